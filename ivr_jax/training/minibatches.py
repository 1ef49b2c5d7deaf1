"""Which answers of a rollout an update learns from, and in which minibatch.  P groups of M answers, N = P * M."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ivr_jax.sampling.rollout import Rollout
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.scoring import Scored

SHUFFLE = 0x5011  # part of the seed that shuffles groups into minibatches


def split_groups(scored: Scored, count: int, seed: int, step: int) -> list[np.ndarray]:
    """The answers that take part, whole groups shuffled into `count` minibatches of about equal size.

    Returns:
      int [n] each, numbers of answers; `seed` and `step` decide the order.
    """
    groups = np.arange(len(scored.used))
    if count > 1:
        groups = np.random.default_rng((seed, step, SHUFFLE)).permutation(groups)
    numbers = np.arange(scored.used.size).reshape(scored.used.shape)
    return [numbers[part][scored.used[part]] for part in np.array_split(groups, count)]


def in_passes(scored: Scored, options: GrpoOptions) -> np.ndarray:
    """bool [N]: answers that go through forward and backward passes."""
    used = scored.used
    if options.skip_equal_groups:
        used = used & scored.has_contrast[:, None]
    return used.reshape(-1)


def context_length(rollout: Rollout, options: GrpoOptions) -> int:
    """Tokens at the beginning of every answer that the policy does not learn from: drafts of a buffer."""
    return rollout.draft_length if options.draft_source == "buffer" else 0


def left_out(
    rollout: Rollout, scored: Scored, answers: np.ndarray, options: GrpoOptions, forced: np.ndarray
) -> float:
    """What those of `answers` that skip the passes add to the loss's denominator; to its sum they add 0.

    Args:
      answers: int [n], numbers of the answers of one minibatch.
      forced: int32 [R], the one legal id of each row of the grammar's table; below 0 where several are legal.
    """
    skipped = answers[~in_passes(scored, options)[answers]]
    samples = rollout.samples
    position = np.arange(samples.rows.shape[1])
    inside = (position >= context_length(rollout, options)) & (position < samples.lengths[skipped, None])
    is_chosen = forced[samples.rows[skipped]] < 0  # more than one id was legal
    tokens = (is_chosen & inside).sum(1)
    return float(tokens.sum() if options.loss_type == "bnpo" else (tokens > 0).sum())


def join_metrics(updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of several updates: pairs and skipped updates add up; the ratio's deviation is that of the first.

    With several updates `ratio_largest` is the largest of their deviations.
    """
    joined: dict[str, Any] = {}
    for metrics in updates:
        for name, value in metrics.items():
            if name not in joined:
                joined[name] = value
            elif isinstance(value, tuple):
                joined[name] = tuple(a + b for a, b in zip(joined[name], value, strict=True))
            elif name == "skipped_updates":
                joined[name] += value
    largest = [metrics["max_ratio_deviation"] for metrics in updates if "max_ratio_deviation" in metrics]
    return joined | ({"ratio_largest": functools.reduce(jnp.maximum, largest)} if len(largest) > 1 else {})
