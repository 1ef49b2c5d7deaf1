"""Tiny data in the exact layouts of the public benchmarks, made here, and judgements to go with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item, Judged, Judgement, Question, State
from ivr_jax.evaluate.benchmarks.suites.kris import DIMENSIONS, parts
from ivr_jax.images import save_png

JUDGE = "scripted"


def picture(seed: int, side: int = 32) -> np.ndarray:
    """uint8 [side, side, 3]: a few coloured squares."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((side // 4, side // 4, 1))).astype(np.uint8)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_geneval(root: Path) -> None:
    """One prompt a tag."""
    write_lines(root / "evaluation_metadata.jsonl", [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}],
         "prompt": "a photo of a cup and a dog"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
         "prompt": "a photo of two clocks"},
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
        {"tag": "position", "include": [{"class": "cat", "count": 1},
                                        {"class": "bus", "count": 1, "position": ["left of", 0]}],
         "prompt": "a photo of a bus left of a cat"},
        {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "blue"},
                                          {"class": "tie", "count": 1, "color": "pink"}],
         "prompt": "a photo of a blue cup and a pink tie"},
    ])  # fmt: skip


def write_geneval2(root: Path) -> None:
    write_lines(root / "geneval2_data.jsonl", [
        {"prompt": "three dogs", "atom_count": 3,
         "vqa_list": [["Is there a dog?", "Yes"], ["How many dogs are there?", "three"], ["Are they dogs?", "Yes"]],
         "skills": ["object", "count", "attribute"]},
        {"prompt": "a cat under two boxes, jumping", "atom_count": 4,
         "vqa_list": [["Is there a cat?", "Yes"], ["How many boxes are there?", "2"], ["Is it below?", "Yes"],
                      ["Does it jump?", "Yes"]],
         "skills": ["object", "count", "position", "verb"]},
    ])  # fmt: skip


def write_kris(root: Path) -> None:
    """One item in each of the twenty categories, two in chemistry."""
    seed = 0
    for categories in DIMENSIONS.values():
        for category in categories:
            folder = root / category
            records = {}
            for number in ("1", "2") if category == "chemistry" else ("1",):
                seed += 1
                names: list[str] | str = f"{number}.png"
                if category == "multi-element_composition":
                    names = [f"{number}-a.png", f"{number}-b.png"]
                elif category == "temporal_prediction":
                    names = [f"{number}-{frame}.png" for frame in (1, 2, 4)]
                for name in [names] if isinstance(names, str) else names:
                    save_png(folder / name, picture(seed))
                records[number] = {
                    "ori_img": names, "ins_en": f"Edit of {category} {number}.", "explain_en": f"Facts on {category}.",
                }  # fmt: skip
                if category == "viewpoint_change":
                    records[number]["gt_img"] = f"{number}-gt.png"
                    save_png(folder / f"{number}-gt.png", picture(seed + 100))
            (folder / "annotation.json").write_text(json.dumps(records))


def write_omnicontext(root: Path) -> None:
    rows = []
    for number, task in enumerate(("single_character", "single_character", "multi_object", "scene_object")):
        names = [f"images/{number}_{n}.png" for n in range(1 if task.startswith("single") else 2)]
        for n, name in enumerate(names):
            save_png(root / name, picture(10 * number + n))
        rows.append({"key": f"k{number}", "task_type": task, "instruction": f"Show it, {number}.",
                     "input_images": names, "instruction_language": "en"})  # fmt: skip
    rows.append({**rows[0], "key": "k9", "instruction_language": "cn"})
    write_lines(root / "omnicontext.jsonl", rows)


def write_wise(root: Path) -> None:
    def row(number: int, category: str, subcategory: str) -> dict:
        return {"Prompt": f"Prompt {number}.", "Explanation": f"Fact {number}.", "Category": category,
                "Subcategory": subcategory, "prompt_id": number}  # fmt: skip

    files = {
        "cultural_common_sense_verified.json": [row(1, "Cultural knowledge", "Festival"),
                                                row(2, "Cultural knowledge", "Sports")],
        "spatio-temporal_reasoning_verified.json": [row(401, "Time", "Horizontal time"),
                                                    row(568, "Space", "Geographical location")],
        "natural_science_verified.json": [row(701, "Biology", "State"), row(801, "Physics", "Optics"),
                                          row(901, "Chemistry", "Combustion")],
    }  # fmt: skip
    for name, rows in files.items():
        path = root / "data_verified" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))


