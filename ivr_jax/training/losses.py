"""Per-token log-probabilities without the whole vocabulary, and the GRPO objective.

Losses are returned as (sum, denominator), so that accumulation over micro-batches and devices is exact.
Letters: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.config import Count, NotNegative, OneOf, Positive, Section
from ivr_jax.models.layers import project_gathered
from ivr_jax.protocol.grammar import ILLEGAL, Tables
from ivr_jax.sampling.logits_processors import MASKED, SamplingOptions, log_probabilities


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
    uncond_hidden: tuple[jax.Array, ...] = (),
    kept_mask: jax.Array | None = None,
    vocab_size: int | None = None,
    fsdp_over_tensor: bool = False,
) -> TokenStatistics:
    """Statistics of `targets` int [B, T] under `hidden` [B, T, D] and `head` [D, V].

    The vocabulary is only ever materialised for about `chunk` tokens at a time, forwards and backwards (each chunk is
    recomputed for its gradient, unless it is the only one: that would save nothing).  A chunk takes every n-th token of
    every row, so that on a mesh each device works on tokens of its own.  With `tables` and `rows` int [B, T] the
    distribution is the sampler's, under the grammar mask and `options`, with `uncond_hidden`, hidden states [B, T, D]
    of the same positions in guidance's other passes, and `kept_mask` uint8 [B, T, ceil(V / 8)] for top-k and top-p
    (`logits_processors.log_probabilities`).  Columns of `head` from `vocab_size` on are padding, and have no
    probability.  `fsdp_over_tensor` says how the rows of `hidden` are sharded (`sharding.partition`).
    """
    batch, length, _ = hidden.shape
    count = min(length, math.ceil(batch * length / chunk))  # chunks of `size` tokens of every row
    size = math.ceil(length / count)
    columns = jnp.arange(head.shape[1], dtype=jnp.int32)[None, None]
    head = _scatter_gradient(head)
    head_axes = ("embed", "vocab")
    whole = sharding.gather(jax.lax.stop_gradient(head).astype(hidden.dtype), head_axes)  # once, not for every chunk
    padding = head.shape[1] - (vocab_size or head.shape[1])
    if tables is not None and padding:
        tables = tables._replace(class_of=jnp.pad(jnp.asarray(tables.class_of), (0, padding), constant_values=ILLEGAL))
    if kept_mask is not None:
        bytes_missing = math.ceil(head.shape[1] / 8) - kept_mask.shape[2]
        kept_mask = jnp.pad(kept_mask, ((0, 0), (0, 0), (0, bytes_missing)))

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, tokens of a chunk, ...]."""
        x = jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))
        axes = (None, "batch", "residual", *("width",) * (x.ndim - 2))
        chunks = jnp.moveaxis(x.reshape(batch, size, count, *x.shape[2:]), 2, 0)
        return sharding.constrain(chunks, axes, fsdp_over_tensor)

    def logits_of(h: jax.Array) -> jax.Array:
        logits = project_gathered(h, head, whole, head_axes, "float32")
        logits = sharding.constrain(logits, ("batch", "length", "vocab"))
        return jnp.where(columns < vocab_size, logits, MASKED) if padding else logits

    def one(_: None, inputs: tuple) -> tuple[None, TokenStatistics]:
        h, target, row, uncond, keep = jax.tree.map(_gathered, inputs)
        if tables is None:
            log_probs = jax.nn.log_softmax(logits_of(h))
        else:
            uncond_logits = tuple(map(logits_of, uncond))
            log_probs = log_probabilities(logits_of(h), tables, row, options or SamplingOptions(), uncond_logits, keep)
        taken = jnp.sum(jnp.where(columns == target[..., None], log_probs, 0.0), axis=-1)  # no gather across shards
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return None, TokenStatistics(taken, entropy, (taken >= jnp.max(log_probs, axis=-1)).astype(jnp.float32))

    rows = targets if rows is None else rows  # without tables they are not read
    inputs = (hidden, targets, rows, uncond_hidden, kept_mask)
    if count == 1:
        return one(None, inputs)[1]
    _, statistics = jax.lax.scan(jax.checkpoint(one), None, jax.tree.map(split, inputs))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, -1)[:, :length], statistics)


def next_token(x: jax.Array) -> jax.Array:
    """x [B, T] of the next token at each token (the last one gets the first).

    The barrier keeps it separate from what uses it: XLA:TPU aborts where it fuses this into sums over a single row.
    """
    return jax.lax.optimization_barrier(jnp.roll(x, -1, axis=1))


@jax.custom_vjp
def _scatter_gradient(head: jax.Array) -> jax.Array:
    """The identity; its gradient is reduce-scattered to the shards of `head` at once.

    Otherwise XLA keeps the full-size sum of a loop's gradients on every device until the optimiser needs it.
    """
    return head


def _scattered(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.optimization_barrier(sharding.constrain(gradient, ("embed", "vocab"))),)


_scatter_gradient.defvjp(lambda head: (head, None), _scattered)


def _gathered(x: jax.Array) -> jax.Array:
    """A chunk's [B, T, ...], replicated on every tensor shard."""
    return sharding.constrain(x, ("batch", "length", *("width",) * (x.ndim - 2)))


