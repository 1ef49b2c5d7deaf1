"""What edits do to scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivr_jax.errors import UserError
from ivr_jax.world.draws import random_scene
from ivr_jax.world.edits import (
    DIRECTIONS,
    KINDS,
    SUBCATEGORIES,
    TAXONOMY,
    Edit,
    EditError,
    changes,
    edit_from_json,
    edit_to_json,
    resolve,
    run,
    touches,
)
from ivr_jax.world.levels import LEVELS
from ivr_jax.world.sampler import sample_task
from ivr_jax.world.scene import Scene, object_from_words, scene_from_json, scene_to_json


def scene_of(*words: str, columns: int = 3) -> Scene:
    """A scene from words in reading order, "" for an empty cell."""
    return Scene(len(words) // columns, columns, tuple(object_from_words(w) if w else None for w in words))


def words_of(scene: Scene) -> list[str]:
    return [cell.words if cell else "" for cell in scene.cells]


BOARD = scene_of("red circle", "", "blue square",
                 "", "green triangle", "",
                 "", "blue square", "")

SCENES = st.builds(lambda seed, level: random_scene(np.random.default_rng(seed), level),
                   st.integers(0, 2**32), st.sampled_from(LEVELS))
PLACES = st.sampled_from(["a1", "b2", "c3", "a3", "c1"])


def test_the_worked_example_of_the_package():
    start = scene_of("red circle", "", "", "", "blue square", "", "", "", "green triangle")
    after = run([Edit("move", ref="a1", to="b1"), Edit("recolour", ref="the cell above b2", value="green"),
                 Edit("swap", ref="b2", to="c3")], start)
    assert words_of(after) == ["", "green circle", "", "", "green triangle", "", "", "", "blue square"]


@pytest.mark.parametrize("edit, expected", [
    (Edit("put", ref="a2", thing="red square"), {"a2": "red square"}),
    (Edit("replace", ref="a1", thing="red square"), {"a1": "red square"}),
    (Edit("clear", ref="the red circle"), {"a1": ""}),
    (Edit("recolour", ref="b2", value="red"), {"b2": "red triangle"}),
    (Edit("move", ref="a1", to="c3"), {"a1": "", "c3": "red circle"}),
    (Edit("swap", ref="a1", to="b2"), {"a1": "green triangle", "b2": "red circle"}),
    (Edit("duplicate", ref="a1", to="the cell right of a1"), {"b1": "red circle"}),
    (Edit("line", line="row 1", count=2, thing="red cross"), {"a1": "red cross", "b1": "red cross", "c1": ""}),
    (Edit("line", line="column b", count=3, thing="red cross"), dict.fromkeys(("b1", "b2", "b3"), "red cross")),
    (Edit("keep", ref="b2"), {"a1": "", "c1": "", "b3": ""}),
    (Edit("mirror"), {"a1": "blue square", "c1": "red circle"}),
    (Edit("fall"), {"a1": "", "c1": "", "a3": "red circle", "c3": "blue square"}),
    (Edit("slide", value="down"), {"a1": "", "b1": "blue square", "c1": "", "a2": "red circle", "b2": "",
                                   "c2": "blue square", "b3": "green triangle"}),
    (Edit("resize", ref="a1", value="small"), {"a1": "small red circle"}),
    (Edit("texture", ref="a1", value="dotted"), {"a1": "dotted red circle"}),
    (Edit("pose", ref="b2", value="left"), {"b2": "green triangle pointing left"}),
    (Edit("recolour", ref="a2", value="red"), {}),  # nothing stands there
    (Edit("pose", ref="a1", value="left"), {}),  # circles point nowhere
    (Edit("complete", ref="a1"), {}),  # it is whole
])
def test_what_each_kind_does(edit, expected):
    after = edit.apply(BOARD)
    assert {BOARD.places[i]: words_of(after)[i] for i in changes(BOARD, after)} == expected


def test_defects_are_mended_by_the_edit_that_fits_them():
    scene = scene_of("half red circle", "odd blue square", "yellow letter A")
    assert words_of(Edit("complete", ref="a1").apply(scene))[0] == "red circle"
    assert words_of(Edit("fix", ref="b1").apply(scene))[1] == "blue square"
    assert Edit("fix", ref="a1").apply(scene) == scene
    assert words_of(Edit("letter", ref="c1", value="letter C").apply(scene))[2] == "yellow letter C"


def test_other_images_lend_objects_and_colours():
    other = scene_of("", "", "", "", "red square", "", "", "", "")
    references = (BOARD, other)
    copied = Edit("copy", ref="b2", image=2, to="a2").apply(BOARD, references)
    assert words_of(copied)[3] == "red square"
    exchanged = Edit("exchange", ref="the red square", image=2, to="b2").apply(BOARD, references)
    assert words_of(exchanged)[4] == "red square"
    dyed = Edit("dye", ref="b2", image=2, to="b2").apply(BOARD, references)
    assert words_of(dyed)[4] == "red triangle"
    with pytest.raises(EditError, match="3"):
        Edit("copy", ref="b2", image=3, to="a2").apply(BOARD, references)


@pytest.mark.parametrize("words", ["d1", "a4", "the cell left of a1", "the cell below c3", "the blue square",
                                   "the red cross"])
def test_a_reference_that_means_no_cell_or_several_is_an_error(words):
    with pytest.raises(EditError):
        resolve(words, BOARD)


def test_attributes_belong_to_the_whole_image():
    after = run([Edit("background", value="sky"), Edit("style", value="outlined"), Edit("tone", value="dark")], BOARD)
    assert after.appearance == ("sky", "outlined", "dark")
    assert after.cells == BOARD.cells


@given(SCENES, PLACES, PLACES)
def test_a_swap_undoes_itself_and_a_move_goes_back(scene, here, there):
    swap = Edit("swap", ref=here, to=there)
    assert run([swap, swap], scene) == scene
    if here != there:
        emptied = Edit("clear", ref=there).apply(scene)
        assert run([Edit("move", ref=here, to=there), Edit("move", ref=there, to=here)], emptied) == emptied


@given(SCENES)
def test_boards_return_to_where_they_were(scene):
    assert run([Edit("mirror")] * 2, scene) == scene
    assert run([Edit("rotate")] * 4, scene) == scene
    assert run([Edit("slide", value="left"), Edit("slide", value="right")], scene) == scene
    assert run([Edit("slide", value="up"), Edit("slide", value="down")], scene) == scene
    assert run([Edit("fall")] * 2, scene) == run([Edit("fall")], scene)


@given(SCENES, st.sampled_from(sorted(DIRECTIONS)))
def test_motion_loses_nothing(scene, direction):
    for edit in (Edit("fall"), Edit("mirror"), Edit("slide", value=direction)):
        kinds = [sorted((c.colour, c.shape) for c in s.cells if c) for s in (scene, edit.apply(scene))]
        assert kinds[0] == kinds[1]


@given(st.integers(0, len(LEVELS) - 1), st.integers(0, 500))
def test_edits_change_only_what_they_touch_and_later_ones_find_sense(level, index):
    task = sample_task(level, 4, index)
    scene = task.facts.canvas
    for edit in task.edits:
        after = edit.apply(scene, task.facts.sources)
        assert after != scene
        assert set(changes(scene, after)) <= edit.touched(scene, task.facts.sources)
        scene = after
    assert scene == task.target
    assert set(changes(task.facts.canvas, scene)) <= set(task.facts.touches())


def test_touching_counts_every_edit_of_a_place():
    edits = [Edit("move", ref="a1", to="b1"), Edit("recolour", ref="b1", value="blue"), Edit("clear", ref="b3")]
    named = {BOARD.places[i]: count for i, count in touches(edits, BOARD).items()}
    assert named == {"a1": 1, "b1": 2, "b3": 1}


@given(SCENES)
def test_scenes_and_edits_are_plain_json(scene):
    assert scene_from_json(json.loads(json.dumps(scene_to_json(scene)))) == scene
    edit = Edit("copy", ref="a1", image=2, to="b2")
    assert edit_from_json(json.loads(json.dumps(edit_to_json(edit)))) == edit


@pytest.mark.parametrize("read, record", [
    (edit_from_json, {"kind": "explode"}), (edit_from_json, {"kind": "put", "where": "b2"}),
    (scene_from_json, {"rows": 3}), (scene_from_json, scene_to_json(BOARD) | {"tone": "loud"}),
    (scene_from_json, scene_to_json(BOARD) | {"rows": 2}), (scene_from_json, scene_to_json(BOARD) | {"rows": 99}),
    (scene_from_json, scene_to_json(BOARD) | {"cells": ["pink elephant"] * 9}),
    (object_from_words, "red circle pointing left"),
])
def test_damaged_records_are_user_errors(read, record):
    with pytest.raises(UserError):
        read(record)


def test_the_taxonomy_is_the_papers():
    assert [len(group) for group in TAXONOMY.values()] == [4, 5, 3, 3, 3, 3]
    assert len(set(SUBCATEGORIES)) == 21
    assert {kind.category for kind in KINDS.values()} == set(SUBCATEGORIES)
