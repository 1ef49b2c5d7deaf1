"""The paper's escalation: from a request and a first image to a trajectory, or to a reason for having none.

    G1 passes                         -> direct         G1 E1
    else up to 3 reflections          -> reflection     G1 E1 R1 G2 E2 ...
    else why did they all fail?
      anything but "too complex"      -> dropped
      too complex: 2-5 atomic steps   -> multi-step     G1 E1 S2 G2 E2 ...

Each step is drawn on the image before it, the first one on the *sources* (not on the failed G1), judged by itself and
tried up to 3 times.  What is stored is pruned: the failed reflections and the failed tries of a step go, `G1 E1` stays.
Every stored evaluation judges against the whole request, so while steps remain it fails, and the last one
passes; what the analyzer thought of the step alone is kept beside it as `Round.step_evaluation`.

Choices that the paper leaves open: a step whose image already meets the whole request ends the trajectory, even if the
plan has more steps; once there are steps, the multi-step thresholds judge the whole request too; a later step gets the
last image in the place of the first source, followed by the other sources.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Annotated

from ivr_jax.config import Range, Section
from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels, image_name
from ivr_jax.interfaces import Analyzer, Attempt, Generator, RootCause
from ivr_jax.thresholds import MULTI_STEP, WHOLE_REQUEST, Thresholds
from ivr_jax.trajectory import MAX_REFLECTIONS, MAX_STEPS, Evaluation, Reflection, Round, Sample, Step, Trajectory


@dataclasses.dataclass(frozen=True)
class Rules(Section, name="rules"):
    """Every threshold and every count of the escalation.

    Attributes:
      thresholds: turn the scores of G1 and of reflected images into verdicts; None lets the analyzer's verdicts stand.
      step_thresholds: the same for everything that is drawn step by step; None means `thresholds` there too.
      max_reflections: rounds of critique before the root cause is asked for, 0-3.
      min_steps, max_steps: how long a usable plan is.
      step_tries: drawings of one step before the sample is dropped.
      max_step_chars: how long one step's instruction may be.
    """

    thresholds: Thresholds | None = None
    step_thresholds: Thresholds | None = None
    max_reflections: Annotated[int, Range(0, MAX_REFLECTIONS)] = MAX_REFLECTIONS
    min_steps: Annotated[int, Range(1, MAX_STEPS)] = 2
    max_steps: Annotated[int, Range(1, MAX_STEPS)] = MAX_STEPS
    step_tries: Annotated[int, Range(1, 100)] = 3
    max_step_chars: Annotated[int, Range(1, 100_000)] = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_steps > self.max_steps:
            raise UserError(f"`rules.min_steps` is {self.min_steps}.", f"Give at most max_steps = {self.max_steps}.")


RELEASED_RULES = Rules(thresholds=WHOLE_REQUEST, step_thresholds=MULTI_STEP, min_steps=1)


class Drop(enum.StrEnum):
    """Why a sample yields no trajectory."""

    AMBIGUOUS_PROMPT = "ambiguous_prompt"
    GENERATOR_LIMIT = "generator_limit"
    UNKNOWN_CAUSE = "unknown_cause"
    BAD_PLAN = "bad_plan"
    STEP_FAILED = "step_failed"
    FINAL_FAILED = "final_failed"


_DROP_OF_CAUSE = {
    RootCause.AMBIGUOUS_PROMPT: Drop.AMBIGUOUS_PROMPT,
    RootCause.GENERATOR_LIMIT: Drop.GENERATOR_LIMIT,
    RootCause.UNKNOWN: Drop.UNKNOWN_CAUSE,
}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One image of the unpruned history.

    Attributes:
      cause: what led to it; None for G1.
      image: its name.
      evaluation: against the whole request; None for a try that already failed as a step.
      step_evaluation: against its step alone; None outside multi-step.
    """

    cause: Reflection | Step | None
    image: str
    evaluation: Evaluation | None
    step_evaluation: Evaluation | None = None

    @property
    def kept(self) -> bool:
        """False for a failed try of a step."""
        return self.step_evaluation is None or self.step_evaluation.passed


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
      sample: the request.
      trajectory: the pruned trajectory, or None when the sample was dropped.
      drop: why it was dropped, or None.
      history: everything that was drawn, in order, nothing pruned.
      images: name -> uint8 [height, width, 3], of the sources and of the whole history.
      root_cause: what the analyzer named, when it was asked.
      plan: the steps it proposed, when it was asked.
    """

    sample: Sample
    trajectory: Trajectory | None
    drop: Drop | None
    history: tuple[Drawing, ...]
    images: dict[str, Pixels]
    root_cause: RootCause | None = None
    plan: tuple[str, ...] = ()


def prune(history: Sequence[Drawing]) -> tuple[Round, ...]:
    """The rounds worth keeping of a history that ended well.

    Without steps all of it: each reflection answers the image before.  With steps G1, then the step images that
    passed as steps; the reflections that repaired nothing and the failed tries go.
    """
    steps = [d for d in history if isinstance(d.cause, Step)]
    kept = [history[0], *(d for d in steps if d.kept)] if steps else list(history)
    rounds = []
    for drawing in kept:
        if drawing.evaluation is None:
            raise ValueError(f"image {drawing.image} is kept, but nobody judged it against the whole request")
        rounds.append(Round(drawing.cause, drawing.image, drawing.evaluation, drawing.step_evaluation))
    return tuple(rounds)


class _Escalation:
    """One sample on its way; `drawn` (the history) and `images` (its pixels, and the sources') grow."""

    def __init__(
        self,
        sample: Sample,
        images: Images,
        analyzer: Analyzer,
        generator: Generator,
        rules: Rules,
        given: Sequence[tuple[Reflection, Pixels]],
        baseline: Generator,
    ):
        missing = [name for name in sample.sources if name not in images]
        if missing:
            raise UserError(
                f"sample {sample.key!r} names the source image {missing[0]}, which was not given.",
                "Pass every source with the sample.",
            )
        self.sample, self.analyzer, self.generator, self.rules = sample, analyzer, generator, rules
        self.sources = [images[name] for name in sample.sources]
        self.given_rounds, self.baseline = list(given), baseline
        self.source_images = {name: images[name] for name in sample.sources}
        self.images = dict(self.source_images)
        self.drawn: list[Drawing] = []
        self.root_cause: RootCause | None = None
        self.plan: tuple[str, ...] = ()

    def record(
        self,
        cause: Reflection | Step | None,
        image: Pixels,
        evaluation: Evaluation | None,
        step_evaluation: Evaluation | None = None,
    ) -> bool:
        """Adds an image to the history; true when it meets the whole request."""
        name = image_name(image)
        self.images[name] = image
        self.drawn.append(Drawing(cause, name, evaluation, step_evaluation))
        return evaluation is not None and evaluation.passed

    async def judged(self, image: Pixels, thresholds: Thresholds | None) -> Evaluation:
        evaluation = await self.analyzer.evaluate(self.sample, self.source_images, image)
        return thresholds.judge(evaluation) if thresholds else evaluation

    async def direct(self, first_image: Pixels | None) -> bool:
        image = first_image
        if image is None:
            image = await self.baseline.generate(self.sample, self.sample.prompt, self.sources)
        return self.record(None, image, await self.judged(image, self.rules.thresholds))

    async def reflection(self, attempt: int) -> bool:
        """One round: a critique of the last image, and a new image drawn from the sources with it."""
        last = self.drawn[-1]
        if attempt <= len(self.given_rounds):
            critique, image = self.given_rounds[attempt - 1]
        else:
            critique = await self.analyzer.reflect(
                self.sample, self.source_images, self.images[last.image], last.evaluation
            )
            image = await self.generator.generate(self.sample, self.sample.prompt, self.sources, critique, attempt)
        return self.record(critique, image, await self.judged(image, self.rules.thresholds))

    async def find_root_cause(self) -> Drop | None:
        attempts = [
            Attempt(self.images[d.image], d.evaluation, d.cause if isinstance(d.cause, Reflection) else None)
            for d in self.drawn
        ]
        self.root_cause = await self.analyzer.root_cause(self.sample, self.source_images, attempts)
        return _DROP_OF_CAUSE.get(self.root_cause)

    async def make_plan(self) -> Drop | None:
        self.plan = tuple(await self.analyzer.decompose(self.sample, self.source_images))
        fits = self.rules.min_steps <= len(self.plan) <= self.rules.max_steps
        usable = all(step.strip() and len(step) <= self.rules.max_step_chars for step in self.plan)
        return None if fits and usable else Drop.BAD_PLAN

    async def steps(self) -> Drop | None:
        """Draws the plan, each step on the image before it; None when the whole request is met in the end."""
        previous = self.sources
        for instruction in self.plan:
            image = await self.step(instruction, previous)
            if image is None:
                return Drop.STEP_FAILED
            if self.drawn[-1].evaluation.passed:
                return None
            previous = [image, *self.sources[1:]]
        return Drop.FINAL_FAILED

    async def step(self, instruction: str, previous: Sequence[Pixels]) -> Pixels | None:
        """The first try that passes as a step, judged against the whole request too; None when no try does."""
        thresholds = self.rules.step_thresholds or self.rules.thresholds
        for attempt in range(self.rules.step_tries):
            image = await self.generator.generate(self.sample, instruction, previous, None, attempt)
            alone = await self.analyzer.evaluate_step(self.sample, self.source_images, instruction, previous, image)
            if thresholds:
                alone = thresholds.judge(alone)
            whole = await self.judged(image, thresholds) if alone.passed else None
            self.record(Step(instruction), image, whole, alone)
            if alone.passed:
                return image
        return None

    def outcome(self, drop: Drop | None = None) -> Outcome:
        trajectory = None if drop else Trajectory(self.sample, prune(self.drawn))
        return Outcome(self.sample, trajectory, drop, tuple(self.drawn), self.images, self.root_cause, self.plan)


async def construct(
    sample: Sample,
    images: Images,
    first_image: Pixels | None,
    analyzer: Analyzer,
    generator: Generator,
    rules: Rules | None = None,
    given: Sequence[tuple[Reflection, Pixels]] = (),
    baseline: Generator | None = None,
) -> Outcome:
    """Runs the escalation for one sample.

    Args:
      sample: the request.
      images: the pixels of its sources, by name.
      first_image: G1, drawn by the model to be trained (uint8 [height, width, 3]); None lets it be drawn.
      analyzer, generator: the two services; what they raise is passed on.
      rules: thresholds and counts; `Rules()` when None.
      given: reflections and the images drawn from them, by someone else; they are judged like others, and the services
        are asked for further ones only.
      baseline: draws G1 where it is not given; `generator` when None.

    Returns:
      The outcome, with a trajectory or a reason for having none.
    """
    run = _Escalation(sample, images, analyzer, generator, rules or Rules(), given, baseline or generator)
    if await run.direct(first_image):
        return run.outcome()
    for attempt in range(1, run.rules.max_reflections + 1):
        if await run.reflection(attempt):
            return run.outcome()
    for stage in (run.find_root_cause, run.make_plan, run.steps):
        drop = await stage()
        if drop:
            return run.outcome(drop)
    return run.outcome()


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `construct` that differ from sample to sample."""

    sample: Sample
    images: Images = dataclasses.field(default_factory=dict)
    first_image: Pixels | None = None
    given: tuple[tuple[Reflection, Pixels], ...] = ()
