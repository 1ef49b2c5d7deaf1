"""The sampled distribution, defined once.

The sampler samples from `log_probabilities`, and the trainer computes them again: the chain of processors that
`SamplingOptions.chain` names (guidance, then the grammar mask, then temperature, then top-k and top-p per modality,
each left out when it is switched off), and a log-softmax.  With the default options it is the bare policy: a
log-softmax over the *legal* ids at temperature 1.

A processor is a small frozen dataclass, called with scores float32 [..., V] and the `Context` of their positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from ivr_jax.config import Count, NotNegative, Range, Section
from ivr_jax.protocol.grammar import VISUAL, Tables

MASKED = -1e30  # finite, so that a masked id times a zero weight stays zero in gradients


class Context(NamedTuple):
    """What a processor may know of its positions.

    legal bool [..., V]: ids that the grammar allows.
    visual bool [..., 1]: where a visual token comes next.
    uncond_logits: float32 [..., V] of the unconditional passes, as many as `SamplingOptions.passes`.
    """

    legal: jax.Array
    visual: jax.Array
    uncond_logits: tuple[jax.Array, ...]


Processor = Callable[[jax.Array, Context], jax.Array]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of visual tokens, on log-softmax scores (Emu3.5).

    c has the whole prompt, n the references alone, a neither.  Two-way: `n + text (c - n)`; three-way, when `image` is
    not None: `a + image (n - a) + text (c - n)`.

    The prompts of the further passes come from `rollout.encode_prompts`; they run in `decode_loop.run` when answers are
    sampled, and in `training.policy_logprobs` when they are learnt from.
    """

    text: float
    image: float | None = None

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        given, *uncond = (jax.nn.log_softmax(x) for x in (scores, *context.uncond_logits))
        start = uncond[0] if self.image is None else uncond[1] + self.image * (uncond[0] - uncond[1])
        return jnp.where(context.visual, start + self.text * (given - uncond[0]), scores)


@dataclasses.dataclass(frozen=True)
class GrammarMask:
    """Only what the grammar allows here: text, digits, a grid, a forced EOL or EOI."""

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        return jnp.where(context.legal, scores, MASKED)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divides scores; 0 leaves the likeliest id alone."""

    text: float
    image: float

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        scores = scores / jnp.where(context.visual, self.image or 1.0, self.text or 1.0)
        if self.text and self.image:
            return scores
        ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
        likeliest = ids == jnp.argmax(scores, axis=-1, keepdims=True)
        greedy = jnp.where(context.visual, self.image == 0, self.text == 0)
        return jnp.where(greedy & ~likeliest, MASKED, scores)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k likeliest ids of a position (and what ties with the last of them); 0 keeps all."""

    text: int
    image: int

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        largest = min(max(self.text, self.image), scores.shape[-1])
        ordered, _ = jax.lax.top_k(scores, largest)  # no sort of the whole vocabulary
        limit = jnp.where(context.visual, self.image, self.text)
        threshold = jnp.take_along_axis(ordered, jnp.clip(limit, 1, largest) - 1, axis=-1)
        keeps_all = (limit == 0) | (limit > largest)
        return jnp.where(keeps_all | (scores >= threshold), scores, MASKED)


@dataclasses.dataclass(frozen=True)
class TopP:
    """Keeps the smallest set of likeliest ids that holds this much probability (with ties); 1 keeps all."""

    text: float
    image: float

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        scores = jax.nn.log_softmax(scores)
        threshold = _nucleus_threshold(scores, jnp.where(context.visual, self.image, self.text))
        return jnp.where(scores >= threshold, scores, MASKED)


