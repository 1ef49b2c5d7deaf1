"""The program's commands as a user types them, run inside this process: what they print, and their exit status.

Beside them: a script in a process of its own, which has several devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
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
    if module == "construct":
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


def on_devices(count: int, script: str, *arguments: object, **environment: str) -> list[str]:
    """The lines that a Python script printed in a process with `count` CPU devices; asserts that it went well.

    It may import the package and what lies beside the tests.  Its coverage is not measured: the code that such scripts
    call is measured on one device, and following every line costs a fifth of their time.
    """
    here = Path(__file__).resolve().parent
    variables = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
