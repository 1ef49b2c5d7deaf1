"""The one exception that users are meant to see.

A `UserError` says in one line what is wrong, where, and how to fix it. Entry points print it without a
traceback and exit with status 2 (`ivr_jax.cli.run`); everything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input, bad configuration or a missing file: `what`, and the `remedy` the user can apply."""

    def __init__(self, what: str, remedy: str = ""):
        self.what, self.remedy = what, remedy
        super().__init__(f"{what} {remedy}".strip())
