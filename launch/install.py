"""`pip install ARGUMENTS` into this interpreter's environment, by uv where it can do that.

    .venv/bin/python launch/install.py -e '.[test]'

uv takes less time than pip and installs the same versions.  It reads none of pip's settings (files and `PIP_*`
variables), so it is told of them.  pip itself installs when a setting has no counterpart in uv, when uv cannot be had,
and when it fails, for instance because it does not know one of the arguments.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

PIP = [sys.executable, "-m", "pip"]
SECTIONS = ("global", "install", ":env:")  # the later ones replace the earlier ones
SAME_RESULT = {"cache-dir", "disable-pip-version-check", "no-color", "no-compile", "no-input", "progress-bar", "quiet",
               "root-user-action"}  # fmt: skip
VARIABLES = {  # pip's setting -> uv's variable, and what stands between several values
    "cert": ("SSL_CERT_FILE", None),
    "constraint": ("UV_CONSTRAINT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", None),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_DEFAULT_INDEX", None),
    "timeout": ("UV_HTTP_TIMEOUT", None),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}


def settings_of(listing: str) -> dict[str, str]:
    """pip's settings that concern an installation, by name, from what `pip config list` prints."""
    by_section = {section: {} for section in SECTIONS}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in by_section:
            by_section[section][name] = ast.literal_eval(value)
    return {name: value for values in by_section.values() for name, value in values.items()}


def variables_of(settings: dict[str, str]) -> dict[str, str] | None:
    """The variables that tell uv of pip's settings; None when there is one that uv cannot follow."""
    unknown = settings.keys() - VARIABLES.keys() - SAME_RESULT
    if unknown:
        return None
    # pip takes the best version of all indexes; uv by default that of the first index that has the package.
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for name in settings.keys() & VARIABLES.keys():
        variable, separator = VARIABLES[name]
        variables[variable] = settings[name] if separator is None else separator.join(settings[name].split())
    return variables


def install_with_uv(arguments: list[str]) -> bool:
    """Whether uv installed everything."""
    listing = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True)
    variables = variables_of(settings_of(listing.stdout))
    if listing.returncode or variables is None:
        return False
    get_uv = [*PIP, "install", "--quiet", "--no-compile", "--only-binary=:all:", "uv"]  # to build it takes minutes
    if subprocess.run(get_uv, capture_output=True).returncode:
        return False
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        print(f"pip installs, because uv did not:\n{done.stderr.rstrip()}", file=sys.stderr)
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    """The exit status of the installation."""
    if install_with_uv(arguments):
        return 0
    # Modules are compiled when they are first imported, which most of them never are.
    return subprocess.run([*PIP, "install", "--quiet", "--no-compile", *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
