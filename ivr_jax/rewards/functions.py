"""Rewards as pure, jittable array functions; two presets, the paper's and that of the authors' public reward code.

Letters: P prompts, M members of a group.  A component is *present or missing*: every function takes a bool mask, and
a missing value leaves all group statistics and the bonus alone.

    R = w_o R_o + w_s R_s + w_f R_f + w_r R_r        outcome, steps, format, reflection
    competitive members of a group: R_i >= max R - epsilon;  N* = fewest images among them;  R_i += weight * N* / N_i
    A_i = (R_i - mean R) / (std R + std_floor)

    PAPER      R_o = 0.05 * sum of the four axis scores, R_f = 1 for a structurally valid answer, R_s = mean validity
               of the intermediate texts, no R_r; weights 0.7, 0.1, 0.2
    RELEASED   a score s counts (s - 1) / 4; R_o weighs the axes 0.40, 0.25, 0.20, 0.15, R_s is the mean over the
               intermediate images, R_r over the reflections; weights 0.4, 0.3, 0.1, 0.2; no bonus
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ivr_jax.config import NotNegative, OneOf, Range, Section
from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import ACCEPT, GrammarState, Tables, advance
from ivr_jax.trajectory import AXES

SCORE_MAPS = ("div5", "unit")
INTERMEDIATE = ("texts", "images")
STEP_REWARD_EVALS = ("none", "final", "all")


@dataclasses.dataclass(frozen=True)
class RewardOptions(Section, name="reward"):
    """Weights and rules; the defaults are the paper's.

    Attributes:
      outcome_weight, format_weight, step_weight, reflection_weight: of R_o, R_f, R_s, R_r.
      axis_weights: of the four axes in R_o, in the order of `trajectory.AXES`; they are divided by their sum.
      score_map: what an axis score s in 1..5 counts: "div5" s / 5; "unit" (s - 1) / 4, held to [0, 1].
      intermediate: what R_s is a mean over: "texts" the validity of every failure analysis, improvement plan and
        sub-instruction; "images" the score of every step's image, with R_r the mean over the reflections.
      step_reward_evals: which of the answer's own evaluations count in R_s beside that, each as 1 when its verdict is
        the judge's and else 0: "none" none (the paper's formula), "final" the last one, "all".
      renormalise: an answer without intermediate texts (or reflections) has no R_s (R_r); True rescales the other
        weights to keep their sum, False counts it as `missing_value`.
      missing_value: see above; 1 says that nothing was said wrongly.
      bonus_weight: of the complexity bonus; 0 switches it off.
      epsilon: a member within epsilon of the group's best is competitive.
      bonus_min_outcome: a member below this outcome reward is never competitive; 0 is the paper's rule, 1 pays the
        bonus for flawless images alone, so that giving up early on a prompt which nobody solves earns nothing.
      divide_by_std: divide advantages by the group's standard deviation.
      std_floor: added to that deviation.
      min_valid: a group with fewer present members is left out of the update.
    """

    outcome_weight: Annotated[float, Range(above=0)] = 0.7
    format_weight: NotNegative = 0.1
    step_weight: NotNegative = 0.2
    reflection_weight: NotNegative = 0.0
    axis_weights: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)
    score_map: Annotated[str, OneOf(*SCORE_MAPS)] = "div5"
    intermediate: Annotated[str, OneOf(*INTERMEDIATE)] = "texts"
    step_reward_evals: Annotated[str, OneOf(*STEP_REWARD_EVALS)] = "none"
    renormalise: bool = True
    missing_value: float = 1.0
    bonus_weight: NotNegative = 1.0
    epsilon: NotNegative = 0.05
    bonus_min_outcome: NotNegative = 0.0
    divide_by_std: bool = True
    std_floor: NotNegative = 1e-6
    min_valid: Annotated[int, Range(2)] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.axis_weights) != len(AXES) or min(self.axis_weights) < 0 or sum(self.axis_weights) <= 0:
            raise UserError(
                f"reward.axis_weights {self.axis_weights} are out of range.",
                f"Give one weight >= 0 for each of {', '.join(AXES)}.",
            )


PAPER = RewardOptions()
RELEASED = RewardOptions(
    outcome_weight=0.4,
    format_weight=0.1,
    step_weight=0.3,
    reflection_weight=0.2,
    axis_weights=(0.40, 0.25, 0.20, 0.15),
    score_map="unit",
    intermediate="images",
    missing_value=0.0,
    bonus_weight=0.0,
)


class Components(NamedTuple):
    """What was judged of each member; `has_*` bool says where a component is present.

    scores float [..., 4] axis scores of the final image in 1..5; format, step, reflection float [...] in [0, 1].
    """

    scores: Any
    format: Any
    step: Any
    has_step: Any
    reflection: Any
    has_reflection: Any


class GroupScores(NamedTuple):
    """float [P, M] each, but `used` bool [P, M]: the members that take part in the update.

    image_advantages compare outcomes alone, for the image tokens where these have advantages of their own.
    draft_advantages compare the drafts of a prompt; zeros without drafts.
    """

    outcome: jax.Array
    total: jax.Array
    bonus: jax.Array
    advantages: jax.Array
    image_advantages: jax.Array
    draft_advantages: jax.Array
    used: jax.Array


class DraftTruth(NamedTuple):
    """What the judge says of drafts: outcome float [P], R_o; right bool [P], all axes pass; present bool [P]."""

    outcome: Any
    right: Any
    present: Any


def rescale(scores: ArrayLike, scale: str) -> jax.Array:
    """What scores in 1..5, float [...], count in [0, 1]; see `RewardOptions.score_map`."""
    scores = jnp.asarray(scores)
    return scores / 5 if scale == "div5" else jnp.clip((scores - 1) / 4, 0, 1)


def outcome(scores: ArrayLike, options: RewardOptions = PAPER) -> jax.Array:
    """R_o float [...] in [0, 1] from axis scores float [..., 4] in 1..5."""
    weights = jnp.asarray(options.axis_weights, jnp.result_type(float)) / sum(options.axis_weights)
    return jnp.einsum("...a,a->...", rescale(jnp.asarray(scores), options.score_map), weights)


@jax.jit
def format_reward(tables: Tables, state: GrammarState, tokens: jax.Array) -> jax.Array:
    """R_f float [B]: 1 where the grammar, from `state`, accepts int [B, T] tokens (EOS, then any padding)."""
    tables = Tables(*map(jnp.asarray, tables))
    state = GrammarState(*map(jnp.asarray, state))
    last, _ = jax.lax.scan(lambda s, token: (advance(tables, s, token, jnp), None), state, jnp.asarray(tokens).T)
    return (last.node == ACCEPT).astype(jnp.float32)


def effective_weights(has_step: jax.Array, has_reflection: jax.Array, options: RewardOptions) -> jax.Array:
    """float [..., 4]: the weights of outcome, step, format and reflection for each answer."""
    full = (options.outcome_weight, options.step_weight, options.format_weight, options.reflection_weight)
    present = [jnp.ones_like(has_step), has_step, jnp.ones_like(has_step), has_reflection]
    if not options.renormalise:
        present = [jnp.ones_like(has_step)] * 4
    weights = jnp.stack([jnp.where(p, w, 0.0) for p, w in zip(present, full, strict=True)], -1)
    return weights * (sum(full) / weights.sum(-1, keepdims=True))


def total(
    outcome_reward: ArrayLike,
    format_reward: ArrayLike,
    step_reward: ArrayLike,
    has_step: ArrayLike,
    options: RewardOptions,
    reflection_reward: ArrayLike | None = None,
    has_reflection: ArrayLike | None = None,
) -> jax.Array:
    """R float [...]; `has_step`, `has_reflection` bool [...] say where R_s and R_r are present (None: nowhere)."""
    has_step = jnp.asarray(has_step)
    has_reflection = jnp.zeros_like(has_step) if has_reflection is None else jnp.asarray(has_reflection)
    reflection_reward = jnp.zeros_like(outcome_reward) if reflection_reward is None else reflection_reward
    parts = [
        jnp.asarray(outcome_reward),
        jnp.where(has_step, step_reward, options.missing_value),
        jnp.asarray(format_reward, jnp.result_type(float)),
        jnp.where(has_reflection, reflection_reward, options.missing_value),
    ]
    return (effective_weights(has_step, has_reflection, options) * jnp.stack(parts, -1)).sum(-1)


def complexity_bonus(
    rewards: jax.Array,
    images: jax.Array,
    valid: jax.Array,
    options: RewardOptions,
    outcome_reward: jax.Array | None = None,
) -> jax.Array:
    """The bonus alone, float [P, M], from R float [P, M], image counts int [P, M] and presence bool [P, M].

    A member that drew no image is never competitive, nor is one whose R_o, float [P, M], is below `bonus_min_outcome`.
    """
    counted = valid & (images > 0)
    if options.bonus_min_outcome and outcome_reward is not None:
        counted &= (
            outcome_reward >= options.bonus_min_outcome - 1e-6
        )  # R_o of a flawless image may round to just below 1
    best = jnp.max(jnp.where(counted, rewards, -jnp.inf), axis=1, keepdims=True)
    competitive = counted & (rewards >= best - options.epsilon)
    fewest = jnp.min(jnp.where(competitive, images, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    return jnp.where(competitive, options.bonus_weight * fewest / jnp.maximum(images, 1), 0.0)


def advantages(rewards: jax.Array, valid: jax.Array, options: RewardOptions) -> tuple[jax.Array, jax.Array]:
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
        centred = centred / (std + jnp.where(std > 0, options.std_floor, 1.0))
    return centred, used


@functools.partial(jax.jit, static_argnames="options")
def score_groups(parts: Components, images: jax.Array, present: jax.Array, options: RewardOptions) -> GroupScores:
    """Everything from judged components to advantages, for P groups of M at once.

    Args:
      parts: arrays [P, M] (scores [P, M, 4]); what stands where `present` is False never reaches a result.
      images: int [P, M], generated images; present: bool [P, M], members without a missing judgement.
    """
    parts = Components(*map(jnp.asarray, parts))
    outcome_reward = outcome(jnp.where(present[..., None], parts.scores, 1.0), options)
    reward = total(
        outcome_reward, parts.format, parts.step, parts.has_step, options, parts.reflection, parts.has_reflection
    )
    bonus = complexity_bonus(reward, images, present, options, outcome_reward)
    gains, used = advantages(reward + bonus, present, options)
    image_gains, _ = advantages(outcome_reward, present, options)
    reward = jnp.where(present, reward, 0.0)
    return GroupScores(outcome_reward, reward, bonus, gains, image_gains, jnp.zeros_like(gains), used)


def improvement(outcome_reward: jax.Array, images: jax.Array, drafts: DraftTruth) -> jax.Array:
    """What continuations gain over their draft, float [P, M] in [-1, 1]; takes the place of R_o.

    A continuation that stops at the draft (one image) earns 1 where the draft is right, and 0 where it is wrong; one
    that continues earns the difference of the outcomes.
    """
    stopped = jnp.where(drafts.right, 1.0, 0.0)[:, None]
    return jnp.where(images == 1, stopped, outcome_reward - jnp.asarray(drafts.outcome)[:, None])


@functools.partial(jax.jit, static_argnames=("options", "each"))
def score_draft_groups(
    parts: Components, images: jax.Array, present: jax.Array, drafts: DraftTruth, each: int, options: RewardOptions
) -> GroupScores:
    """As `score_groups`, for P drafts (`each` of a prompt, adjacent) with M continuations each.

    R = w_o improvement + w_s R_s + w_f R_f + w_r R_r, without the complexity bonus: what stopping is worth is in the
    improvement.  The value of a draft is the mean R (with the outcome itself) of its continuations; drafts of a prompt
    are compared by it.
    """
    parts = Components(*map(jnp.asarray, parts))
    drafts = DraftTruth(*map(jnp.asarray, drafts))
    present = jnp.asarray(present) & drafts.present[:, None]
    outcome_reward = outcome(jnp.where(present[..., None], parts.scores, 1.0), options)
    gain = improvement(outcome_reward, jnp.asarray(images), drafts)
    rest = (parts.format, parts.step, parts.has_step, options, parts.reflection, parts.has_reflection)
    reward = jnp.where(present, total(gain, *rest), 0.0)
    gains, used = advantages(reward, present, options)
    image_gains, _ = advantages(jnp.where(present, gain, 0.0), present, options)
    whole = jnp.where(present, total(outcome_reward, *rest), 0.0)
    judged = present.any(1)
    value = whole.sum(1) / jnp.maximum(present.sum(1), 1)
    draft_gains, _ = advantages(value.reshape(-1, each), judged.reshape(-1, each), options)
    draft_gains = jnp.broadcast_to(draft_gains.reshape(-1, 1), gains.shape)
    return GroupScores(outcome_reward, reward, jnp.zeros_like(gains), gains, image_gains, draft_gains, used)
