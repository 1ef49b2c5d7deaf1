"""Tasks are reproducible, labelled, mixed as promised, and benchmarks never meet training."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from world_scenes import read_scene

from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.trajectory import sample_from_json, sample_to_json
from ivr_jax.world import language
from ivr_jax.world.edits import SUBCATEGORIES
from ivr_jax.world.facts import facts_of
from ivr_jax.world.levels import LEVELS
from ivr_jax.world.sampler import categories, is_held_out, sample_task
from ivr_jax.world.splits import SPLITS, split_task

ALL_LEVELS = range(len(LEVELS))


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_task_is_a_function_of_level_seed_and_index(level):
    first, again = sample_task(level, 7, 3), sample_task(level, 7, 3)
    assert first.sample == again.sample and first.facts == again.facts
    assert (first.target_image == again.target_image).all()
    others = {sample_task(level, seed, index).sample.prompt for seed in (7, 8) for index in range(5)}
    assert len(others) > 5


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_task_is_whole(level):
    for index in range(25):
        task = sample_task(level, 1, index)
        assert task.sample.sources == tuple(image_name(pixels) for pixels in task.images.values())
        assert language.parse_prompt(task.sample.prompt) == task.edits
        assert read_scene(task.target_image, level) == (task.target, True)
        for scene, pixels in zip(task.facts.sources, task.images.values(), strict=True):
            assert read_scene(pixels, level) == (scene, True)
        assert task.sample.facts["edits"] == len(task.edits)
        assert 1 <= len(task.edits) <= LEVELS[level].most_edits
        assert task.target != task.facts.canvas


def test_facts_survive_json():
    for level in ALL_LEVELS:
        task = sample_task(level, 2, 5)
        stored = sample_from_json(json.loads(json.dumps(sample_to_json(task.sample))))
        assert stored == task.sample
        assert facts_of(stored) == task.facts


def test_a_sample_without_facts_is_a_user_error():
    sample = sample_task(0, 0, 0).sample
    for facts in ({}, {"world": {"level": 0}}, {"world": 3}):
        with pytest.raises(UserError, match="world0-0-0"):
            facts_of(sample_from_json(sample_to_json(sample) | {"facts": facts}))


def test_the_mixture_of_level_0():
    tasks = [sample_task(0, 3, index) for index in range(1500)]
    shown = Counter(len(task.sample.sources) for task in tasks)
    assert set(shown) == {0, 1, 2}
    assert 0.07 < shown[0] / len(tasks) < 0.13  # from blank
    assert 0.015 < shown[2] / len(tasks) < 0.05  # two images
    edits = Counter(len(task.edits) for task in tasks)
    assert set(edits) == {1, 2, 3, 4}
    assert min(edits.values()) / len(tasks) > 0.18
    chained = [max(task.facts.touches().values()) > 1 for task in tasks if len(task.edits) > 1]
    assert np.mean(chained) > 0.5
    kinds = {edit.kind for task in tasks for edit in task.edits}
    assert kinds == {"put", "clear", "recolour", "replace", "move", "swap", "line", "duplicate", "copy"}


def test_the_paper_s_sub_categories_are_covered():
    basic = {"addition", "removal", "replacement", "colour", "count", "arrangement", "composition"}
    from_1 = basic | {"object replacement", "reference transfer"}
    table = {name: [level for level in ALL_LEVELS if name in categories(level)] for name in SUBCATEGORIES}
    assert len(table) == 21
    assert {name for name, levels in table.items() if 0 in levels} == basic
    assert {name for name, levels in table.items() if 1 in levels} == from_1
    assert all(levels[-2:] == [2, 3] for levels in table.values())


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_every_covered_sub_category_can_be_drawn_and_is_labelled(level):
    for name in categories(level):
        for index in range(2):
            task = sample_task(level, 5, index, subset=name)
            assert task.sample.category == name
            assert read_scene(task.target_image, level)[0] == task.target


@pytest.mark.parametrize("subset, images", [("t2i", {0}), ("edit", {1}), ("references", {2, 3})])
def test_subsets_choose_the_kind_of_request(subset, images):
    assert {len(sample_task(1, 0, index, subset=subset).sample.sources) for index in range(20)} == images


def test_the_number_of_edits_can_be_fixed():
    assert {len(sample_task(0, 0, index, edits=3).edits) for index in range(20)} == {3}


@pytest.mark.parametrize("options", [{"subset": "viewpoint"}, {"subset": "nonsense"}, {"edits": 5}, {"edits": 0}])
def test_what_a_level_cannot_draw_is_a_user_error(options):
    with pytest.raises(UserError, match="level 0"):
        sample_task(0, 0, 0, **options)


# -- held-out tasks and benchmarks ----------------------------------------------------------------------------------


def test_training_and_benchmarks_never_meet():
    tasks = [sample_task(0, 0, index, subset="t2i", edits=1) for index in range(300)]
    training = {(task.sample.prompt, task.sample.sources) for task in tasks}
    assert not any(is_held_out(prompt, ()) for prompt, _ in training)
    for split in SPLITS:
        for index in range(20):
            task = split_task(split, 0, 0, index)
            assert is_held_out(task.sample.prompt, task.facts.sources)
            assert (task.sample.prompt, task.sample.sources) not in training


def test_held_out_tasks_of_the_training_mixture():
    task = sample_task(0, 0, 0, held_out=True)
    assert is_held_out(task.sample.prompt, task.facts.sources)


@pytest.mark.parametrize("level", ALL_LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_benchmark_tasks_are_reproducible_and_exact(split, level):
    task, again = split_task(split, level, 1, 0), split_task(split, level, 1, 0)
    assert task.sample == again.sample
    assert task.sample.facts["split"] == split
    assert read_scene(task.target_image, level) == (task.target, True)


def test_the_benchmarks_ask_what_they_are_named_for():
    def draw(split: str):
        return [split_task(split, 0, 2, index) for index in range(12)]

    def objects(task):
        return [cell for cell in task.target.cells if cell]

    suites = {name: [s for s in SPLITS if s.startswith(name)] for name in ("geneval", "kris", "omnicontext")}
    assert [len(splits) for splits in suites.values()] == [6, 3, 3]
    assert all(not task.sample.sources for split in suites["geneval"] for task in draw(split))
    assert all(len(objects(task)) == 1 for task in draw("geneval/single"))
    assert all(len({o.shape for o in objects(t)}) == 2 and len({o.colour for o in objects(t)}) == 1
               for t in draw("geneval/two_objects"))
    assert all(len(objects(t)) >= 2 and len(set(objects(t))) == 1 for t in draw("geneval/counting"))
    assert all(len({o.shape for o in objects(t)}) == 1 and len({o.colour for o in objects(t)}) == 2
               for t in draw("geneval/colours"))
    assert all(t.edits[1].ref.startswith("the cell ") for t in draw("geneval/position"))
    assert all(len({o.shape for o in objects(t)}) == len({o.colour for o in objects(t)}) == 2
               for t in draw("geneval/attribution"))
    assert all(len(task.edits) == 1 for task in draw("kris/factual"))
    for task in draw("kris/procedural"):
        assert len(task.edits) >= 3 and max(task.facts.touches().values()) > 1
    assert all(len(task.sample.sources) == 1 for task in draw("omnicontext/single"))
    assert all([e.image for e in task.edits] == [2, 2] for task in draw("omnicontext/multiple"))
    assert all(task.edits[0].image == 2 and task.edits[1].image == 0 for task in draw("omnicontext/scene"))


def test_level_0_benchmarks_use_the_vocabulary_of_training():
    def words(tasks):
        return {word for task in tasks for word in task.sample.prompt.replace(".", " ").replace(",", " ").split()}

    trained = words(sample_task(0, 0, index) for index in range(1500))
    for split in SPLITS:
        assert words(split_task(split, 0, 3, index) for index in range(15)) <= trained


def test_an_unknown_split_is_a_user_error():
    with pytest.raises(UserError, match="geneval/single"):
        split_task("geneval", 0, 0, 0)
