"""The exact ANALYZER: judges pixels against the scene that the request leads to.

`WorldAnalyzer` implements `ivr_jax.interfaces.Analyzer`; every coroutine has a plain function of the same name with
`_sync`.  What an image shows is read from its pixels alone (`ivr_jax.world.recognise`); what it should show comes from
`Sample.facts`.

Strictness is deliberate: one wrong cell fails its axis, because a judge that lets near misses pass teaches a model
that near misses are cheap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels
from ivr_jax.interfaces import Attempt, RootCause
from ivr_jax.trajectory import AXES, MAX_STEPS, AxisVerdict, Evaluation, Reflection, Sample
from ivr_jax.world import judgement, language
from ivr_jax.world.edits import Edit, EditError, changes, touches
from ivr_jax.world.facts import Facts, facts_of
from ivr_jax.world.scene import FOREIGN

UNCLEAR = "unclear request"  # the reason when a step is outside the language


class WorldAnalyzer:
    """Exact judgements of micro-world samples: an `Analyzer`.

    Args:
      threshold: the score from which an axis passes: one number for all, or one for each axis by name.  The default
        of 5 accepts no wrong place at all.
      most_named: reflections name at most this many wrong places, in reading order, so that the critique of a ruined
        image stays short.
      observe: whether evaluations begin with an observation: what is wanted and seen, place by place.
    """

    def __init__(self, threshold: float | Mapping[str, float] = 5.0, most_named: int = 9, observe: bool = False):
        thresholds = dict(threshold) if isinstance(threshold, Mapping) else dict.fromkeys(AXES, float(threshold))
        if set(thresholds) != set(AXES) or not all(1 <= value <= 5 for value in thresholds.values()):
            raise UserError(f"{threshold!r} is no threshold.",
                            f"Give a number from 1 to 5, or one for each of {', '.join(AXES)}.")
        self.thresholds = thresholds
        self.most_named = most_named
        self.observe = observe

    # -- scenes --

    def evaluate_view(self, facts: Facts, view: judgement.View) -> Evaluation:
        """The evaluation of what an image shows."""
        said = ""
        if self.observe:
            said = judgement.observe(view, facts.canvas, facts.edits, facts.sources, facts.level)
        return judgement.compare(view, facts.target, facts.touches()).evaluation(self.thresholds, said)

    def reflect_view(self, facts: Facts, view: judgement.View) -> Reflection:
        """Failure types and places, then what each wrong place should hold, in reading order."""
        touched = facts.touches()
        named = judgement.compare(view, facts.target, touched).wrong[: self.most_named]
        found = judgement.faults(view, facts.canvas, facts.target, touched, named)
        entries = [(name, judgement.content_words(facts.target, name)) for name in named]
        return Reflection(language.failure_analysis(found), language.plan(entries))

    # -- images --

    def evaluate_sync(self, sample: Sample, images: Images, image: Pixels) -> Evaluation:
        """See `Analyzer.evaluate`.  Raises UserError for a sample without the world's facts, never for an image."""
        facts = facts_of(sample)
        return self.evaluate_view(facts, judgement.look(image, facts.level))

    def is_exact(self, sample: Sample, image: Pixels) -> bool:
        """Whether the image shows exactly what was asked for, ruler included."""
        return not _find_all([sample], [image])[0].wrong

    def exact_all(self, samples: Sequence[Sample], images: Sequence[Pixels]) -> np.ndarray:
        """bool [n]: `is_exact` of images[i] for samples[i]."""
        return np.array([not finding.wrong for finding in _find_all(samples, images)], bool)

    def evaluate_step_sync(self, sample: Sample, images: Images, instruction: str, previous: Sequence[Pixels],
                           image: Pixels) -> Evaluation:
        """See `Analyzer.evaluate_step`: `image` against `instruction` applied to the first of `previous`."""
        facts = facts_of(sample)
        edit = language.parse_step(instruction)
        before = judgement.look(previous[0], facts.level).scene if len(previous) else facts.rules.blank
        view = judgement.look(image, facts.level)
        try:
            if edit is None or before is None:
                raise EditError(f"the step {instruction[:60]!r} cannot be followed.")
            target = edit.apply(before, facts.sources)
            touched = touches([edit], before, facts.sources)
        except EditError:
            fine = judgement.Finding((), {axis: () for axis in AXES}).evaluation(self.thresholds)
            return dataclasses.replace(fine, instruction=AxisVerdict(False, UNCLEAR, float(judgement.WORST)))
        return judgement.compare(view, target, touched).evaluation(self.thresholds)

    # -- critique and planning --

    def reflect_sync(self, sample: Sample, images: Images, image: Pixels, evaluation: Evaluation) -> Reflection:
        """See `Analyzer.reflect`, and `reflect_view`."""
        facts = facts_of(sample)
        return self.reflect_view(facts, judgement.look(image, facts.level))

    def root_cause_sync(self, sample: Sample, images: Images, attempts: Sequence[Attempt]) -> RootCause:
        """See `Analyzer.root_cause`: several edits are too complex a prompt, a single one should have been drawn."""
        return RootCause.PROMPT_TOO_COMPLEX if len(facts_of(sample).edits) > 1 else RootCause.GENERATOR_LIMIT

    def decompose_sync(self, sample: Sample, images: Images) -> tuple[str, ...]:
        """See `Analyzer.decompose`: one step an edit.

        A request of a single edit is cut into removals and additions of single cells (so a move is a removal, then an
        addition); when that leaves fewer than two steps or more than five, the request itself is the only step.
        """
        return tuple(language.step(edit) for edit in step_edits(facts_of(sample)))

    def judge_reasoning_sync(self, sample: Sample, images: Images, kind: str, text: str,
                             previous: Sequence[Pixels]) -> float:
        """See `Analyzer.judge_reasoning`.

        A failure analysis is graded by the F1 of the places it names, an improvement plan by the places it repairs less
        those it spoils, a step by how it continues from the last image (`judgement.step_value`); the first step
        starts again from the source.  Text outside the language is worth 0.
        """
        facts = facts_of(sample)
        if kind == "step":
            return _judge_step(facts, text, previous)
        if kind not in ("failure_analysis", "improvement_plan"):
            raise UserError(f"there is no kind of reasoning {kind!r}.",
                            "Use failure_analysis, improvement_plan or step.")
        if not len(previous):
            return 0.0
        finding = self._find(facts, judgement.look(previous[-1], facts.level))
        if kind == "failure_analysis":
            named = language.parse_failure_analysis(text)
            return 0.0 if named is None else judgement.f1([n for names in named.values() for n in names], finding.wrong)
        entries = language.parse_plan(text)
        return 0.0 if entries is None else judgement.plan_value(entries, facts.target, finding.wrong)

    @staticmethod
    def _find(facts: Facts, view: judgement.View) -> judgement.Finding:
        return judgement.compare(view, facts.target, facts.touches())

    # -- the same as coroutines --

    async def evaluate(self, sample: Sample, images: Images, image: Pixels) -> Evaluation:
        return self.evaluate_sync(sample, images, image)

    async def evaluate_step(self, sample: Sample, images: Images, instruction: str, previous: Sequence[Pixels],
                            image: Pixels) -> Evaluation:
        return self.evaluate_step_sync(sample, images, instruction, previous, image)

    async def reflect(self, sample: Sample, images: Images, image: Pixels, evaluation: Evaluation) -> Reflection:
        return self.reflect_sync(sample, images, image, evaluation)

    async def root_cause(self, sample: Sample, images: Images, attempts: Sequence[Attempt]) -> RootCause:
        return self.root_cause_sync(sample, images, attempts)

    async def decompose(self, sample: Sample, images: Images) -> tuple[str, ...]:
        return self.decompose_sync(sample, images)

    async def judge_reasoning(self, sample: Sample, images: Images, kind: str, text: str,
                              previous: Sequence[Pixels]) -> float:
        return self.judge_reasoning_sync(sample, images, kind, text, previous)


