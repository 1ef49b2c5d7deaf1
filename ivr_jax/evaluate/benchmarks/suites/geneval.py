"""GenEval (github.com/djghosh13/geneval): objects, counts, colours and positions, checked by a detector.

Layout: `<index, 5 digits>/metadata.jsonl` and `<index>/samples/<digits>.png`, four images a prompt.  The official
detector is mmdet 2.x's Mask2Former with Swin-S, with CLIP ViT-L/14 for colours; figures of any other detector, or of a
vision-language judge, are not official and carry its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.figures import Figure, Score, flat, macro
from ivr_jax.evaluate.benchmarks.interface import ANSWER, Benchmark, Item, Judged, Kind, Picture, Question

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TAGS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a box counts above it
MOST_BOXES = 16  # of one class
SHRINK = 0.1  # share of both sizes by which an offset is shortened
LEAST_OFFSET = 1e-3
LEAST_COMPONENT = 0.5
OFFICIAL_DETECTOR = "mask2former-swin-s"

Box = Sequence[float]  # x1, y1, x2, y2, score
Objects = Mapping[str, Sequence[Box]]
ColorOf = Callable[[str, int], str]  # class and number of a kept box -> its colour

_PROMPTS = "evaluation_metadata.jsonl"
_IMAGE = re.compile(r"\d+\.png")


def keep_boxes(boxes: Objects, tag: str) -> dict[str, list[Box]]:
    """Boxes above the threshold of `tag`, the most confident first, at most 16 a class; classes without one left out.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {}
    for name, found in boxes.items():
        ordered = sorted((box for box in found if box[4] > threshold), key=lambda box: -box[4])[:MOST_BOXES]
        if ordered:
            kept[name] = ordered
    return kept


def relations(box: Box, other: Box) -> set[str]:
    """How the first box stands to the second; y grows downward.

    The offset of the centres is shortened on each axis by a tenth of both sizes, then divided by the length of the
    *unshortened* offset; a relation holds when its component exceeds one half.
    """
    offset = [(box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [abs(box[axis + 2] - box[axis]) + abs(other[axis + 2] - other[axis]) for axis in (0, 1)]
    shortened = [
        math.copysign(max(abs(distance) - SHRINK * size, 0.0), distance)
        for distance, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(distance) < LEAST_OFFSET for distance in shortened):
        return set()
    x, y = (distance / math.hypot(*offset) for distance in shortened)
    held = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, component in held.items() if component > LEAST_COMPONENT}


def judge_objects(metadata: Mapping[str, Any], objects: Objects, color_of: ColorOf) -> tuple[bool, str]:
    """Whether an image holds what its prompt asks for, and what is wrong, one line a fault.

    Args:
      metadata: the prompt's record.
      objects: kept boxes by class (`keep_boxes`).
      color_of: the colour of a kept box, one of `COLORS`; asked only where a colour is required.
    """
    faults: list[str] = []
    matched: list[Sequence[Box] | None] = []  # for each include entry; None when it failed
    for entry in metadata.get("include", []):
        fault = _entry_fault(entry, objects, color_of, matched)
        matched.append(None if fault else objects[entry["class"]][: entry["count"]])
        if fault:
            faults.append(fault)
    for entry in metadata.get("exclude", []):
        found = len(objects.get(entry["class"], ()))
        if found >= entry["count"]:
            faults.append(f"expected {entry['class']}<{entry['count']}, found {found}")
    return not faults, "\n".join(faults)


def _entry_fault(
    entry: Mapping[str, Any], objects: Objects, color_of: ColorOf, matched: Sequence[Sequence[Box] | None]
) -> str:
    """What is wrong with one include entry; "" when it holds.  Position counts only when number and colour do."""
    name, count = entry["class"], entry["count"]
    found = objects.get(name, ())[:count]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in entry:
        colors = [color_of(name, number) for number in range(count)]
        right = colors.count(entry["color"])
        if right < count:
            seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {entry['color']} {name}>={count}, found {right} {entry['color']}; and {seen}"
    if "position" in entry:
        relation, index = entry["position"]
        target = matched[index]
        if target is None:
            return f"no target for {name} to be {relation}"
        for box in found:
            for other in target:
                held = relations(box, other)
                if relation not in held:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(held))} target"
    return ""


