"""launch/install.py: uv is told of pip's settings, and pip installs whenever uv cannot do the same."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "install.py"
SETTINGS = """\
:env:.cert='/certificates.pem'
:env:.find-links='/wheels'
global.cert='/other.pem'
global.disable-pip-version-check='1'
global.extra-index-url='file:///a/simple https://b/simple'
global.find-links='\\n/one\\n/two'
global.index-url='https://user:pass%27word@c/simple'
install.timeout='60'
wheel.no-binary=':all:'
"""


@pytest.fixture(scope="module")
def install() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Processes:
    """Stands for subprocess.run: `pip config list` prints `listing`; commands that hold a word of `failing` fail."""

    def __init__(self, listing: str, *failing: str):
        self.listing, self.failing = listing, failing
        self.commands: list[list[str]] = []
        self.variables: dict[str, str] = {}

    def __call__(self, command: list[str], env: dict[str, str] | None = None, **_) -> subprocess.CompletedProcess[str]:
        self.commands.append(command[1:])
        self.variables = env or self.variables
        failed = any(word in command for word in self.failing)
        return subprocess.CompletedProcess(command, 3 if failed else 0, self.listing, "what was wrong")


def test_uv_is_told_of_pips_settings_and_the_later_source_wins(install):
    assert install.variables_of(install.settings_of(SETTINGS)) == {
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_DEFAULT_INDEX": "https://user:pass%27word@c/simple",
        "UV_FIND_LINKS": "/wheels",
        "UV_HTTP_TIMEOUT": "60",
        "UV_INDEX": "file:///a/simple https://b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_several_values_are_separated_as_uv_wants_them(install):
    variables = install.variables_of(install.settings_of(SETTINGS.replace(":env:.find-links", "wheel.find-links")))
    assert variables["UV_FIND_LINKS"] == "/one,/two"


def test_uv_installs_and_pip_is_left_alone(install, monkeypatch):
    processes = Processes(SETTINGS)
    monkeypatch.setattr(install.subprocess, "run", processes)
    assert install.main(["-e", ".[test]"]) == 0
    *before, last = processes.commands
    assert last == ["-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, "-e", ".[test]"]
    assert [command[:3] for command in before] == [["-m", "pip", "config"], ["-m", "pip", "install"]]
    assert before[1][-1] == "uv" and processes.variables["UV_FIND_LINKS"] == "/wheels"


@pytest.mark.parametrize(
    ("listing", "failing"),
    [
        (SETTINGS + "global.only-binary=':all:'\n", ()),  # a setting that uv is not told of
        (SETTINGS, ("config",)),
        (SETTINGS, ("--only-binary=:all:",)),
        ("", ("--python",)),
    ],
    ids=["unknown setting", "settings unknown", "no uv for this machine", "uv fails"],
)
def test_pip_installs_where_uv_cannot(install, monkeypatch, listing, failing):
    processes = Processes(listing, *failing)
    monkeypatch.setattr(install.subprocess, "run", processes)
    assert install.main(["-e", ".[test]"]) == 0
    assert processes.commands[-1] == ["-m", "pip", "install", "--quiet", "--no-compile", "-e", ".[test]"]


def test_the_status_is_that_of_pip_when_both_fail(install, monkeypatch):
    monkeypatch.setattr(install.subprocess, "run", Processes("", "install"))
    assert install.main([".[test]"]) == 3
