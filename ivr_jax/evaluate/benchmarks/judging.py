"""Puts every question of a run to a judge, many at a time, and records each outcome as it comes.

What is on record for the same image and the same judge is not asked again, except where nothing was learnt: a question
that was lost on the way (`transport`), or whose image was missing and is there now.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.interface import (
    ANSWER,
    Benchmark,
    Item,
    Judgement,
    Question,
    State,
    for_mode,
)
from ivr_jax.evaluate.benchmarks.interface import Picture as Wanted
from ivr_jax.evaluate.benchmarks.judgements import Writer
from ivr_jax.evaluate.benchmarks.judges import Judge, label
from ivr_jax.evaluate.benchmarks.run_folder import Found
from ivr_jax.images import Pixels, image_name, load_image
from ivr_jax.services.http_client import Picture

_REMEMBERED = 256  # images that are kept decoded; those of one item are asked for together
Address = tuple[str, int, str, str]


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about one image; `path` is None when there is no image."""

    item: Item
    sample: int
    question: Question
    path: Path | None


def tasks(
    benchmark: Benchmark, items: Sequence[Item], found: Found, form: str, modes: Sequence[str]
) -> Iterator[Task]:
    """Every question of a run, in order."""
    for item in items:
        for sample in range(found.samples[item.key]):
            for question in for_mode(benchmark.questions(item, sample, form), modes):
                yield Task(item, sample, question, found.paths.get((item.key, sample)))


async def judge_all(
    asked: Sequence[Task],
    judge: Judge,
    data: Path,
    workdir: Path,
    recorded: Mapping[Address, Judgement],
    progress: Callable[[Judgement], None] | None = None,
) -> dict[Address, Judgement]:
    """Asks what is not on record; returns the judgement of every task.

    Args:
      data: folder below which reference images are.
      workdir: where `judgements.jsonl` is.
      recorded: what is on record (`judgements.read`).

    Raises:
      UserError: the judge cannot be used, a reference image is missing, or the disk is full.  What was judged stays.
    """
    images = _Images(data)
    results: dict[Address, Judgement] = {}
    waiting = iter(asked)
    name = label(judge)
    with Writer(workdir) as writer:

        async def work() -> None:
            for task in waiting:
                judgement = await _one(task, judge, name, images, recorded)
                address = (*judgement.address, judgement.judge)
                if recorded.get(address) != judgement:
                    writer.add(judgement)
                results[address] = judgement
                if progress is not None:
                    progress(judgement)

        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, judge.in_flight)):
                group.create_task(work())
    return results


def first_error(group: BaseExceptionGroup) -> BaseException:
    """The error of a group that says most: a bug before bad input, which may have followed from it."""
    errors = []
    for error in group.exceptions:
        errors.append(first_error(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in errors if not isinstance(error, UserError)), errors[0])


async def _one(
    task: Task, judge: Judge, name: str, images: _Images, recorded: Mapping[Address, Judgement]
) -> Judgement:
    base = Judgement(task.item.key, task.sample, task.question.metric, name, State.NO_IMAGE)
    if task.path is None:
        return base
    pixels, image = await images.get(task.path)
    known = recorded.get((*base.address, name))
    if known is not None and known.image == image and known.state not in (State.TRANSPORT, State.NO_IMAGE):
        return known
    pictures = [await images.shown(wanted, pixels) for wanted in task.question.pictures]
    outcome = await judge.ask(task.item, task.question, pictures)
    return dataclasses.replace(base, state=outcome.state, value=outcome.value, image=image, detail=outcome.detail)


class _Images:
    """Images by path, the last ones kept decoded; read beside the event loop."""

    def __init__(self, data: Path):
        self._data = data
        self._read = functools.lru_cache(_REMEMBERED)(_read)

    async def get(self, path: Path) -> tuple[Pixels, str]:
        """Pixels and name of an image."""
        return await asyncio.to_thread(self._read, path)

    async def shown(self, wanted: Wanted, answer: Pixels) -> Picture:
        """The picture that a question wants, at the size that it wants."""
        pixels = answer if wanted.path == ANSWER else (await self.get(self._data / wanted.path))[0]
        like = (await self.get(self._data / wanted.like))[0].shape if wanted.like else None
        if like is None and not wanted.max_area:
            return Picture(wanted.label, pixels)
        return Picture(wanted.label, await asyncio.to_thread(resized, pixels, wanted, like))


def resized(pixels: Pixels, wanted: Wanted, like: tuple[int, ...] | None) -> Pixels:
    """`pixels` at the size of `like`, or at most `wanted.max_area` with sides cut to multiples of `wanted.multiple`."""
    height, width = pixels.shape[:2]
    if like is not None:
        height, width = like[:2]
    else:
        scale = min(1.0, (wanted.max_area / (height * width)) ** 0.5)
        height, width = (
            max(wanted.multiple, int(side * scale) // wanted.multiple * wanted.multiple) for side in (height, width)
        )
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _read(path: Path) -> tuple[Pixels, str]:
    pixels = load_image(path)
    return pixels, image_name(pixels)