def _nucleus_threshold(log_probs: jax.Array, mass: jax.Array) -> jax.Array:
    """float32 [..., 1]: an id belongs to the nucleus where `log_probs` [..., V] is at least this.

    An id belongs to it where the ids that are likelier hold less than `mass` [..., 1].  Their probability falls as the
    threshold rises, so 31 bisections over the bits of a float32 find the exact threshold; sorting would cost more.
    """
    rank = jax.lax.bitcast_convert_type(jnp.maximum(-log_probs, 0.0), jnp.int32)  # of floats >= 0 bits keep the order
    probs = jnp.exp(log_probs)

    def bisect(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the ids of rank below `low` hold less than `mass`; those of rank below `high` may not
        middle = low + (high - low + 1) // 2
        held = jnp.where(rank < middle, probs, 0.0).sum(-1, keepdims=True)
        return jnp.where(held < mass, middle, low), jnp.where(held < mass, high, middle - 1)

    largest = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    start = jnp.zeros_like(mass, jnp.int32), jnp.full_like(mass, largest, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, bisect, start)
    return -jax.lax.bitcast_convert_type(low, jnp.float32)


@dataclasses.dataclass(frozen=True)
class SamplingOptions(Section, name="sampling"):
    """How ids are sampled.  A config may leave out the options that are None here.

    Attributes:
      temperature: 0 takes the likeliest id.
      text_top_k, image_top_k: keep the k likeliest ids of a text or visual position; 0 keeps all.
      text_top_p, image_top_p: keep the smallest set of ids that holds this much probability; 1 keeps all.
      guidance: classifier-free guidance on visual tokens, see `Guidance.text`; 1 is off.
      image_temperature: of visual tokens; None: `temperature`.
      image_guidance: guidance by the references, see `Guidance.image`; None: the two-way form.
    """

    temperature: NotNegative = 1.0
    text_top_k: Count = 0
    text_top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    image_top_k: Count = 0
    image_top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    guidance: NotNegative = 1.0
    image_temperature: NotNegative | None = None
    image_guidance: NotNegative | None = None

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leaves ids out, so that the sampler has to record which."""
        return bool(self.text_top_k or self.image_top_k) or min(self.text_top_p, self.image_top_p) < 1

    @property
    def passes(self) -> int:
        """Unconditional passes that guidance needs: 0, 1 (references alone) or 2 (references alone; nothing)."""
        if self.image_guidance not in (None, 1.0):
            return 2
        return int(self.guidance != 1.0)

    @property
    def greedy(self) -> bool:
        """Whether every id is the likeliest one."""
        return self.temperature == 0 and self.image_temperature in (None, 0)

    @property
    def chain(self) -> tuple[Processor, ...]:
        """The processors that act, in order."""
        temperature = Temperature(
            self.temperature, self.temperature if self.image_temperature is None else self.image_temperature
        )
        every: tuple[tuple[bool, Processor], ...] = (
            (self.passes > 0, Guidance(self.guidance, self.image_guidance if self.passes == 2 else None)),
            (True, GrammarMask()),
            (temperature != Temperature(1.0, 1.0), temperature),
            (self.text_top_k > 0 or self.image_top_k > 0, TopK(self.text_top_k, self.image_top_k)),
            (self.text_top_p < 1 or self.image_top_p < 1, TopP(self.text_top_p, self.image_top_p)),
        )
        return tuple(processor for acts, processor in every if acts)


def legal_ids(tables: Tables, rows: jax.Array) -> jax.Array:
    """Rows of the legality table int [...] -> bool [..., V]."""
    return jnp.asarray(tables.legal)[rows][..., jnp.asarray(tables.class_of)]


def log_probabilities(
    logits: jax.Array,
    tables: Tables,
    rows: jax.Array,
    options: SamplingOptions,
    uncond_logits: tuple[jax.Array, ...] = (),
    kept_mask: jax.Array | None = None,
) -> jax.Array:
    """float32 [..., V] log-probabilities of the next id.

    Args:
      logits: float [..., V] of the conditional pass.
      rows: int [...], `grammar.legal_row` of each position.
      uncond_logits: float [..., V] of the unconditional passes, `options.passes` of them: with the references alone
        and, for the three-way form, with nothing.
      kept_mask: uint8 [..., ceil(V / 8)], what `pack_kept` made when the ids were sampled: replaces top-k and top-p, so
        that a model that has changed since is compared over the same set of ids.
    """
    if len(uncond_logits) != options.passes:
        raise ValueError(f"guidance needs logits of {options.passes} unconditional passes, not {len(uncond_logits)}")
    visual = jnp.asarray(tables.legal)[rows][..., VISUAL, None]
    context = Context(legal_ids(tables, rows), visual, tuple(x.astype(jnp.float32) for x in uncond_logits))
    scores = logits.astype(jnp.float32)
    chain = options.chain
    if kept_mask is not None:
        kept = jnp.unpackbits(kept_mask, axis=-1, count=scores.shape[-1]).astype(bool)
        context = context._replace(legal=context.legal & kept)
        chain = tuple(processor for processor in chain if not isinstance(processor, (TopK, TopP)))
    for processor in chain:
        scores = processor(scores, context)
    return jax.nn.log_softmax(scores)


def pack_kept(log_probs: jax.Array) -> jax.Array:
    """uint8 [..., ceil(V / 8)]: one bit an id, whether `log_probabilities` [..., V] left it any probability."""
    return jnp.packbits(log_probs > MASKED / 2, axis=-1)


def sample_ids(log_probs: jax.Array, keys: jax.Array, options: SamplingOptions) -> jax.Array:
    """One id a row: int32 [B] from float [B, V]; `keys` [B] PRNG keys, one a row."""
    if options.greedy:
        return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, log_probs).astype(jnp.int32)
