"""Answers as the trainer reads them: padded batches, log-probabilities under the sampled distribution, the gradient.

Letters: B answers of a micro_batch, T tokens of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.models import backbone, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol.grammar import Grammar, Tables
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.sampling.slots import rules_of
from ivr_jax.training.losses import TokenStatistics, grpo_loss, token_statistics
from ivr_jax.training.rl_options import RLOptions

RATIO_TOLERANCE = 1e-3  # of |ratio - 1| before the first update
SAMPLER_TOLERANCE = 0.05  # nats a token between sampler and trainer, where their precisions differ
TOKEN_ARRAYS = {"tokens": np.int32, "rows": np.int32, "old": np.float32, "mask": np.float32, "advantages": np.float32}


def answer_batch(
    rollout: Rollout,
    advantages: np.ndarray,
    answers: np.ndarray,
    size: int,
    buckets: Sequence[int],
    context_length: int = 0,
) -> dict[str, np.ndarray]:
    """Some answers of a rollout as one padded batch of `size` rows, in the smallest bucket.

    Args:
      advantages: float32 [N, A] of every token of the rollout's N answers, or [N] of every answer.
      answers: int [n], which of them; n <= size.
      context_length: tokens at the beginning of every answer that are context only.

    Returns:
      tokens, rows int32, old, mask, advantages float32 [B, T]: prompt and answer joined without a gap; with guidance
      free_tokens int32 [B, passes, T], the same answer after each unconditional prompt, and shifts int32 [B, passes],
      how much later it begins there; with top-k or top-p kept_mask uint8 [B, T, ceil(V / 8)].
    """
    samples, passes = rollout.samples, rollout.unconditional
    prompts = np.max([rollout.prompt_lengths, *(lengths for _, lengths in passes)], axis=0)
    length = bucket_of(int((prompts[answers // rollout.group_size] + samples.lengths[answers]).max()), buckets)
    batch = {name: np.zeros((size, length), kind) for name, kind in TOKEN_ARRAYS.items()}
    if passes:
        batch["free_tokens"] = np.zeros((size, len(passes), length), np.int32)
        batch["shifts"] = np.zeros((size, len(passes)), np.int32)
    if samples.kept is not None:
        batch["kept_mask"] = np.zeros((size, length, samples.kept.shape[-1]), np.uint8)
    for i, number in enumerate(answers):
        prompt, answer = rollout.prompt(number), rollout.answer_tokens(number)
        a, b = len(prompt), len(prompt) + len(answer)
        batch["tokens"][i, :b] = np.concatenate([prompt, answer])
        batch["rows"][i, a:b] = samples.rows[number, : b - a]
        batch["old"][i, a:b] = samples.log_probs[number, : b - a]
        batch["mask"][i, a + context_length : b] = 1.0
        batch["advantages"][i, a:b] = advantages[number, : b - a] if advantages.ndim == 2 else advantages[number]
        if samples.kept is not None:
            batch["kept_mask"][i, a:b] = samples.kept[number, : b - a]
        for k, (free, lengths) in enumerate(passes):
            group = number // rollout.group_size
            f = int(lengths[group])
            batch["free_tokens"][i, k, : f + len(answer)] = np.append(free[group, :f], answer)
            batch["shifts"][i, k] = f - a
    return batch


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens.  Raises UserError when none does."""
    fits = [bucket for bucket in buckets if bucket >= length]
    if not fits:
        raise UserError(
            f"a prompt and its answer may take {length} tokens; the largest bucket is {max(buckets)}.",
            "Add a larger bucket to config.buckets (it may change when a run resumes), or lower config.answer_length.",
        )
    return min(fits)


def policy_logprobs(
    config: BackboneConfig, params: Any, batch: Mapping[str, jax.Array], grammar: Grammar, options: RLOptions
) -> TokenStatistics:
    """Statistics of every token given the ones before it, [B, T], under the distribution that the sampler samples from.

    Position 0 means nothing: no token stands before it.
    """
    tokens = batch["tokens"]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = backbone.apply(config, params, tokens, positions)
    unconditional = []
    for k in range(batch["shifts"].shape[1] if "shifts" in batch else 0):
        free, _ = backbone.apply(config, params, batch["free_tokens"][:, k], positions)
        index = jnp.clip(positions + batch["shifts"][:, k, None], 0, tokens.shape[1] - 1)
        unconditional.append(jnp.take_along_axis(free, index[..., None], axis=1))
    # hidden state t predicts token t + 1: everything is read one to the left, and the statistics moved back
    statistics = token_statistics(
        hidden,
        backbone.lm_head(config, params),
        jnp.roll(tokens, -1, 1),
        options.loss_chunk_tokens,
        jnp.roll(batch["rows"], -1, 1),
        Tables(*map(jnp.asarray, grammar.tables)),
        options.sampling,
        uncond_hidden=tuple(unconditional),
        kept_mask=jnp.roll(batch["kept_mask"], -1, 1) if "kept_mask" in batch else None,
        vocab_size=config.vocab_size,
        fsdp_over_tensor=config.fsdp_over_tensor,
    )
    return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), statistics)


