"""From parsed answers to reward components, with an `Analyzer` as the judge.

An answer that does not parse has no readable image: format 0, outcome at the floor of the scale.  A judge that fails
leaves the component *missing* (None), never a bad score.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import math
import numbers
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

import numpy as np

from ivr_jax.images import Images
from ivr_jax.interfaces import Analyzer, ServiceFailed
from ivr_jax.rewards.functions import PAPER, RewardOptions, outcome, rescale, total
from ivr_jax.trajectory import AXES, Evaluation, Reflection, Step, Trajectory


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer's components.

    Attributes:
      scores: the final image's four axis scores; None when the judge failed.
      format: 1 for a structurally valid answer, else 0.
      step: R_s, None when the answer has nothing that it is a mean over.
      step_failed: True when a judgement that R_s or R_r needs is missing.
      truth: the judge's evaluation of every generated image that was asked for, in order; None where it failed.
      reflection: R_r, None when there is no reflection or the rules have no R_r.
    """

    scores: tuple[float, ...] | None
    format: float
    step: float | None
    step_failed: bool = False
    truth: tuple[Evaluation | None, ...] = ()
    reflection: float | None = None

    @property
    def present(self) -> bool:
        """Whether everything that the reward needs was judged."""
        return self.scores is not None and not self.step_failed


INVALID = Judged(scores=(1.0,) * len(AXES), format=0.0, step=None)


async def judge_answer(
    analyzer: Analyzer,
    trajectory: Trajectory,
    images: Images,
    every_image: bool = False,
    options: RewardOptions = PAPER,
    format_reward: float = 1.0,
) -> Judged:
    """Judges a parsed answer: the final image on four axes, and whatever `options` makes R_s and R_r a mean of.

    Args:
      images: the sources and the generated images by name.
      every_image: evaluate all generated images, not only those that a reward needs.
      format_reward: R_f of the answer.
    """
    sample = trajectory.sample
    generated = [images[name] for name in trajectory.images]
    wanted = generated if every_image or options.step_reward_evals == "all" else generated[-1:]
    truth = await _outcomes(analyzer.evaluate(sample, images, image) for image in wanted)
    last = truth[-1]
    if last is None or not all(in_range(score, 1, 5) for score in last.scores):
        return Judged(None, format_reward, None, truth=truth)
    scores = tuple(float(score) for score in last.scores)
    own = [round_.evaluation for round_ in trajectory.rounds]
    counted = {"none": 0, "final": 1, "all": len(own)}[options.step_reward_evals]
    agreed = [t and float(e.passed == t.passed) for e, t in zip(own[::-1], truth[::-1], strict=False)][:counted]
    parts = _intermediate_images if options.intermediate == "images" else _intermediate_texts
    steps, reflections = parts(analyzer, trajectory, images, options)
    step_values = [*await _outcomes(steps), *agreed]
    reflection_values = await _outcomes(reflections)
    if not all(in_range(value, 0, 1) for value in (*step_values, *reflection_values)):
        return Judged(scores, format_reward, None, step_failed=True, truth=truth)
    return Judged(
        scores, format_reward, _mean(step_values), truth=truth, reflection=_mean(reflection_values)
    )


async def judge_answers(
    analyzer: Analyzer,
    answers: Sequence[tuple[Trajectory, Images] | None],
    every_image: bool = False,
    options: RewardOptions = PAPER,
    format_rewards: Sequence[float] | None = None,
) -> list[Judged]:
    """`judge_answer` for many; None (an answer that did not parse) is INVALID."""

    async def one(answer: tuple[Trajectory, Images] | None, format_reward: float) -> Judged:
        if answer is None:
            return INVALID
        return await judge_answer(analyzer, *answer, every_image, options, format_reward)

    formats = [1.0] * len(answers) if format_rewards is None else format_rewards
    return list(await asyncio.gather(*map(one, answers, formats)))


