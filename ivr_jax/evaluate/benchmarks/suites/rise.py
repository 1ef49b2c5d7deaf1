"""RISEBench (github.com/PhoenixZ810/RISEBench): editing that needs reasoning; an item counts when all sub-scores are 5.

Images: `images/<category>/<index>.png` (or .jpg).  Sub-scores: appearance consistency and reasoning, and visual
plausibility except for logical reasoning, whose two sub-scores are 0 or 1, read as 1 or 5.

Quirk: items marked `consistency_free` are not asked for consistency, and the official script then never counts them as
complete; `strict` keeps that, `fixed` requires only what was asked.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat
from ivr_jax.evaluate.benchmarks.interface import (
    ANSWER,
    IMAGE_SUFFIXES,
    STRICT,
    Benchmark,
    Item,
    Judged,
    Kind,
    Picture,
    Question,
    only_one,
)

CATEGORIES = ("temporal_reasoning", "causal_reasoning", "spatial_reasoning", "logical_reasoning")
LOGICAL, SPATIAL = "logical_reasoning", "spatial_reasoning"
_TITLES = dict(zip(CATEGORIES, ("Temporal", "Causal", "Spatial", "Logical"), strict=True))
_PARTS = {"reasoning": "Reasoning", "consistency": "ApprConsistency", "quality": "VisualPlausibility_total"}
_FILES = ("data_total.json", "datav2_total*.json", "data*.json", "*/data_total.json", "*/datav2_total*.json")


class Rise(Benchmark):
    """RISEBench, as the module describes it."""

    name = "rise"
    title = "RISEBench"
    headline = "Accuracy"
    top = 100.0
    official_judge = "gpt-4.1-2025-04-14"
    count = 360
    decimals = 1
    notes = ("An item counts only when all its sub-scores are 5; scores are (score - 1) x 25.",)

    def prompt_files(self, data: Path) -> list[Path]:
        return [datafiles.find_file(data, _FILES, self.title)]

    def items(self, data: Path, scratch: Path) -> list[Item]:
        path = self.prompt_files(data)[0]
        kinds = {"index": str, "category": str, "instruction": str, "image": str}
        items = []
        for row in datafiles.read_rows(path, scratch):
            where = f"{path}, {row.get('index')!r}"
            datafiles.fields(row, kinds, where, self.title)
            if row["category"] not in CATEGORIES:
                raise UserError(f"{where}: there is no category {row['category']!r}.", "Fetch the file again.")
            folder = path.parent.relative_to(data)
            record = {**row, "folder": str(folder)}
            key = f"{row['category']}/{row['index']}"
            items.append(Item(key, row["instruction"], row["category"], (str(folder / row["image"]),), record))
        datafiles.unique((item.key for item in items), str(path))
        return items

    def image_path(self, item: Item, sample: int) -> str:
        return f"images/{item.key}.png"

    def find_images(self, images: Path, item: Item) -> list[Path]:
        """In `images/`, or in the folder itself when that is the folder of categories."""
        found = []
        for root in (images / "images", images):
            found += [path for suffix in IMAGE_SUFFIXES if (path := root / f"{item.key}{suffix}").is_file()]
        return only_one(found, item)

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        logical = item.category == LOGICAL
        low, high = (0, 1) if logical else (1, 5)
        answer = Picture("Edited image", ANSWER)
        original = Picture("Original image", item.references[0])
        reference = _given(item, "reference_img")
        if reference and item.category in (SPATIAL, LOGICAL):
            original = Picture("Reference image", str(Path(item.data["folder"]) / reference))
        words = {"instruction": item.prompt, "reference": str(_given(item, "reference_txt") or
                                                              _given(item, "reference") or "")}  # fmt: skip
        form = "_logical" if logical else ""
        shown = (original, answer) if self._shows_original(item) else (answer,)

        def ask(metric: str, pictures: tuple[Picture, ...]) -> Question:
            return Question(metric, Kind.SCORES, f"rise_{metric}{form}", words, pictures, ("score",), low, high)

        questions = [ask("reasoning", shown)]
        if not _given(item, "consistency_free"):
            questions.append(ask("consistency", (original, answer)))
        if not logical:
            questions.append(ask("quality", (answer,)))
        return questions

    def _shows_original(self, item: Item) -> bool:
        """Whether the judge of reasoning sees an image beside the edited one."""
        if item.category == LOGICAL:
            return bool(_given(item, "reference_img")) and not _given(item, "reference_txt")
        if item.category == SPATIAL and _given(item, "reference_img"):
            return True
        return bool(_given(item, "reasoning_img"))

    def _parts(self, item: Item, judged: Judged) -> dict[str, float | None]:
        """The sub-scores that were asked for, 1 to 5; None where missing."""
        asked = [question.metric for question in self.questions(item, 0, "chat")]
        scores = {part: judged.score(item, part, "score") for part in asked}
        if item.category == LOGICAL:
            return {part: None if score is None else 4 * min(score, 1) + 1 for part, score in scores.items()}
        return scores

    def _complete(self, item: Item, judged: Judged, mode: str) -> Score:
        parts = self._parts(item, judged)
        got = sum(score is not None for score in parts.values())
        if got < len(parts):
            return Score(item.key, None, got, len(parts))
        complete = all(score == 5 for score in parts.values())
        if mode == STRICT and "consistency" not in parts:
            complete = False
        return Score(item.key, 100.0 * complete, got, len(parts))

    def _weighted(self, item: Item, judged: Judged) -> Score:
        """The official weighted score of an item, as (score - 1) x 25."""
        parts = self._parts(item, judged)
        got = sum(score is not None for score in parts.values())
        if got < len(parts):
            return Score(item.key, None, got, len(parts))
        if item.category == LOGICAL:
            weights = {"consistency": 0.3, "reasoning": 0.7}
        elif "consistency" in parts:
            weights = {"consistency": 0.3, "reasoning": 0.5, "quality": 0.2}
        else:
            weights = {"reasoning": 0.8, "quality": 0.2}
        score = math.fsum(weights[part] * value for part, value in parts.items() if part in weights)
        if parts["reasoning"] == 1:
            score = max(1.0, score / 2)
        return Score(item.key, 25 * (score - 1), got, len(parts))

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        complete = {item.key: self._complete(item, judged, mode) for item in items}
        weighted = {item.key: self._weighted(item, judged) for item in items}

        def of(scores: Mapping[str, Score], category: str | None = None) -> list[Score]:
            return [scores[item.key] for item in items if category in (None, item.category)]

        figures = [flat("Accuracy", of(complete)), flat("Score", of(weighted))]
        present = [category for category in CATEGORIES if of(complete, category)]
        figures += [flat(category, of(complete, category), category) for category in present]
        figures += [flat(f"Score {category}", of(weighted, category)) for category in present]
        for part in _PARTS:
            scores = []
            for item in items:
                values = self._parts(item, judged)
                if part in values:
                    value = values[part]
                    scores.append(Score(item.key, None if value is None else 25 * (value - 1), int(value is not None)))
            figures.append(flat(f"Score {part}", scores))
        return figures

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """`<model>_judge.csv`: the rows of the whole, of the categories and of the sub-scores."""
        figures = {figure.name: figure for figure in self.figures(items, judged, STRICT)}
        rows: list[list[Any]] = []
        for title, accuracy, score in (
            ("Overall", "Accuracy", "Score"),
            *((_TITLES[category], category, f"Score {category}") for category in CATEGORIES if category in figures),
            *((f"Overall_{title}", None, f"Score {part}") for part, title in _PARTS.items()),
        ):
            percent = figures[score].value
            right = None if accuracy is None else figures[accuracy].value
            rows.append([title, None if percent is None else percent / 25 + 1, percent,
                         None if right is None else right / 100])  # fmt: skip
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["-", "Score-Origin", "Score-Percentage", "Accuracy"])
        writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
        return {f"{model}_judge.csv": text.getvalue()}


def _given(item: Item, name: str) -> Any:
    """A field of the record; None when it is absent, empty or NaN."""
    value = item.data.get(name)
    if value is None or value == "" or isinstance(value, float) and math.isnan(value):
        return None
    return value


BENCHMARK = Rise()