@dataclasses.dataclass(frozen=True)
class GrpoOptions(Section, name="grpo"):
    """The GRPO objective.

    Attributes:
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      beta: coefficient of the k3 estimate of KL(policy || reference).
      loss_type: "grpo" averages each answer over its tokens, then over answers; "bnpo" averages over all
        tokens of the update; "dr_grpo" divides each answer's sum by `dr_grpo_length`, then averages over answers.
      dr_grpo_length: see above, in tokens.
      tis_cap: truncated importance sampling: where answers were sampled in another precision than they are learnt
        from, a token's gain is multiplied by the trainer's probability over the sampler's, at most this; 0: off.
      skip_equal_groups: leave groups whose advantages are all 0 out of the passes.  Without a KL term the update is the
        same; with one their answers add nothing to it.
      refill: how often new answers are asked for in place of those whose judgement is missing; 0: these leave their
        group.
      drop_truncated: leave answers that were cut at the answer length out of the update.
      group: "prompt": the answers to a prompt are compared; "draft": the continuations of one first image.
      drafts: first images a prompt, for draft groups.
      draft_source: "rollout": the policy samples them, and learns from them too; "buffer": the checkpoint that the run
        starts from does, once (`sampling.drafts.DraftBuffer`), and they are context only.
      credit: of draft groups.  "local": a continuation has the advantage within its draft's group, the draft that among
        the drafts of its prompt; "broadcast": all tokens have the sum of the two.
      modality_advantages: image tokens have advantages by the outcome (draft groups: the improvement) alone, text
        tokens by the whole reward; False: all tokens have those of the whole reward.
    """

    clip_low: NotNegative = 0.2
    clip_high: NotNegative = 0.2
    beta: NotNegative = 0.01
    loss_type: Annotated[str, OneOf("grpo", "bnpo", "dr_grpo")] = "grpo"
    dr_grpo_length: Positive = 256
    tis_cap: NotNegative = 2.0
    skip_equal_groups: bool = True
    refill: Count = 0
    drop_truncated: bool = False
    group: Annotated[str, OneOf("prompt", "draft")] = "prompt"
    drafts: Positive = 2
    draft_source: Annotated[str, OneOf("rollout", "buffer")] = "rollout"
    credit: Annotated[str, OneOf("local", "broadcast")] = "local"
    modality_advantages: bool = False


def grpo_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    reference_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    options: GrpoOptions,
    sampler_log_probs: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """(sum, denominator, metric sums) of the clipped objective with a k3 KL term.

    Args:
      log_probs, old_log_probs, reference_log_probs: float [B, T] of the sampled tokens under the policy, the policy
        that sampled them, and the reference.
      advantages: float [B], or [B, T] of every token.
      mask: float [B, T], 1 on the tokens that count; answers without any do not count.
      sampler_log_probs: float [B, T], what the sampler itself noted, where its precision was another one.
      segments: int32 [B, T], less than T, which answer of its row a token belongs to; None: one answer a row.

    Returns:
      The sum and the denominator add up over micro-batches.  Metrics are sums over the tokens that count, but
      "max_ratio_deviation", the largest |ratio - 1|.
    """
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    log_ratio = (log_probs - old_log_probs) * mask
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    sums = {}
    if sampler_log_probs is not None:
        mismatch = (old_log_probs - sampler_log_probs) * mask
        sums["sampler_kl"] = (jnp.exp(mismatch) - 1 - mismatch).sum()
        if options.tis_cap:
            gain = gain * jnp.minimum(jnp.exp(mismatch), options.tis_cap)
    # The k3 estimate of KL(policy || reference).
    difference = (reference_log_probs - log_probs) * mask
    kl = jnp.exp(difference) - difference - 1
    per_token = (options.beta * kl - gain) * mask
    tokens = _sum_answers(mask, segments)
    answers = (tokens > 0).sum().astype(jnp.float32)
    if options.loss_type == "grpo":
        total, denominator = (_sum_answers(per_token, segments) / jnp.maximum(tokens, 1)).sum(), answers
    elif options.loss_type == "bnpo":
        total, denominator = per_token.sum(), tokens.sum()
    else:
        total, denominator = per_token.sum() / options.dr_grpo_length, answers
    # Clipping binds only where leaving the interval would have raised the objective.
    too_low = (ratio < 1 - options.clip_low) & (advantages < 0)
    too_high = (ratio > 1 + options.clip_high) & (advantages > 0)
    is_clipped = too_low | too_high
    sums |= {
        "kl": (kl * mask).sum(),
        "clipped": (is_clipped * mask).sum(),
        "tokens": tokens.sum(),
        "ratio": (ratio * mask).sum(),
        "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        "max_ratio_deviation": (jnp.abs(ratio - 1) * mask).max(),
    }
    return total, denominator, sums


def _sum_answers(x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Sums over answers of x [B, T]: [B] of one answer a row, [B * T] of the `segments` of all rows."""
    if segments is None:
        return x.sum(1)
    rows, length = x.shape
    index = jnp.arange(rows)[:, None] * length + segments
    return jax.ops.segment_sum(x.reshape(-1), index.reshape(-1), rows * length)
