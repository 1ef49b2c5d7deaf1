"""A text tokenizer in Emu3.5's file format, small enough for tests, and the released one as far as it can be had."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path

CORPUS = (
    "You are a helpful assistant for x2i task. USER: draw a red circle ASSISTANT: <Evaluate> Instruction: pass: "
    "Consistency: fail: Quality: Knowledge: </Evaluate> <Failure Analysis> </Failure Analysis> <Improvement Plan> "
    "</Improvement Plan> <Step 2> </Step 3> the image the cat and the cup make it dusk keep all else"
)


def merged(count: int) -> list[bytes]:
    """All single bytes, then the `count` most frequent merges of pairs in `CORPUS`, words kept apart."""
    words = [[bytes((byte,)) for byte in word] for word in CORPUS.encode().replace(b" ", b"\0 ").split(b"\0")]
    ranks = [bytes((byte,)) for byte in range(256)]
    while len(ranks) < 256 + count:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(left + right)
        for word in words:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    return ranks


def rank_lines(ranks: list[bytes]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]


def vision_lines(codes: int) -> list[str]:
    block = ["<|image token|>", "<|image start|>", "<|image end|>"]
    return [*block, *(f"<|visual token {code:0>6d}|>" for code in range(codes))]


def write_folder(folder: Path, codes: int = 8, merges: int = 60) -> Path:
    """Makes `folder` with the two files of a tokenizer: 256 + `merges` text ids and `codes` visual tokens."""
    folder.mkdir(parents=True)
    (folder / "emu3.tiktoken").write_text("\n".join(rank_lines(merged(merges))) + "\n")
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(vision_lines(codes)) + "\n")
    return folder
