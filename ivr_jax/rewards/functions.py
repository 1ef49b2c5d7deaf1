"""The paper's reward as pure, jittable array functions.

Letters: P prompts, M members of a group.  A component is *present or missing*: every function takes a bool mask, and
a missing value leaves all group statistics and the bonus alone.

    R_o = sum over the axes of 0.05 * S            R_f = 1 if the answer is structurally valid
    R_s = mean validity of the intermediate texts  R   = 0.7 R_o + 0.1 R_f + 0.2 R_s
    competitive members of a group: R_i >= max R - epsilon;  N* = fewest images among them;  R_i += weight * N* / N_i
    A_i = (R_i - mean R) / std R
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ivr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """Weights and rules; the defaults are the paper's.

    Attributes:
      outcome_weight, format_weight, step_weight: of R_o, R_f, R_s.
      renormalise: without intermediate texts R_s is missing; True rescales the other weights to keep their sum,
        False counts R_s as 1 (nothing was said wrongly).
      bonus_weight: of the complexity bonus; 0 switches it off.
      epsilon: a member within epsilon of the group's best is competitive.
      divide_by_std: divide advantages by the group's standard deviation.
      min_valid: a group with fewer present members is left out of the update.
    """

    outcome_weight: float = 0.7
    format_weight: float = 0.1
    step_weight: float = 0.2
    renormalise: bool = True
    bonus_weight: float = 1.0
    epsilon: float = 0.05
    divide_by_std: bool = True
    min_valid: int = 2

    def __post_init__(self) -> None:
        weights = (self.outcome_weight, self.format_weight, self.step_weight, self.bonus_weight, self.epsilon)
        if min(weights) < 0 or self.outcome_weight <= 0 or self.min_valid < 2:
            raise UserError(
                f"reward options {self} are out of range.",
                "Weights and epsilon must be >= 0, outcome_weight > 0 and min_valid >= 2.",
            )


def outcome(scores: jax.Array) -> jax.Array:
    """R_o float [...] in [0.2, 1] from axis scores float [..., 4] in 1..5."""
    return 0.05 * scores.sum(-1)


def total(
    outcome_reward: jax.Array,
    format_reward: jax.Array,
    step_reward: jax.Array,
    has_step: jax.Array,
    options: RewardOptions,
) -> jax.Array:
    """R float [...]; `has_step` bool [...] says where R_s is present."""
    w_o, w_f, w_s = options.outcome_weight, options.format_weight, options.step_weight
    base = w_o * outcome_reward + w_f * format_reward
    without = base * (w_o + w_f + w_s) / (w_o + w_f) if options.renormalise else base + w_s
    return jnp.where(has_step, base + w_s * step_reward, without)


def complexity_bonus(rewards: jax.Array, images: jax.Array, valid: jax.Array, options: RewardOptions) -> jax.Array:
    """The bonus alone, float [P, M], from R float [P, M], image counts int [P, M] and presence bool [P, M].

    A member that drew no image is never competitive.
    """
    counted = valid & (images > 0)
    best = jnp.max(jnp.where(counted, rewards, -jnp.inf), axis=1, keepdims=True)
    competitive = counted & (rewards >= best - options.epsilon)
    fewest = jnp.min(jnp.where(competitive, images, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    return jnp.where(competitive, options.bonus_weight * fewest / jnp.maximum(images, 1), 0.0)


def advantages(
    rewards: jax.Array, valid: jax.Array, options: RewardOptions, tiny: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """Group-relative advantages float [P, M] and the members that take part in the update, bool [P, M].

    Mean and (sample) standard deviation run over the present members; missing members, and groups with fewer than
    `min_valid` present ones, get advantage 0 and take no part.
    """
    count = valid.sum(1, keepdims=True)
    used = valid & (count >= options.min_valid)
    best = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1, keepdims=True)
    below = jnp.where(valid, rewards - best, 0.0)  # equal rewards are exactly 0, so rounding teaches nothing
    centred = jnp.where(used, below - below.sum(1, keepdims=True) / jnp.maximum(count, 1), 0.0)
    if options.divide_by_std:
        std = jnp.sqrt((centred**2).sum(1, keepdims=True) / jnp.maximum(count - 1, 1))
        centred = centred / (std + tiny)
    return centred, used