def step_edits(facts: Facts) -> tuple[Edit, ...]:
    """The edits of the steps into which a task is decomposed (see `WorldAnalyzer.decompose_sync`)."""
    if len(facts.edits) > 1:
        return facts.edits
    before, after = facts.canvas, facts.target
    changed = changes(before, after)
    words = before.places
    removals = [Edit("clear", ref=words[i]) for i in changed if i < len(after.cells) and after.cells[i] is None]
    additions = [Edit("replace" if before.cells[i] else "put", ref=words[i], thing=after.cells[i].words)
                 for i in changed if i < len(after.cells) and after.cells[i] is not None]
    steps = (*removals, *additions)
    whole = len(steps) == len(changed) and FOREIGN not in after.cells
    return steps if whole and 2 <= len(steps) <= MAX_STEPS else facts.edits


def _look_at_all(samples: Sequence[Sample], images: Sequence[Pixels]) -> list[tuple[Facts, judgement.View]]:
    """The facts of samples[i] and what images[i] shows, for all i at once."""
    everything = [facts_of(sample) for sample in samples]
    found: dict[int, judgement.View] = {}
    for level in {facts.level for facts in everything}:
        chosen = [i for i, facts in enumerate(everything) if facts.level == level]
        found |= dict(zip(chosen, judgement.look_at_all([images[i] for i in chosen], level), strict=True))
    return [(facts, found[i]) for i, facts in enumerate(everything)]


def _find_all(samples: Sequence[Sample], images: Sequence[Pixels]) -> list[judgement.Finding]:
    return [judgement.compare(view, facts.target, facts.touches()) for facts, view in _look_at_all(samples, images)]


def _judge_step(facts: Facts, text: str, previous: Sequence[Pixels]) -> float:
    """The first of `previous` answered the whole request; every later one is the result of a step."""
    edit = language.parse_step(text)
    done = max(0, len(previous) - 1)
    state = judgement.look(previous[-1], facts.level).scene if done else facts.canvas
    if edit is None or state is None:
        return 0.0
    return judgement.step_value(edit, state, step_edits(facts)[done:], facts.target, facts.sources)
