"""Answers as the trainer reads them again: padded batches, log-probabilities under the sampled distribution, objective.

Letters: B answers of a micro_batch, T tokens of prompt and answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.models import backbone, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol.grammar import Grammar, Tables
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.sampling.slots import rules_of
from ivr_jax.training.losses import GrpoOptions, TokenStatistics, grpo_loss, token_statistics


def answer_batch(
    rollout: Rollout, advantages: np.ndarray, rows: np.ndarray, size: int, buckets: Sequence[int]
) -> dict[str, np.ndarray]:
    """Rows of a rollout as one padded batch of `size` answers, in the smallest bucket.

    tokens, rows int32, old, mask float32 [B, T]: prompt and answer joined without a gap; advantages float32 [B]; with
    guidance free_tokens int32 [B, passes, T], the same answer after each unconditional prompt, and shifts int32
    [B, passes], how much later it begins there; with top-k or top-p kept uint8 [B, T, ceil(V / 8)].
    """
    samples, passes = rollout.samples, rollout.unconditional
    prompts = np.max([rollout.prompt_lengths, *(lengths for _, lengths in passes)], axis=0)
    length = bucket_of(int((prompts[rows // rollout.group] + samples.lengths[rows]).max()), buckets)
    kinds = {"tokens": np.int32, "rows": np.int32, "old": np.float32, "mask": np.float32}
    batch = {name: np.zeros((size, length), kind) for name, kind in kinds.items()}
    batch["advantages"] = np.zeros(size, np.float32)
    if passes:
        batch["free_tokens"] = np.zeros((size, len(passes), length), np.int32)
        batch["shifts"] = np.zeros((size, len(passes)), np.int32)
    if samples.kept is not None:
        batch["kept"] = np.zeros((size, length, samples.kept.shape[-1]), np.uint8)
    for i, row in enumerate(rows):
        prompt, answer = rollout.prompt(row), rollout.answer_tokens(row)
        a, b = len(prompt), len(prompt) + len(answer)
        batch["tokens"][i, :b] = np.concatenate([prompt, answer])
        batch["rows"][i, a:b] = samples.rows[row, : b - a]
        batch["old"][i, a:b] = samples.log_probs[row, : b - a]
        batch["mask"][i, a:b] = 1.0
        batch["advantages"][i] = advantages[row]
        if samples.kept is not None:
            batch["kept"][i, a:b] = samples.kept[row, : b - a]
        for k, (free, lengths) in enumerate(passes):
            f = int(lengths[row // rollout.group])
            batch["free_tokens"][i, k, : f + len(answer)] = np.append(free[row // rollout.group, :f], answer)
            batch["shifts"][i, k] = f - a
    return batch


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens.  Raises UserError when none does."""
    fits = [bucket for bucket in buckets if bucket >= length]
    if not fits:
        raise UserError(
            f"a prompt and its answer may take {length} tokens; the largest bucket is {max(buckets)}.",
            "Add a larger bucket to config.buckets, or lower config.answer_length.",
        )
    return min(fits)


@dataclasses.dataclass(frozen=True)
class Replay:
    """The policy as a function of its parameters: what the sampler drew from, computed for whole answers at once.

    Attributes:
      config: of the backbone; grammar: whose mask the sampler drew under; chunk: see `losses.token_statistics`.
    """

    config: BackboneConfig
    grammar: Grammar
    sampling: SamplingOptions
    objective: GrpoOptions
    chunk: int

    def statistics(self, params: Any, batch: Mapping[str, jax.Array]) -> TokenStatistics:
        """Statistics of every token given the ones before it, [B, T]; position 0 means nothing."""
        config, tokens = self.config, batch["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = backbone.apply(config, params, tokens, positions)
        others = []
        for k in range(batch["shifts"].shape[1] if "shifts" in batch else 0):
            free, _ = backbone.apply(config, params, batch["free_tokens"][:, k], positions)
            index = jnp.clip(positions + batch["shifts"][:, k, None], 0, tokens.shape[1] - 1)
            others.append(jnp.take_along_axis(free, index[..., None], axis=1))
        found = token_statistics(
            hidden,
            backbone.lm_head(config, params),
            jnp.roll(tokens, -1, 1),
            self.chunk,
            jnp.roll(batch["rows"], -1, 1),
            Tables(*map(jnp.asarray, self.grammar.tables)),
            self.sampling,
            others=tuple(others),
            kept=jnp.roll(batch["kept"], -1, 1) if "kept" in batch else None,
            vocab_size=config.vocab_size,
            fsdp_over_tensor=config.fsdp_over_tensor,
        )
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), found)

    def loss(self, trained: Any, frozen: Any, batch: Mapping[str, jax.Array]):
        """(sum, ((sum, denominator), metric sums)) of the objective; (trained, frozen): `lora.split` of parameters.

        Entropies are of the tokens that the grammar leaves to the model, text and image tokens apart.
        """
        found = self.statistics(lora.join(trained, frozen), batch)
        total, denominator, sums = grpo_loss(
            found.log_probs, batch["old"], batch["reference"], batch["advantages"], batch["mask"], self.objective,
            batch.get("sampler"),
        )  # fmt: skip
        choices = batch["mask"] * (jnp.asarray(rules_of(self.grammar).forced)[batch["rows"]] < 0)
        image = choices * (batch["tokens"] >= self.grammar.tokenizer.vocab.visual_start)
        text = choices - image
        sums |= {
            "image_entropy": (found.entropy * image).sum(),
            "image_tokens": image.sum(),
            "text_entropy": (found.entropy * text).sum(),
            "text_tokens": text.sum(),
        }
        return total, ((total, denominator), sums)
