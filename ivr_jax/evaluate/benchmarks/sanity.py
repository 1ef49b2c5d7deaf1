"""Images on which a judge must be right before its figures count.

For a language model they are drawn here: plain shapes, each with statements that hold or do not.  For a detector they
are a folder of the user's own photographs with `metadata.jsonl`, one object a line:

    {"file": "a.jpg", "metadata": {"tag": "counting", "include": [{"class": "dog", "count": 2}]}, "correct": true}
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles, judging
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item, Kind, Question, State
from ivr_jax.evaluate.benchmarks.judges import Judge, Outcome
from ivr_jax.images import Pixels, load_image
from ivr_jax.services.http_client import Picture

PASSED, SKIPPED, NOT_RUN = "passed", "skipped", "not run"
_SIDE = 256
_STATEMENTS = (  # shape, colour, statement, whether it holds
    ("square", "red", "The image shows a red square.", True),
    ("square", "red", "The image shows a blue circle.", False),
    ("circle", "blue", "The image shows a blue circle.", True),
    ("circle", "blue", "The image shows a red square.", False),
)


@dataclasses.dataclass(frozen=True)
class Check:
    """One image, what is asked about it, and the right answer."""

    question: Question
    pixels: Pixels
    expected: bool


def checks_for(benchmark: Benchmark, judge: Judge, folder: Path | None) -> list[Check]:
    """The checks of a judge; none for a detector without a folder of its own."""
    if judge.form == "detector":
        return [] if folder is None else _of_folder(folder)
    if benchmark.name == "geneval2":
        return [
            Check(Question("sanity", Kind.PROBABILITY, "sanity_yes", {"question": f"Is this true? {statement}"},
                           accepted=("Yes", "yes", " Yes", " yes")), shape(kind, color), holds)
            for kind, color, statement, holds in _STATEMENTS
        ]  # fmt: skip
    return [
        Check(Question("sanity", Kind.SCORES, "sanity_statement", {"statement": statement}, scores=("score",)),
              shape(kind, color), holds)
        for kind, color, statement, holds in _STATEMENTS
    ]  # fmt: skip


async def run(checks: list[Check], judge: Judge, progress: Callable[[], object] = lambda: None) -> str:
    """`PASSED`, `NOT_RUN` without checks, or what failed; `progress` is called after each check."""
    if not checks:
        return NOT_RUN

    async def ask(check: Check) -> Outcome:
        outcome = await judge.ask(Item("sanity", "sanity", ""), check.question, [Picture("Image", check.pixels)])
        progress()
        return outcome

    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(check)) for check in checks]
    except BaseExceptionGroup as errors:
        raise judging.first_error(errors) from None
    wrong = []
    for check, outcome in zip(checks, (task.result() for task in asked), strict=True):
        if outcome.state != State.OK:
            wrong.append(f"{outcome.state.value} ({outcome.detail})")
            continue
        if _verdict(check.question, outcome.value) != check.expected:
            said = check.question.fields.get("statement") or check.question.fields.get("question") or "an image"
            wrong.append(f"{said!r} was judged {not check.expected}".lower())
    return PASSED if not wrong else f"failed {len(wrong)} of {len(checks)}: {wrong[0]}"


def shape(kind: str, color: str) -> Pixels:
    """uint8 [256, 256, 3]: one shape on white."""
    image = Image.new("RGB", (_SIDE, _SIDE), "white")
    box = (_SIDE // 4, _SIDE // 4, 3 * _SIDE // 4, 3 * _SIDE // 4)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if kind == "square" else draw.ellipse)(box, fill=color)
    return np.array(image)


def _of_folder(folder: Path) -> list[Check]:
    checks = []
    for number, row in enumerate(datafiles.read_jsonl(folder / "metadata.jsonl")):
        where = f"{folder / 'metadata.jsonl'}, image {number}"
        datafiles.fields(row, {"file": str, "metadata": dict, "correct": bool}, where, "sanity images")
        question = Question("sanity", Kind.DETECTION, data=row["metadata"])
        checks.append(Check(question, load_image(folder / row["file"]), row["correct"]))
    if not checks:
        raise UserError(f"{folder} holds no sanity image.", "Describe some in its metadata.jsonl.")
    return checks


def _verdict(question: Question, value: dict) -> bool:
    if question.kind == Kind.PROBABILITY:
        return value["probability"] > 0.5
    return bool(value["scores"]["score" if question.kind == Kind.SCORES else "correct"])
