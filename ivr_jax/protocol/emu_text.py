"""Emu3.5's text tokenizer: byte-pair ranks as Qwen's, and special ids for image blocks and codes.

A folder holds two files, named as the public repository names them:

    emu3.tiktoken             one token a line: its bytes in base64, and its rank, which is its id, 0 ... n - 1
    emu3_vision_tokens.txt    one special token a line: `<|image token|>`, `<|image start|>`, `<|image end|>`, then
                              `<|visual token 000000|>`, `<|visual token 000001|>`, ... one for each code

With n ranks and v codes (released: n = 151,643, v = 131,072) the ids are

    0 ... n - 1        text              n + 3 + i         `<|extra_i|>`, i = 0 ... 204
    n                  `<|endoftext|>`   n + 208           IMG, then BOI, EOI
    n + 1, n + 2       `<|im_start|>`, `<|im_end|>`        n + 211 + c       code c

Any n and v make a tokenizer, so a small one for tests is the same two files with fewer lines.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from ivr_jax.errors import UserError
from ivr_jax.protocol import vocabulary

RANKS_FILE, VISION_FILE = "emu3.tiktoken", "emu3_vision_tokens.txt"
# Qwen's pattern: contractions; letters with at most one other character before; one digit; punctuation; white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEFORE_VISION = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(vocabulary.EXTRAS)),
)  # fmt: skip
BLOCK = ("<|image token|>", "<|image start|>", "<|image end|>")
_LONGEST = 100_000  # characters encoded at a time: a far longer text without a break overflows tiktoken's stack
_REMEDY = "Copy the tokenizer folder of the released checkpoint again."


class EmuTokenizer:
    """A `TextTokenizer` over byte-pair ranks; markers are ordinary text.

    `encode` treats every text as ordinary: `<|image start|>` in it becomes the ids of its characters, never id n + 209.
    """

    def __init__(self, ranks: Sequence[bytes], codes: int):
        """`ranks`: the bytes of text ids 0, 1, ...; all 256 single bytes are among them.  `codes`: visual tokens."""
        self._bytes = tuple(ranks)
        self.vocab = vocabulary.emu35(len(self._bytes), codes)
        self._encoding = tiktoken.Encoding(
            "emu3", pat_str=SPLIT, mergeable_ranks={token: i for i, token in enumerate(self._bytes)}, special_tokens={}
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> EmuTokenizer:
        """From the two files in `folder`.  Raises UserError naming file and line for anything that is not as above."""
        folder = Path(folder)
        return cls(read_ranks(folder / RANKS_FILE), read_vision_tokens(folder / VISION_FILE))

    def encode(self, text: str) -> list[int]:
        text, ids = unicodedata.normalize("NFC", text), []
        for piece in _pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, map(int, ids))).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """What an id says: a text token's bytes, or a special token's name as in the released files."""
        if token < self.vocab.text_size:
            return self._bytes[token]
        if token < self.vocab.visual_start:
            return (BEFORE_VISION + BLOCK)[token - self.vocab.text_size].encode()
        return _visual_name(token - self.vocab.visual_start).encode()

    @functools.cache  # noqa: B019  a handful of strings, for as long as the tokenizer lives
    def marker(self, text: str) -> tuple[int, ...]:
        return tuple(self.encode(text))

    def is_blank(self, token: int) -> bool:
        return not self.token_bytes(token).strip(b" \t\n\r\f\v")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when any id changes its meaning: checkpoints and tokenised data carry it."""
        digest = hashlib.sha256(b"emu3 %d" % self.vocab.visual_size)
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:16]


def _pieces(text: str) -> list[str]:
    """`text` in pieces of at most `_LONGEST` characters, cut after a line's end where there is one."""
    if len(text) <= _LONGEST:
        return [text]
    pieces, start = [], 0
    while start < len(text):
        end = min(start + _LONGEST, len(text))
        newline = text.rfind("\n", start, end)
        # Before a letter: "\n\n" and "\n  x" are one token or two, depending on what follows.
        if end < len(text) and newline > start and text[newline + 1].isalpha():
            end = newline + 1
        pieces.append(text[start:end])
        start = end
    return pieces


def _visual_name(code: int) -> str:
    return f"<|visual token {code:06d}|>"


def read_ranks(path: Path) -> list[bytes]:
    """The bytes of text ids 0, 1, ... from a ranks file."""
    ranks: dict[int, bytes] = {}
    lines: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        where, fields = f"{path}, line {number}", line.split()
        try:
            encoded, rank = fields[0], int(fields[1])
            token = base64.b64decode(encoded, validate=True)
        except (IndexError, ValueError, binascii.Error):
            raise UserError(f"{where} is not a token in base64 and its rank: {_shown(line)}.", _REMEDY) from None
        if len(fields) != 2 or not token or rank < 0:
            raise UserError(f"{where} is not a token in base64 and its rank: {_shown(line)}.", _REMEDY)
        if token in lines:
            raise UserError(f"{where} repeats the token of line {lines[token]}: {_shown(line)}.", _REMEDY)
        if rank in ranks:
            raise UserError(f"{where} repeats rank {rank}, the rank of line {lines[ranks[rank]]}.", _REMEDY)
        ranks[rank], lines[token] = token, number
    gap = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if gap is not None or not ranks:
        raise UserError(f"{path} has {len(ranks)} tokens, but none of rank {gap or 0}.", _REMEDY)
    missing = [byte for byte in range(256) if bytes((byte,)) not in lines]
    if missing:
        raise UserError(f"{path} has no token for the single byte {missing[0]}, so not every text has ids.", _REMEDY)
    return [ranks[rank] for rank in range(len(ranks))]


def read_vision_tokens(path: Path) -> int:
    """The number of codes in a list of special tokens, which must be in order and without a gap."""
    text = _read(path).decode(errors="replace")
    names = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    first: dict[str, int] = {}
    for index, (number, name) in enumerate(names):
        wanted = BLOCK[index] if index < len(BLOCK) else _visual_name(index - len(BLOCK))
        if name in first:
            raise UserError(f"{path}, line {number} repeats line {first[name]}: {_shown(name)}.", _REMEDY)
        if name != wanted:
            raise UserError(f"{path}, line {number} is {_shown(name)} where {wanted!r} should stand.", _REMEDY)
        first[name] = number
    if len(names) <= len(BLOCK):
        raise UserError(f"{path} names {len(names)} special tokens, and no visual one.", _REMEDY)
    return len(names) - len(BLOCK)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the tokenizer file {str(path)!r} cannot be read ({error.strerror or error}).",
            f"A tokenizer folder holds {RANKS_FILE} and {VISION_FILE}.",
        ) from error


def _shown(line: str | bytes) -> str:
    return repr(line if len(line) <= 60 else line[:60])
