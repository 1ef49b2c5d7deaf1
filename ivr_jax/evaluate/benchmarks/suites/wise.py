"""WISE (github.com/PKU-YuanGroup/WISE), the verified form: world knowledge in text-to-image prompts, a binary judge.

Overall = .40 culture + .12 each of time, space, biology, physics and chemistry.  The legacy form (three scores, other
weights) is not comparable and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Group, Score, flat
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item, Judged, Kind, Question

WEIGHTS = {"culture": 0.40, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
_WORDS = {"bio": "biology", "phys": "physics", "chem": "chemistry", "cultur": "culture", "time": "time",
          "tempor": "time", "space": "space", "spati": "space"}  # fmt: skip
_PATTERNS = ("*_verified.json", "*/*_verified.json")


class Wise(Benchmark):
    """WISE, as the module describes it."""

    name = "wise"
    title = "WISE (verified)"
    headline = "Overall"
    top = 1.0
    official_judge = "Qwen3.5-35B-A3B"
    count = 1000
    decimals = 3
    notes = ("Not comparable with the legacy WiScore (consistency, realism, aesthetics).",)

    def prompt_files(self, data: Path) -> list[Path]:
        first = datafiles.find_file(data, _PATTERNS, self.title)
        return sorted(first.parent.glob("*_verified.json"))

    def items(self, data: Path, scratch: Path) -> list[Item]:
        kinds = {"Prompt": str, "Explanation": str, "Category": str, "Subcategory": str, "prompt_id": int}
        items = []
        for path in self.prompt_files(data):
            for row in datafiles.read_rows(path, scratch):
                where = f"{path}, prompt {row.get('prompt_id')!r}"
                datafiles.fields(row, kinds, where, self.title)
                area = area_of(path.name, row["Category"], row["Subcategory"], where)
                record = {**row, "file": path.stem}
                items.append(Item(str(row["prompt_id"]), row["Prompt"], area, (), record))
        datafiles.unique((item.key for item in items), str(data))
        return sorted(items, key=lambda item: int(item.key))

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        words = {"prompt": item.prompt, "explanation": item.data["Explanation"]}
        return [Question("right", Kind.SCORES, "wise_right", words, scores=("score",))]

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        by_area: dict[str, list[Score]] = {}
        for item in items:
            value = judged.score(item, "right", "score")
            by_area.setdefault(item.category, []).append(Score(item.key, value, int(value is not None)))
        areas = [area for area in WEIGHTS if area in by_area]
        overall = Figure("Overall", tuple(Group(tuple(by_area[area]), WEIGHTS[area]) for area in areas))
        return [overall, *(flat(area, by_area[area], area) for area in areas)]

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        lines: dict[str, list[str]] = {}
        for item in items:
            value = judged.score(item, "right", "score")
            if value is not None:
                row = {"prompt_id": item.data["prompt_id"], "Category": item.data["Category"],
                       "Subcategory": item.data["Subcategory"], "score": int(value)}  # fmt: skip
                lines.setdefault(item.data["file"], []).append(json.dumps(row, ensure_ascii=False))
        return {f"{name}_scores_results.jsonl": "\n".join(rows) + "\n" for name, rows in lines.items()}


def area_of(file: str, category: str, subcategory: str, where: str) -> str:
    """The area of a prompt: by its subcategory, else its category, else the name of its file.

    Of the file on space and time whatever does not name time is space.
    """
    if file.startswith("cultur"):
        return "culture"
    if file.startswith("spatio"):
        return "time" if "time" in f"{category} {subcategory}".lower() else "space"
    for text in (subcategory, category, file):
        for word, area in _WORDS.items():
            if word in text.lower():
                return area
    raise UserError(f"{where}: the category {category!r} ({subcategory!r}) is none of {', '.join(WEIGHTS)}.",
                    "Fetch the *_verified.json files of WISE.")


BENCHMARK = Wise()