class PolicyGradient(NamedTuple):
    """What one micro_batch contributes to an update; all of it adds up over micro_batches.

    gradients of the summed objective; loss (sum, denominator); metrics: sums by name, but "max_ratio_deviation".
    """

    gradients: Any
    loss: tuple[jax.Array, jax.Array]
    metrics: dict[str, jax.Array]


def policy_gradient(
    config: BackboneConfig, grammar: Grammar, options: RLOptions, out_shardings: Any = None
) -> jax.stages.Wrapped:
    """The jitted gradient of the GRPO objective: (trained, frozen, batch) -> PolicyGradient.

    (trained, frozen) are `lora.split` of the parameters; `batch` is that of `answer_batch` with "reference" float32
    [B, T], the reference's log-probabilities, and "sampler", where the sampler's precision is not the trainer's.

    Tokens that the grammar forces (one id is legal) have log-probability 0 whatever the policy is.  They take no part:
    neither in the mean over an answer nor in KL, clip fraction, ratio and entropy.

    Args:
      out_shardings: of `PolicyGradient`; None: XLA chooses.
    """
    forced = jnp.asarray(rules_of(grammar).forced)
    visual_start = grammar.tokenizer.vocab.visual_start

    def loss(trained: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, tuple[Any, Any]]:
        statistics = policy_logprobs(config, lora.join(trained, frozen), batch, grammar, options)
        chosen = batch["mask"] * (forced[batch["rows"]] < 0)
        total, denominator, metrics = grpo_loss(
            statistics.log_probs, batch["old"], batch["reference"], batch["advantages"], chosen, options.grpo,
            batch.get("sampler"),
        )  # fmt: skip
        image = chosen * (batch["tokens"] >= visual_start)
        text = chosen - image
        metrics |= {
            "image_entropy": (statistics.entropy * image).sum(),
            "image_tokens": image.sum(),
            "text_entropy": (statistics.entropy * text).sum(),
            "text_tokens": text.sum(),
        }
        return total, ((total, denominator), metrics)

    def gradient(trained: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> PolicyGradient:
        gradients, (pair, metrics) = jax.grad(loss, has_aux=True)(trained, frozen, batch)
        return PolicyGradient(gradients, pair, metrics)

    return jax.jit(gradient, out_shardings=out_shardings)


def add_gradients(total: PolicyGradient | None, more: PolicyGradient) -> PolicyGradient:
    """Both together; the buffers of `total` are reused."""
    if total is None:
        return more
    deviation = jnp.maximum(total.metrics["max_ratio_deviation"], more.metrics["max_ratio_deviation"])
    both = _add(total, more)
    return both._replace(metrics={**both.metrics, "max_ratio_deviation": deviation})


def _sum(total: PolicyGradient, more: PolicyGradient) -> PolicyGradient:
    return jax.tree.map(jnp.add, total, more)


_add = jax.jit(_sum, donate_argnums=0)


def assert_on_policy(deviation: float) -> None:
    """Raises RuntimeError when the ratio deviates from 1 by more than rounding, before the first update."""
    if not deviation <= RATIO_TOLERANCE:
        raise RuntimeError(
            f"importance ratio deviates from 1 by {deviation:.2e} before the first update: "
            "the trainer does not compute the sampler's distribution"
        )


def assert_same_distribution(divergence: float) -> None:
    """Raises RuntimeError when the sampler is more nats a token from the trainer than their precisions explain."""
    if not divergence <= SAMPLER_TOLERANCE:
        raise RuntimeError(
            f"sampler and trainer are {divergence:.2e} nats a token apart before the first update, more than rounding "
            "explains: the trainer does not compute the sampler's distribution"
        )
