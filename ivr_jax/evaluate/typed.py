"""Requests that a person typed: a file of prompts with the boards they are about, as tasks with exact targets.

One JSON object a line:

    {"prompt": "Paint a1 green.", "images": [{"a1": "red circle", "b2": "blue square"}]}

`images` holds the boards that are shown, cell -> object in words, other cells empty; none for a picture drawn from the
prompt alone.  The prompts are in the micro-world's language, any wording of it.  They are not held out: a training
request may happen to say the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.report.answers import EvaluatedAnswer
from ivr_jax.world import language
from ivr_jax.world.facts import make_facts
from ivr_jax.world.levels import level_of
from ivr_jax.world.sampler import Task, make_task
from ivr_jax.world.scene import Scene, object_from_words

TYPED = "typed"  # the split of these tasks


def read_tasks(path: str | os.PathLike[str], level: int) -> list[Task]:
    """The tasks of a file.  Raises UserError naming file and line for one that is no request of the level."""
    tasks = []
    for where, value in files.read_json_lines(path, "Name a file of prompts, one JSON object a line."):
        try:
            tasks.append(_task(value, level, f"{TYPED}-{len(tasks) + 1}"))
        except (ValueError, KeyError, TypeError, UserError) as error:
            what = error.what if isinstance(error, UserError) else str(error)
            raise UserError(
                f"{where} is no request of level {level} of the micro-world: {what}",
                'Write {"prompt": "Paint a1 green.", "images": [{"a1": "red circle"}]}.',
            ) from None
    return tasks


def _task(value: dict, level: int, key: str) -> Task:
    edits = language.parse_prompt(value["prompt"])
    if edits is None:
        raise ValueError(f"the prompt {value['prompt']!r} is not in its language")
    sources = tuple(_scene(board, level) for board in value["images"])
    return make_task(np.random.default_rng(0), make_facts(level, sources, edits), value["prompt"], key, TYPED)


def _scene(board: dict[str, str], level: int) -> Scene:
    blank = level_of(level).blank
    return blank.with_values({blank.index(name): object_from_words(words) for name, words in board.items()})


def print_answers(answers: Sequence[EvaluatedAnswer], console: Console | None = None) -> None:
    """A line for each typed request: right or wrong, images drawn, garbled texts; then how many are right."""
    typed = [answer for answer in answers if answer.split == TYPED]
    output = console or Console()
    for answer in typed:
        mark = Text("right", "green") if answer.right else Text("wrong", "red")
        count = f"{len(answer.images)} image{'' if len(answer.images) == 1 else 's'}"
        garbled = f", garbled {' '.join(answer.garbled)}" if answer.garbled else ""
        output.print(Text.assemble(mark, f"  {count:9}  {answer.sample.prompt}{garbled}"), soft_wrap=True)
    output.print(f"{sum(bool(answer.right) for answer in typed)} of {len(typed)} typed requests are exactly right.")
