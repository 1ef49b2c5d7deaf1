"""Log-probabilities of answers under the sampled distribution, and the gradient of the GRPO objective.

Letters: B rows of a micro-batch (`answer_batches.py`), T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivr_jax.models import backbone, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol.grammar import Grammar, Tables
from ivr_jax.sampling.slots import rules_of
from ivr_jax.training.losses import TokenStatistics, grpo_loss, token_statistics
from ivr_jax.training.rl_options import RLOptions

RATIO_TOLERANCE = 1e-3  # of |ratio - 1| before the first update
SAMPLER_TOLERANCE = 0.05  # nats a token between sampler and trainer, where their precisions differ


def policy_logprobs(
    config: BackboneConfig, params: Any, batch: Mapping[str, jax.Array], grammar: Grammar, options: RLOptions
) -> TokenStatistics:
    """Statistics of every token given the ones before it, [B, T], under the distribution that the sampler samples from.

    At the first token of a row or of a segment it means nothing: no token stands before it.
    """
    tokens = batch["tokens"]
    positions = batch.get("positions", jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    segments, prefixes = batch.get("segments"), batch.get("prefixes")
    hidden, _ = backbone.apply(config, params, tokens, positions, segments, prefix_ids=prefixes)
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

    (trained, frozen) are `lora.split` of the parameters; `batch` is one of `answer_batches.py` with "reference" float32
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
            batch.get("sampler"), batch.get("segments"),
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
