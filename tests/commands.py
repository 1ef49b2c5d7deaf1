"""The program's commands as a user types them, run inside this process: what they print, and their exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import sys
import traceback
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
