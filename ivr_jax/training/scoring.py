"""From judged rollouts to rewards, advantages and metrics.  P prompts, M members of a group; arrays [P, M]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ivr_jax.report.answers import Answer, make_answer
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.judge import Judged
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.trajectory import AXES, Mode, Sample


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout with rewards.  Arrays [P, M]; `components` holds outcome, format, step, has_step, total and so on."""

    judged: list[Judged]
    components: dict[str, np.ndarray]
    images: np.ndarray
    present: np.ndarray
    bonus: np.ndarray
    advantages: np.ndarray
    used: np.ndarray


def score(rollout: Rollout, judged: Sequence[Judged], group: int, options: reward_functions.RewardOptions) -> Scored:
    """Rewards, bonus and advantages of a rollout's answers (P * group of them, groups adjacent)."""

    def grid(values: Sequence[Any], dtype: Any = np.float32) -> np.ndarray:
        return np.asarray(values, dtype).reshape(-1, group)

    present = grid([j.present for j in judged], bool)
    floor = (1.0,) * len(AXES)
    parts = reward_functions.Components(
        np.asarray([floor if j.scores is None else j.scores for j in judged], np.float32).reshape(-1, group, len(AXES)),
        grid([j.format for j in judged]),
        grid([j.step or 0.0 for j in judged]),
        grid([j.step is not None for j in judged], bool),
        grid([j.reflection or 0.0 for j in judged]),
        grid([j.reflection is not None for j in judged], bool),
    )
    images = grid([len(a.trajectory.rounds) if a else 0 for a in rollout.answers], np.int32)
    found = reward_functions.score_groups(parts, images, present, options)
    components = {**parts._asdict(), "outcome": np.asarray(found.outcome), "total": np.asarray(found.total)}
    return Scored(
        list(judged), components, images, present, *map(np.asarray, (found.bonus, found.advantages, found.used))
    )


def summary(rollout: Rollout, scored: Scored) -> dict[str, Any]:
    """Metrics of one rollout; pairs are (sum, denominator)."""
    present, parts = scored.present, scored.components
    reward = parts["total"] + scored.bonus

    def mean(values: np.ndarray, where: np.ndarray = present) -> tuple[float, float]:
        return float(np.where(where, values, 0.0).sum()), float(where.sum())

    contrast = [np.ptp(r[p]) > 1e-6 if p.sum() > 1 else False for r, p in zip(reward, present, strict=True)]
    valid = [a is not None and j.format > 0 for a, j in zip(rollout.answers, scored.judged, strict=True)]
    modes = [a.trajectory.mode if a and ok else None for a, ok in zip(rollout.answers, valid, strict=True)]
    shares = {f"mode_{mode.value}": (float(sum(m is mode for m in modes)), float(len(modes))) for mode in Mode}
    return {
        "reward": mean(parts["total"]),
        "outcome": mean(parts["outcome"]),
        "images": mean(scored.images),
        "format": mean(parts["format"]),
        "step_reward": mean(parts["step"], present & parts["has_step"]),
        "reflection_reward": mean(parts["reflection"], present & parts["has_reflection"]),
        "bonus": mean(scored.bonus),
        **shares,
        **calibration(rollout, scored),
        "frac_groups_nonzero_std": (float(sum(contrast)), float(len(contrast))),
        "groups_skipped": (float((~scored.used.any(1)).sum()), float(len(contrast))),
        "missing": float(present.size - present.sum()),
        "work_tokens": float(rollout.samples.lengths.sum()),
        "answer_tokens": (float(rollout.samples.lengths.sum()), float(len(rollout.answers))),
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
    rollout: Rollout, samples: Sequence[Sample], scored: Scored, rows: Sequence[int]
) -> tuple[list[Answer], dict[str, np.ndarray]]:
    """Answers `rows` of a rollout as records with their rewards, and every image that they name."""
    records, images = [], {}
    for row in rows:
        drawn, judged = rollout.answers[row], scored.judged[row]
        p, m = divmod(row, rollout.group)
        rewards: dict[str, float] = {}
        if scored.present[p, m]:
            parts = scored.components
            rewards = {name: float(parts[name][p, m]) for name in ("total", "outcome", "format")}
            rewards |= {"bonus": float(scored.bonus[p, m]), "advantage": float(scored.advantages[p, m])}
            rewards |= {n: float(parts[n][p, m]) for n in ("step", "reflection") if parts[f"has_{n}"][p, m]}
        if drawn is None:
            records.append(Answer(samples[p], None, rollout.errors[row], rewards=rewards))
            continue
        invalid = "" if judged.format > 0 else "the answer does not continue as its verdict says."
        records.append(
            make_answer(drawn.trajectory, drawn.segments, error=invalid, truth=judged.truth, rewards=rewards)
        )
        images |= drawn.images
    return records, images
