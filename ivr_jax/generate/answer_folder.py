"""One answer as a folder: every image as a PNG file, `answer.json`, and `answer.html`, one self-contained page.

    source1.png ...   the references, as the model saw them
    G1.png ...        the drawn images; final.png is the last of them
    answer.json       what was asked, how (`about`), and the trajectory, or the parts of an interleaved answer

The folder is made under a temporary name.  It appears whole; where there is a folder already, its files are replaced
one by one, `answer.json` last, and files of the user's own stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ivr_jax import files
from ivr_jax.cli import prepare_workdir
from ivr_jax.errors import UserError
from ivr_jax.images import data_uri, save_png
from ivr_jax.protocol import interleaved
from ivr_jax.report.answers import make_answer
from ivr_jax.report.gallery import GalleryItem, GallerySection
from ivr_jax.report.pages import render_page, write_report
from ivr_jax.sampling.rollout import Answer
from ivr_jax.trajectory import Sample, sample_to_json, trajectory_to_json

RECORD, PAGE = "answer.json", "answer.html"
ANSWER = ".answer"  # where a new answer is complete before it replaces an earlier one
_HEADINGS = {interleaved.GLOBAL_THOUGHT: "Thought", interleaved.IMAGE_THOUGHT: "Thought about the next image"}


@dataclasses.dataclass(frozen=True)
class InterleavedAnswer:
    """An interleaved answer: its parts, the pixels of its images in order, and whether it came to its end."""

    sample: Sample
    parts: tuple[interleaved.Part, ...]
    drawn: tuple[np.ndarray, ...]
    finished: bool
    images: Mapping[str, np.ndarray]


def write_answer(out: Path, answer: Answer | InterleavedAnswer, about: Mapping[str, Any]) -> list[Path]:
    """Writes the folder `out`; returns the paths of the drawn images.  Raises UserError when it cannot be written."""
    with _replacing(out) as folder:
        sample = answer.sample if isinstance(answer, InterleavedAnswer) else answer.trajectory.sample
        for number, name in enumerate(sample.sources, 1):
            save_png(folder / f"source{number}.png", answer.images[name])
        if isinstance(answer, InterleavedAnswer):
            drawn, record = answer.drawn, _interleaved_record(answer)
            (folder / PAGE).write_bytes(_interleaved_page(answer).encode("utf-8", "xmlcharrefreplace"))
        else:
            drawn = tuple(answer.images[name] for name in answer.trajectory.images)
            record = trajectory_to_json(answer.trajectory)
            _trajectory_page(folder / PAGE, answer)
        for number, pixels in enumerate(drawn, 1):
            save_png(folder / f"G{number}.png", pixels)
        if drawn:
            save_png(folder / "final.png", drawn[-1])
        (folder / RECORD).write_text(json.dumps({"about": dict(about), **record}, indent=1) + "\n")
    return [out / f"G{number}.png" for number in range(1, len(drawn) + 1)]


def read_about(out: Path) -> dict[str, Any] | None:
    """The `about` of a finished answer in `out`; None when there is none."""
    try:
        record = files.read_json(out / RECORD, "Remove it; the answer is made again.")
    except FileNotFoundError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("about"), dict):
        raise UserError(f"{out / RECORD} is no answer.", "Name another --out.")
    return record["about"]


def check_writable(out: Path) -> None:
    """Raises UserError when `out` cannot be made or written to; leaves nothing new or half-written behind."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    prepare_workdir(out, "out")
    for folder in missing:
        folder.rmdir()
    for partial in out.glob(".answer*"):
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out`, or whose files replace an earlier answer's in it."""
    if not out.exists():
        with files.NewFolder(out) as folder:
            yield folder
        return
    with files.NewFolder(out / ANSWER) as folder:
        yield folder
    with files.writing(out):
        if (out / RECORD).exists():
            (out / RECORD).unlink()  # from here on there is no finished answer
            for old in (*out.glob("G[0-9]*.png"), *out.glob("source[0-9]*.png"), *out.glob("final.png")):
                old.unlink()
        for path in sorted((out / ANSWER).iterdir(), key=lambda path: path.name == RECORD):
            os.replace(path, out / path.name)
        (out / ANSWER).rmdir()


def _trajectory_page(path: Path, answer: Answer) -> None:
    trajectory = answer.trajectory
    record = make_answer(trajectory, answer.segments)
    section = GallerySection("Answer", "Round by round.", (GalleryItem("answer", record, answer.images),))
    write_report(path, trajectory.sample.prompt, (), {}, (section,), (), ())


def _interleaved_record(answer: InterleavedAnswer) -> dict[str, Any]:
    numbers = iter(range(1, len(answer.drawn) + 1))
    parts = [
        {"kind": part.kind, "image": f"G{next(numbers)}.png"}
        if part.kind == interleaved.IMAGE
        else {"kind": part.kind, "text": part.text}
        for part in answer.parts
    ]
    return {"sample": sample_to_json(answer.sample), "parts": parts, "finished": answer.finished}


def _interleaved_page(answer: InterleavedAnswer) -> str:
    pixels = iter(answer.drawn)
    parts = [
        {"uri": data_uri(next(pixels)), "heading": "", "text": ""}
        if part.kind == interleaved.IMAGE
        else {"uri": "", "heading": _HEADINGS.get(part.kind, ""), "text": part.text.strip()}
        for part in answer.parts
    ]
    return render_page(
        "interleaved.html",
        answer.sample.prompt,
        task=answer.sample.task,
        sources=[data_uri(answer.images[name]) for name in answer.sample.sources],
        parts=parts,
        finished=answer.finished,
    )


