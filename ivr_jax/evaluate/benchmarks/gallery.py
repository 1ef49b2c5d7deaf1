"""Wins and losses of a run, or of two runs side by side, as the report shows answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ivr_jax.evaluate.benchmarks import run_folder
from ivr_jax.evaluate.benchmarks.figures import item_means
from ivr_jax.evaluate.benchmarks.interface import FIXED, Benchmark, Item, Judged, for_mode
from ivr_jax.evaluate.benchmarks.run_folder import AnswerRecord
from ivr_jax.images import Pixels, load_image
from ivr_jax.report.answers import EvaluatedAnswer, SegmentRecord, answer_from_json
from ivr_jax.report.gallery import GalleryItem, GallerySection
from ivr_jax.trajectory import Sample, sample_from_json


class _Images(Mapping[str, Pixels]):
    """Images by name, read when asked for; a name without a file is not there."""

    def __init__(self, paths: Mapping[str, Path]):
        self._paths = {name: path for name, path in paths.items() if path.is_file()}

    def __getitem__(self, name: str) -> np.ndarray:
        return load_image(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class Run:
    """A finished run as the gallery needs it.

    Args:
      title: of its answers.
      workdir: its folder; data: folder of the reference images.
      paths: the judged images by (item, sample).
    """

    def __init__(
        self, title: str, benchmark: Benchmark, workdir: Path, data: Path, judged: Judged,
        paths: Mapping[tuple[str, int], Path], form: str,
    ):  # fmt: skip
        self.title, self.benchmark, self._workdir, self._data = title, benchmark, workdir, data
        self.judged, self._paths, self._form = judged, paths, form

    def means(self, items: Sequence[Item]) -> dict[str, float]:
        """Each item's part of the headline figure."""
        figures = {figure.name: figure for figure in self.benchmark.figures(items, self.judged, FIXED)}
        return item_means(figures[self.benchmark.headline]) if self.benchmark.headline in figures else {}

    def shown(self, item: Item, value: float | None) -> GalleryItem:
        """The first answer to a prompt, with its scores and the judge's words."""
        record = run_folder.read_answer(self._workdir, item, 0)
        scores, notes = {}, []
        if value is not None:
            scores[self.benchmark.headline] = value
        for question in for_mode(self.benchmark.questions(item, 0, self._form), (FIXED,)):
            found = self.judged.judgement(item, question.metric)
            if found is None:
                continue
            for name, score in ((found.value or {}).get("scores") or {}).items():
                scores[_score_label(question.metric, name)] = float(score)
            said = self.judged.reasoning(item, question.metric) or found.detail
            if said:
                notes.append((f"Judge, {question.metric}", said))
        answer, images = self._answer(item, record, scores)
        mode = record.mode if record is not None else "" if answer.images else "invalid"
        return GalleryItem(self.title, answer, images, mode or "final image only", tuple(notes))

    def _answer(
        self, item: Item, record: AnswerRecord | None, scores: Mapping[str, float]
    ) -> tuple[EvaluatedAnswer, Mapping[str, Pixels]]:
        folder = run_folder.answer_folder(self._workdir, item, 0)
        references = [self._data / path for path in item.references]
        content = record.content if record is not None else None
        if content is not None and "rounds" in content:
            answer = dataclasses.replace(answer_from_json(content), rewards=dict(scores))
            sources = dict(zip(answer.sample.sources, references, strict=True))
            drawn = {name: folder / f"G{n}.png" for n, name in enumerate(answer.images, 1)}
            return answer, _Images({**sources, **drawn})
        names = tuple(f"reference {n}" for n in range(1, len(references) + 1))
        files = dict(zip(names, references, strict=True))
        if content is not None:
            return self._interleaved(item, record, folder, files, scores)
        sample = Sample(item.key, item.prompt, names)
        final = self._paths.get((item.key, 0))
        images = ("final",) if final is not None else ()
        error = record.error if record is not None else ""
        answer = EvaluatedAnswer(sample, None, error, images, rewards=dict(scores), split=item.category)
        return answer, _Images({**files, **({"final": final} if final is not None else {})})

    def _interleaved(
        self, item: Item, record: AnswerRecord, folder: Path, files: dict[str, Path], scores: Mapping[str, float]
    ) -> tuple[EvaluatedAnswer, Mapping[str, Pixels]]:
        segments, images = [], []
        for part in record.content["parts"]:
            if "image" in part:
                images.append(part["image"])
                segments.append(SegmentRecord(f"G{len(images)}", "", part["image"], 0, False))
            else:
                segments.append(SegmentRecord(part["kind"], part["text"], None, 0, False))
        asked = sample_from_json(record.content["sample"])
        sample = Sample(item.key, asked.prompt, tuple(files))
        answer = EvaluatedAnswer(
            sample, None, record.error, tuple(images), rewards=dict(scores), segments=tuple(segments),
            split=item.category,
        )  # fmt: skip
        return answer, _Images({**files, **{name: folder / name for name in images}})


def _score_label(metric: str, name: str) -> str:
    """ "knowledge" for a `knowledge_score`; the metric alone where the field only says that it is a score."""
    label = name.removesuffix("score").rstrip("_")
    if label == name:
        label = metric if name == metric else f"{metric} {name}"
    return (label or metric).replace("_", " ")


def sections(run: Run, items: Sequence[Item]) -> tuple[GallerySection, ...]:
    """The prompts with the best and with the worst answers, and those without a judgement."""
    means = run.means(items)
    judged = sorted((item for item in items if item.key in means), key=lambda item: -means[item.key])
    shown = run.benchmark.shown
    half = min(shown, len(judged) // 2)
    missing = [item for item in items if item.key not in means]
    parts = (
        ("Best answers", "The prompts with the highest scores.", judged[: len(judged) - half][:shown]),
        ("Worst answers", "The prompts with the lowest scores.", judged[::-1][:half]),
        ("Without a judgement", "No image, or no usable reply of the judge.", missing[:shown]),
    )
    return tuple(
        GallerySection(title, lead, tuple(run.shown(item, means.get(item.key)) for item in chosen))
        for title, lead, chosen in parts
        if chosen
    )


def side_by_side(
    first: Run, second: Run, items: Sequence[Item], change: Mapping[str, float]
) -> tuple[GallerySection, ...]:
    """The prompts on which the second run gains most, and those on which it loses most, with both answers."""
    by_key = {item.key: item for item in items}
    order = sorted(change, key=lambda key: -change[key])
    shown = second.benchmark.shown
    parts = (
        ("Gains", f"Where {second.title} is better.", [key for key in order if change[key] > 0][:shown]),
        ("Losses", f"Where {second.title} is worse.", [key for key in order[::-1] if change[key] < 0][:shown]),
    )
    means = [run.means(items) for run in (first, second)]
    return tuple(
        GallerySection(title, lead, tuple(
            run.shown(by_key[key], of.get(key)) for key in keys for run, of in zip((first, second), means, strict=True)
        ))
        for title, lead, keys in parts
        if keys
    )  # fmt: skip


