"""KRIS-Bench (github.com/mercurystraw/Kris_Bench): editing that needs knowledge; four scores from 1 to 5 an image.

Data: `<category>/annotation.json` with images beside it.  Images: `results/<model>/<category>/<id>.jpg` or `.png`; the
official scripts open `.jpg`, so that is what is written.  A score s counts as (s - 1) x 25, and every average, Overall
too, is the flat mean of single scores.

Quirks, kept by `strict` and undone by `fixed`:
  * official commits read `instruction` and `explain`, where the data say `ins_en` and `explain_en`: the judge sees an
    empty instruction.  `strict` asks that question too, beside the right one.
  * the anomaly category has a prompt of its own that is never used.
  * "knowledge is 1 when instruction is 2 or less" is asked of the judge alone.
  * a lone digit anywhere in the reply is taken as the score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat
from ivr_jax.evaluate.benchmarks.interface import (
    ANSWER,
    FIXED,
    MODES,
    STRICT,
    Benchmark,
    Item,
    Judged,
    Kind,
    Picture,
    Question,
)

DIMENSIONS = {  # dimension -> categories, with the number of items as published
    "Attribute": {"count_change": 50, "color_change": 50, "size_adjustment": 50, "part_completion": 50,
                  "anomaly_correction": 75},
    "Spatial": {"viewpoint_change": 50, "position_movement": 50},
    "Temporal": {"temporal_prediction": 74},
    "Social": {"humanities": 75, "practical_knowledge": 50},
    "Natural": {"biology": 68, "chemistry": 75, "geography": 75, "medicine": 50, "mathematics": 50, "physics": 75},
    "Logical": {"abstract_reasoning": 75, "rule-based_reasoning": 75},
    "Decomposition": {"multi-element_composition": 75, "multi-instruction_execution": 75},
}  # fmt: skip
LEVELS = {
    "Factual": ("Attribute", "Spatial", "Temporal"),
    "Conceptual": ("Social", "Natural"),
    "Procedural": ("Logical", "Decomposition"),
}
WITH_KNOWLEDGE = ("Social", "Natural", "Logical")
MULTI, TEMPORAL, VIEWPOINT, ANOMALY = (
    "multi-element_composition", "temporal_prediction", "viewpoint_change", "anomaly_correction",
)  # fmt: skip
FRAMES = (1, 2, 3, 4)
LOW, HIGH = 1, 5
_DIMENSION_OF = {category: name for name, categories in DIMENSIONS.items() for category in categories}
_ANNOTATION = "annotation.json"
_FRAME = re.compile(r"(\d+)-(\d+)")
_KEYS = {"consistency": "consistency_score", "quality": "quality_score", "instruction": "instruction_score",
         "knowledge": "knowledge_score"}  # fmt: skip


class Kris(Benchmark):
    """KRIS-Bench, as the module describes it."""

    name = "kris"
    title = "KRIS-Bench"
    headline = "Overall"
    top = 100.0
    official_judge = "gpt-4o-2024-11-20"
    count = 1267
    notes = ("Averages are flat means over single scores, (score - 1) x 25.",)

    def prompt_files(self, data: Path) -> list[Path]:
        root = self._root(data)
        files = [root / category / _ANNOTATION for category in _DIMENSION_OF]
        missing = [str(path.parent.name) for path in files if not path.is_file()]
        if missing:
            raise UserError(f"{root} lacks {len(missing)} of the {len(files)} categories of KRIS-Bench: "
                            f"{', '.join(missing)}.", "Fetch the whole data set.")
        return files

    def _root(self, data: Path) -> Path:
        """The folder of the categories: `data` itself, or `KRIS_Bench` in it."""
        datafiles.existing_folder(data, self.title)
        for root in (data, data / "KRIS_Bench"):
            if any((root / category / _ANNOTATION).is_file() for category in _DIMENSION_OF):
                return root
        raise UserError(f"{data} does not hold the prompts of KRIS-Bench: no <category>/{_ANNOTATION}.",
                        "Name its folder with --data=FOLDER.")

    def items(self, data: Path, scratch: Path) -> list[Item]:
        items = []
        for path in self.prompt_files(data):
            category = path.parent.name
            records = datafiles.read_json(path)
            if not isinstance(records, dict):
                raise UserError(f"{path} is no JSON object.", "Fetch the file again.")
            for number, row in records.items():
                where = f"{path}, {number!r}"
                if not isinstance(row, dict):
                    raise UserError(f"{where} is no JSON object.", "Fetch the file again.")
                datafiles.fields(row, {"ori_img": (str, list), "ins_en": str}, where, self.title)
                names = [row["ori_img"]] if isinstance(row["ori_img"], str) else row["ori_img"]
                folder = path.parent.relative_to(data)
                references = tuple(str(folder / name) for name in names)
                record = {**row, "folder": str(folder)}
                if category == TEMPORAL:
                    record["frame"] = _missing_frame(names, where)
                items.append(Item(f"{category}/{number}", row["ins_en"], category, references, record))
        return items

    def image_path(self, item: Item, sample: int) -> str:
        return f"{item.key}.jpg"

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        questions = [self._ask("quality", "kris_quality", item, {}, (Picture("Edited image", ANSWER),), MODES)]
        for mode in MODES:
            words = {"instruction": item.prompt, "explanation": str(item.data.get("explain_en") or "")}
            if mode == STRICT:
                words = {"instruction": "", "explanation": ""}
            questions.append(self._consistency(item, words, mode))
            questions.append(self._instruction(item, words, mode))
        return questions

    def _consistency(self, item: Item, words: Mapping[str, str], mode: str) -> Question:
        form = {MULTI: "_multi", TEMPORAL: "_temporal"}.get(item.category, "")
        return self._ask("consistency", f"kris_consistency{form}", item, words, self._pictures(item), (mode,))

    def _instruction(self, item: Item, words: Mapping[str, str], mode: str) -> Question:
        pictures = self._pictures(item)
        if has_knowledge(item):
            return self._ask("instruction", "kris_knowledge", item, words, pictures, (mode,))
        form = {MULTI: "_multi", TEMPORAL: "_temporal", VIEWPOINT: "_viewpoint"}.get(item.category, "")
        if item.category == ANOMALY and mode == FIXED:
            form = "_anomaly"
        if item.category == VIEWPOINT and item.data.get("gt_img"):
            truth = Path(item.data["folder"]) / item.data["gt_img"]
            pictures = (*pictures, Picture("Ground truth", str(truth)))
        return self._ask("instruction", f"kris_instruction{form}", item, words, pictures, (mode,))

    def _ask(
        self, metric: str, template: str, item: Item, words: Mapping[str, str], pictures: tuple[Picture, ...],
        modes: tuple[str, ...],
    ) -> Question:  # fmt: skip
        names = (metric, "knowledge") if template == "kris_knowledge" else (metric,)
        if item.category == TEMPORAL and metric != "quality":
            words = {**words, "frame": str(item.data["frame"])}
        name = metric if FIXED in modes else f"{metric} ({STRICT})"
        return Question(name, Kind.SCORES, template, words, pictures, tuple(_KEYS[part] for part in names),
                        LOW, HIGH, modes=modes)  # fmt: skip

    def _pictures(self, item: Item) -> tuple[Picture, ...]:
        """What stands beside the edited image: the original, all references, or the given frames in frame order."""
        edited = Picture("Edited image", ANSWER)
        if item.category == MULTI:
            shown = [Picture(f"Reference image {n}", path) for n, path in enumerate(item.references, 1)]
            return (*shown, edited)
        if item.category == TEMPORAL:
            frames = [(_frame_of(path), Picture("", path)) for path in item.references]
            frames.append((item.data["frame"], Picture("", ANSWER)))
            frames.sort(key=lambda pair: pair[0])
            return tuple(
                Picture(f"Frame {n} ({'generated' if picture.path == ANSWER else 'reference'})", picture.path)
                for n, picture in frames
            )
        return (*(Picture("Original image", path) for path in item.references), edited)

    def read_strict(self, question: Question, text: str) -> Mapping[str, float] | None:
        return {key: score for key in question.scores if (score := official_score(text, key)) is not None}

    def _score(self, item: Item, judged: Judged, part: str, mode: str) -> Score:
        """(score - 1) x 25 of one of the four parts."""
        base = "instruction" if part == "knowledge" else part
        metric = f"{base} ({STRICT})" if mode == STRICT and base != "quality" else base
        value = judged.score(item, metric, _KEYS[part], mode=mode)
        if part == "knowledge" and mode == FIXED and value is not None:
            instruction = judged.score(item, metric, _KEYS["instruction"], mode=mode)
            value = 1.0 if instruction is not None and instruction <= 2 else value
        return Score(item.key, None if value is None else (value - 1) * 25, int(value is not None))

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        scores = {item.key: {part: self._score(item, judged, part, mode) for part in parts(item)} for item in items}

        def of(categories: Sequence[str], part: str | None = None) -> list[Score]:
            return [
                score
                for item in items
                if item.category in categories
                for name, score in scores[item.key].items()
                if part in (None, name)
            ]

        every = list(_DIMENSION_OF)
        dimensions = {name: list(categories) for name, categories in DIMENSIONS.items()}
        levels = {name: [c for part in within for c in dimensions[part]] for name, within in LEVELS.items()}
        figures = [flat("Overall", of(every))]
        figures += [flat(name, of(categories)) for name, categories in (*levels.items(), *dimensions.items())]
        figures += [flat(f"metric {part}", of(every, part)) for part in _KEYS]
        figures += [flat(category, of([category]), category) for category in every]
        return [figure for figure in figures if figure.items]

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """`<model>/<category>/metrics.json`, with the answers to the questions that hold the instruction."""
        by_category: dict[str, dict[str, Any]] = {}
        for item in items:
            record: dict[str, Any] = {
                "instruction": item.prompt, "explain": str(item.data.get("explain_en") or ""),
            }  # fmt: skip
            for part in parts(item):
                metric = "instruction" if part == "knowledge" else part
                score = judged.score(item, metric, _KEYS[part])
                if score is not None:
                    record[f"{part}_score"] = int(score)
                    record[f"{part}_reasoning"] = judged.reasoning(item, metric)
            if len(record) > 2:
                by_category.setdefault(item.category, {})[item.key.partition("/")[2]] = record
        return {
            f"{model}/{category}/metrics.json": json.dumps(records, ensure_ascii=False, indent=2) + "\n"
            for category, records in by_category.items()
        }


def has_knowledge(item: Item) -> bool:
    """Whether the item is also judged for knowledge."""
    return _DIMENSION_OF[item.category] in WITH_KNOWLEDGE


def parts(item: Item) -> list[str]:
    """The scores that an item has."""
    return [part for part in _KEYS if part != "knowledge" or has_knowledge(item)]


def official_score(text: str, key: str) -> float | None:
    """The score that the official parser takes: of the first flat JSON object that names `key`, else of "<key>: n",
    "n/5", "n out of 5", else the first lone digit from 1 to 5."""
    match = re.search(r"\{[^{}]*" + re.escape(key) + r"[^{}]*\}", text)
    if match:
        try:
            value = json.loads(match.group(0)).get(key)
            if value is not None:
                return float(int(value))
        except (ValueError, TypeError, OverflowError):
            pass
    loose = key.replace("_", r"[_\s]*")
    for pattern in (loose + r"\s*[:：]?\s*([1-5])", r"([1-5])\s*/\s*5", r"([1-5])\s+out\s+of\s+5", r"\b([1-5])\b"):
        match = re.search(pattern, text, re.IGNORECASE)
        if match:
            return float(match.group(1))
    return None


def _frame_of(path: str) -> int:
    match = _FRAME.search(Path(path).name)
    if not match:
        raise UserError(f"the frame {path} is not named <id>-<frame>.", "Fetch the data again.")
    return int(match.group(2))


def _missing_frame(names: Sequence[str], where: str) -> int:
    """The one frame of four that is not given, and is to be drawn."""
    missing = set(FRAMES) - {_frame_of(name) for name in names}
    if len(names) != 3 or len(missing) != 1:
        raise UserError(f"{where} does not give three of four frames.", "Fetch the file again.")
    return missing.pop()


BENCHMARK = Kris()
