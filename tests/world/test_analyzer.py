"""The exact analyzer: full marks for the target, no pass for a near miss, a judgement for anything."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivr_jax.errors import UserError
from ivr_jax.interfaces import Attempt, RootCause
from ivr_jax.trajectory import AXES, Reflection, Sample
from ivr_jax.world import language
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.edits import Edit, changes
from ivr_jax.world.facts import facts_to_json, make_facts
from ivr_jax.world.generator import WorldGenerator
from ivr_jax.world.levels import level_of
from ivr_jax.world.recognise import contents
from ivr_jax.world.render import render
from ivr_jax.world.sampler import Task, sample_task
from ivr_jax.world.scene import FOREIGN, Scene, object_from_words

ANALYZER = WorldAnalyzer()
START = level_of(0).blank.with_values({0: object_from_words("red circle"), 4: object_from_words("blue square"),
                                       8: object_from_words("green triangle")})
EXAMPLE = (Edit("move", ref="a1", to="b1"), Edit("recolour", ref="b1", value="green"), Edit("swap", ref="b2", to="c3"))


def sample_of(*edits: Edit, sources: tuple[Scene, ...] = (START,)) -> Sample:
    """A level-0 sample with given edits; its image names are placeholders, the analyzer does not need them."""
    facts = make_facts(0, sources, edits)
    names = tuple(f"source{i}" for i in range(len(sources)))
    return Sample("example", language.prompt(edits), names, facts=facts_to_json(facts))


def picture(scene: Scene, changes_by_name: dict[str, str | None] | None = None) -> np.ndarray:
    """The level-0 image of a scene in which cells hold other objects (in words; None for empty)."""
    values = {scene.index(name): object_from_words(words) if words else None
              for name, words in (changes_by_name or {}).items()}
    return render(scene.with_values(values), 0)


SAMPLE = sample_of(*EXAMPLE)
TARGET = make_facts(0, (START,), EXAMPLE).target


def test_the_worked_example_of_the_package():
    edits = language.parse_prompt("Move a1 to b1. Paint the cell above b2 green. Swap b2 with c3.")
    sample = sample_of(*edits)
    assert {START.places[i]: n for i, n in make_facts(0, (START,), edits).touches().items()} == {
        "a1": 1, "b1": 2, "b2": 1, "c3": 1}
    forgot = picture(TARGET, {"b1": "red circle"})
    evaluation = ANALYZER.evaluate_sync(sample, {}, forgot)
    assert evaluation.scores == (3, 5, 5, 3)
    assert ANALYZER.reflect_sync(sample, {}, forgot, evaluation) == Reflection(
        "Wrong target at b1.", "Make b1 green circle.")
    assert ANALYZER.decompose_sync(sample, {})[1] == "Paint the cell above b2 green, nothing else."


@pytest.mark.parametrize("level", (0, 1, 2))
def test_the_target_scores_five_on_every_axis(level):
    for index in range(15):
        task = sample_task(level, 11, index)
        evaluation = ANALYZER.evaluate_sync(task.sample, task.images, task.target_image)
        assert evaluation.passed and evaluation.scores == (5.0, 5.0, 5.0, 5.0)
        assert all(axis.reason == "as asked" for axis in evaluation.axes)
        assert ANALYZER.is_exact(task.sample, task.target_image)


@pytest.mark.parametrize("cells, scores", [
    ({}, (5, 5, 5, 5)),
    ({"b1": "red circle"}, (3, 5, 5, 3)),  # forgot the colour of a cell touched twice
    ({"a1": "red circle"}, (3, 5, 5, 5)),  # touched once
    ({"a3": "red circle"}, (5, 3, 5, 5)),  # nobody asked for it
    ({"a2": "red circle", "a3": "red circle"}, (5, 1, 5, 5)),
    ({"a1": "red circle", "b1": None, "a3": "blue circle"}, (1, 3, 5, 3)),
    ({"a2": FOREIGN.words}, (5, 3, 3, 5)),
    ({"b1": FOREIGN.words}, (3, 5, 3, 3)),
])
def test_scores_count_wrong_cells_by_axis(cells, scores):
    evaluation = ANALYZER.evaluate_sync(SAMPLE, {}, picture(TARGET, cells))
    assert evaluation.scores == scores
    assert [axis.passed for axis in evaluation.axes] == [score == 5 for score in scores]


def test_reasons_name_the_cells():
    evaluation = ANALYZER.evaluate_sync(SAMPLE, {}, picture(TARGET, {"b1": None, "c3": None, "a2": "red circle"}))
    assert evaluation.instruction.reason == "wrong at b1 c3"
    assert evaluation.consistency.reason == "wrong at a2"
    assert evaluation.knowledge.reason == "wrong at b1"
    assert evaluation.quality.reason == "as asked"


@given(st.integers(0, 200), st.integers(0, 8), st.integers(0, 9))
def test_every_near_miss_fails(index, place, code):
    task = sample_task(0, 12, index)
    other = contents(0)[code]
    if other == task.target.cells[place]:
        other = FOREIGN
    image = render(task.target.with_values({place: other}), 0)
    evaluation = ANALYZER.evaluate_sync(task.sample, task.images, image)
    assert not evaluation.passed and not ANALYZER.is_exact(task.sample, image)
    axis = evaluation.instruction if place in task.facts.touches() else evaluation.consistency
    assert axis.score == 3 and axis.reason == f"wrong at {task.target.places[place]}"


def test_a_damaged_ruler_costs_quality():
    image = picture(TARGET).copy()
    image[:16, 16:32] = 255
    evaluation = ANALYZER.evaluate_sync(SAMPLE, {}, image)
    assert evaluation.scores == (5, 5, 3, 5)
    assert evaluation.quality.reason == "wrong at the ruler"


@pytest.mark.parametrize("image", [
    np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 128, np.uint8), np.zeros((1, 1, 3), np.uint8),
    np.zeros((128, 64, 3), np.uint8), np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8),
    np.zeros((0, 0, 3), np.uint8), np.zeros((64, 64, 3), np.float32), np.full((64, 64, 3), np.nan),
    np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)])
def test_garbage_gets_the_floor_and_never_crashes(image):
    evaluation = ANALYZER.evaluate_sync(SAMPLE, {}, image)
    assert not evaluation.passed
    assert evaluation.instruction.score == evaluation.consistency.score == evaluation.quality.score == 1
    assert not ANALYZER.is_exact(SAMPLE, image)
    reflection = ANALYZER.reflect_sync(SAMPLE, {}, image, evaluation)
    assert reflection.failure_analysis.startswith("Artefact at") or "at a1" in reflection.failure_analysis
    for kind in ("failure_analysis", "improvement_plan", "step"):
        assert 0 <= ANALYZER.judge_reasoning_sync(SAMPLE, {}, kind, "Clear b2.", [image, image]) <= 1


def test_a_white_sheet_is_an_empty_board_without_a_ruler():
    evaluation = ANALYZER.evaluate_sync(SAMPLE, {}, np.full((64, 64, 3), 255, np.uint8))
    assert evaluation.instruction.reason == "wrong at b1 b2 c3"
    assert evaluation.consistency.passed and evaluation.quality.reason == "wrong at the ruler"


@given(st.integers(0, 2**32), st.integers(0, 64), st.integers(0, 64), st.floats(0, 200))
@settings(max_examples=25)
def test_anything_between_picture_and_noise_is_judged(seed, top, left, noise):
    rng = np.random.default_rng(seed)
    image = picture(TARGET).astype(float)
    image[top:, left:] += rng.normal(0, noise, image[top:, left:].shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    assert all(1 <= score <= 5 for score in ANALYZER.evaluate_sync(SAMPLE, {}, image).scores)


def test_many_images_at_once_are_judged_like_one_at_a_time():
    generator = WorldGenerator(fault_rate=0.5)
    samples, images = [], []
    for level in (0, 1, 2):
        for index in range(8):
            task = sample_task(level, 13, index)
            samples.append(task.sample)
            images.append(generator.generate_sync(task.sample, task.sample.prompt, list(task.images.values())))
    images[3] = images[3][:32]
    singly = [ANALYZER.evaluate_sync(sample, {}, image) for sample, image in zip(samples, images, strict=True)]
    assert ANALYZER.exact_all(samples, images).tolist() == [evaluation.passed for evaluation in singly]


def test_thresholds_decide_what_passes_and_scores_do_not_move():
    lenient = WorldAnalyzer(threshold={"instruction": 5, "consistency": 3, "quality": 3, "knowledge": 3})
    image = picture(TARGET, {"a3": "red circle"})
    assert lenient.evaluate_sync(SAMPLE, {}, image).passed
    assert lenient.evaluate_sync(SAMPLE, {}, image).scores == ANALYZER.evaluate_sync(SAMPLE, {}, image).scores
    assert not lenient.is_exact(SAMPLE, image)
    for bad in (0, 6, {"instruction": 5}):
        with pytest.raises(UserError, match="threshold"):
            WorldAnalyzer(threshold=bad)


# -- critique -------------------------------------------------------------------------------------------------------


def test_a_reflection_names_type_and_cells_and_what_they_should_hold():
    image = picture(TARGET, {"b1": "red circle", "b2": "blue square", "a3": "red square", "c2": FOREIGN.words})
    reflection = ANALYZER.reflect_sync(SAMPLE, {}, image, ANALYZER.evaluate_sync(SAMPLE, {}, image))
    assert reflection.failure_analysis == "Under-editing at b2. Wrong target at b1. Over-editing at a3. Artefact at c2."
    assert reflection.improvement_plan == "Make b1 green circle, b2 green triangle, c2 empty, a3 empty."


@given(st.integers(0, 2), st.integers(0, 200))
@settings(max_examples=40)
def test_its_own_reflections_are_perfect_and_repair(level, index):
    task = sample_task(level, 14, index)
    sources = list(task.images.values())
    image = WorldGenerator(fault_rate=1.0).generate_sync(task.sample, task.sample.prompt, sources)
    reflection = ANALYZER.reflect_sync(task.sample, task.images, image, ANALYZER.evaluate_sync(task.sample, {}, image))
    for kind in ("failure_analysis", "improvement_plan"):
        text = getattr(reflection, kind)
        assert ANALYZER.judge_reasoning_sync(task.sample, task.images, kind, text, [image]) == 1.0
    repaired = WorldGenerator().generate_sync(task.sample, task.sample.prompt, sources, reflection)
    assert ANALYZER.is_exact(task.sample, repaired)


@pytest.mark.parametrize("text, value", [
    ("Wrong target at b1 c3.", 1.0), ("Under-editing at b1. Artefact at c3.", 1.0), ("Wrong target at b1.", 2 / 3),
    ("Wrong target at b1 a3.", 1 / 2), ("Over-editing at a3.", 0.0), ("No fault.", 0.0), ("It looks odd.", 0.0)])
def test_failure_analyses_are_graded_by_the_cells_they_name(text, value):
    image = picture(TARGET, {"b1": None, "c3": None})
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "failure_analysis", text, [image]) == pytest.approx(value)


@pytest.mark.parametrize("text, value", [
    ("Make b1 green circle, c3 blue square.", 1.0), ("Make b1 green circle.", 0.5), ("Make b1 red circle.", 0.0),
    ("Make b1 green circle, c3 blue square, a1 empty.", 1.0),  # a1 is empty already
    ("Make b1 green circle, c3 blue square, a1 red circle.", 0.5),  # spoils a1
    ("Make b1 green circle, a1 red circle, a2 red circle.", 0.0), ("Keep it.", 0.0), ("Try harder.", 0.0)])
def test_plans_are_graded_by_what_they_mend_less_what_they_spoil(text, value):
    image = picture(TARGET, {"b1": None, "c3": None})
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "improvement_plan", text, [image]) == pytest.approx(value)


def test_a_reflection_needs_an_image():
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "failure_analysis", "No fault.", []) == 0.0
    with pytest.raises(UserError, match="poetry"):
        ANALYZER.judge_reasoning_sync(SAMPLE, {}, "poetry", "No fault.", [])


def test_the_critique_of_a_ruined_image_stays_short():
    image = np.zeros((64, 64, 3), np.uint8)
    reflection = WorldAnalyzer(most_named=3).reflect_sync(SAMPLE, {}, image, ANALYZER.evaluate_sync(SAMPLE, {}, image))
    assert len(language.parse_plan(reflection.improvement_plan)) == 3


# -- decomposition and steps ----------------------------------------------------------------------------------------


def test_a_decomposition_is_one_clause_an_edit():
    assert ANALYZER.decompose_sync(SAMPLE, {}) == (
        "Move a1 to b1, nothing else.", "Paint b1 green, nothing else.", "Swap b2 with c3, nothing else.")


def test_a_single_move_is_a_removal_then_an_addition():
    assert ANALYZER.decompose_sync(sample_of(Edit("move", ref="a1", to="b1")), {}) == (
        "Clear a1, nothing else.", "Put a red circle at b1, nothing else.")


@given(st.integers(0, 2), st.integers(0, 300))
@settings(max_examples=40)
def test_following_the_decomposition_reaches_the_target(level, index):
    task = sample_task(level, 15, index)
    steps = ANALYZER.decompose_sync(task.sample, task.images)
    assert len(steps) <= 5 and (len(steps) >= 2 or len(task.edits) == 1)
    current = list(task.images.values())
    drawn = [render(task.facts.canvas, level)]  # a first image that did nothing
    for text in steps:
        assert ANALYZER.judge_reasoning_sync(task.sample, task.images, "step", text, drawn) == 1.0
        image = WorldGenerator().generate_sync(task.sample, text, current)
        assert ANALYZER.evaluate_step_sync(task.sample, task.images, text, current, image).passed
        drawn.append(image)
        current = [image, *list(task.images.values())[1:]]
    assert ANALYZER.is_exact(task.sample, drawn[-1])


@pytest.mark.parametrize("done, text, value", [
    (0, "Move a1 to b1.", 1.0), (0, "Shift a1 to b1, nothing else.", 1.0),  # any wording
    (0, "Exchange c3 with b2.", 1.0),  # the order does not matter
    (0, "Paint a1 green.", 0.0),  # the target has nothing there
    (0, "Clear a1.", 0.0),  # the move would find nothing
    (0, "Put a green circle at a3.", 0.0), (0, "Make it so.", 0.0), (0, "Paint c1 red.", 0.0),
    (1, "Paint b1 green.", 1.0), (1, "Substitute a green circle at b1.", 1.0), (1, "Move a1 to b1.", 0.0),
    (2, "Swap b2 with c3.", 1.0), (2, "Put a blue square at c3.", 0.0)])
def test_steps_are_graded_by_how_they_continue(done, text, value):
    state, drawn = START, [picture(START)]
    for edit in EXAMPLE[:done]:
        state = edit.apply(state)
        drawn.append(picture(state))
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "step", text, drawn) == pytest.approx(value)


def test_the_first_step_starts_from_the_source_whatever_was_drawn():
    garbage = np.zeros((64, 64, 3), np.uint8)
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "step", "Move a1 to b1.", [garbage]) == 1.0


def test_a_step_that_repairs_an_earlier_one_is_worth_the_share_it_repairs():
    botched = TARGET.with_values({2: object_from_words("red circle"), 6: object_from_words("red square")})
    drawn = [picture(START)] * 3 + [picture(botched)]
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "step", "Clear c1.", drawn) == 0.5
    assert ANALYZER.judge_reasoning_sync(SAMPLE, {}, "step", "Clear b1.", drawn) == 0.0


def test_a_step_that_brings_a_cell_to_its_end_early_is_worth_half():
    sample = sample_of(Edit("recolour", ref="a1", value="blue"), Edit("recolour", ref="a1", value="green"))
    assert ANALYZER.judge_reasoning_sync(sample, {}, "step", "Paint a1 green.", [picture(START)]) == 0.5


def test_a_step_is_evaluated_alone():
    moved = EXAMPLE[0].apply(START)
    judge = ANALYZER.evaluate_step_sync
    assert judge(SAMPLE, {}, "Move a1 to b1, nothing else.", [picture(START)], picture(moved)).passed
    untouched = judge(SAMPLE, {}, "Move a1 to b1, nothing else.", [picture(START)], picture(START))
    assert untouched.instruction.reason == "wrong at a1 b1" and untouched.consistency.passed
    spoilt = judge(SAMPLE, {}, "Move a1 to b1.", [picture(START)], picture(moved, {"a3": "red circle"}))
    assert spoilt.instruction.passed and spoilt.consistency.reason == "wrong at a3"
    unclear = judge(SAMPLE, {}, "Make it nice.", [picture(START)], picture(START))
    assert unclear.instruction.score == 1 and unclear.instruction.reason == "unclear request"
    assert not judge(SAMPLE, {}, "Clear a1.", [np.zeros((1, 1, 3), np.uint8)], picture(START)).passed


def test_a_step_of_text_to_image_starts_from_the_empty_board():
    edit = Edit("put", ref="b2", thing="red circle")
    sample = sample_of(edit, sources=())
    image = picture(edit.apply(level_of(0).blank))
    assert ANALYZER.evaluate_step_sync(sample, {}, language.step(edit), [], image).passed


def test_root_cause():
    attempts = [Attempt(picture(START), ANALYZER.evaluate_sync(SAMPLE, {}, picture(START)), None)]
    assert ANALYZER.root_cause_sync(SAMPLE, {}, attempts) is RootCause.PROMPT_TOO_COMPLEX
    assert ANALYZER.root_cause_sync(sample_of(EXAMPLE[0]), {}, attempts) is RootCause.GENERATOR_LIMIT


def test_coroutines_answer_like_their_twins():
    image = picture(TARGET, {"b1": None})

    async def ask():
        evaluation = await ANALYZER.evaluate(SAMPLE, {}, image)
        return (evaluation, await ANALYZER.reflect(SAMPLE, {}, image, evaluation),
                await ANALYZER.root_cause(SAMPLE, {}, []), await ANALYZER.decompose(SAMPLE, {}),
                await ANALYZER.evaluate_step(SAMPLE, {}, "Clear b2.", [image], image),
                await ANALYZER.judge_reasoning(SAMPLE, {}, "step", "Clear b2.", [image]))

    evaluation, reflection, cause, steps, step_evaluation, value = asyncio.run(ask())
    assert evaluation == ANALYZER.evaluate_sync(SAMPLE, {}, image)
    assert reflection == Reflection("Under-editing at b1.", "Make b1 green circle.")
    assert cause is RootCause.PROMPT_TOO_COMPLEX and len(steps) == 3
    assert not step_evaluation.passed and value == 0.0


def test_a_sample_from_elsewhere_is_a_user_error():
    with pytest.raises(UserError, match="'photo'"):
        ANALYZER.evaluate_sync(Sample("photo", "Make it nicer."), {}, picture(START))


def test_all_four_axes_are_judged_in_order():
    evaluation = ANALYZER.evaluate_sync(SAMPLE, {}, picture(TARGET))
    assert [field.name for field in dataclasses.fields(evaluation)][:4] == list(AXES)


@given(st.integers(0, 300))
@settings(max_examples=25)
def test_judgements_depend_on_pixels_and_facts_alone(index):
    task: Task = sample_task(0, 16, index)
    renamed = dataclasses.replace(task.sample, key="other", prompt="Something else.", category="")
    image = render(task.facts.canvas, 0)
    assert ANALYZER.evaluate_sync(renamed, {}, image) == ANALYZER.evaluate_sync(task.sample, task.images, image)
    wrong = len(changes(task.facts.canvas, task.target))
    assert ANALYZER.evaluate_sync(task.sample, {}, image).instruction.score == max(1, 5 - 2 * wrong)


def test_an_observation_says_what_each_edit_changes_and_what_every_cell_shows():
    observer = WorldAnalyzer(observe=True)
    seen = picture(TARGET, {"b1": "red circle"})
    judged = observer.evaluate_sync(SAMPLE, {}, seen)
    found = language.parse_observation(judged.observation)
    assert found.changes == (
        ("a1", "empty"), ("b1", "red circle"), ("b1", "green circle"), ("b2", "green triangle"), ("c3", "blue square"))
    rows = dict(zip(TARGET.places, found.places, strict=False))
    assert rows["b1"] == ("green circle", "red circle", False)
    assert rows["c3"] == ("blue square", "blue square", True)
    assert [name for name, row in rows.items() if not row[2]] == ["b1"]
    assert len(rows) == 9 and not found.broken
    assert dataclasses.replace(judged, observation="") == ANALYZER.evaluate_sync(SAMPLE, {}, seen)


@given(st.integers(0, 400))
@settings(max_examples=20)
def test_observations_of_every_level_are_read_back_and_follow_the_scores(index):
    level = index % 4
    task, other = sample_task(level, 5, index), sample_task(level, 6, index)
    observer = WorldAnalyzer(observe=True)
    for image in (task.target_image, other.target_image):
        judged = observer.evaluate_sync(task.sample, task.images, image)
        found = language.parse_observation(judged.observation)
        assert found is not None and language.observation(found) == judged.observation
        assert judged.passed == all(row[2] for row in found.places) and not found.broken


def test_an_observation_of_another_size_or_of_a_damaged_ruler_says_so():
    observer = WorldAnalyzer(observe=True)
    small = language.parse_observation(observer.evaluate_sync(SAMPLE, {}, np.zeros((8, 8, 3), np.uint8)).observation)
    assert small.places == () and small.broken == (language.SIZE,)
    damaged = picture(TARGET)
    damaged[:16] = 0
    found = language.parse_observation(observer.evaluate_sync(SAMPLE, {}, damaged).observation)
    assert len(found.places) == 9 and found.broken == (language.RULER,)
