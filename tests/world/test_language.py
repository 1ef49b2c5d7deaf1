"""The micro-world's English says every edit, loses nothing, and is cheap in tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivr_jax.world import language
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.edits import COUNTS, DIRECTIONS, KINDS, RELATIONS, Edit
from ivr_jax.world.generator import WorldGenerator
from ivr_jax.world.levels import LEVELS
from ivr_jax.world.sampler import sample_task
from ivr_jax.world.scene import (
    BACKGROUNDS,
    COLOURS,
    COLUMN_LETTERS,
    LETTERS,
    POSES,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    TONES,
    Object,
    place_names,
)

CELLS = st.builds(lambda x, y: f"{COLUMN_LETTERS[x]}{y + 1}", st.integers(0, 4), st.integers(0, 4))
REFERENCES = st.one_of(
    CELLS,
    st.builds(lambda r, c: f"the cell {r} {c}", st.sampled_from(tuple(RELATIONS)), CELLS),
    st.builds(lambda c, s: f"the {c} {s}", st.sampled_from(COLOURS), st.sampled_from(SHAPES + LETTERS)))
OBJECTS = st.one_of(
    st.builds(Object, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.sampled_from(SIZES),
              st.sampled_from(TEXTURES), st.just("up"), st.sampled_from(("whole", "half", "odd"))),
    st.builds(Object, st.just("triangle"), st.sampled_from(COLOURS), pose=st.sampled_from(POSES)),
    st.builds(Object, st.sampled_from(LETTERS), st.sampled_from(COLOURS)))
VALUES = {"recolour": COLOURS, "texture": TEXTURES, "resize": SIZES, "pose": POSES, "letter": LETTERS,
          "slide": tuple(DIRECTIONS), "background": BACKGROUNDS, "style": STYLES, "tone": TONES}


@st.composite
def edits(draw) -> Edit:
    """Any edit the language can say."""
    kind = draw(st.sampled_from(sorted(language.TEMPLATES)))
    slots = set(re.findall(r"\{(\w+)\}", language.TEMPLATES[kind][0]))
    fields = {name: draw(REFERENCES) for name in ("ref", "to") if name in slots}
    if "thing" in slots:
        fields["thing"] = draw(OBJECTS).words
    if "line" in slots:
        shape, colour = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(COLOURS))
        fields |= {"line": draw(st.sampled_from(("row 1", "row 5", "column a", "column e"))),
                   "thing": f"{colour} {shape}", "count": draw(st.sampled_from(tuple(COUNTS.values())))}
    if "image" in slots:
        fields["image"] = draw(st.integers(1, 4))
    if kind in VALUES:
        fields["value"] = draw(st.sampled_from(VALUES[kind]))
    return Edit(kind, **fields)


def cut(text: str) -> list[str]:
    """Greedy longest match over `PHRASES`; single characters where none matches."""
    longest_first = sorted(language.PHRASES, key=len, reverse=True)
    pieces = []
    while text:
        piece = next((p for p in longest_first if text.startswith(p)), text[0])
        pieces.append(piece)
        text = text[len(piece):]
    return pieces


def test_every_kind_of_edit_can_be_said():
    assert set(language.TEMPLATES) == set(KINDS)


@given(st.lists(st.tuples(edits(), st.integers(0, 11)), min_size=1, max_size=5))
def test_a_prompt_in_any_wording_parses_to_the_same_edits(pairs):
    wanted, wordings = zip(*pairs, strict=True)
    assert language.parse_prompt(language.prompt(wanted, wordings)) == wanted


@given(edits())
def test_a_step_parses_to_its_edit_and_says_that_the_rest_stays(edit):
    text = language.step(edit)
    assert language.parse_step(text) == edit
    assert text.endswith(", nothing else.")


@given(edits())
def test_wordings_are_synonyms(edit):
    texts = {language.clause(edit, wording) for wording in range(12)}
    assert len(texts) == len(language.TEMPLATES[edit.kind])
    assert {language.parse_clause(text) for text in texts} == {edit}


@pytest.mark.parametrize("text", ["", "Make it nicer.", "Put a red circle", "Put a red circle at z9.", "Clear b2. And?",
                                  "put a red circle at b2", "Move b2 to", "Paint b2 pink."])
def test_other_text_is_no_instruction(text):
    assert language.parse_prompt(text) is None
    assert language.parse_step(text) is None


def test_several_clauses_are_no_step():
    assert language.parse_step("Clear b2. Clear b3.") is None


@given(OBJECTS)
def test_plans_round_trip(content):
    entries = (("b2", content.words), ("c1", "empty"), ("background", "sky"), ("the ruler", "redrawn"))
    assert language.parse_plan(language.plan(entries)) == entries
    assert language.parse_plan(language.plan(())) == ()


@given(st.dictionaries(st.sampled_from(language.FAULTS),
                       st.lists(st.sampled_from((*place_names(5, 5), "the ruler")), min_size=1, max_size=4).map(tuple)))
def test_failure_analyses_round_trip(faults):
    assert language.parse_failure_analysis(language.failure_analysis(faults)) == faults


@pytest.mark.parametrize("text", ["It is wrong.", "Under-editing at", "Under-editing at moon.", "b2", ""])
def test_other_text_is_no_critique(text):
    assert language.parse_failure_analysis(text) is None
    assert language.parse_plan(text) is None


def test_reasons_name_the_wrong_places_and_stay_short():
    assert language.reason(()) == "as asked"
    assert language.reason(("b2", "c1")) == "wrong at b2 c1"
    assert language.reason(("a1", "a2", "a3", "b1", "b2")) == "wrong at a1 a2 a3 b1 and more"


# -- tokens ---------------------------------------------------------------------------------------------------------


def test_phrases_are_few_and_distinct():
    assert len(language.PHRASES) == len(set(language.PHRASES)) <= 350
    assert all(language.PHRASES)


@given(edits())
def test_whatever_the_language_says_is_cut_into_phrases_alone(edit):
    pieces = cut(language.step(edit))
    assert "".join(pieces) == language.step(edit)
    assert all(piece in language.PHRASES for piece in pieces)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_prompts_need_no_bytes(level):
    for index in range(40):
        pieces = cut(sample_task(level, 1, index).sample.prompt)
        assert all(piece in language.PHRASES for piece in pieces)


def test_level_0_clauses_take_at_most_five_tokens_and_prompts_at_most_twenty_two():
    lengths = []
    for index in range(300):
        task = sample_task(0, 2, index)
        assert max(len(cut(language.clause(edit))) for edit in task.edits) <= 5
        lengths.append(len(cut(task.sample.prompt)))
    assert max(lengths) <= 22
    assert np.mean(lengths) < 13


def test_a_passing_reason_is_one_token_and_a_failing_one_is_one_more_than_its_cells():
    assert len(cut(language.reason(()))) == 1
    assert [len(cut(language.reason(("a1", "b2", "c3")[:n]))) for n in (1, 2, 3)] == [2, 3, 4]


def test_critiques_and_steps_of_level_0_are_short():
    analyzer, generator = WorldAnalyzer(), WorldGenerator(fault_rate=1.0)
    for index in range(60):
        task = sample_task(0, 3, index)
        image = generator.generate_sync(task.sample, task.sample.prompt, list(task.images.values()))
        evaluation = analyzer.evaluate_sync(task.sample, task.images, image)
        reflection = analyzer.reflect_sync(task.sample, task.images, image, evaluation)
        wrong = len(language.parse_plan(reflection.improvement_plan))
        assert len(cut(reflection.failure_analysis)) <= 3 * wrong  # type, cell, full stop
        assert len(cut(reflection.improvement_plan)) <= 1 + 4 * wrong  # "Make", then cell, colour, shape, comma
        assert all(len(cut(step)) <= 6 for step in analyzer.decompose_sync(task.sample, task.images))


def test_an_observation_is_read_back():
    found = language.Observation(
        (("Put a red circle at b2", (("b2", "red circle"),)), ("Clear a1", ()),
         ("Swap the cell left of b2 with c3", (("a2", "empty"), ("c3", "small red circle")))),
        (("empty", "unknown blot", False), ("small dotted red triangle pointing left", "red circle", False),
         ("empty", "empty", True), ("sky", "white", False)),
        ("the ruler",),
    )
    text = language.observation(found)
    assert language.parse_observation(text) == found
    assert language.parse_observation(text + " red circle") is None
    assert found.changes == (("b2", "red circle"), ("a2", "empty"), ("c3", "small red circle"))
    assert language.parse_observation(text.replace("Clear", "Clean")) is None
    assert language.parse_observation(text.replace("b2, b2", "b2, big")) is None
    without_places = language.Observation((("Clear c3", (("c3", "empty"),)),), (), ("the image size",))
    assert language.parse_observation(language.observation(without_places)) == without_places