class GenEval(Benchmark):
    """GenEval, as the module describes it."""

    name = "geneval"
    title = "GenEval"
    samples = 4
    headline = "Overall"
    top = 1.0
    official_judge = f"{OFFICIAL_DETECTOR} with CLIP ViT-L/14"
    judges = ("detector", "chat")
    count = 553
    decimals = 4
    notes = ("Overall is the unweighted mean of the six tags. Figures on rewritten prompts are another column.",)

    def prompt_files(self, data: Path) -> list[Path]:
        return [datafiles.find_file(data, (_PROMPTS, f"*/{_PROMPTS}"), self.title)]

    def items(self, data: Path, scratch: Path) -> list[Item]:
        path = self.prompt_files(data)[0]
        items = []
        for index, row in enumerate(datafiles.read_jsonl(path)):
            where = f"{path}, prompt {index}"
            datafiles.fields(row, {"tag": str, "include": list, "prompt": str}, where, self.title)
            _check(row, where)
            items.append(Item(f"{index:05d}", row["prompt"], row["tag"], (), row))
        return items

    def image_path(self, item: Item, sample: int) -> str:
        return f"{item.key}/samples/{sample:05d}.png"

    def side_files(self, item: Item) -> Mapping[str, str]:
        return {f"{item.key}/metadata.jsonl": json.dumps(item.data) + "\n"}

    def find_images(self, images: Path, item: Item) -> list[Path]:
        folders = [folder for name in (item.key, f"{int(item.key):04d}") if (folder := images / name).is_dir()]
        if len(folders) > 1:
            raise UserError(f"there are two folders for prompt {int(item.key)}: {folders[0]} and {folders[1].name}.",
                            "Remove the one that is not to be judged.")
        if not folders or not (folders[0] / "samples").is_dir():
            return []
        metadata = folders[0] / "metadata.jsonl"
        if metadata.is_file() and datafiles.read_jsonl(metadata)[:1] != [dict(item.data)]:
            raise UserError(f"{metadata} is not prompt {int(item.key)} of the prompt file.",
                            "The images were made for other prompts: name their own prompt file.")
        found = [path for path in (folders[0] / "samples").iterdir() if _IMAGE.fullmatch(path.name)]
        numbers: dict[int, Path] = {}
        for path in found:
            if int(path.stem) in numbers:
                raise UserError(f"there are two images for one sample: {path} and {numbers[int(path.stem)].name}.",
                                "Remove the one that is not to be judged.")
            numbers[int(path.stem)] = path
        return [numbers[number] for number in sorted(numbers)]

    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        if judge == "detector":
            return [Question("objects", Kind.DETECTION, pictures=(Picture("Image", ANSWER),), data=item.data)]
        wanted = {"prompt": item.prompt, "requirements": requirements(item.data)}
        return [Question("objects", Kind.SCORES, "geneval_objects", wanted, scores=("correct",))]

    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        by_tag: dict[str, list[Score]] = {}
        prompts, every = [], []
        for item in items:
            values = [judged.score(item, "objects", "correct", sample) for sample in judged.samples(item)]
            scores = [Score(item.key, value, int(value is not None)) for value in values]
            by_tag.setdefault(item.category, []).extend(scores)
            every += scores
            got = [value for value in values if value is not None]
            prompts.append(Score(item.key, max(got) if got else None, len(got), len(values)))
        return [
            macro("Overall", by_tag),
            flat("Correct images", every),
            flat("Correct prompts", prompts),
            *(flat(tag, scores, tag) for tag, scores in by_tag.items()),
        ]

    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        lines = []
        for item in items:
            for sample in judged.samples(item):
                correct = judged.score(item, "objects", "correct", sample)
                if correct is None:
                    continue
                value = judged.value(item, "objects", sample) or {}
                lines.append(json.dumps({
                    "filename": judged.path(item, sample),
                    "tag": item.category,
                    "prompt": item.prompt,
                    "correct": bool(correct),
                    "reason": value.get("reasoning", ""),
                    "metadata": json.dumps(item.data),
                    "details": json.dumps(value.get("details", {})),
                }))  # fmt: skip
        return {"results.jsonl": "".join(line + "\n" for line in lines)}


def requirements(metadata: Mapping[str, Any]) -> str:
    """The record of a prompt in words, one requirement a line, for a vision-language judge."""
    names = [entry["class"] for entry in metadata["include"]]
    lines = []
    for entry in metadata["include"]:
        color = f"{entry['color']} " if "color" in entry else ""
        lines.append(f"- at least {entry['count']} {color}{entry['class']}")
        if "position" in entry:
            relation, index = entry["position"]
            lines.append(f"- the {entry['class']} is {relation} the {names[index]}")
    lines += [f"- fewer than {entry['count']} {entry['class']}" for entry in metadata.get("exclude", [])]
    return "\n".join(lines)


def _check(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless a record is one of GenEval's."""
    right = row["tag"] in TAGS and bool(row["include"])
    for number, entry in enumerate(row["include"]):
        right = right and _is_entry(entry) and entry.get("color", "red") in COLORS
        position = entry.get("position") if isinstance(entry, dict) else None
        if position is not None:
            right = right and isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
            right = right and position[1] in range(number)
    right = right and all(_is_entry(entry) for entry in row.get("exclude", []))
    if not right:
        raise UserError(f"{where} is no record of GenEval.", "Fetch evaluation_metadata.jsonl again.")


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("class"), str) and isinstance(entry.get("count"), int)


BENCHMARK = GenEval()