async def _outcomes(calls: Iterable[Awaitable[Any]]) -> tuple[Any, ...]:
    """The results of all calls, None where the judge failed.  Any other error is raised, after all have ended."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, ServiceFailed):
            raise result
    return tuple(None if isinstance(result, ServiceFailed) else result for result in results)


def _intermediate_texts(analyzer: Analyzer, trajectory: Trajectory, images: Images, options: RewardOptions):
    """Calls that rate each failure analysis, improvement plan and sub-instruction, shown the images before it."""
    calls, generated = [], [images[name] for name in trajectory.images]
    for n, round_ in enumerate(trajectory.rounds):
        texts: list[tuple[str, str]] = []
        if isinstance(round_.cause, Reflection):
            texts = [
                ("failure_analysis", round_.cause.failure_analysis),
                ("improvement_plan", round_.cause.improvement_plan),
            ]
        elif isinstance(round_.cause, Step):
            texts = [("step", round_.cause.instruction)]
        before = generated[:n]
        calls += [analyzer.judge_reasoning(trajectory.sample, images, kind, text, before) for kind, text in texts]
    return calls, ()


def _intermediate_images(analyzer: Analyzer, trajectory: Trajectory, images: Images, options: RewardOptions):
    """Calls that rate each step's image (the mean of its axes), and each reflection (the mean of its two texts)."""
    sample, generated = trajectory.sample, [images[name] for name in trajectory.images]
    before = [images[name] for name in sample.sources]

    async def step(instruction: str, previous: list, image: Any) -> float:
        evaluation = await analyzer.evaluate_step(sample, images, instruction, previous, image)
        if not all(in_range(score, 1, 5) for score in evaluation.scores):
            raise ServiceFailed(f"the judge scored a step {evaluation.scores}.", "Scores are from 1 to 5.")
        return float(rescale(sum(evaluation.scores) / len(AXES), options.score_map))

    async def reflection(cause: Reflection, previous: list) -> float:
        texts = (("failure_analysis", cause.failure_analysis), ("improvement_plan", cause.improvement_plan))
        ratings = await _outcomes(analyzer.judge_reasoning(sample, images, *text, previous) for text in texts)
        if not all(in_range(rating, 0, 1) for rating in ratings):
            raise ServiceFailed(f"the judge rated a reflection {ratings}.", "Ratings are in [0, 1].")
        return sum(ratings) / len(ratings)

    steps, reflections = [], []
    for n, round_ in enumerate(trajectory.rounds):
        if isinstance(round_.cause, Step):
            steps.append(step(round_.cause.instruction, before, generated[n]))
            before = [generated[n]]
        elif isinstance(round_.cause, Reflection):
            reflections.append(reflection(round_.cause, generated[:n]))
    return steps, reflections


def in_range(value: Any, low: float, high: float) -> bool:
    """Whether `value` is a finite number from `low` to `high`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return number and low <= value <= high


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def score_answer(
    trajectory: Trajectory,
    images: Images,
    analyzer: Analyzer,
    options: RewardOptions = PAPER,
    format_reward: float = 1.0,
) -> dict[str, float | None]:
    """Reward components of one parsed answer, judged by `analyzer` (blocking; see `judge_answer` for many at a time).

    Args:
      trajectory: the answer; images: uint8 [height, width, 3] of its sources and generated images, by name.
      options: weights and rules, `PAPER` or `RELEASED` of `ivr_jax.rewards.functions`, or your own.
      format_reward: R_f of the answer; a parsed answer of the strict grammar has 1.

    Returns:
      `outcome`, `format`, `step`, `reflection` and `total`, in [0, 1]; a component that does not apply, or whose
      judgement failed, is None, and so is the total of an answer with a missing judgement.
    """
    calls = judge_answer(analyzer, trajectory, images, options=options, format_reward=format_reward)
    with concurrent.futures.ThreadPoolExecutor(1) as own_thread:  # a notebook's thread runs an event loop already
        judged = own_thread.submit(asyncio.run, calls).result()
    return components(judged, options)


def components(judged: Judged, options: RewardOptions) -> dict[str, float | None]:
    """`outcome`, `format`, `step`, `reflection` and `total` of one judged answer; None where missing or absent."""
    parts = {"format": judged.format, "step": judged.step, "reflection": judged.reflection}
    if not judged.present:
        return {"outcome": None, **parts, "total": None}
    scored = outcome(np.asarray(judged.scores, np.float32), options)
    step, reflection = (
        (np.float32(value or 0.0), np.bool_(value is not None)) for value in (judged.step, judged.reflection)
    )
    reward = total(scored, np.float32(judged.format), *step, options, *reflection)
    return {"outcome": float(scored), **parts, "total": float(reward)}
