"""The micro-world's held-out prompts as a benchmark: exact match and four axis scores, judged by its exact analyzer.

Data: `tasks.jsonl`, one sample a line, and `images/<name>.png`.  They are the project's own, so a folder that is empty
or missing is filled: the training mixture by number of edits, and the splits in the manner of the public benchmarks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat
from ivr_jax.evaluate.benchmarks.interface import ANSWER, Benchmark, Item, Judged, Kind, Picture, Question
from ivr_jax.evaluate.micro_world import held_out_tasks
from ivr_jax.images import save_png
from ivr_jax.trajectory import AXES, sample_to_json

TASKS = "tasks.jsonl"
# The benchmark itself: level and seed of the world, prompts of the mixture by edits up to the most, prompts a split.
LEVEL, SEED, PROMPTS, MOST_EDITS, EACH_SPLIT = 0, 7, 320, 4, 8


def write_tasks(folder: Path, prompts: int = PROMPTS, each_split: int = EACH_SPLIT, seed: int = SEED) -> None:
    """Writes the prompts and their images into `folder`."""
    config = ConfigDict({"level": LEVEL, "seed": seed, "prompts": prompts, "most_edits": MOST_EDITS,
                         "each_split": each_split, "each_kind": 0, "typed": ""})  # fmt: skip
    lines = []
    for task, split in held_out_tasks(config):
        for name, pixels in task.images.items():
            save_png(folder / "images" / f"{name}.png", pixels)
        lines.append(json.dumps({"split": split, "sample": sample_to_json(task.sample)}))
    files.write_file(folder / TASKS, "".join(line + "\n" for line in lines))


class Micro(Benchmark):
    """The micro-world's held-out prompts, as the module describes it."""

    name = "micro"
    title = "Micro-world, held out"
    headline = "Exact"
    top = 100.0
    official_judge = "the micro-world's analyzer"
    judges = ("world",)
    count = PROMPTS + 12 * EACH_SPLIT
    decimals = 1

    def prompt_files(self, data: Path) -> list[Path]:
        if not data.exists() or data.is_dir() and not any(data.iterdir()):
            write_tasks(data)
        return [datafiles.find_file(data, (TASKS,), self.title)]

    def items(self, data: Path, scratch: Path) -> list[Item]:
        path = self.prompt_files(data)[0]
        items = []
        for number, row in enumerate(datafiles.read_jsonl(path)):
            where = f"{path}, line {number + 1}"
            datafiles.fields(row, {"split": str, "sample": dict}, where, self.title)
            sample = row["sample"]
            datafiles.fields(sample, {"key": str, "prompt": str, "sources": list, "facts": dict}, where, self.title)
            references = tuple(f"images/{name}.png" for name in sample["sources"])
            items.append(Item(f"{number:04d}", sample["prompt"], row["split"], references, row))
        if not items:
            raise UserError(f"{path} is empty.", "Remove it; it is written again.")
        return items

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        sources = [Picture(Path(path).stem, path) for path in item.references]
        pictures = (*sources, Picture("Answer", ANSWER))
        return [Question("world", Kind.WORLD, pictures=pictures, data=item.data["sample"])]

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        scores = {name: [self._score(item, judged, name) for item in items] for name in ("exact", *AXES)}
        exact = [_times(score, 100) for score in scores["exact"]]
        figures = [flat("Exact", exact), *(flat(axis, scores[axis]) for axis in AXES)]
        categories = list(dict.fromkeys(item.category for item in items))
        for category in categories:
            within = [score for item, score in zip(items, exact, strict=True) if item.category == category]
            figures.append(flat(category, within, category))
        return figures

    def _score(self, item: Item, judged: Judged, name: str) -> Score:
        values = [judged.score(item, "world", name, sample) for sample in judged.samples(item)]
        got = [value for value in values if value is not None]
        return Score(item.key, sum(got) / len(got) if got else None, len(got), len(values))

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        lines = []
        for item in items:
            value = judged.value(item, "world")
            if value is not None:
                lines.append(json.dumps({"key": item.key, "split": item.category, **value["scores"]}))
        return {"results.jsonl": "".join(line + "\n" for line in lines)}


def _times(score: Score, factor: float) -> Score:
    return score if score.value is None else dataclasses.replace(score, value=factor * score.value)


BENCHMARK = Micro()
