"""Text <-> token ids.

`TextTokenizer` is what the rest of the protocol needs.  `PhraseTokenizer` is the micro one: greedy longest match over
a list of phrases, and UTF-8 bytes for everything else, so that every text has ids and decoding gives it back exactly.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Protocol

from ivr_jax.protocol import markers, vocabulary


class TextTokenizer(Protocol):
    """Encodes text.  `encode` never yields a special id, whatever the text says."""

    vocab: vocabulary.Vocabulary

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides what an id means."""

    def encode(self, text: str) -> list[int]:
        """Ordinary text -> ids in [0, text_size)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids of text and markers -> text; bytes that are not UTF-8 become U+FFFD."""

    def marker(self, text: str) -> tuple[int, ...]:
        """Ids of one fixed string of `markers`."""

    def is_blank(self, token: int) -> bool:
        """True if the token is nothing but ASCII white space."""


class PhraseTokenizer:
    """Ids 0-255 are bytes, then one id a phrase, then one id an answer marker; a `TextTokenizer`.

    Example: with phrases ("Put a", " red", " circle"), "Put a red circle!" is 256 257 258 33.
    """

    def __init__(self, phrases: Sequence[str], visual_size: int):
        # A full stop before " ASSISTANT: " is its own phrase: else ". " would be cut off and leave bytes behind.
        template = (*markers.SYSTEM.values(), markers.SYSTEM_UNCONDITIONAL, markers.ASSISTANT, f".{markers.ASSISTANT}")
        self.phrases = tuple(dict.fromkeys((*phrases, *template)))
        self._ids = {phrase: 256 + i for i, phrase in enumerate(self.phrases)}
        text_size = 256 + len(self.phrases)
        self._markers = {text: text_size + i for i, text in enumerate(markers.ANSWER_MARKERS)}
        self._bytes = {i: phrase.encode() for phrase, i in (self._ids | self._markers).items()}
        self._pattern = re.compile(
            "|".join(re.escape(p) for p in sorted(self.phrases, key=len, reverse=True)) + "|.", re.DOTALL
        )
        self.vocab = vocabulary.micro(text_size, len(self._markers), visual_size)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._pattern.findall(text):
            phrase = self._ids.get(piece)
            ids.extend(piece.encode() if phrase is None else (phrase,))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(bytes((i,)) if i < 256 else self._bytes[i] for i in map(int, ids)).decode(errors="replace")

    def marker(self, text: str) -> tuple[int, ...]:
        return (self._markers[text],) if text in self._markers else tuple(self.encode(text))

    def is_blank(self, token: int) -> bool:
        text = bytes((token,)) if token < 256 else self._bytes[token]
        return not text.strip(b" \t\n\r\f\v")

    @property
    def fingerprint(self) -> str:
        """Changes when any id changes its meaning: checkpoints and tokenised data carry it."""
        return hashlib.sha256(json.dumps([self.phrases, markers.ANSWER_MARKERS, self.vocab.size]).encode()).hexdigest()[
            :16
        ]