def write_rise(root: Path) -> None:
    def row(index: str, category: str, **more) -> dict:
        save_png(root / f"{category}_images/{index}.png", picture(len(index) + len(category)))
        return {"index": index, "category": category, "instruction": f"Change {index}.",
                "image": f"{category}_images/{index}.png", "reference": f"Outcome {index}.", "reference_img": None,
                "reference_txt": None, "subtask": "Any", "consistency_free": None, "reasoning_img": None,
                **more}  # fmt: skip

    rows = [
        row("temporal_reasoning_1", "temporal_reasoning"),
        row("temporal_reasoning_2", "temporal_reasoning", consistency_free=True),
        row("causal_reasoning_1", "causal_reasoning", reasoning_img=True),
        row("spatial_reasoning_1", "spatial_reasoning", reference_img="spatial_reasoning_images/ref.png"),
        row("logical_reasoning_1", "logical_reasoning", reference_txt="Forty-two."),
    ]
    save_png(root / "spatial_reasoning_images/ref.png", picture(77))
    (root / "data_total.json").write_text(json.dumps(rows))


def write_imgedit(root: Path) -> None:
    records = {}
    for number, kind in enumerate(("add", "add", "remove")):
        name = f"animal/{number}.jpg"
        save_png(root / "singleturn" / name, picture(number))
        records[str(1000 + number)] = {"id": name, "prompt": f"Edit {number}.", "edit_type": kind}
    (root / "basic_edit.json").write_text(json.dumps(records))


def write_gedit(root: Path) -> None:
    rows = []
    for number, (task, language, shared) in enumerate((
        ("color_alter", "en", True), ("color_alter", "en", False), ("subject-add", "en", True),
        ("color_alter", "cn", True),
    )):  # fmt: skip
        save_png(root / f"images/{number}.png", picture(number, 48))
        rows.append({"key": f"k{number}", "task_type": task, "instruction": f"Edit {number}.",
                     "instruction_language": language, "Intersection_exist": shared,
                     "input_image": f"images/{number}.png"})  # fmt: skip
    write_lines(root / "gedit.jsonl", rows)


WRITERS = {
    "geneval": write_geneval, "geneval2": write_geneval2, "kris": write_kris, "omnicontext": write_omnicontext,
    "wise": write_wise, "rise": write_rise, "imgedit": write_imgedit, "gedit": write_gedit,
}  # fmt: skip


def load_items(benchmark: Benchmark, root: Path) -> list[Item]:
    """Writes the benchmark's tiny data into `root`, and reads it."""
    WRITERS[benchmark.name](root)
    return benchmark.items(root, root / "scratch")


class Records:
    """Judgements by hand; `judged` is what a benchmark reads."""

    def __init__(self) -> None:
        self.all: dict[tuple[str, int, str], Judgement] = {}
        self.samples: dict[str, int] = {}

    def add(self, item: str, metric: str, sample: int = 0, state: State = State.OK, **value) -> None:
        """`value` holds scores by name; `_strict`, `_value` replace parts of the record."""
        strict, raw = value.pop("_strict", None), value.pop("_value", None)
        held = raw if raw is not None else {"scores": value, "reasoning": f"{metric} of {item}"}
        if strict is not None:
            held = {**held, "strict": strict}
        judgement = Judgement(item, sample, metric, JUDGE, state, held if value or raw or strict else None)
        self.all[judgement.address] = judgement
        self.samples[item] = max(self.samples.get(item, 1), sample + 1)

    @property
    def judged(self) -> Judged:
        paths = {address[:2]: f"images/{address[0]}_{address[1]}.png" for address in self.all}
        return Judged(self.all, self.samples, paths)


def figure_values(benchmark: Benchmark, items: list[Item], judged: Judged, mode: str) -> dict[str, float | None]:
    return {figure.name: figure.value for figure in benchmark.figures(items, judged, mode)}


def metrics(questions: list[Question]) -> list[str]:
    return [question.metric for question in questions]


