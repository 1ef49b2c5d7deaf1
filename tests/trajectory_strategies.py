"""Any trajectory, for properties of formats; and services that answer as scripted."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ivr_jax.images import image_name
from ivr_jax.interfaces import RootCause
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Round, Sample, Step, Trajectory

characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
texts = st.text(characters, min_size=1, max_size=12).filter(str.strip)
verdicts = st.builds(AxisVerdict, st.booleans(), texts, st.sampled_from([1, 2, 2.5, 3, 4, 5]))
evaluations = st.builds(Evaluation, verdicts, verdicts, verdicts, verdicts)


@st.composite
def trajectories(draw) -> Trajectory:
    images = iter(draw(st.lists(st.integers(0, 255), min_size=9, max_size=9, unique=True)))
    first = Round(None, name(next(images)), draw(evaluations))
    mode, rounds = draw(st.sampled_from(Mode)), []
    if mode is Mode.REFLECTION:
        causes = draw(st.lists(st.builds(Reflection, texts, texts), min_size=1, max_size=3))
        rounds = [Round(cause, name(next(images)), draw(evaluations)) for cause in causes]
    elif mode is Mode.MULTI_STEP:
        steps = draw(st.lists(st.builds(Step, texts), min_size=1, max_size=5))
        rounds = [Round(step, name(next(images)), draw(evaluations), draw(st.none() | evaluations)) for step in steps]
    sources = tuple(name(next(images)) for _ in range(draw(st.integers(0, 2))))
    facts = draw(st.sampled_from([{}, {"edit_key": "free"}, {"edit_key": {"a": [1, None]}}]))
    category = "" if facts else draw(st.sampled_from(["", "addition"]))
    sample = Sample(
        draw(st.from_regex(r"[a-z夕é_ -]{1,9}z", fullmatch=True)).strip(),
        draw(texts),
        sources,
        draw(st.just("") | texts),
        category,
        facts,
    )
    return Trajectory(sample, (first, *rounds))


def pixels(value: int) -> np.ndarray:
    return np.full((3, 2, 3), value, np.uint8)


def name(value: int) -> str:
    return image_name(pixels(value))


PICTURES = {name(value): pixels(value) for value in range(256)}


class Services:
    """Fails G1 and every reflection; steps pass as scripted; draws 1, 2, 3, ..."""

    def __init__(self, steps: list[bool], whole: list[bool]):
        self.steps, self.whole, self.drawn = iter(steps), iter(whole), iter(range(1, 99))

    @staticmethod
    def verdict(passed: bool) -> Evaluation:
        return Evaluation(*(AxisVerdict(passed, "why", 5 if passed else 1) for _ in AXES))

    async def evaluate(self, *_):
        return self.verdict(next(self.whole))

    async def evaluate_step(self, *_):
        return self.verdict(next(self.steps))

    async def reflect(self, *_):
        return Reflection("a", "p")

    async def root_cause(self, *_):
        return RootCause.PROMPT_TOO_COMPLEX

    async def decompose(self, *_):
        return ("one", "two")

    async def generate(self, *_):
        return pixels(next(self.drawn))
