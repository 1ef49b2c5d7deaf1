"""Reads a working directory for the report.

    <workdir>/
      image_tokenizer/ base/ sft/ rl/     stages: metrics.jsonl, config.json
        training_samples/             optional: some of its training data as answers.jsonl + images/
      eval_base/ eval_sft/ eval_rl/       arms: evaluation.json, answers.jsonl, images/
      eval_<anything>/                    further arms (ablations, forced modes), after those three
      <anything>/swap.json                optional: swap tests
      gates.json                          optional: the entry gates

A missing part is left out and noted; a broken file raises UserError.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.report.answers import ANSWERS_FILE, EvaluatedAnswer, StoredImages, read_answers, read_images
from ivr_jax.report.gallery import GalleryItem, GallerySection, choose
from ivr_jax.report.gates import GATES_FILE, Gate, read_gates
from ivr_jax.report.metrics import EVALUATION_FILE, mode_of, read_evaluation
from ivr_jax.report.pages import Run
from ivr_jax.report.plots import Curve
from ivr_jax.report.swaps import SWAP_FILE, read_swap
from ivr_jax.report.tables import MAIN_ARMS

STAGES: Mapping[str, str] = {"image_tokenizer": "Image tokenizer", "base": "Base", "sft": "SFT", "rl": "RL"}
ARMS: Mapping[str, str] = dict(zip(("eval_base", "eval_sft", "eval_rl"), MAIN_ARMS, strict=True))
FURTHER: Mapping[str, str] = {
    "eval_direct": "SFT held to direct",
    "eval_multi_step": "SFT held to multi-step",
    "eval_kinds": "Base, one edit, temperature 0",
    "eval_typed": "Typed requests, temperature 0",
}
METRICS_FILE, CONFIG_FILE, SAMPLES_FOLDER = "metrics.jsonl", "config.json", "training_samples"
_PROMPTS_SHOWN, _SAMPLES_SHOWN = 12, 9
_SEED = 0  # of the choice of answers


class ReportInputs(NamedTuple):
    """The arguments of `report.write_report` after the path: `write_report(path, *collect(workdir))`."""

    title: str
    runs: tuple[Run, ...]
    evaluations: dict[str, dict[str, Any]]
    gallery: tuple[GallerySection, ...]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...]
    swaps: dict[str, dict[str, Any]]


def collect(workdir: str | os.PathLike[str], title: str = "") -> ReportInputs:
    """Everything that `workdir` holds for a report.

    Args:
      workdir: laid out as the module says.
      title: of the page; by default it names the folder.

    Raises:
      UserError: when `workdir` is not a folder, or a file in it is broken.
    """
    root = Path(workdir)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder.", "Give the --workdir of a run.")
    notes: list[str] = []
    runs = tuple(run for name, stage in STAGES.items() if (run := _run(root / name, stage, notes)) is not None)
    evaluations, answered = _arms(root, notes)
    gallery = [
        GallerySection(
            "Answers",
            "The same prompts, answered by each model. Prompts are sampled evenly from the kinds of answer that "
            "the last model gave, so rare kinds are over-represented here.",
            choose(answered, _PROMPTS_SHOWN, _SEED),
        )
    ]
    for name, stage in STAGES.items():
        if (root / name / SAMPLES_FOLDER / ANSWERS_FILE).is_file():
            gallery.append(_training_samples(root / name / SAMPLES_FOLDER, stage))
    gates = read_gates(root) if (root / GATES_FILE).is_file() else ()
    swaps = {path.parent.name.replace("_", " "): read_swap(path.parent) for path in sorted(root.glob(f"*/{SWAP_FILE}"))}
    return ReportInputs(
        title or f"Report on {root.resolve().name}", runs, evaluations, tuple(gallery), gates, tuple(notes), swaps
    )


def read_curves(path: str | os.PathLike[str]) -> tuple[Curve, ...]:
    """The curves in a `metrics.jsonl` file: one JSON object a line, {"step": int, name: number, ...}.

    A resumed run may have written a step twice: the later line counts.  Values that are not finite numbers are left
    out, as is a last line that was cut off.  Raises UserError for any other line that is not such an object.
    """
    points: dict[str, dict[int, float]] = {}
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}.", "Check the file's permissions.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record["step"]
            if isinstance(step, bool) or not isinstance(step, int):
                raise TypeError("step is not a whole number")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline after it: the writer was stopped in the middle
                break
            raise UserError(f"{path}, line {number} is not a metrics record ({error}).", "Remove the line.") from None
        for name, value in record.items():
            if name != "step" and type(value) in (int, float) and math.isfinite(value):
                points.setdefault(name, {})[step] = float(value)
    return tuple(
        Curve(name, tuple(sorted(series)), tuple(series[step] for step in sorted(series)))
        for name, series in points.items()
    )


def _run(folder: Path, title: str, notes: list[str]) -> Run | None:
    metrics, config = folder / METRICS_FILE, folder / CONFIG_FILE
    if not metrics.is_file() and not config.is_file():
        notes.append(f"The stage \u201c{title}\u201d is not in this working directory.")
        return None
    curves, when = (), ""
    if metrics.is_file():
        curves = read_curves(metrics)
        when = datetime.datetime.fromtimestamp(metrics.stat().st_mtime).strftime("%d %B %Y, %H:%M")
    if not curves:
        notes.append(f"The stage \u201c{title}\u201d has logged no metrics.")
    return Run(title, when, _read_config(config, title, notes), curves)


def _read_config(path: Path, title: str, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        notes.append(f"The stage \u201c{title}\u201d has kept no configuration.")
        return {}
    return files.read_json_object(path, "Remove the file, or run the stage again.")


def _arms(
    root: Path, notes: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[tuple[EvaluatedAnswer, ...], StoredImages]]]:
    """Evaluations and answers by arm title."""
    known = {folder.name for folder in root.glob("eval_*") if folder.is_dir()}
    names = sorted(known - set(ARMS))
    further = {name: FURTHER.get(name, name.removeprefix("eval_").replace("_", " ")) for name in names}
    evaluations, answered = {}, {}
    for name, arm in {**ARMS, **further}.items():
        folder = root / name
        if (folder / EVALUATION_FILE).is_file():
            evaluations[arm] = read_evaluation(folder)
        else:
            notes.append(f"\u201c{arm}\u201d has not been evaluated.")
        if (folder / ANSWERS_FILE).is_file():
            answered[arm] = (read_answers(folder), read_images(folder))
        elif (folder / EVALUATION_FILE).is_file():
            notes.append(f"The answers of \u201c{arm}\u201d were not kept, so none is shown.")
    return evaluations, answered


def _training_samples(folder: Path, stage: str) -> GallerySection:
    """Training samples of one stage, the modes in turn."""
    answers, images = read_answers(folder), read_images(folder)
    order = np.random.default_rng(_SEED).permutation(len(answers))
    by_mode: dict[str, list[EvaluatedAnswer]] = {}
    for index in order:
        by_mode.setdefault(mode_of(answers[index]), []).append(answers[index])
    turns = [group[turn] for turn in range(len(answers)) for group in by_mode.values() if turn < len(group)]
    items = tuple(GalleryItem("Training sample", answer, images) for answer in turns[:_SAMPLES_SHOWN])
    return GallerySection(
        f"Training samples of {stage}",
        "Constructed trajectories. Hatched segments and dashed images are context only: the model reads "
        "them but is never trained to produce them.",
        items,
    )
