"""A user's own prompts, from a JSON-lines file: shares of answers that pass and scores on the four axes of the paper.

Data: the file that `python -m ivr_jax.generate --prompts` takes (`ivr_jax.sampling.requests`); `explanation` and
`category` of a line are for the judge and for the table.  Images: `<key>/<sample>.png`.  An answer passes with the
scores that pass in data construction (`ivr_jax.thresholds`).  Without a judge nothing is scored, and the page shows the
answers alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.cloud import inputs
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat, mean
from ivr_jax.evaluate.benchmarks.interface import ANSWER, Benchmark, Item, Judged, Kind, Picture, Question
from ivr_jax.sampling.requests import Request, read_requests
from ivr_jax.thresholds import WHOLE_REQUEST
from ivr_jax.trajectory import AXES

METRIC, PASSED = "answer", "Passed"


class Own(Benchmark):
    """A user's own prompts, as the module describes it."""

    name = "own"
    title = "Own prompts"
    headline = PASSED
    top = 100.0
    decimals = 2
    shown = 100
    needs_judge = False
    notes = ("Passed is the share of answers, in per cent, with instruction 5 and at least 3 on the other axes.",)

    def prompt_files(self, data: Path) -> list[Path]:
        if not data.is_file():
            raise UserError(f"there is no file of prompts {data}.", "Name it with --prompts=FILE.jsonl.")
        return [data]

    def items(self, data: Path, scratch: Path) -> list[Item]:
        return [self._item(request, data) for request in read_requests(str(self.prompt_files(data)[0]))]

    def _item(self, request: Request, data: Path) -> Item:
        if request.seed:
            raise UserError(f"{data}: the prompt {request.key!r} has a seed of its own.",
                            "Leave it out: the answers of an evaluation follow from --config.seed.")
        references = tuple(str(inputs.local(image).absolute()) for image in request.images)
        return Item(request.key, request.prompt, request.category or "all", references,
                    {"explanation": request.explanation}, request.task, request.aspect_ratio)

    def image_path(self, item: Item, sample: int) -> str:
        return f"{item.key}/{sample}.png"

    def find_images(self, images: Path, item: Item) -> list[Path]:
        folder = images / item.key
        found = [path for path in folder.glob("*.png") if path.stem.isdecimal()] if folder.is_dir() else []
        return sorted(found, key=lambda path: int(path.stem))

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        references = [Picture(f"Source image {n}", path) for n, path in enumerate(item.references, 1)]
        count = len(references)
        words = {
            "request": item.prompt,
            "sources": f"The request comes with {count} source image{'s' * (count > 1)}, shown first." if count
            else "The request comes without a source image.",
            "explanation": item.data["explanation"] or "none given",
        }  # fmt: skip
        pictures = (*references, Picture("Result", ANSWER))
        return [Question(METRIC, Kind.SCORES, "own_answer", words, pictures, AXES, 1, 5)]

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        passed = [_score(item, judged, PASSED) for item in items]
        figures = [flat(PASSED, passed), *(flat(axis, [_score(item, judged, axis) for item in items]) for axis in AXES)]
        categories = list(dict.fromkeys(item.category for item in items))
        for category in categories if len(categories) > 1 else ():
            within = [score for item, score in zip(items, passed, strict=True) if item.category == category]
            figures.append(flat(f"{PASSED}: {category}", within, category))
        return figures

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """`results.jsonl`: prompt, image and scores of each judged answer; not there without a judge."""
        lines = []
        for item in items:
            for sample in judged.samples(item):
                value = judged.value(item, METRIC, sample)
                if value is not None and "scores" in value:
                    record = {"key": item.key, "sample": sample, "prompt": item.prompt, "category": item.category,
                              "image": judged.path(item, sample), **value["scores"],
                              "reasoning": value.get("reasoning", "")}  # fmt: skip
                    lines.append(json.dumps(record, ensure_ascii=False))
        return {"results.jsonl": "".join(line + "\n" for line in lines)} if lines else {}


def _score(item: Item, judged: Judged, name: str) -> Score:
    """The mean over the answers to a prompt of one axis, or of 100 for those that pass and 0 for the others."""
    values = []
    for sample in judged.samples(item):
        scores = {axis: judged.score(item, METRIC, axis, sample) for axis in AXES}
        if None not in scores.values():
            passes = all(scores[axis] >= getattr(WHOLE_REQUEST, axis) for axis in AXES)
            values.append(100.0 * passes if name == PASSED else scores[name])
    return Score(item.key, mean(values) if values else None, len(values), len(judged.samples(item)))


BENCHMARK = Own()
