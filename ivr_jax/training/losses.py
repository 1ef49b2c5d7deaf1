"""Per-token log-probabilities without the whole vocabulary, and the GRPO objective.

Losses are returned as (sum, denominator), so that accumulation over micro-batches and devices is exact.
Letters: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import Tables
from ivr_jax.sampling.chain import MASKED, SamplingOptions, log_probabilities


class TokenStatistics(NamedTuple):
    """float32 [B, T] each: log-probability of the target, entropy of its distribution, 1 where likeliest."""

    log_probs: jax.Array
    entropy: jax.Array
    correct: jax.Array


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int,
    rows: jax.Array | None = None,
    tables: Tables | None = None,
    options: SamplingOptions | None = None,
    others: tuple[jax.Array, ...] = (),
    kept: jax.Array | None = None,
    vocab_size: int | None = None,
) -> TokenStatistics:
    """Statistics of `targets` int [B, T] under `hidden` [B, T, D] and `head` [D, V].

    The vocabulary is only ever materialised for about `chunk` tokens at a time, a stretch of every row, forwards and
    backwards (each chunk is recomputed for its gradient).  With `tables` and `rows` int [B, T] the distribution is the
    sampler's: the grammar mask and `options` are replayed, with `others`, hidden states [B, T, D] of the same positions
    in guidance's unconditional passes, and `kept` uint8 [B, T, ceil(V / 8)] for top-k and top-p
    (`chain.log_probabilities`).  Columns of `head` from `vocab_size` on are padding.
    """
    batch, length, _ = hidden.shape
    stretch = min(length, max(1, chunk // batch))
    padding = -length % stretch
    vocab_size = vocab_size or head.shape[1]
    head = sharding.constrain(head, ("width", "vocab"))  # gathered once, not once a chunk

    def stretches(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, stretch, *x.shape[2:]), 1, 0)

    def logits_of(h: jax.Array) -> jax.Array:
        logits = jnp.einsum("btd,dv->btv", h, head.astype(h.dtype), preferred_element_type=jnp.float32)
        return sharding.constrain(logits, ("batch", None, "vocab"))

    @jax.checkpoint
    def one(_: None, inputs: tuple) -> tuple[None, TokenStatistics]:
        h, target, row, free, keep = inputs  # `free` as many as `others`
        ids = jnp.arange(head.shape[1], dtype=target.dtype)[None, None]
        if tables is None:
            log_probs = jax.nn.log_softmax(jnp.where(ids < vocab_size, logits_of(h), MASKED))
        else:
            ids = ids[..., :vocab_size]
            logits, *without = (logits_of(x)[..., :vocab_size] for x in (h, *free))
            log_probs = log_probabilities(logits, tables, row, options or SamplingOptions(), tuple(without), keep)
        taken = jnp.sum(jnp.where(ids == target[..., None], log_probs, 0.0), axis=-1)  # no gather across shards
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return None, TokenStatistics(taken, entropy, (jnp.argmax(log_probs, -1) == target).astype(jnp.float32))

    inputs = (hidden, targets, targets if rows is None else rows, others, kept)
    _, statistics = jax.lax.scan(one, None, jax.tree.map(stretches, inputs))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], statistics)


@dataclasses.dataclass(frozen=True)
class GrpoOptions:
    """The GRPO objective.

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      kl: coefficient of the k3 estimate of KL(policy || reference).
      normalisation: "sequence" averages each answer over its tokens, then over answers; "token" averages over all
        tokens of the update; "constant" divides each answer's sum by `constant`, then averages over answers.
      constant: see above, in tokens.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.01
    normalisation: str = "sequence"
    constant: int = 256

    def __post_init__(self) -> None:
        if (
            self.normalisation not in ("sequence", "token", "constant")
            or min(self.clip_low, self.clip_high, self.kl) < 0
            or self.constant < 1
        ):
            raise UserError(
                f"GRPO options {self} are out of range.",
                "normalisation is sequence, token or constant; the rest are >= 0.",
            )


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    reference_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    options: GrpoOptions,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """(sum, denominator, metric sums) of the clipped objective with a k3 KL term.

    Args:
      log_probs, old_log_probs, reference_log_probs: float [B, T] of the sampled tokens under the policy, the sampler
        and the reference.
      advantages: float [B].
      mask: float [B, T], 1 on the answer tokens of members that take part; all-zero rows do not count.
    """
    log_ratio = (log_probs - old_log_probs) * mask
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    gain = jnp.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    difference = (reference_log_probs - log_probs) * mask
    kl = jnp.exp(difference) - difference - 1
    per_token = (options.kl * kl - gain) * mask
    tokens = mask.sum(1)
    members = (tokens > 0).sum().astype(jnp.float32)
    if options.normalisation == "sequence":
        total, denominator = (per_token.sum(1) / jnp.maximum(tokens, 1)).sum(), members
    elif options.normalisation == "token":
        total, denominator = per_token.sum(), tokens.sum()
    else:
        total, denominator = (per_token.sum(1) / options.constant).sum(), members
    is_clipped = ((ratio < 1 - options.clip_low) & (advantages[:, None] < 0)) | (
        (ratio > 1 + options.clip_high) & (advantages[:, None] > 0)
    )
    sums = {
        "kl": (kl * mask).sum(),
        "clipped": (is_clipped * mask).sum(),
        "tokens": tokens.sum(),
        "ratio": (ratio * mask).sum(),
        "old_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        "ratio_deviation": (jnp.abs(ratio - 1) * mask).max(),
    }
    return total, denominator, sums
