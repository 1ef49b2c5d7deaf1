"""What is shown of a sequence: every token with id, text, segment and loss, and the images that its codes stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.checkpoints.system import System
from ivr_jax.models import backbone
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar, GrammarState, Tables
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.sampling import slots
from ivr_jax.sampling.logits_processors import MASKED, SamplingOptions, log_probabilities

PROMPT = "prompt"
SPECIAL = ("pad", "bos", "eos", "bss", "boi", "img", "eoi", "eol")  # tokens that stand for no text


@dataclasses.dataclass(frozen=True)
class Token:
    """One token: `segment` "prompt", "G1", "E1", "R1", "S2", ... or "" for what belongs to none.

    `log_prob` and `entropy` (nats, under the grammar) and `advantage` are None where they are not known.
    """

    position: int
    id: int
    text: str
    segment: str
    loss: bool
    log_prob: float | None = None
    entropy: float | None = None
    advantage: float | None = None


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """An image of the sequence: its tokens [start, end), and pixels uint8 [height, width, 3] decoded from its codes."""

    name: str
    start: int
    end: int
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A sequence as it is shown; `facts` are lines such as mode, length or reward."""

    title: str
    facts: Mapping[str, str]
    tokens: tuple[Token, ...]
    images: tuple[ShownImage, ...]


class Figures:
    """What is known of answer tokens beside their ids: arrays [A], or None.

    Attributes:
      log_prob, entropy: float; advantage: float.
    """

    def __init__(self, log_prob: Any = None, entropy: Any = None, advantage: Any = None):
        self.log_prob, self.entropy, self.advantage = log_prob, entropy, advantage

    def with_missing(self, other: Figures) -> Figures:
        """These, and those of `other` that are not known here."""
        names = ("log_prob", "entropy", "advantage")
        return Figures(*(getattr(other if getattr(self, name) is None else self, name) for name in names))

    def at(self, index: int) -> dict[str, float | None]:
        """Of answer token `index`; none before the answer."""
        names = ("log_prob", "entropy", "advantage")
        return {n: None if index < 0 or getattr(self, n) is None else float(getattr(self, n)[index]) for n in names}


def token_text(tokenizer: TextTokenizer, token: int) -> str:
    """What a token says: its text, the name of a special one, or "v" and the code of a visual one."""
    vocab = tokenizer.vocab
    if token >= vocab.visual_start:
        return f"v{token - vocab.visual_start}"
    for name in SPECIAL:
        if token == getattr(vocab, name):
            return f"<{name.upper()}>"
    return tokenizer.decode([token])


def inspected(
    system: System,
    title: str,
    facts: Mapping[str, str],
    tokens: np.ndarray,
    answer_start: int,
    segments: Sequence[codec.Segment],
    loss: np.ndarray,
    figures: Figures | None = None,
) -> Inspected:
    """The view of a sequence.

    Args:
      tokens: int [T], prompt and answer; answer_start: where the answer begins.
      segments: of the answer; loss: bool [T].
    """
    names = np.full(len(tokens), "", object)
    names[:answer_start] = PROMPT
    for segment in segments:
        names[answer_start + segment.start : answer_start + segment.end] = segment.name
    figures = figures or Figures()
    rows = tuple(
        Token(i, int(token), token_text(system.tokenizer, int(token)), str(names[i]), bool(loss[i]),
              **figures.at(i - answer_start))
        for i, token in enumerate(tokens)
    )  # fmt: skip
    return Inspected(title, facts, rows, images_of(system, tokens, answer_start, segments))


def images_of(
    system: System, tokens: np.ndarray, answer_start: int, segments: Sequence[codec.Segment]
) -> tuple[ShownImage, ...]:
    """Every complete image of a sequence, decoded together."""
    vocab, blocks = system.tokenizer.vocab, []
    ends = np.flatnonzero(tokens == vocab.eoi)
    for start in np.flatnonzero(tokens == vocab.boi):
        following = ends[ends > start]
        if len(following):
            blocks.append((int(start), int(following[0]) + 1))
    pixels = system.image_codec.decode([codec.decode_image(system.tokenizer, tokens[a:b], a) for a, b in blocks])
    drawn = {answer_start + s.start: s.name for s in segments if s.part == "G"}
    found, sources = [], 0
    for (start, end), image in zip(blocks, pixels, strict=True):
        if start < answer_start:
            sources += 1
        name = f"source {sources}" if start < answer_start else _name_at(drawn, start)
        found.append(ShownImage(name, start, end, image))
    return tuple(found)


def _name_at(names: Mapping[int, str], start: int) -> str:
    """The last name at or before a position: the tokens that lead into an image belong to its segment."""
    before = [position for position in names if position <= start]
    return names[max(before)] if before else "image"


# -- under the model --------------------------------------------------------------------------------------------------


def model_figures(
    system: System, grammar: Grammar, tokens: np.ndarray, answer_start: int, size: tuple[int, int]
) -> Figures:
    """Log-probability and entropy of each answer token, the rest being given (teacher forcing, under the grammar).

    Args:
      tokens: int [T], prompt and answer; size: forced rows and columns of images, (0, 0) for any.
    """
    answer = np.asarray(tokens[answer_start:], np.int32)
    state = GrammarState(*(np.asarray(x) for x in grammar.initial(np.full(1, size[0]), np.full(1, size[1]))))
    rows, _ = slots.replay(grammar.tables, state, answer[None])
    length = -(-len(tokens) // 64) * 64  # few shapes, few compilations
    padded = np.full((1, length), system.tokenizer.vocab.pad, np.int32)
    padded[0, : len(tokens)] = tokens
    where = np.arange(answer_start - 1, len(tokens) - 1)
    log_prob, entropy = _figures(system.config, system.params, padded, where, answer, rows[0], grammar.tables)
    return Figures(np.asarray(log_prob), np.asarray(entropy))


def _figures(config: Any, params: Any, tokens: Any, where: Any, answer: Any, rows: Any, tables: Tables) -> tuple:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = backbone.apply(config, params, jnp.asarray(tokens), positions)

    def one(hidden: jax.Array, row: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = backbone.logits(config, params, hidden[None, None])[0, 0]
        log_probs = log_probabilities(logits[None], tables, row[None], SamplingOptions())[0]
        legal = log_probs > MASKED / 2
        entropy = -jnp.where(legal, jnp.exp(log_probs) * log_probs, 0.0).sum()
        return log_probs[token], entropy

    tables = Tables(*map(jnp.asarray, tables))  # the whole vocabulary for one position at a time
    return jax.lax.map(lambda x: one(*x), (hidden[0, jnp.asarray(where)], jnp.asarray(rows), jnp.asarray(answer)))
