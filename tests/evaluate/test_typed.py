"""Typed requests: the file's tasks, errors that name the line, and the line printed for each answer."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from answers_fixture import plain_answer
from rich.console import Console

import ivr_jax
from ivr_jax.errors import UserError
from ivr_jax.evaluate.typed import TYPED, print_answers, read_tasks
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.levels import level_of

PROMPTS = Path(ivr_jax.__file__).parent / "demo" / "prompts.jsonl"


def test_the_demo_asks_twenty_requests_of_every_kind_and_length():
    tasks = read_tasks(PROMPTS, level=0)
    assert len(tasks) == 20 and len({task.sample.key for task in tasks}) == 20
    assert {edit.kind for task in tasks for edit in task.edits} == set(level_of(0).all_kinds)
    assert {len(task.edits) for task in tasks} == {1, 2, 3, 4}
    assert {len(task.sample.sources) for task in tasks} == {0, 1, 2}
    assert "Put a red circle at b2. Put a blue square at a1. Swap b2 with a1." in {task.sample.prompt for task in tasks}
    for task in tasks:
        assert WorldAnalyzer().is_exact(task.sample, task.target_image)
        assert not task.images or not WorldAnalyzer().is_exact(task.sample, task.images[task.sample.sources[0]])


@pytest.mark.parametrize("line", [
    "not json", '{"prompt": "Paint a1 green."}', '{"prompt": "Please paint it.", "images": []}',
    '{"prompt": "Paint a1 green.", "images": [{"z9": "red circle"}]}',
    '{"prompt": "Paint a1 green.", "images": [{"a1": "red thing"}]}',
])
def test_a_line_that_is_no_request_is_named(line, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Clear a1.", "images": [{"a1": "red circle"}]}) + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        read_tasks(path, 0)
    assert f"{path}, line 2" in caught.value.what


def test_each_answer_has_a_line_and_the_right_ones_are_counted():
    answers = [plain_answer(2, key="a", split=TYPED), plain_answer(1, exact=False, key="b", split=TYPED),
               plain_answer(1, key="c", split="mixture")]  # fmt: skip
    answers[0] = dataclasses.replace(answers[0], garbled=("S2",))
    console = Console(file=io.StringIO(), width=200)
    print_answers(answers, console)
    first, second, total = console.file.getvalue().splitlines()
    assert first.startswith("right") and "2 images" in first and "S2" in first and second.startswith("wrong")
    assert total.startswith("1 of 2")
