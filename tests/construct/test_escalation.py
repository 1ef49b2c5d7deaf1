"""The escalation with scripted services: every branch, every count, what is pruned and why samples are dropped."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivr_jax.construct.escalation import (
    RELEASED_RULES,
    Drawing,
    Drop,
    Rules,
    construct,
    prune,
)
from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.interfaces import RootCause
from ivr_jax.thresholds import MULTI_STEP, Thresholds
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Sample, Step


def evaluation(passed: bool, score: float | None = None) -> Evaluation:
    verdict = AxisVerdict(passed, "fine" if passed else "wrong", score)
    return Evaluation(verdict, *(AxisVerdict(True, "fine", score) for _ in range(3)))


def picture(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


SOURCE, G1 = picture(250), picture(100)


class Script:
    """Both services: answers in the order given, and remembers what it was asked."""

    def __init__(self, whole=(), steps=(), cause=RootCause.PROMPT_TOO_COMPLEX, plan=("one", "two", "three")):
        self.whole, self.step_verdicts, self.cause, self.plan = iter(whole), iter(steps), cause, plan
        self.drawn = itertools.count(1)
        self.calls: list[tuple] = []

    def of(self, kind: str) -> list[tuple]:
        return [call[1:] for call in self.calls if call[0] == kind]

    async def evaluate(self, sample, images, image):
        await asyncio.sleep(0)
        self.calls.append(("evaluate", image, set(images)))
        answer = next(self.whole)
        return answer if isinstance(answer, Evaluation) else evaluation(answer)

    async def evaluate_step(self, sample, images, instruction, previous, image):
        self.calls.append(("evaluate_step", instruction, list(previous), image))
        answer = next(self.step_verdicts)
        return answer if isinstance(answer, Evaluation) else evaluation(answer)

    async def reflect(self, sample, images, image, judged):
        self.calls.append(("reflect", image, judged))
        return Reflection(f"analysis {len(self.of('reflect'))}", "plan")

    async def root_cause(self, sample, images, attempts):
        self.calls.append(("root_cause", attempts))
        return self.cause

    async def decompose(self, sample, images):
        self.calls.append(("decompose",))
        return self.plan

    async def generate(self, sample, instruction, sources, reflection=None, attempt=0):
        self.calls.append(("generate", instruction, list(sources), reflection, attempt))
        return picture(next(self.drawn))


def run(script: Script, rules: Rules | None = None, first=G1):
    sample = Sample("s", "do it", (image_name(SOURCE),))
    return asyncio.run(construct(sample, {image_name(SOURCE): SOURCE}, first, script, script, rules))


def same(a, b) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_first_image_that_passes_is_a_direct_answer_and_nothing_is_drawn():
    script = Script(whole=[True])
    outcome = run(script)
    assert outcome.trajectory.mode is Mode.DIRECT and outcome.drop is None
    assert outcome.trajectory.images == (image_name(G1),)
    assert script.of("generate") == [] and script.of("reflect") == []


def test_without_a_first_image_the_generator_draws_it_from_the_whole_prompt():
    script = Script(whole=[True])
    outcome = run(script, first=None)
    ((instruction, sources, reflection, attempt),) = script.of("generate")
    assert (instruction, reflection, attempt) == ("do it", None, 0) and same(sources, [SOURCE])
    assert outcome.trajectory.images == (image_name(picture(1)),)


def test_reflection_draws_from_the_sources_with_the_critique_of_the_last_image():
    script = Script(whole=[False, False, True])
    outcome = run(script)
    assert outcome.trajectory.mode is Mode.REFLECTION
    assert [r.evaluation.passed for r in outcome.trajectory.rounds] == [False, False, True]
    assert [r.cause and r.cause.failure_analysis for r in outcome.trajectory.rounds] == [
        None,
        "analysis 1",
        "analysis 2",
    ]
    drawn = script.of("generate")
    assert [(d[0], d[2].failure_analysis, d[3]) for d in drawn] == [
        ("do it", "analysis 1", 1),
        ("do it", "analysis 2", 2),
    ]
    assert all(same(d[1], [SOURCE]) for d in drawn)
    assert same([c[0] for c in script.of("reflect")], [G1, picture(1)])
    assert script.of("root_cause") == []


@pytest.mark.parametrize(
    "cause, drop",
    [
        (RootCause.AMBIGUOUS_PROMPT, Drop.AMBIGUOUS_PROMPT),
        (RootCause.GENERATOR_LIMIT, Drop.GENERATOR_LIMIT),
        (RootCause.UNKNOWN, Drop.UNKNOWN_CAUSE),
    ],
)
def test_three_failed_reflections_and_another_cause_than_complexity_drop_the_sample(cause, drop):
    script = Script(whole=[False] * 4, cause=cause)
    outcome = run(script)
    assert outcome.trajectory is None and outcome.drop is drop and outcome.root_cause is cause
    ((attempts,),) = script.of("root_cause")
    assert same([a.image for a in attempts], [G1, picture(1), picture(2), picture(3)])
    assert [a.reflection and a.reflection.failure_analysis for a in attempts] == [
        None,
        "analysis 1",
        "analysis 2",
        "analysis 3",
    ]
    assert len(outcome.history) == 4 and script.of("decompose") == []


def test_multi_step_starts_from_the_source_and_draws_each_step_on_the_image_before():
    script = Script(whole=[False] * 4 + [False, False, True], steps=[True] * 3)
    outcome = run(script)
    assert outcome.plan == ("one", "two", "three") and outcome.root_cause is RootCause.PROMPT_TOO_COMPLEX
    drawn = script.of("generate")[3:]
    assert [(d[0], d[2], d[3]) for d in drawn] == [("one", None, 0), ("two", None, 0), ("three", None, 0)]
    befores = [[SOURCE], [picture(4)], [picture(5)]]
    assert all(same(d[1], before) for d, before in zip(drawn, befores, strict=True))
    assert all(same(c[1], before) for c, before in zip(script.of("evaluate_step"), befores, strict=True))


def test_later_steps_see_the_last_image_in_the_place_of_the_first_source_and_the_other_references_behind_it():
    script = Script(whole=[False] * 4 + [False, False, True], steps=[True] * 3)
    images = {image_name(p): p for p in (SOURCE, picture(251), picture(252))}
    asyncio.run(construct(Sample("s", "do it", tuple(images)), images, G1, script, script))
    shown = [[*images.values()], [picture(4), picture(251), picture(252)], [picture(5), picture(251), picture(252)]]
    assert all(same(d[1], befores) for d, befores in zip(script.of("generate")[3:], shown, strict=True))
    assert all(same(c[1], befores) for c, befores in zip(script.of("evaluate_step"), shown, strict=True))


def test_failed_reflections_and_failed_tries_are_pruned_and_g1_stays():
    script = Script(whole=[False] * 4 + [False, True], steps=[False, True, False, False, True], plan=("one", "two"))
    outcome = run(script)
    rounds = outcome.trajectory.rounds
    assert outcome.trajectory.mode is Mode.MULTI_STEP
    assert [r.cause and r.cause.instruction for r in rounds] == [None, "one", "two"]
    assert outcome.trajectory.images == tuple(image_name(p) for p in (G1, picture(5), picture(8)))
    assert [r.evaluation.passed for r in rounds] == [False, False, True]
    assert [r.step_evaluation and r.step_evaluation.passed for r in rounds] == [None, True, True]
    assert [d[3] for d in script.of("generate")[3:]] == [0, 1, 0, 1, 2]
    assert len(outcome.history) == 9 and [d.kept for d in outcome.history[4:]] == [False, True, False, False, True]
    assert {d.image for d in outcome.history} | {image_name(SOURCE)} == set(outcome.images)


def test_a_failed_try_is_not_judged_against_the_whole_request():
    script = Script(whole=[False] * 4, steps=[False] * 3)
    outcome = run(script)
    assert outcome.drop is Drop.STEP_FAILED and len(script.of("evaluate")) == 4 and len(script.of("evaluate_step")) == 3
    assert [d.evaluation for d in outcome.history[4:]] == [None] * 3


def test_a_step_that_already_meets_the_whole_request_ends_the_trajectory():
    script = Script(whole=[False] * 4 + [False, True], steps=[True, True])
    outcome = run(script)
    assert [r.cause and r.cause.instruction for r in outcome.trajectory.rounds] == [None, "one", "two"]
    assert len(script.of("generate")) == 5


def test_a_last_image_that_fails_the_whole_request_drops_the_sample():
    outcome = run(Script(whole=[False] * 7, steps=[True] * 3))
    assert outcome.drop is Drop.FINAL_FAILED and outcome.trajectory is None and len(outcome.history) == 7


@pytest.mark.parametrize("plan", [(), ("one",), tuple("abcdef"), ("one", " "), ("one", "x" * 501)])
def test_an_unusable_plan_drops_the_sample_before_anything_is_drawn(plan):
    script = Script(whole=[False] * 4, plan=plan)
    outcome = run(script)
    assert outcome.drop is Drop.BAD_PLAN and outcome.plan == plan and len(script.of("generate")) == 3


def test_the_analyzer_sees_the_sources_only_never_earlier_drawings():
    script = Script(whole=[False] * 4 + [True], steps=[True])
    run(script)
    assert all(names == {image_name(SOURCE)} for _, names in script.of("evaluate"))


def test_counts_in_the_rules_are_obeyed():
    script = Script(whole=[False] * 3, steps=[False] * 2)
    outcome = run(script, Rules(max_reflections=1, step_tries=2))
    assert outcome.drop is Drop.STEP_FAILED
    assert len(script.of("reflect")) == 1 and len(script.of("evaluate_step")) == 2


def test_thresholds_turn_scores_into_verdicts_and_none_trusts_the_analyzer():
    near = evaluation(True, 4)
    assert run(Script(whole=[near])).trajectory.mode is Mode.DIRECT
    strict = run(Script(whole=[near, evaluation(False, 5)]), RELEASED_RULES)
    assert strict.trajectory.mode is Mode.REFLECTION
    assert strict.trajectory.rounds[0].evaluation.instruction == AxisVerdict(False, "fine", 4)
    assert strict.trajectory.rounds[1].evaluation.passed


def test_steps_need_quality_4_under_the_released_rules():
    low = Evaluation(*(AxisVerdict(True, "fine", 3 if axis == "quality" else 5) for axis in AXES))
    fail, good = evaluation(False, 1), evaluation(True, 5)
    script = Script(whole=[fail] * 4 + [low, good], steps=[low, good, good])
    outcome = run(script, RELEASED_RULES)
    assert [d.kept for d in outcome.history[4:]] == [False, True, True]
    assert [r.evaluation.passed for r in outcome.trajectory.rounds] == [False, False, True]
    assert MULTI_STEP.judge(low).quality.passed is False and Thresholds().judge(low).passed


@pytest.mark.parametrize(
    "fields",
    [{"max_reflections": 4}, {"max_steps": 6}, {"min_steps": 0}, {"step_tries": 0}, {"min_steps": 4, "max_steps": 3}],
)
def test_rules_that_no_trajectory_could_follow_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Rules(**fields)


def test_thresholds_outside_the_scale_are_refused():
    with pytest.raises(UserError, match="quality"):
        Thresholds(quality=6)


def test_a_source_that_was_not_given_is_named():
    with pytest.raises(UserError, match="absent"):
        asyncio.run(construct(Sample("s", "do it", ("absent",)), {}, G1, Script(), Script()))


@given(
    whole=st.lists(st.booleans(), min_size=9, max_size=9),
    steps=st.lists(st.booleans(), min_size=15, max_size=15),
    cause=st.sampled_from(RootCause),
    plan=st.lists(st.sampled_from("abc"), min_size=1, max_size=6).map(tuple),
)
def test_whatever_the_services_say_the_paper_s_rules_hold(whole, steps, cause, plan):
    script = Script(whole, steps, cause, plan)
    outcome = run(script)
    reflections = [d for d in outcome.history if isinstance(d.cause, Reflection)]
    tries = [d for d in outcome.history if isinstance(d.cause, Step)]
    assert (outcome.trajectory is None) == (outcome.drop is not None)
    assert len(reflections) <= 3 and len(tries) <= 15
    assert (outcome.root_cause is not None) == (not any(whole[:4]))
    assert not tries or (cause is RootCause.PROMPT_TOO_COMPLEX and len(reflections) == 3)
    if outcome.trajectory:
        rounds = outcome.trajectory.rounds
        assert [r.evaluation.passed for r in rounds] == [False] * (len(rounds) - 1) + [True]
        assert rounds[0].image == outcome.history[0].image == image_name(G1)
        assert rounds[-1].image == outcome.history[-1].image
        assert outcome.trajectory.mode is (
            Mode.MULTI_STEP if tries else Mode.REFLECTION if reflections else Mode.DIRECT
        )
        assert all(r.step_evaluation is None or r.step_evaluation.passed for r in rounds)
        assert {r.image for r in rounds} <= set(outcome.images)


@st.composite
def histories(draw) -> list[Drawing]:
    """G1, failed reflections, then for each step some failed tries and one that passed."""
    names = (f"image{i}" for i in itertools.count())
    history = [Drawing(None, next(names), evaluation(False))]
    history += [Drawing(Reflection("a", "p"), next(names), evaluation(False)) for _ in range(draw(st.integers(0, 3)))]
    for k in range(draw(st.integers(0, 5))):
        history += [
            Drawing(Step(f"step {k}"), next(names), None, evaluation(False)) for _ in range(draw(st.integers(0, 2)))
        ]
        history.append(Drawing(Step(f"step {k}"), next(names), evaluation(False), evaluation(True)))
    return history


@given(histories())
def test_pruning_keeps_g1_and_either_all_reflections_or_one_image_a_step(history):
    rounds = prune(history)
    kept = {r.image for r in rounds}
    assert [d.image for d in history if d.image in kept] == [r.image for r in rounds], "the order stays"
    steps = list(dict.fromkeys(d.cause.instruction for d in history if isinstance(d.cause, Step)))
    if steps:
        assert [r.cause.instruction for r in rounds[1:]] == steps
    else:
        assert len(rounds) == len(history)


def test_a_kept_image_that_nobody_judged_is_a_bug_not_a_trajectory():
    with pytest.raises(ValueError, match="image1"):
        prune([Drawing(None, "image0", evaluation(False)), Drawing(Step("a"), "image1", None, evaluation(True))])
