"""The program's commands as a user types them, run inside this process: what they print, and their exit status.

Beside them what needs a process of its own: its environment, and a script on several devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished command; `stderr` ends with the traceback when it did not handle an exception."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The one line in which bad input ends; asserts that it is one, with status 2, and says how to mend it."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert self.returncode == 2 and "Traceback" not in self.stderr, self
        assert len(lines) == 1 and self.stderr.rstrip().endswith(lines[0]), self
        return lines[0].removeprefix("error: ")


def run(module: str, *arguments: object) -> Done:
    """`python -m ivr_jax.MODULE ARGUMENTS`, without the seconds that a fresh process takes to import everything."""
    name = f"ivr_jax.{module}"
    if importlib.util.find_spec(name).submodule_search_locations is not None:
        name += ".__main__"
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [name, *map(str, arguments)]),
    ):
        try:
            importlib.import_module(name).entry()
        except SystemExit as end:
            status = end.code or 0
        except Exception:  # what the interpreter does with a bug: its traceback, status 1
            traceback.print_exc()
            status = 1
    return Done(status, out.getvalue(), err.getvalue())


def succeed(module: str, *arguments: object) -> str:
    """What the command printed; asserts that it went well."""
    done = run(module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(devices: int = 1, measured: bool = False) -> dict[str, str]:
    """For a process that may import the package and what lies beside the tests, with so many CPU devices.

    Its coverage is not measured unless asked for: most of what such processes run is measured in this one, a killed
    one has nothing to say, and to follow every line costs a quarter of their time.
    """
    here = Path(__file__).resolve().parent
    kept = {name: text for name, text in os.environ.items() if measured or not name.startswith("COVERAGE_PROCESS")}
    if devices > 1:
        kept["XLA_FLAGS"] = kept.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    return {**kept, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}


def on_devices(count: int, script: str, *arguments: object, **variables: str) -> list[str]:
    """The lines that a Python script printed in a process with `count` CPU devices; asserts that it went well."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment(count) | variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
