"""The prompts: one readable file each in `ivr_jax/construct/prompts/`, with a version in its first line.

They are Jinja2 templates; what a prompt may use is what its caller passes, nothing else.  Change a file's version with
its text: the versions are stored with every sample.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).resolve().parent.parent / "prompts"
_VERSION = re.compile(r"\{# version: (\d+) #\}\n")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False)


@functools.cache
def _load(name: str) -> tuple[int, jinja2.Template]:
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    match = _VERSION.match(text)
    if match is None:
        raise ValueError(f"the prompt {name} names no version in its first line")
    return int(match.group(1)), _environment().from_string(text[match.end() :])


def render(name: str, **values: Any) -> str:
    """The prompt `name` with its values filled in."""
    return _load(name)[1].render(**values).strip()


def versions() -> dict[str, int]:
    """Name -> version of every prompt."""
    return {path.stem: _load(path.stem)[0] for path in sorted(FOLDER.glob("*.txt"))}
