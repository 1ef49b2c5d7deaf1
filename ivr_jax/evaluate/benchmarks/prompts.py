"""The words of a question: a template of `prompts/` with its fields filled in.

Templates are ours, not the authors': a figure that was judged with them carries their version and hash.  A folder of
templates of one's own (the authors' wording, say) replaces them file by file.
"""

from __future__ import annotations

import functools
import hashlib
import string
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Question

FOLDER = Path(__file__).parent / "prompts"


def render(question: Question, own: Path | None = None) -> str:
    """The prompt of a question; `own` is searched before the installed templates."""
    text = _template(question.template, own)
    try:
        return string.Template(text).substitute(question.fields)
    except (KeyError, ValueError) as error:
        known = ", ".join(f"${name}" for name in question.fields) or "none"
        raise UserError(f"the judge's prompt {question.template!r} has a field that is not known ({error}).",
                        f"It may use {known}; write $$ for a dollar sign.") from None


def digest(benchmark: Benchmark, own: Path | None = None) -> str:
    """SHA-256 of every template that the benchmark can use, 16 hexadecimal characters."""
    content = hashlib.sha256()
    for path in sorted(FOLDER.glob(f"{benchmark.name}_*.txt")):
        content.update(path.stem.encode() + b"\0" + _template(path.stem, own).encode() + b"\0")
    return content.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _template(name: str, own: Path | None) -> str:
    for folder in (own, FOLDER):
        path = folder / f"{name}.txt" if folder else None
        if path is not None and path.is_file():
            return path.read_text(encoding="utf-8").strip()
    raise UserError(f"there is no prompt {name!r} for the judge.", f"The installed ones are in {FOLDER}.")
