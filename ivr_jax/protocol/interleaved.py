"""Answers of texts and images in any order: what Emu3.5 says to a story or a how-to (grammar mode "interleaved").

Example, with `[..]` for an image block and T for the marks that enclose a thought (`<|extra_60|>` ... `<|extra_61|>`
over the whole answer, `<|extra_50|>` ... `<|extra_51|>` over the next image):

    T plan T  First, knead the dough.  T a bowl from above T [..]  Then let it rest.  [..] ESS EOS
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer

TEXT, IMAGE, GLOBAL_THOUGHT, IMAGE_THOUGHT = "text", "image", "global_thought", "image_thought"
_THOUGHTS = ((GLOBAL_THOUGHT, "<|extra_60|>", "<|extra_61|>"), (IMAGE_THOUGHT, "<|extra_50|>", "<|extra_51|>"))
_PIECES = re.compile(
    "|".join(f"{re.escape(begin)}(?P<{kind}>.*?){re.escape(end)}" for kind, begin, end in _THOUGHTS), re.DOTALL
)
_SILENT = re.compile(r"<\|extra_101\|>")  # end of the answer; says nothing


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of an answer: `kind` text, image, global_thought or image_thought, over tokens [start, end).

    `text` is "" for an image; `codes` int32 [rows, columns] are an image's, else None.
    """

    kind: str
    text: str
    codes: np.ndarray | None
    start: int
    end: int


def parse_interleaved(tokenizer: TextTokenizer, tokens: Sequence[int] | np.ndarray) -> tuple[tuple[Part, ...], bool]:
    """The parts of an answer, and whether it came to its end; an image that was cut off is left out.

    Args:
      tokens: int [T], up to and including EOS if there is one.

    Raises UserError with position and reason for an image block that does not parse.
    """
    vocab, tokens = tokenizer.vocab, np.asarray(tokens)
    ends = np.flatnonzero(tokens == vocab.eos)
    finished = len(ends) > 0
    stop = int(ends[0]) if finished else len(tokens)
    parts, at = [], 0
    while at < stop:
        if tokens[at] == vocab.boi:
            closing = np.flatnonzero(tokens[at:stop] == vocab.eoi)
            if not len(closing) and not finished:
                break
            end = at + int(closing[0]) + 1 if len(closing) else stop
            parts.append(Part(IMAGE, "", codec.decode_image(tokenizer, tokens[at:end], at), at, end))
        else:
            begins = np.flatnonzero(tokens[at:stop] == vocab.boi)
            end = at + int(begins[0]) if len(begins) else stop
            parts += _texts(_SILENT.sub("", tokenizer.decode(tokens[at:end])), at, end)
        at = end
    return tuple(parts), finished


def _texts(text: str, start: int, end: int) -> list[Part]:
    """Texts and thoughts between two images, without those that are blank; all over the same tokens."""
    found, at = [], 0
    for match in _PIECES.finditer(text):
        found += [(TEXT, text[at : match.start()]), (match.lastgroup, match[match.lastgroup])]
        at = match.end()
    found.append((TEXT, text[at:]))
    return [Part(kind, said, None, start, end) for kind, said in found if said.strip()]
