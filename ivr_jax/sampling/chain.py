"""The sampled distribution, defined once.

`log_probabilities` is what the sampler draws from and what the trainer replays: guidance, then the grammar mask, then
temperature, then top-k and top-p per modality, each skipped when it is switched off.  With the default options it is
the bare policy: a log-softmax over the *legal* ids at temperature 1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import VISUAL, Tables

MASKED = -1e30  # finite, so that a masked id times a zero weight stays zero in gradients


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How ids are drawn.

    Attributes:
      temperature: 0 takes the likeliest id.
      text_top_k, image_top_k: keep the k likeliest ids of a text or visual position; 0 keeps all.
      text_top_p, image_top_p: keep the smallest set of ids that holds this much probability; 1 keeps all.
      guidance: classifier-free guidance on visual tokens, `u + guidance * (c - u)` on log-softmax scores; 1 is off.
    """

    temperature: float = 1.0
    text_top_k: int = 0
    text_top_p: float = 1.0
    image_top_k: int = 0
    image_top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.guidance < 0 or min(self.text_top_k, self.image_top_k) < 0:
            raise UserError(
                f"sampling options {self} are out of range.", "temperature, guidance and top_k must be >= 0."
            )
        if not (0 < self.text_top_p <= 1 and 0 < self.image_top_p <= 1):
            raise UserError(f"top_p of {self} is out of range.", "Use 0 < top_p <= 1.")

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leaves ids out, so that the sampler has to record which."""
        return bool(self.text_top_k or self.image_top_k) or min(self.text_top_p, self.image_top_p) < 1


def legal_ids(tables: Tables, rows: jax.Array) -> jax.Array:
    """Rows of the legality table int [...] -> bool [..., V]."""
    return jnp.asarray(tables.legal)[rows][..., jnp.asarray(tables.class_of)]


def log_probabilities(
    logits: jax.Array,
    tables: Tables,
    rows: jax.Array,
    options: SamplingOptions,
    unconditional: jax.Array | None = None,
    kept: jax.Array | None = None,
) -> jax.Array:
    """float32 [..., V] log-probabilities of the next id.

    Args:
      logits: float [..., V] of the conditional pass.
      rows: int [...], `grammar.legal_row` of each position.
      unconditional: float [..., V] logits without task and question, needed when guidance is on.
      kept: uint8 [..., ceil(V / 8)], what `pack_kept` made when the ids were drawn: replaces top-k and top-p, so that a
        model that has changed since is compared over the same set of ids.
    """
    scores = logits.astype(jnp.float32)
    visual = jnp.asarray(tables.legal)[rows][..., VISUAL]
    if options.guidance != 1.0:
        if unconditional is None:
            raise ValueError("guidance needs the unconditional logits")
        conditional, free = jax.nn.log_softmax(scores), jax.nn.log_softmax(unconditional.astype(jnp.float32))
        scores = jnp.where(visual[..., None], free + options.guidance * (conditional - free), scores)
    allowed = legal_ids(tables, rows)
    if kept is not None:
        allowed &= jnp.unpackbits(kept, axis=-1, count=scores.shape[-1]).astype(bool)
    scores = jnp.where(allowed, scores, MASKED)
    scores = jax.nn.log_softmax(scores / (options.temperature or 1.0))
    if kept is not None:
        return scores
    if options.text_top_k or options.image_top_k:
        limit = jnp.where(visual, options.image_top_k, options.text_top_k)
        scores = _keep_top_k(scores, limit)
    if options.text_top_p < 1 or options.image_top_p < 1:
        scores = _keep_top_p(scores, jnp.where(visual, options.image_top_p, options.text_top_p))
    return scores


def pack_kept(log_probs: jax.Array) -> jax.Array:
    """uint8 [..., ceil(V / 8)]: one bit an id, whether `log_probabilities` [..., V] left it any probability."""
    return jnp.packbits(log_probs > MASKED / 2, axis=-1)


def _keep_top_k(scores: jax.Array, limit: jax.Array) -> jax.Array:
    size = scores.shape[-1]
    ordered = -jnp.sort(-scores, axis=-1)
    index = jnp.clip(jnp.where(limit > 0, limit, size) - 1, 0, size - 1)
    threshold = jnp.take_along_axis(ordered, index[..., None], axis=-1)
    return jax.nn.log_softmax(jnp.where(scores >= threshold, scores, MASKED))


def _keep_top_p(scores: jax.Array, mass: jax.Array) -> jax.Array:
    ordered = -jnp.sort(-scores, axis=-1)
    before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    kept = before < mass[..., None]
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(scores >= threshold, scores, MASKED))


def draw(log_probs: jax.Array, keys: jax.Array, options: SamplingOptions) -> jax.Array:
    """One id a row: int32 [B] from float [B, V]; `keys` [B] PRNG keys, one a row."""
    if options.temperature == 0:
        return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, log_probs).astype(jnp.int32)
