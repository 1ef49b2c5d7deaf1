"""The generator draws what it is told, and errs as often as it is told."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world_scenes import read_scene

from ivr_jax.errors import UserError
from ivr_jax.trajectory import Reflection, Sample
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.edits import changes
from ivr_jax.world.generator import WorldGenerator, follow_plan
from ivr_jax.world.levels import level_of
from ivr_jax.world.render import render
from ivr_jax.world.sampler import sample_task
from ivr_jax.world.scene import object_from_words

ANALYZER = WorldAnalyzer()


def draw(generator: WorldGenerator, level: int, index: int, **options) -> tuple:
    task = sample_task(level, 21, index)
    return task, generator.generate_sync(task.sample, task.sample.prompt, list(task.images.values()), **options)


@given(st.integers(0, 3), st.integers(0, 300))
@settings(max_examples=30)
def test_without_faults_every_prompt_is_drawn_exactly(level, index):
    task, image = draw(WorldGenerator(), level, index)
    assert ANALYZER.is_exact(task.sample, image)


@given(st.integers(0, 2), st.integers(0, 300))
@settings(max_examples=30)
def test_a_fault_spoils_one_or_two_cells(level, index):
    task, image = draw(WorldGenerator(fault_rate=1.0), level, index)
    seen, ruler = read_scene(image, level)
    assert ruler and 1 <= len(changes(task.target, seen)) <= 2


@pytest.mark.parametrize("rate", (0.0, 0.3, 1.0))
def test_faults_come_at_the_rate_that_is_set(rate):
    generator = WorldGenerator(fault_rate=0.5, seed=3)
    generator.fault_rate = rate
    tasks, images = zip(*(draw(generator, 0, index) for index in range(300)), strict=True)
    faults = 1 - ANALYZER.exact_all([task.sample for task in tasks], images).mean()
    assert abs(faults - rate) <= 3 * np.sqrt(rate * (1 - rate) / 300)


def test_faults_are_determined_by_seed_and_request():
    spoilt = [draw(WorldGenerator(0.5, seed=1), 0, index)[1] for index in range(20)]
    again = [draw(WorldGenerator(0.5, seed=1), 0, index)[1] for index in range(20)]
    other_seed = [draw(WorldGenerator(0.5, seed=2), 0, index)[1] for index in range(20)]
    other_try = [draw(WorldGenerator(0.5, seed=1), 0, index, attempt=1)[1] for index in range(20)]
    assert all((a == b).all() for a, b in zip(spoilt, again, strict=True))
    for others in (other_seed, other_try):
        assert any((a != b).any() for a, b in zip(spoilt, others, strict=True))


def test_faults_are_of_several_types():
    types = set()
    for index in range(80):
        task, image = draw(WorldGenerator(fault_rate=1.0), 0, index)
        evaluation = ANALYZER.evaluate_sync(task.sample, {}, image)
        analysis = ANALYZER.reflect_sync(task.sample, {}, image, evaluation).failure_analysis
        types |= {part.split(" at ")[0] for part in analysis.split(". ")}
    assert types == {"Under-editing", "Wrong target", "Over-editing", "Artefact"}


def test_a_plan_is_carried_out_even_when_it_is_wrong():
    task, exact = draw(WorldGenerator(), 0, 0)
    wish = "red circle" if task.target.cells[8] != object_from_words("red circle") else "blue square"
    _, image = draw(WorldGenerator(), 0, 0, reflection=Reflection("Wrong target at c3.", f"Make c3 {wish}."))
    assert read_scene(image, 0)[0] == task.target.with_values({8: object_from_words(wish)})


def test_plans_that_make_no_sense_do_nothing():
    scene = level_of(2).blank
    for plan in ("", "Try harder.", "Make e5 red circle.", "Make b2 sky.", "Make background empty.",
                 "Make the ruler redrawn."):
        assert follow_plan(scene, plan) == scene
    assert follow_plan(scene, "Make b2 red circle, background sky, tone dark.").appearance == ("sky", "filled", "dark")


def test_text_outside_the_language_leaves_the_source_alone():
    sample = Sample("free", "Make it nicer.")
    source = render(level_of(0).blank.with_values({2: object_from_words("red circle")}), 0)
    assert (WorldGenerator().generate_sync(sample, sample.prompt, [source]) == source).all()
    followed = WorldGenerator().generate_sync(sample, "Paint c1 blue.", [source])
    assert read_scene(followed, 0)[0].cells[2] == object_from_words("blue circle")


def test_what_is_not_edited_keeps_its_very_pixels():
    task = next(t for t in (sample_task(0, 22, i, subset="removal", edits=1) for i in range(9)))
    source = next(iter(task.images.values())).copy()
    source[40, 40] ^= 8  # a speck that no renderer draws
    image = WorldGenerator().generate_sync(task.sample, task.sample.prompt, [source])
    assert (image == source).mean() > 0.8
    assert image[40, 40].tolist() == source[40, 40].tolist() or task.target.cells[4] != task.facts.canvas.cells[4]


def test_bad_arguments_are_user_errors():
    with pytest.raises(UserError, match="fault rate"):
        WorldGenerator(fault_rate=1.5)
    with pytest.raises(UserError, match="64x64"):
        draw_from = sample_task(0, 0, 0, subset="edit").sample
        WorldGenerator().generate_sync(draw_from, draw_from.prompt, [np.zeros((10, 10, 3), np.uint8)])


def test_the_coroutine_draws_the_same():
    task, image = draw(WorldGenerator(0.5), 0, 4)
    same = asyncio.run(WorldGenerator(0.5).generate(task.sample, task.sample.prompt, list(task.images.values())))
    assert (same == image).all()
