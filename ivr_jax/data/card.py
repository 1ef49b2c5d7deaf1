"""The card of a dataset: what is in it, counted, for people (`README.md`) and for programs (`card.json`).

Both stand in the dataset folder.  The writer of a dataset makes them when it closes; `write_card` makes them anew for
a folder that is already there.  Everything counts trajectories unless it says images.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.trajectory import AXES, Mode, Trajectory

CARD, NUMBERS = "README.md", "card.json"
_UNSCORED = "none"


class CardCounts:
    """Running counts over the trajectories of a dataset."""

    def __init__(self) -> None:
        self.modes: collections.Counter[str] = collections.Counter()
        self.categories: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.drawn: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.references: collections.Counter[str] = collections.Counter()
        self.scores = {
            place: {axis: collections.Counter() for axis in AXES} for place in ("first_image", "final_image")
        }
        self.failed_ends = 0

    def add(self, trajectory: Trajectory) -> None:
        """Counts one trajectory."""
        mode, rounds = trajectory.mode.value, trajectory.rounds
        self.modes[mode] += 1
        self.categories[trajectory.sample.category][mode] += 1
        self.drawn[mode][str(len(rounds))] += 1
        self.references[str(len(trajectory.sample.sources))] += 1
        for place, r in (("first_image", rounds[0]), ("final_image", rounds[-1])):
            for axis, score in zip(AXES, r.evaluation.scores, strict=True):
                self.scores[place][axis][_UNSCORED if score is None else f"{score:g}"] += 1
        self.failed_ends += not rounds[-1].evaluation.passed

    def to_json(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of the card; `manifest` is the dataset's `dataset.json`."""
        return {
            "trajectories": manifest["trajectories"],
            "images": manifest["images"],
            "by_mode": _sorted(self.modes),
            "by_category_and_mode": {name: _sorted(modes) for name, modes in sorted(self.categories.items())},
            "by_image_size": manifest["by_image_size"],
            "by_references": _sorted(self.references),
            "drawn_images_by_mode": {mode: _sorted(drawn) for mode, drawn in sorted(self.drawn.items())},
            "scores": {
                place: {axis: _sorted(counts) for axis, counts in axes.items()} for place, axes in self.scores.items()
            },
            "end_in_a_failed_image": self.failed_ends,
            "yield": yield_stages(manifest.get("provenance") or {}),
        }


def yield_stages(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How many samples came through each stage, from what construction and review wrote into the provenance.

    Returns rows `{"stage", "samples"}` in the order of the stages; empty when the provenance says nothing.
    """
    origin = provenance.get("source_provenance")
    rows = yield_stages(origin) if isinstance(origin, Mapping) else []
    for key, prefix in (("counts", ""), ("review", "review: ")):
        counts = provenance.get(key)
        for name, value in counts.items() if isinstance(counts, Mapping) else ():
            if isinstance(value, Mapping):
                rows += [{"stage": f"{prefix}{name}: {part}", "samples": n} for part, n in value.items() if _count(n)]
            elif _count(value):
                rows.append({"stage": f"{prefix}{name}", "samples": value})
    return rows


def card_text(numbers: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    modes = [mode.value for mode in Mode if numbers["by_mode"].get(mode.value)]
    lines = ["# Dataset card", ""]
    lines.append(
        f"{numbers['trajectories']:,} interleaved reasoning trajectories over {numbers['images']:,} images, written by"
        " ivr_jax. `dataset.json` describes the format and how the data came about, `card.json` holds these numbers."
    )
    if numbers["end_in_a_failed_image"]:
        lines += ["", f"{numbers['end_in_a_failed_image']:,} of them end in an image that failed: they teach evaluation"
                  " alone, and are left out of exports."]
    rows = [
        (name or "(none)", *(counts.get(mode, 0) for mode in modes), sum(counts.values()))
        for name, counts in numbers["by_category_and_mode"].items()
    ]
    total = ("all", *(numbers["by_mode"][mode] for mode in modes), numbers["trajectories"])
    lines += ["", "## Sub-categories and modes", "", *_table(("sub-category", *modes, "all"), [*rows, total])]
    shares = [(mode, n, f"{n / numbers['trajectories']:.1%}", _mean(numbers["drawn_images_by_mode"][mode]))
              for mode, n in numbers["by_mode"].items()]
    lines += ["", "## Modes", "", *_table(("mode", "trajectories", "share", "drawn images, mean"), shares)]
    sizes = sorted(numbers["by_image_size"].items(), key=lambda item: (-item[1], item[0]))
    lines += ["", "## Images", "", *_table(("width x height", "images"), sizes)]
    lines += ["", *_table(("reference images", "trajectories"), numbers["by_references"].items())]
    for place, title in (("first_image", "Scores of the first image"), ("final_image", "Scores of the final image")):
        axes = numbers["scores"][place]
        values = sorted({value for counts in axes.values() for value in counts}, key=_order)
        rows = [(axis, *(axes[axis].get(value, 0) for value in values)) for axis in AXES]
        lines += ["", f"## {title}", "", *_table(("axis", *values), rows)]
    lines += ["", "## Yield", ""]
    if numbers["yield"]:
        lines += _table(("stage", "samples"), [(row["stage"], row["samples"]) for row in numbers["yield"]])
    else:
        lines.append("Not recorded: the dataset was not made by construction.")
    review = provenance.get("review")
    if isinstance(review, Mapping):
        kappa = review.get("kappa")
        lines += ["", f"Reviewed by two people; Cohen's kappa {'undefined' if kappa is None else f'{kappa:.3f}'}."]
    return "\n".join(lines) + "\n"


def write_files(folder: Path, counts: CardCounts, manifest: Mapping[str, Any]) -> None:
    """Writes both files into `folder`, replacing older ones."""
    numbers = counts.to_json(manifest)
    files.write_json(folder / NUMBERS, numbers)
    files.write_file(folder / CARD, card_text(numbers, manifest.get("provenance") or {}))


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: _order(item[0])))


def _order(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def _mean(counts: Mapping[str, int]) -> str:
    return f"{sum(int(value) * n for value, n in counts.items()) / sum(counts.values()):.2f}"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(cells: Sequence[Any]) -> str:
        shown = (f"{cell:,}" if _count(cell) else str(cell) for cell in cells)
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in shown) + " |"

    return [line(head), "|" + "|".join([" --- ", *(" ---: " for _ in head[1:])]) + "|", *map(line, rows)]
