"""From judged answers to rewards, advantages and metrics.  P prompts, M members of a group; arrays [P, M]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax.images import Images
from ivr_jax.report.answers import EvaluatedAnswer, make_answer
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.judge import Judged
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.trajectory import AXES, Mode, Sample, Trajectory


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout with rewards; arrays [P, M].

    Attributes:
      judged: what the judge said of each answer.
      components: outcome, format, step, has_step, reflection, has_reflection, total (R before the bonus).
      images: generated images; present: members without a missing judgement.
      bonus, advantages: float32; used: bool, the members that take part in the update.
      image_advantages: of image tokens, where these have their own; draft_advantages: of drafts; None: none.
    """

    judged: list[Judged]
    components: dict[str, np.ndarray]
    images: np.ndarray
    present: np.ndarray
    bonus: np.ndarray
    advantages: np.ndarray
    used: np.ndarray
    image_advantages: np.ndarray | None = None
    draft_advantages: np.ndarray | None = None

    @property
    def has_contrast(self) -> np.ndarray:
        """bool [P]: groups in which not all advantages are 0."""
        gains = [x for x in (self.advantages, self.image_advantages, self.draft_advantages) if x is not None]
        return np.any([(self.used & (x != 0)).any(1) for x in gains], axis=0)


def score_rollout(
    rollout: Rollout,
    judged: Sequence[Judged],
    options: reward_functions.RewardOptions,
    grpo: GrpoOptions | None = None,
    drafts: Sequence[Judged] | None = None,
) -> Scored:
    """Rewards, bonus and advantages of a rollout's answers.

    Args:
      grpo: what is compared with what, and which answers are left out.
      drafts: judgements of the first images, one a group, where the groups are continuations of these.
    """
    grpo = grpo or GrpoOptions()

    def grid(values: Sequence[Any], dtype: Any = np.float32) -> np.ndarray:
        return np.asarray(values, dtype).reshape(-1, rollout.group_size)

    present = grid([j.present for j in judged], bool)
    if grpo.drop_truncated:
        present &= ~grid(rollout.truncated, bool)
    floor = (1.0,) * len(AXES)
    scores = np.asarray([floor if j.scores is None else j.scores for j in judged], np.float32)
    components = reward_functions.Components(
        scores.reshape(-1, rollout.group_size, len(AXES)),
        grid([j.format for j in judged]),
        grid([j.step or 0.0 for j in judged]),
        grid([j.step is not None for j in judged], bool),
        grid([j.reflection or 0.0 for j in judged]),
        grid([j.reflection is not None for j in judged], bool),
    )
    images = grid([len(a.trajectory.rounds) if a else 0 for a in rollout.answers], np.int32)
    if drafts is None:
        groups = reward_functions.score_groups(components, images, present, options)
    else:
        truth = _draft_truth(drafts, options)
        groups = reward_functions.score_draft_groups(components, images, present, truth, grpo.drafts, options)
    groups = reward_functions.GroupScores(*map(np.asarray, groups))
    parts = {**components._asdict(), "outcome": groups.outcome, "total": groups.total}
    learns_drafts = drafts is not None and grpo.draft_source == "rollout"
    return Scored(
        list(judged),
        parts,
        images,
        present,
        groups.bonus,
        groups.advantages,
        groups.used,
        groups.image_advantages if grpo.modality_advantages else None,
        groups.draft_advantages if learns_drafts else None,
    )


def _draft_truth(drafts: Sequence[Judged], options: reward_functions.RewardOptions) -> reward_functions.DraftTruth:
    present = np.array([j.scores is not None for j in drafts])
    scores = np.array([j.scores or (1.0,) * len(AXES) for j in drafts], np.float32)
    right = np.array([bool(j.truth) and j.truth[-1] is not None and j.truth[-1].passed for j in drafts])
    return reward_functions.DraftTruth(np.asarray(reward_functions.outcome(scores, options)), right, present)


def draft_answers(rollout: Rollout) -> list[tuple[Trajectory, Images] | None]:
    """What the judge needs of each group's draft: an answer of the first image alone; None where no answer parses."""
    answers: list[tuple[Trajectory, Images] | None] = []
    for start in range(0, len(rollout.answers), rollout.group_size):
        answer = next((a for a in rollout.answers[start : start + rollout.group_size] if a is not None), None)
        if answer is None:
            answers.append(None)
            continue
        first = dataclasses.replace(answer.trajectory.rounds[0], cause=None)
        answers.append((Trajectory(answer.trajectory.sample, (first,)), answer.images))
    return answers


def separate_drafts(judged: list[Judged], rollout: Rollout) -> tuple[list[Judged], list[Judged] | None]:
    """The judgements of answers, and those of drafts or None; each process submitted its answers, then its drafts."""
    if not rollout.draft_length:
        return judged, None
    answers = len(rollout.answers) // jax.process_count()
    drafts = answers // rollout.group_size
    by_process = [judged[start : start + answers + drafts] for start in range(0, len(judged), answers + drafts)]
    return [j for part in by_process for j in part[:answers]], [j for part in by_process for j in part[answers:]]


