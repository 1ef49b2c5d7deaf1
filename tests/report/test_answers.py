"""Answers on disk: an exact round trip, images beside them, nothing half written, and one clear line for bad files."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from answers_fixture import ARMS, Studio, plain_answer, tasks
from hypothesis import given
from hypothesis import strategies as st

from ivr_jax.errors import UserError
from ivr_jax.report.answers import (
    EvaluatedAnswer,
    SegmentRecord,
    answer_from_json,
    answer_to_json,
    file_name,
    read_answers,
    read_images,
    write_answers,
)
from ivr_jax.trajectory import Mode, Sample


@pytest.fixture(scope="module")
def recorded() -> tuple[list[EvaluatedAnswer], dict[str, np.ndarray]]:
    """Answers of every mode, a garbled one and a training sample, with their images."""
    studio = Studio(seed=5)
    answers = [studio.answer(task, ARMS["eval_sft"], "kris/procedural") for task in tasks(24)]
    answers.append(studio.garbled(tasks(2)[1], "half a sentence \ud800 and a line\u2028break"))
    answers.append(studio.training_sample(tasks(3)[2], Mode.REFLECTION))
    return answers, studio.images


def test_the_fixture_shows_every_kind_of_answer(recorded):
    assert {answer.mode for answer in recorded[0]} == {*Mode, None}


def test_answers_and_images_come_back_as_they_were_written(recorded, tmp_path):
    answers, images = recorded
    write_answers(tmp_path, answers, images)
    assert read_answers(tmp_path) == tuple(answers)
    stored = read_images(tmp_path)
    needed = {name for answer in answers for name in answer.names}
    assert set(stored) == needed and len(stored) == len(needed)
    assert all(np.array_equal(stored[name], images[name]) for name in needed)


def test_an_image_that_many_answers_share_is_one_file(tmp_path):
    answer = plain_answer(key="a")
    write_answers(tmp_path, [answer, answer, answer], {"a-0": np.zeros((4, 4, 3), np.uint8)})
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a-0.png"]


def test_writing_again_replaces_the_answers(recorded, tmp_path):
    answers, images = recorded
    write_answers(tmp_path, answers, images)
    write_answers(tmp_path, answers[:2], images)
    assert read_answers(tmp_path) == tuple(answers[:2])


def test_a_missing_image_is_named_and_leaves_the_old_answers(recorded, tmp_path):
    answers, images = recorded
    write_answers(tmp_path, answers[:1], images)
    with pytest.raises(UserError) as caught:
        write_answers(tmp_path, [plain_answer(key="nowhere")], images)
    assert "nowhere-0" in caught.value.what
    assert read_answers(tmp_path) == tuple(answers[:1])


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique_by=str.casefold))
def test_no_image_name_leaves_its_folder_or_meets_another(names):
    names = [name for name in names if name.encode("utf-8", "ignore").decode() == name]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(files)
    assert all("/" not in file and "\\" not in file and file not in (".png", "..", ".") for file in files)


def test_an_image_name_with_slashes_is_one_file_inside_the_folder(tmp_path):
    answer = plain_answer(key="../../up/and away")
    write_answers(tmp_path / "eval", [answer], {answer.images[0]: np.full((4, 4, 3), 7, np.uint8)})
    assert [path.parent for path in tmp_path.rglob("*.png")] == [tmp_path / "eval" / "images"]
    assert read_images(tmp_path / "eval")[answer.images[0]].max() == 7


def test_names_that_differ_in_case_only_are_refused(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(UserError):
        write_answers(tmp_path, [plain_answer(key="A"), plain_answer(key="a")], {"A-0": pixels, "a-0": pixels})


def test_an_image_that_was_not_stored_is_a_key_error_and_a_broken_one_a_clear_error(tmp_path):
    write_answers(tmp_path, [plain_answer(key="a")], {"a-0": np.zeros((4, 4, 3), np.uint8)})
    images = read_images(tmp_path)
    assert "b-0" not in images
    (tmp_path / "images" / "a-0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    with pytest.raises(UserError) as caught:
        images["a-0"]
    assert "a-0.png" in caught.value.what


@pytest.mark.parametrize("line", ["{", "[1, 2]", '{"sample": {}}', "MODE", "SEGMENT", "TRUTH"])
def test_a_bad_line_is_reported_with_file_and_number(line, tmp_path):
    good = answer_to_json(plain_answer())
    bad = {"MODE": {**good, "mode": "sideways"}, "SEGMENT": {**good, "segments": [{"kind": "G1", "colour": 3}]},
           "TRUTH": {**good, "truth": good["truth"] * 2}}
    text = json.dumps(bad[line]) if line in bad else line
    (tmp_path / "answers.jsonl").write_text(json.dumps(good) + "\n\n" + text + "\n")
    with pytest.raises(UserError) as caught:
        read_answers(tmp_path)
    assert "answers.jsonl, line 3" in caught.value.what


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError) as caught:
        read_answers(tmp_path)
    assert str(tmp_path / "answers.jsonl") in caught.value.what


def test_a_record_without_garbled_texts_is_read_and_one_with_them_is_kept(tmp_path):
    answer = dataclasses.replace(plain_answer(2), garbled=("S2",))
    record = answer_to_json(answer)
    assert answer_from_json(record) == answer
    assert answer_from_json({name: value for name, value in record.items() if name != "garbled"}) == plain_answer(2)


def test_an_answer_must_agree_with_itself():
    answer = plain_answer(images=2)
    for change in ({"mode": Mode.DIRECT}, {"images": ("other",)}, {"trajectory": None}, {"sample": Sample("x", "y")},
                   {"exact": (True,)}, {"rewards": {"step": math.nan}}, {"rewards": {"step": None}}):
        with pytest.raises(UserError):
            dataclasses.replace(answer, **change)


def test_an_answer_is_right_by_its_target_else_by_the_analyzer_and_wrong_without_an_image():
    answer = plain_answer(exact=True)
    assert answer.right is True
    assert dataclasses.replace(answer, exact=(False,)).right is False
    assert dataclasses.replace(answer, exact=()).right is True
    assert dataclasses.replace(answer, exact=(), truth=(None,)).right is None
    assert EvaluatedAnswer(answer.sample, None, "no image").right is False


def test_a_segment_needs_a_kind_and_a_length():
    for arguments in (("", "", None, 1, True), ("G1", "", "a", -1, True)):
        with pytest.raises(UserError):
            SegmentRecord(*arguments)


def test_the_json_form_is_plain(recorded):
    for answer in recorded[0]:
        assert answer_from_json(json.loads(json.dumps(answer_to_json(answer), allow_nan=False))) == answer