OMNI_SCORES = {  # task -> (PF, SC, PF as strict asks it)
    "single_character/k0": (9, 4, 9), "single_character/k1": (8, 8, 8), "multi_object/k2": (10, 0, 10),
    "scene_object/k3": (9, 9, 4),
}  # fmt: skip


def omni_records() -> Records:
    records = Records()
    for key, (following, consistency, strict) in OMNI_SCORES.items():
        records.add(key, "PF", score=following)
        records.add(key, "SC", score=consistency)
        if key.startswith("scene"):
            records.add(key, "PF (strict)", score=strict)
    return records


def rise_records() -> Records:
    records = Records()
    for key, reasoning, consistency, quality in (
        ("temporal_reasoning/temporal_reasoning_1", 5, 5, 5),
        ("temporal_reasoning/temporal_reasoning_2", 5, None, 5),  # consistency is not asked
        ("causal_reasoning/causal_reasoning_1", 5, 4, 5),
        ("spatial_reasoning/spatial_reasoning_1", 1, 3, 5),
        ("logical_reasoning/logical_reasoning_1", 1, 1, None),  # 0 or 1
    ):
        for metric, score in (("reasoning", reasoning), ("consistency", consistency), ("quality", quality)):
            if score is not None:
                records.add(key, metric, score=score)
    return records


def imgedit_records() -> Records:
    records = Records()
    for key, scores in {"1000": (5, 4, 4), "1001": (3, 3, 2), "1002": (1, 1, 1)}.items():
        records.add(key, "edit", **dict(zip(("following", "naturalness", "integrity"), scores, strict=True)))
    return records


def gedit_records() -> Records:
    records = Records()
    for key, semantics, quality in (
        ("color_alter/en/k0", (9, 4), (9, 9)),  # 4, 9: 6
        ("color_alter/en/k1", (8, 8), (2, 9)),  # 8, 2: 4
        ("subject-add/en/k2", (9, 10), (9, 9)),  # 9, 9: 9
        ("color_alter/cn/k3", (0, 9), (9, 9)),  # 0
    ):
        records.add(key, "semantics", **dict(zip(("success", "preservation"), semantics, strict=True)))
        records.add(key, "quality", **dict(zip(("naturalness", "artifacts"), quality, strict=True)))
    return records


# Four samples for the first prompt, two for the others: correct or not, by prompt.
OUTCOMES = ((1, 0, 1, 1), (0, 0), (1, 1), (0, 1), (0, 0), (1, 0))


def geneval_records(items: list[Item]) -> Records:
    records = Records()
    for item, outcomes in zip(items, OUTCOMES, strict=True):
        for sample, correct in enumerate(outcomes):
            records.add(item.key, "objects", sample, correct=correct)
    return records


PROBABILITIES = {  # item -> (without the space, with it) of each atom
    "00000": ((0.5, 0.5), (0.2, 0.4), (1.0, 1.0)),
    "00001": ((0.8, 0.8), (0.0, 0.1), (0.5, 0.5), (0.25, 0.25)),
}


def geneval2_records() -> Records:
    records = Records()
    for item, atoms in PROBABILITIES.items():
        for number, (plain, space) in enumerate(atoms):
            records.add(item, f"atom {number}", _value={"probability": plain, "with_space": space, "mass": 1.0})
    return records


def kris_records(items: list[Item]) -> Records:
    """Every score present: 1 to 5 in turn, the same with the empty instruction but for one point less."""
    records, turn = Records(), 0
    for item in items:
        values = {}
        for part in parts(item):
            values[part] = 1 + turn % 5
            turn += 3
        records.add(item.key, "quality", quality_score=values["quality"])
        records.add(item.key, "consistency", consistency_score=values["consistency"])
        records.add(item.key, "consistency (strict)", consistency_score=max(1, values["consistency"] - 1))
        for metric in ("instruction", "instruction (strict)"):
            scores = {f"{part}_score": values[part] for part in values if part in ("instruction", "knowledge")}
            records.add(item.key, metric, **scores)
    return records


WISE_SCORES = {"1": 1, "2": 0, "401": 1, "568": 0, "701": 1, "801": 1, "901": 0}


def wise_records() -> Records:
    records = Records()
    for key, score in WISE_SCORES.items():
        records.add(key, "right", score=score)
    return records