def token_advantages(rollout: Rollout, scored: Scored, grpo: GrpoOptions, visual_start: int) -> np.ndarray:
    """float32 [N, A]: the advantage of every token of every answer; see `GrpoOptions` for what it is made of."""
    text = scored.advantages.reshape(-1, 1)
    image = text if scored.image_advantages is None else scored.image_advantages.reshape(-1, 1)
    gains = np.where(rollout.samples.tokens >= visual_start, image, text)
    if scored.draft_advantages is not None:
        draft = scored.draft_advantages.reshape(-1, 1)
        in_draft = np.arange(gains.shape[1]) < rollout.draft_length
        gains = gains + draft if grpo.credit == "broadcast" else np.where(in_draft, draft, gains)
    return gains.astype(np.float32)


def summary(rollout: Rollout, scored: Scored) -> dict[str, Any]:
    """Metrics of one rollout; pairs are (sum, denominator)."""
    present, parts = scored.present, scored.components
    reward = parts["total"] + scored.bonus
    answers, groups = float(len(rollout.answers)), float(len(present))

    def mean(values: np.ndarray, where: np.ndarray = present) -> tuple[float, float]:
        return float(np.where(where, values, 0.0).sum()), float(where.sum())

    differs = [np.ptp(r[p]) > 1e-6 if p.sum() > 1 else False for r, p in zip(reward, present, strict=True)]
    valid = [a is not None and j.format > 0 for a, j in zip(rollout.answers, scored.judged, strict=True)]
    modes = [a.trajectory.mode if a and ok else None for a, ok in zip(rollout.answers, valid, strict=True)]
    return {
        "reward": mean(parts["total"]),
        "outcome": mean(parts["outcome"]),
        "images": mean(scored.images),
        "format": mean(parts["format"]),
        "step_reward": mean(parts["step"], present & parts["has_step"]),
        "reflection_reward": mean(parts["reflection"], present & parts["has_reflection"]),
        "bonus": mean(scored.bonus),
        **{f"mode_{mode.value}": (float(sum(m is mode for m in modes)), answers) for mode in Mode},
        **calibration(rollout, scored),
        "frac_groups_nonzero_std": (float(sum(differs)), groups),
        "groups_skipped": (float((~scored.has_contrast).sum()), groups),
        "truncated": (float(rollout.truncated.sum()), answers),
        "missing": float(sum(not j.present for j in scored.judged)),
        "work_tokens": float(rollout.samples.lengths.sum()),
        "answer_tokens": (float(rollout.samples.lengths.sum()), answers),
    }


def calibration(rollout: Rollout, scored: Scored) -> dict[str, tuple[float, float]]:
    """P(pass | right) and P(pass | wrong) of the answers' own evaluations, by the judge's of the same images.

    An answer ends as a rule on an image that it passes, so this says little when only final images are judged.
    """
    passed: dict[bool, list[bool]] = {True: [], False: []}
    for answer, judged in zip(rollout.answers, scored.judged, strict=True):
        rounds = answer.trajectory.rounds if answer is not None else ()
        for own, truth in zip(rounds[::-1], judged.truth[::-1], strict=False):
            if truth is not None:
                passed[truth.passed].append(own.evaluation.passed)
    return {
        f"pass_given_{name}": (float(sum(passed[right])), float(len(passed[right])))
        for name, right in (("right", True), ("wrong", False))
    }


def shown_answers(
    rollout: Rollout, samples: Sequence[Sample], scored: Scored, numbers: Sequence[int]
) -> tuple[list[EvaluatedAnswer], dict[str, np.ndarray]]:
    """The answers `numbers` of a rollout as records with their rewards, and every image that they name."""
    records, images = [], {}
    for number in numbers:
        answer, judged = rollout.answers[number], scored.judged[number]
        group, member = divmod(number, rollout.group_size)
        rewards = rewards_of(scored, group, member)
        if answer is None:
            records.append(EvaluatedAnswer(samples[group], None, rollout.errors[number], rewards=rewards))
            continue
        invalid = "" if judged.format > 0 else "the answer does not continue as its verdict says."
        records.append(
            make_answer(answer.trajectory, answer.segments, error=invalid, truth=judged.truth, rewards=rewards)
        )
        images |= answer.images
    return records, images


def rewards_of(scored: Scored, group: int, member: int) -> dict[str, float]:
    """Rewards of one answer by name; none where its judgement is missing."""
    if not scored.present[group, member]:
        return {}
    parts = {name: values[group, member] for name, values in scored.components.items()}
    rewards = {name: float(parts[name]) for name in ("total", "outcome", "format")}
    rewards |= {"bonus": float(scored.bonus[group, member]), "advantage": float(scored.advantages[group, member])}
    return rewards | {name: float(parts[name]) for name in ("step", "reflection") if parts[f"has_{name}"]}
