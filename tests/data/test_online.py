"""Lessons made when they are read are the token examples that a stored dataset of the same trajectories gives."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from array_record.python import array_record_module

from ivr_jax.checkpoints.system import text_tokenizer
from ivr_jax.data import examples, online, pipeline
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.protocol import codec
from ivr_jax.trajectory import Mode
from ivr_jax.world import judgement, language
from ivr_jax.world.practice import LESSONS, PracticeOptions, draw_lesson
from ivr_jax.world.render import render

OPTIONS = PracticeOptions()
TOKENIZER = text_tokenizer("micro", 64)


class Tiles:
    """An image tokenizer whose codes number the tiles it has met; with `around`, tiles with their left neighbours."""

    def __init__(self, around: bool = False):
        self.known, self.around = {}, around

    def __call__(self, images):
        return [self._codes(image) for image in images]

    def _codes(self, image):
        rows, columns = image.shape[0] // 16, image.shape[1] // 16
        tile = {(y, x): image[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].tobytes()
                for y in range(rows) for x in range(columns)}
        keys = [[(tile[y, x], tile.get((y, x - 1)) if self.around else None) for x in range(columns)]
                for y in range(rows)]
        return np.array([[self.known.setdefault(key, len(self.known)) % 64 for key in row] for row in keys])


def stored_examples(lessons, encode, folder):
    """What the path over a stored dataset with rendered images makes of lessons: {key: (tokens, loss)}."""
    with TrajectoryWriter(folder / "dataset") as writer:
        for lesson in lessons:
            images = {name: render(scene, 0) for name, scene in lesson.scenes.items()}
            named = {name: image_name(image) for name, image in images.items()}
            sample = dataclasses.replace(
                lesson.trajectory.sample, sources=tuple(named[n] for n in lesson.trajectory.sample.sources))
            rounds = tuple(dataclasses.replace(r, image=named[r.image]) for r in lesson.trajectory.rounds)
            writer.add(dataclasses.replace(lesson.trajectory, sample=sample, rounds=rounds),
                       {named[name]: image for name, image in images.items()})
    examples.make_examples(TrajectoryDataset(folder / "dataset"), TOKENIZER, encode, folder / "made", 10_000, "f")
    found = []
    for mode in Mode:
        source = array_record_module.ArrayRecordReader(str(folder / "made" / f"{mode.value}.array_record"))
        found += [examples.unpack_example(record) for record in source.read_all()] if source.num_records() else []
    return found


@pytest.mark.parametrize("around", [False, True])
def test_lessons_are_what_a_stored_dataset_gives(tmp_path, around):
    encode = Tiles(around)
    lessons = [draw_lesson(OPTIONS, 4, index) for index in range(60)]
    assert {lesson.trajectory.mode for lesson in lessons} == set(Mode)
    source = online.LessonExamples(TOKENIZER, encode, OPTIONS, 4)
    made = [source[index] for index in range(60)]
    stored = stored_examples(lessons, encode, tmp_path)
    assert sorted(e["tokens"].tolist() for e in made) == sorted(e["tokens"].tolist() for e in stored)
    for example, lesson in zip(made, lessons, strict=True):
        other = next(e for e in stored if e["tokens"].tolist() == example["tokens"].tolist())
        np.testing.assert_array_equal(example["loss"], without_given(lesson, example["tokens"], other["loss"]))


def without_given(lesson, tokens, loss):
    """The loss flags without those of given images, found by counting the image blocks of the answer."""
    vocab, expected = TOKENIZER.vocab, loss.copy()
    starts = np.flatnonzero(tokens == vocab.boi)[len(lesson.trajectory.sample.sources) :]
    for start, name in zip(starts, lesson.trajectory.images, strict=True):
        end = start + np.flatnonzero(tokens[start:] == vocab.eoi)[0] + 1
        if name in lesson.given:
            expected[start:end] = 0
        elif len(lesson.trajectory.images) == 1:
            assert (expected[start:end] == 1 + codec.PARTS.index("G")).all()
    return expected


def test_lessons_depend_on_seed_and_index_alone_and_show_what_they_say():
    for index in range(80):
        lesson = draw_lesson(OPTIONS, 7, index)
        assert lesson == draw_lesson(OPTIONS, 7, index)
        rounds = lesson.trajectory.rounds
        edits = language.parse_prompt(lesson.trajectory.sample.prompt)
        canvas = lesson.scenes.get("source1", OPTIONS.rules.blank)
        sources = [lesson.scenes[name] for name in lesson.trajectory.sample.sources]
        target = canvas
        for edit in edits:
            target = edit.apply(target, sources)
        for round_ in rounds:
            assert round_.evaluation.passed == (lesson.scenes[round_.image] == target)
            seen = language.parse_observation(round_.evaluation.observation)
            assert [row[2] for row in seen.places] == [
                a == b for a, b in zip(lesson.scenes[round_.image].cells, target.cells, strict=True)]
        assert rounds[-1].evaluation.passed or rounds[-1].image in lesson.given or len(edits) < len(rounds)
    assert draw_lesson(OPTIONS, 7, 0) != draw_lesson(OPTIONS, 8, 0)


def test_shares_are_as_asked_for():
    options = dataclasses.replace(
        OPTIONS, lessons={"direct": 1.0, "judge": 3.0}, drawn_edits=(1.0,), read_edits=(0.0, 0.0, 1.0), right=0.25,
        kinds=dict.fromkeys(("put", "clear", "recolour", "replace", "line", "duplicate", "swap"), 0.0) | {"move": 1.0})
    counts, kinds = Counter(), Counter()
    for index in range(400):
        lesson = draw_lesson(options, 0, index)
        edits = language.parse_prompt(lesson.trajectory.sample.prompt)
        if lesson.trajectory.sample.sources and "image" not in lesson.trajectory.sample.prompt:
            kinds.update(edit.kind for edit in edits)
        counts[not lesson.given, len(edits), lesson.trajectory.rounds[0].evaluation.passed] += 1
    assert set(counts) == {(True, 1, True), (False, 3, True), (False, 3, False)}
    assert 70 <= counts[True, 1, True] <= 130 and 50 <= counts[False, 3, True] <= 100
    assert set(kinds) == {"move"}


def test_later_images_are_wrong_as_often_as_asked_and_the_rest_follows_from_them():
    passes, rounds = Counter(), Counter()
    for share in (0.0, 0.5):
        options = dataclasses.replace(OPTIONS, lessons={"reflection": 1.0, "multi_step": 1.0}, later_wrong=share)
        for index in range(120):
            lesson = draw_lesson(options, 3, index)
            mode, images = lesson.trajectory.mode, lesson.trajectory.rounds
            assert images[0].image in lesson.given and not images[0].evaluation.passed
            for before, round_ in zip(images, images[1:], strict=False):
                if mode is Mode.REFLECTION:
                    assert round_.evaluation.passed == (round_.image not in lesson.given)
                elif round_.image not in lesson.given:
                    first = before is images[0]
                    last = lesson.scenes.get("source1", OPTIONS.rules.blank) if first else lesson.scenes[before.image]
                    sources = [lesson.scenes[name] for name in lesson.trajectory.sample.sources]
                    edit = language.parse_step(round_.cause.instruction)
                    assert lesson.scenes[round_.image] == judgement.apply_safely([edit], last, sources)
            rounds[share, mode, len(images)] += 1
            passes[share, mode] += images[-1].evaluation.passed
    for mode in (Mode.REFLECTION, Mode.MULTI_STEP):
        lessons = {share: sum(n for (s, m, _), n in rounds.items() if (s, m) == (share, mode)) for share in (0.0, 0.5)}
        assert passes[0.0, mode] == lessons[0.0]
        assert 0.1 < passes[0.5, mode] / lessons[0.5] < 0.9
    assert set(length for share, mode, length in rounds if (share, mode) == (0.0, Mode.REFLECTION)) == {2}
    assert set(length for share, mode, length in rounds if (share, mode) == (0.5, Mode.REFLECTION)) == {2, 3}


@pytest.mark.parametrize("wrong", [
    {"lessons": {"essay": 1.0}}, {"lessons": dict.fromkeys(LESSONS, 0.0)}, {"drawn_edits": (1.0,) * 5},
    {"read_edits": (-1.0, 1.0)}, {"right": 1.5}, {"dense": 0.7, "misread": 0.7}, {"kinds": {"dance": 1.0}},
    {"read_edits": (1.0,)}, {"level": 9}, {"later_wrong": -0.1},
])  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UserError):
        dataclasses.replace(OPTIONS, **wrong)


def test_batches_of_lessons_resume_exactly_and_leave_out_what_is_too_long():
    encode = Tiles()

    def read():
        source = online.LessonExamples(TOKENIZER, encode, OPTIONS, 1)
        return pipeline.packed_batches(pipeline.made_examples(source, 200), 2, 200, 0)

    batches = read()
    first = next(batches)
    assert first["tokens"].shape == (2, 200) and (first["loss"] > 0).any()
    assert first["positions"].max() < 200
    state, following = batches.get_state(), next(batches)
    resumed = read()
    resumed.set_state(state)
    for name, value in next(resumed).items():
        np.testing.assert_array_equal(value, following[name])


def test_a_lesson_does_not_depend_on_what_was_read_before_it():
    encode = Tiles()
    source = online.LessonExamples(TOKENIZER, encode, OPTIONS, 2)
    there = [source[index] for index in (0, 700, 130, 2, 400, 900, 0, 131)]
    for index, example in zip((0, 700, 130, 2, 400, 900, 0, 131), there, strict=True):
        alone = online.LessonExamples(TOKENIZER, encode, OPTIONS, 2)[index]
        np.testing.assert_array_equal(alone["tokens"], example["tokens"])
        np.testing.assert_array_equal(alone["loss"], example["loss"])
