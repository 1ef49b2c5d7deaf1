"""The one exception that users are meant to see.

A `UserError` says in one line what is wrong, where, and how to fix it. Entry points print it without a
traceback and exit with status 2 (`ivr_jax.cli.run`); everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType


class UserError(Exception):
    """Bad input, bad configuration or a missing file: `what`, and the `remedy` the user can apply."""

    def __init__(self, what: str, remedy: str = ""):
        self.what, self.remedy = what, remedy
        super().__init__(f"{what} {remedy}".strip())


def refused_variable(error: BaseException) -> UserError | None:
    """A variable of the environment whose value JAX refuses while it is imported; None for all other errors."""
    if not isinstance(error, ValueError):
        return None
    text = str(error)
    for name, value in os.environ.items():
        named = f"'{name}'" in text or text.endswith(f" {name.lower()}")
        quoted = text.startswith("invalid literal") and text.endswith(repr(value))
        if name.startswith("JAX_") and (named or quoted):
            return UserError(f"JAX does not accept {name}={value}.", "Unset the variable, or correct its value.")
    return None


def explain_refused_variables() -> None:
    """Makes `refused_variable` one line on stderr and status 2, where no command has started to handle errors.

    Most commands import JAX at the top of their module, before `ivr_jax.cli.run` is called.
    """
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        understood = refused_variable(error)
        if understood is None:
            usual(kind, error, traceback)
            return
        print("error:", understood, file=sys.stderr)
        sys.exit(2)

    sys.excepthook = hook
