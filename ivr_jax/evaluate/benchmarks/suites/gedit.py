"""GEdit-Bench (Step1X-Edit): real user edits in English and Chinese, scored in VIEScore's manner.

Images: `fullset/<task_type>/<language>/<key>.png`.  Two calls an image: semantics (the lesser of two scores from 0 to
10, with the source shown) and quality (the lesser of two, the edited image alone, at the source's size).  An item is
the geometric mean; each language's figure is the unweighted mean of its eleven tasks.  `Intersection_exist` marks the
items that every model of the authors' comparison answered.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat, macro
from ivr_jax.evaluate.benchmarks.interface import ANSWER, Benchmark, Item, Judged, Kind, Picture, Question

TASKS = ("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change",
         "subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer")  # fmt: skip
LANGUAGES = ("en", "cn")
LOW, HIGH = 0, 10
SEMANTICS, QUALITY = ("success", "preservation"), ("naturalness", "artifacts")
_NAMES = ("*.jsonl", "*/*.jsonl", "*.parquet", "*/*.parquet", "gedit*.json")
_IMAGES = ("input_image_raw", "input_image", "image")  # fields that may hold the source, in order


class GEdit(Benchmark):
    """GEdit-Bench, as the module describes it."""

    name = "gedit"
    title = "GEdit-Bench"
    headline = "en overall"
    top = 10.0
    official_judge = "gpt-4.1"
    notes = ("Each figure is the unweighted mean of the eleven tasks; an item is the root of semantics x quality.",)

    def prompt_files(self, data: Path) -> list[Path]:
        first = datafiles.find_file(data, _NAMES, self.title)
        return sorted(first.parent.glob(f"*{first.suffix}"))

    def items(self, data: Path, scratch: Path) -> list[Item]:
        kinds = {"key": str, "task_type": str, "instruction": str, "instruction_language": str,
                 "Intersection_exist": bool}  # fmt: skip
        items = []
        for path in self.prompt_files(data):
            for number, row in enumerate(datafiles.read_rows(path, scratch)):
                where = f"{path}, row {number}"
                datafiles.fields(row, kinds, where, self.title)
                task, language = row["task_type"], row["instruction_language"]
                if task not in TASKS or language not in LANGUAGES:
                    raise UserError(f"{where}: task_type {task!r}, instruction_language {language!r}.",
                                    "Fetch the file again.")
                source = next((row[name] for name in _IMAGES if isinstance(row.get(name), str)), None)
                if source is None:
                    raise UserError(f"{where} names no source image.", f"It stands in {' or '.join(_IMAGES)}.")
                reference = str(path.parent.relative_to(data) / source)
                key = f"{task}/{language}/{row['key']}"
                items.append(Item(key, row["instruction"], f"{language} {task}", (reference,), row))
        datafiles.unique((item.key for item in items), str(data))
        return items

    def image_path(self, item: Item, sample: int) -> str:
        return f"fullset/{item.key}.png"

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        edited = Picture("Edited image", ANSWER, like=item.references[0])
        both = (Picture("Source image", item.references[0]), edited)
        words = {"instruction": item.prompt}
        return [
            Question("semantics", Kind.SCORES, "gedit_semantics", words, both, SEMANTICS, LOW, HIGH),
            Question("quality", Kind.SCORES, "gedit_quality", {}, (edited,), QUALITY, LOW, HIGH),
        ]

    def _scores(self, item: Item, judged: Judged) -> tuple[float | None, float | None]:
        """Semantics and quality: the lesser of each one's two scores."""
        both = []
        for metric, names in (("semantics", SEMANTICS), ("quality", QUALITY)):
            scores = [judged.score(item, metric, name) for name in names]
            both.append(None if None in scores else min(scores))
        return both[0], both[1]

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        figures: list[Figure] = []
        for language in LANGUAGES:
            asked = [item for item in items if item.data["instruction_language"] == language]
            shared = [item for item in asked if item.data["Intersection_exist"]]
            for suffix, chosen in (("", asked), (" (intersection)", shared)):
                figures += self._macros(f"{language} ", suffix, chosen, judged)
            for task in TASKS:
                scores = [self._overall(item, judged) for item in asked if item.data["task_type"] == task]
                if scores:
                    figures.append(flat(f"{language} {task}", scores, f"{language} {task}"))
        return [figure for figure in figures if figure.items]

    def _macros(self, prefix: str, suffix: str, items: Sequence[Item], judged: Judged) -> list[Figure]:
        parts: dict[str, dict[str, list[Score]]] = {"semantics": {}, "quality": {}, "overall": {}}
        for item in items:
            task = item.data["task_type"]
            for name, value in zip(("semantics", "quality"), self._scores(item, judged), strict=True):
                parts[name].setdefault(task, []).append(Score(item.key, value, int(value is not None)))
            parts["overall"].setdefault(task, []).append(self._overall(item, judged))
        return [
            macro(f"{prefix}{name}{suffix}", {task: groups[task] for task in TASKS if task in groups})
            for name, groups in parts.items()
        ]

    def _overall(self, item: Item, judged: Judged) -> Score:
        both = self._scores(item, judged)
        got = sum(score is not None for score in both)
        return Score(item.key, math.sqrt(both[0] * both[1]) if got == 2 else None, got, 2)

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """`<model>_<task>_gpt_score.csv`, one row an item that has both scores."""
        columns = ["source_image", "edited_image", "instruction", "sementics_score", "quality_score",
                   "intersection_exist", "instruction_language"]  # fmt: skip
        tables: dict[str, io.StringIO] = {}
        for item in items:
            semantics, quality = self._scores(item, judged)
            if semantics is None or quality is None:
                continue
            task = item.data["task_type"]
            if task not in tables:
                tables[task] = io.StringIO()
                csv.writer(tables[task], lineterminator="\n").writerow(columns)
            csv.writer(tables[task], lineterminator="\n").writerow([
                item.references[0], judged.path(item), item.prompt, semantics, quality,
                item.data["Intersection_exist"], item.data["instruction_language"],
            ])  # fmt: skip
        return {f"{model}_{task}_gpt_score.csv": table.getvalue() for task, table in tables.items()}


BENCHMARK = GEdit()
