"""ImgEdit-Bench, basic part (github.com/PKU-YuanGroup/ImgEdit): three scores from 1 to 5 an edit, averaged by type.

Images: `<key>.png`.  Quirk: the official scripts round an item's mean, and then a type's mean, to two decimals;
`strict` does, `fixed` does not.  The overall figure is the unweighted mean of the types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Group, Score, flat, macro, mean
from ivr_jax.evaluate.benchmarks.interface import ANSWER, STRICT, Benchmark, Item, Judged, Kind, Picture, Question

PARTS = {"following": "Prompt compliance", "naturalness": "Visual naturalness", "integrity": "Physical and detail "
         "integrity"}  # fmt: skip
LOW, HIGH = 1, 5
_PROMPTS = "basic_edit.json"


class ImgEdit(Benchmark):
    """ImgEdit-Bench, as the module describes it."""

    name = "imgedit"
    title = "ImgEdit-Bench"
    headline = "Overall"
    top = 5.0
    official_judge = "gpt-4o"
    count = 737
    notes = ("Overall is the unweighted mean of the edit types.",)

    def prompt_files(self, data: Path) -> list[Path]:
        return [datafiles.find_file(data, (_PROMPTS, f"*/{_PROMPTS}", f"*/*/{_PROMPTS}"), self.title)]

    def items(self, data: Path, scratch: Path) -> list[Item]:
        path = self.prompt_files(data)[0]
        records = datafiles.read_json(path)
        if not isinstance(records, dict):
            raise UserError(f"{path} is no JSON object.", "Fetch the file again.")
        items = []
        for key, row in records.items():
            where = f"{path}, {key!r}"
            if not isinstance(row, dict):
                raise UserError(f"{where} is no JSON object.", "Fetch the file again.")
            datafiles.fields(row, {"id": str, "prompt": str, "edit_type": str}, where, self.title)
            items.append(Item(key, row["prompt"], row["edit_type"], (_original(data, path.parent, row["id"]),), row))
        return items

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        pictures = (Picture("Original image", item.references[0]), Picture("Edited image", ANSWER))
        words = {"instruction": item.prompt, "edit_type": item.category}
        return [Question("edit", Kind.SCORES, "imgedit_edit", words, pictures, tuple(PARTS), LOW, HIGH)]

    def _score(self, item: Item, judged: Judged, mode: str) -> Score:
        parts = [judged.score(item, "edit", part) for part in PARTS]
        if None in parts:
            return Score(item.key, None, 0)
        value = mean(parts)
        return Score(item.key, round(value, 2) if mode == STRICT else value)

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        by_type: dict[str, list[Score]] = {}
        for item in items:
            by_type.setdefault(item.category, []).append(self._score(item, judged, mode))
        digits = 2 if mode == STRICT else None
        return [
            macro("Overall", by_type, digits),
            flat("Mean of items", [score for scores in by_type.values() for score in scores]),
            *(Figure(name, (Group(tuple(scores)),), digits, name) for name, scores in by_type.items()),
        ]

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """`result.json` (key -> lines "Name: score"), `average_score.json` and `typescore.json`."""
        texts, averages = {}, {}
        for item in items:
            parts = {title: judged.score(item, "edit", part) for part, title in PARTS.items()}
            if None in parts.values():
                continue
            lines = [f"Brief reasoning: {' '.join(judged.reasoning(item, 'edit').split())}"]
            texts[item.key] = "\n".join([*lines, *(f"{title}: {int(score)}" for title, score in parts.items())])
            averages[item.key] = self._score(item, judged, STRICT).value
        types = {figure.category: figure.value for figure in self.figures(items, judged, STRICT) if figure.category}
        files = {"result.json": texts, "average_score.json": averages,
                 "typescore.json": {name: value for name, value in types.items() if value is not None}}  # fmt: skip
        return {name: json.dumps(value, ensure_ascii=False, indent=2) + "\n" for name, value in files.items()}


def _original(data: Path, folder: Path, name: str) -> str:
    """Path of an original image below `data`: beside the prompt file, in `data`, or one folder below either."""
    for root in (folder, data):
        for path in (root / name, *sorted(root.glob(f"*/{name}"))):
            if path.is_file():
                return str(path.relative_to(data))
    return str((folder / name).relative_to(data))  # reported as missing with all the others


BENCHMARK = ImgEdit()
