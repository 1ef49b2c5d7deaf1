"""From parsed answers to reward components, with an `Analyzer` as the judge.

An answer that does not parse has no readable image: format 0, outcome at the floor of the scale.  A judge that fails
leaves the component *missing* (None), never a bad score.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from ivr_jax.construct.interfaces import Analyzer, Images, Pixels
from ivr_jax.errors import UserError
from ivr_jax.trajectory import AXES, Evaluation, Reflection, Sample, Step, Trajectory


class JudgeFailed(UserError):
    """The judge gave no usable answer; the component is missing."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer's components.

    Attributes:
      scores: the final image's four axis scores; None when the judge failed.
      format: 1 for a structurally valid answer, else 0.
      step: mean validity of the intermediate texts; None when there are none.
      step_failed: True when a judgement of an intermediate text is missing.
      truth: the judge's evaluation of every drawn image that was asked for, in order.
    """

    scores: tuple[float, ...] | None
    format: float
    step: float | None
    step_failed: bool = False
    truth: tuple[Evaluation, ...] = ()

    @property
    def present(self) -> bool:
        return self.scores is not None and not self.step_failed


INVALID = Judged(scores=(1.0,) * len(AXES), format=0.0, step=None)


async def judge_answer(analyzer: Analyzer, trajectory: Trajectory, images: Images, every_image: bool = False) -> Judged:
    """Judges a parsed answer: the final image on four axes, each intermediate text for its logic.

    `images` holds the sources and the drawn images by name; `every_image` evaluates all of them, not only the last.
    """
    sample = trajectory.sample
    drawn = [images[name] for name in trajectory.images]
    try:
        truth = await asyncio.gather(
            *(analyzer.evaluate(sample, images, x) for x in (drawn if every_image else drawn[-1:]))
        )
        scores = tuple(float(s) for s in truth[-1].scores)
    except JudgeFailed:
        return Judged(None, 1.0, None)
    texts = list(_intermediate_texts(trajectory))
    try:
        values = await asyncio.gather(
            *(_validity(analyzer, sample, images, kind, text, drawn[:n]) for n, kind, text in texts)
        )
    except JudgeFailed:
        return Judged(scores, 1.0, None, step_failed=True, truth=tuple(truth))
    return Judged(scores, 1.0, sum(values) / len(values) if values else None, truth=tuple(truth))


async def judge_answers(
    analyzer: Analyzer, answers: Sequence[tuple[Trajectory, Images] | None], every_image: bool = False
) -> list[Judged]:
    """`judge_answer` for many; None (an answer that did not parse) is INVALID."""

    async def one(answer: tuple[Trajectory, Images] | None) -> Judged:
        return INVALID if answer is None else await judge_answer(analyzer, *answer, every_image=every_image)

    return list(await asyncio.gather(*map(one, answers)))


def _intermediate_texts(trajectory: Trajectory):
    """(images drawn before it, kind, text) of each failure analysis, improvement plan and sub-instruction."""
    for n, round_ in enumerate(trajectory.rounds):
        if isinstance(round_.cause, Reflection):
            yield n, "failure_analysis", round_.cause.failure_analysis
            yield n, "improvement_plan", round_.cause.improvement_plan
        elif isinstance(round_.cause, Step):
            yield n, "step", round_.cause.instruction


async def _validity(
    analyzer: Analyzer, sample: Sample, images: Images, kind: str, text: str, previous: Sequence[Pixels]
) -> float:
    value = await analyzer.judge_reasoning(sample, images, kind, text, previous)
    if not 0 <= value <= 1:
        raise JudgeFailed(f"the judge rated a {kind} {value!r}.", "Ratings are in [0, 1].")
    return value
