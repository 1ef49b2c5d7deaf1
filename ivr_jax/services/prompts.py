"""The prompts: one readable file each in `ivr_jax/services/prompts/`, with a version in its first line.

They are Jinja2 templates; what a prompt may use is what its caller passes, nothing else.  Change a file's version with
its text: the versions are stored with every sample.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jinja2

from ivr_jax.errors import UserError

FOLDER = Path(__file__).resolve().parent / "prompts"
_VERSION = re.compile(r"\{# version: (\d+) #\}\n")


class Prompts:
    """The prompts in a folder, all read at once.

    Args:
      folder: has a file NAME.txt for every one that `FOLDER` has, with the same values in braces; "" is `FOLDER`.

    Raises:
      UserError: a file is missing, cannot be read, is no template, or names no version.
    """

    def __init__(self, folder: str | os.PathLike[str] = ""):
        self.folder = Path(folder).expanduser() if folder else FOLDER
        self._environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        self._templates, self._versions = {}, {}
        for name in sorted(path.stem for path in FOLDER.glob("*.txt")):
            self._versions[name], self._templates[name] = self._load(self.folder / f"{name}.txt")

    def render(self, name: str, **values: Any) -> str:
        """The prompt `name` with its values filled in.  Raises UserError when it asks for others."""
        try:
            return self._templates[name].render(**values).strip()
        except jinja2.TemplateError as error:
            raise UserError(f"{self.folder / name}.txt cannot be filled in: {error}.",
                            f"Use what the file of that name in {FOLDER} uses.") from error

    def versions(self) -> dict[str, int]:
        """Name -> version of every prompt."""
        return dict(self._versions)

    def _load(self, file: Path) -> tuple[int, jinja2.Template]:
        try:
            text = file.read_text(encoding="utf-8")
            match = _VERSION.match(text)
            if match is None:
                raise UserError(f"{file} names no version.", "Begin it with the line {# version: 1 #}.")
            return int(match.group(1)), self._environment.from_string(text[match.end() :])
        except (OSError, ValueError) as error:
            raise UserError(f"the prompt {file} cannot be read: {error}.", f"Start from a copy of {FOLDER}.") from error
        except jinja2.TemplateError as error:
            raise UserError(f"the prompt {file} is no template: {error}.", "Correct it.") from error
