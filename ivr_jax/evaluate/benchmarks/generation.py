"""Answers of a model to a benchmark's prompts, through the rollout engine, each written as soon as its batch is drawn.

An answer depends on the seed and on its own number, not on what is drawn beside it, so that a run that was stopped
draws only what is missing.  Of several processes each draws its own share on its own devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ivr_jax import files
from ivr_jax.checkpoints.system import System
from ivr_jax.config import Count, Positive, Section
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import run_folder
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item
from ivr_jax.evaluate.benchmarks.run_folder import AnswerRecord
from ivr_jax.images import Pixels, fit, fitted_size, image_name, load_image, save_png
from ivr_jax.models.image_codec import ImageCodec
from ivr_jax.protocol import codec, interleaved
from ivr_jax.protocol.grammar import FREE, INTERLEAVED, Grammar
from ivr_jax.report.answers import answer_to_json, make_answer
from ivr_jax.sampling.batch import RolloutOptions
from ivr_jax.sampling.engine import EngineOptions, pad_prompts
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.requests import image_tokens, output_size
from ivr_jax.sampling.rollout import Rollout, roll_out
from ivr_jax.trajectory import Sample, sample_to_json

_LEAST_ANSWER, _IMAGES_OF_ROOM = 640, 5  # tokens of an answer when no length is given: five images' worth
_WINDOW = 8  # batches whose references are held in memory at a time


@dataclasses.dataclass(frozen=True)
class GenerationPlan(Section):
    """How answers are drawn.

    Attributes:
      samples: answers to a prompt.
      seed: of all answers.
      batch: answers that are drawn together, and written together.
      image_area: pixels of an image, about; 0 takes the image tokenizer's resolution, squared.
      answer_length: most tokens of an answer; 0 leaves room for five images.
    """

    samples: Positive
    seed: int
    batch: Positive
    image_area: Count
    answer_length: Count


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """One prompt as the engine takes it; `number` is its place in the benchmark."""

    number: int
    item: Item
    sample: Sample
    images: dict[str, Pixels]
    size: tuple[int, int]
    length: int


def missing_answers(workdir: Path, items: Sequence[Item], samples: int) -> list[tuple[int, Item]]:
    """Items without all their answers, with their numbers."""
    return [
        (number, item)
        for number, item in enumerate(items)
        if any(run_folder.read_answer(workdir, item, sample) is None for sample in range(samples))
    ]


def generate(
    system: System,
    grammar: Grammar,
    benchmark: Benchmark,
    items: Sequence[Item],
    data: Path,
    workdir: Path,
    plan: GenerationPlan,
    sampling: SamplingOptions,
    engine: EngineOptions,
    prompts: Mapping[str, str],
    share: tuple[int, int] = (0, 1),
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Draws every answer that is missing; returns how many were written.

    Args:
      data: folder of the reference images.
      prompts: rewritten prompts by item key; others are asked as published.
      share: which process of how many this is.
      mesh: where the system's parameters are, when that is not one device.
      progress: called with the number of answers that were just written.
    """
    system = dataclasses.replace(system, image_codec=_one_by_one(system.image_codec))
    missing = missing_answers(workdir, items, plan.samples)
    todo = [(number, item) for number, item in missing if number % share[1] == share[0]]
    written = 0
    window = max(1, plan.batch // plan.samples) * _WINDOW
    for start in range(0, len(todo), window):
        prepared, refused = _prepare(system, todo[start : start + window], data, plan, prompts)
        for item, reason in refused:
            for sample in range(plan.samples):
                record = AnswerRecord(item.key, sample, "invalid", 0, 0, 0, reason)
                run_folder.write_answer(workdir, item, record)
                written += 1
        for group in _batches(prepared, max(1, plan.batch // plan.samples)):
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                rollout = roll_out(
                    system,
                    grammar,
                    [one.sample for one in group],
                    [one.images for one in group],
                    jax.random.key(plan.seed),
                    RolloutOptions(group[0].length, sampling, engine, plan.samples, group[0].size),
                    first=[one.number for one in group],
                )
            _check_finite(rollout)
            for row, one in ((row, group[row // plan.samples]) for row in range(len(group) * plan.samples)):
                sample = row % plan.samples
                if run_folder.read_answer(workdir, one.item, sample) is None:
                    _write(system, grammar, benchmark, workdir, one, sample, rollout, row)
                    written += 1
                    if progress is not None:
                        progress(1)
    return written


@functools.lru_cache(maxsize=1)
def _one_by_one(image_codec: ImageCodec) -> ImageCodec:
    """`image_codec`, whose images then do not depend on which answers are drawn together, by which process."""
    return ImageCodec(image_codec.config, image_codec.params, batch=1)


def _prepare(
    system: System, todo: Sequence[tuple[int, Item]], data: Path, plan: GenerationPlan, prompts: Mapping[str, str]
) -> tuple[list[_Prepared], list[tuple[Item, str]]]:
    """Prompts as the engine takes them; and those whose prompt leaves no room for an image, with the reason."""
    config = system.image_codec.config
    area = plan.image_area or config.resolution**2
    loaded = []
    for number, item in todo:
        images, shapes = {}, []
        for path in item.references:
            pixels = fit(load_image(data / path), area, config.factor)
            images[image_name(pixels)] = pixels
            shapes.append((image_name(pixels), tuple(side // config.factor for side in pixels.shape[:2])))
        square = tuple(side // config.factor for side in fitted_size(1, 1, area, config.factor))
        size = shapes[0][1] if len(shapes) == 1 else square
        if item.aspect_ratio:
            size = output_size(item.aspect_ratio, [shape for _, shape in shapes], area, config.factor)
        asked, names = prompts.get(item.key, item.prompt), tuple(name for name, _ in shapes)
        sample = Sample(item.key, asked, names, task_word=item.task)
        loaded.append((number, item, sample, images, size, square))
    codes = iter(system.image_codec.encode([pixels for *_, images, _, _ in loaded for pixels in images.values()]))
    prepared, refused = [], []
    for number, item, sample, images, size, square in loaded:
        known = {name: next(codes) for name in images}
        tokens, _ = pad_prompts([codec.encode_prompt(system.tokenizer, sample, known)], system.tokenizer.vocab.pad)
        image = image_tokens(*(square if size == FREE else size))
        left = system.config.max_position_embeddings - tokens.shape[1]
        length = min(plan.answer_length or max(_LEAST_ANSWER, _IMAGES_OF_ROOM * image), left)
        if length <= image:
            refused.append((item, f"the prompt takes {tokens.shape[1]} tokens and leaves {left}; an image needs "
                                  f"{image}"))  # fmt: skip
            continue
        prepared.append(_Prepared(number, item, sample, images, size, length))
    return prepared, refused


def _batches(prepared: Sequence[_Prepared], count: int) -> Iterator[list[_Prepared]]:
    """Up to `count` prompts of one image size and one answer length at a time."""
    groups: dict[tuple[Any, ...], list[_Prepared]] = {}
    for one in prepared:
        groups.setdefault((one.size, one.length), []).append(one)
    for group in groups.values():
        for start in range(0, len(group), count):
            yield group[start : start + count]


def _write(
    system: System, grammar: Grammar, benchmark: Benchmark, workdir: Path, one: _Prepared, sample: int,
    rollout: Rollout, row: int,
) -> None:  # fmt: skip
    """Writes drafts, final image and the files beside it, and last the record."""
    record, drawn = _record(system, grammar, one, sample, rollout, row)
    folder = run_folder.answer_folder(workdir, one.item, sample)
    for number, pixels in enumerate(drawn, 1):
        save_png(folder / f"G{number}.png", pixels)
    if drawn:
        images = workdir / run_folder.IMAGES
        for name, text in benchmark.side_files(one.item).items():
            files.write_file(images / name, text)
        save_image(images / benchmark.image_path(one.item, sample), drawn[-1])
    run_folder.write_answer(workdir, one.item, record)


def _record(
    system: System, grammar: Grammar, one: _Prepared, sample: int, rollout: Rollout, row: int
) -> tuple[AnswerRecord, list[Pixels]]:
    """The record of an answer, and the images that it drew, in order."""
    tokens, key = int(rollout.samples.lengths[row]), one.item.key
    if grammar.options.modes == (INTERLEAVED,):
        try:
            parts, finished = interleaved.parse_interleaved(system.tokenizer, rollout.answer_tokens(row))
        except UserError as error:
            return AnswerRecord(key, sample, "invalid", 0, tokens, error=error.what), []
        drawn = system.image_codec.decode([part.codes for part in parts if part.codes is not None])
        content = {"sample": sample_to_json(one.sample), "parts": _parts(parts), "finished": finished}
        error = "" if drawn else "the answer holds no whole image"
        mode = "interleaved" if drawn else "invalid"
        return AnswerRecord(key, sample, mode, len(drawn), tokens, error=error, content=content), drawn
    answer = rollout.answers[row]
    if answer is None:
        return AnswerRecord(key, sample, "invalid", 0, tokens, error=rollout.errors[row]), []
    trajectory = answer.trajectory
    content = answer_to_json(make_answer(trajectory, answer.segments, split=one.item.category))
    drawn = [answer.images[name] for name in trajectory.images]
    return AnswerRecord(key, sample, trajectory.mode.value, len(drawn), tokens, content=content), drawn


def _parts(parts: Sequence[interleaved.Part]) -> list[dict[str, str]]:
    number, described = 0, []
    for part in parts:
        if part.codes is None:
            described.append({"kind": part.kind, "text": part.text})
        else:
            number += 1
            described.append({"kind": part.kind, "image": f"G{number}.png"})
    return described


def save_image(path: Path, pixels: Pixels) -> None:
    """Writes PNG, or JPEG of high quality where the official layout wants that."""
    if path.suffix == ".png":
        save_png(path, pixels)
        return
    with files.new_file(path) as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)


def _check_finite(rollout: Rollout) -> None:
    if not np.isfinite(rollout.samples.log_probs).all():
        raise UserError("the model's scores are not numbers: its weights hold NaN or infinity.",
                        "Use another step of the run, or convert the weights again.")
