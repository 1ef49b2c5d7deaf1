"""Segments of an answer with the text or image that each carries, for the report's token bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivr_jax.report.answers import Segment
from ivr_jax.trajectory import Reflection, Step, Trajectory


def shown_segments(trajectory: Trajectory, segments: Sequence[Any]) -> tuple[Segment, ...]:
    """Codec segments with what they carry, for the report's token bars."""
    shown = []
    for segment in segments:
        round_ = trajectory.rounds[segment.round - 1]
        text = ""
        if segment.part == "S" and isinstance(round_.cause, Step):
            text = round_.cause.instruction
        elif segment.part == "R" and isinstance(round_.cause, Reflection):
            text = f"{round_.cause.failure_analysis} {round_.cause.improvement_plan}"
        elif segment.part == "E":
            text = "; ".join(f"{'pass' if axis.passed else 'fail'}: {axis.reason}" for axis in round_.evaluation.axes)
        image = round_.image if segment.part == "G" else None
        shown.append(Segment(segment.name, text, image, segment.end - segment.start, segment.loss))
    return tuple(shown)
