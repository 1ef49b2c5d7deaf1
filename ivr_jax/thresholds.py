"""From scores (1-5) to verdicts: the minimum that passes, axis by axis.

The released data construction asks for instruction 5 and 3 on the other axes, and for quality 4 once a request has
been taken apart into steps (every further drawing on a drawing costs quality, so steps must not start low).
"""

from __future__ import annotations

import dataclasses

from ivr_jax.errors import UserError
from ivr_jax.trajectory import AXES, Evaluation


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The lowest score, 1-5, that passes each axis."""

    instruction: float = 5
    consistency: float = 3
    quality: float = 3
    knowledge: float = 3

    def __post_init__(self) -> None:
        for axis in AXES:
            value = getattr(self, axis)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 5:
                raise UserError(f"the {axis} threshold is {value!r}.", "Give a number from 1 to 5.")

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
