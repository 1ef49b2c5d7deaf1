"""From scores (1-5) to verdicts: the minimum that passes, axis by axis.

The released data construction asks for instruction 5 and 3 on the other axes, and for quality 4 once a request has
been taken apart into steps (every further drawing on a drawing costs quality, so steps must not start low).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from ivr_jax.config import Range, Section
from ivr_jax.trajectory import AXES, Evaluation

Score = Annotated[float, Range(1, 5)]


@dataclasses.dataclass(frozen=True)
class Thresholds(Section, name="thresholds"):
    """The lowest score, 1-5, that passes each axis."""

    instruction: Score = 5
    consistency: Score = 3
    quality: Score = 3
    knowledge: Score = 3

    def judge(self, evaluation: Evaluation) -> Evaluation:
        """`evaluation` with its verdicts taken from its scores; an axis without a score keeps its verdict."""
        judged = {}
        for axis in AXES:
            verdict = getattr(evaluation, axis)
            if verdict.score is not None:
                verdict = dataclasses.replace(verdict, passed=verdict.score >= getattr(self, axis))
            judged[axis] = verdict
        return dataclasses.replace(evaluation, **judged)


WHOLE_REQUEST = Thresholds()
MULTI_STEP = Thresholds(quality=4)
