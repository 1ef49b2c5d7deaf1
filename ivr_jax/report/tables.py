"""Arms side by side: the measures of a comparison table and their formats.

An *arm* is one model under one setting (base, SFT, SFT + RL, an ablation); `evaluations` maps an arm's title to its
result of `ivr_jax.report.metrics.evaluate`, in display order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivr_jax.report.intervals import NOTHING, Estimate, difference
from ivr_jax.report.metrics import INVALID
from ivr_jax.trajectory import AXES, Mode

Evaluations = Mapping[str, Mapping[str, Any]]

# The arms that follow from one another; all others are compared beside them.
MAIN_ARMS = ("Base", "SFT", "SFT + RL")


@dataclasses.dataclass(frozen=True)
class Measure:
    """One row of a before/after table.

    Attributes:
      name: in code and JSON.
      title: for display.
      path: keys of the estimate in a summary.
      is_share: formatted in percent; otherwise a plain number.
      better: +1 when higher is better, -1 when lower is, 0 when neither.
    """

    name: str
    title: str
    path: tuple[str, ...]
    is_share: bool = False
    better: int = 0

    def of(self, summary: Mapping[str, Any] | None) -> Estimate:
        """The estimate of this measure in `summary`; an empty one when it is not there."""
        value: Any = summary
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return dict(value) if isinstance(value, Mapping) else dict(NOTHING)


_VERDICTS = ("calibration", "images")  # of every image that was drawn and judged
MEASURES: tuple[Measure, ...] = (
    Measure("exact", "Exact match", ("exact",), True, 1),
    Measure("first_exact", "Own first image exact", ("first_exact",), True),
    Measure("gain", "Gain over first image", ("gain",), True),
    Measure("outcome", "Outcome reward R_o", ("outcome",), False, 1),
    *(Measure(axis, f"{axis.capitalize()} score (1-5)", ("axes", axis), False, 1) for axis in AXES),
    Measure("images", "Images per answer", ("images",), False, -1),
    *(Measure(mode.value, f"Answered {mode.value.replace('_', '-')}", ("modes", mode.value), True) for mode in Mode),
    Measure(INVALID, "Invalid answers", ("modes", INVALID), True, -1),
    Measure("sight", "Sight, own wrong image", ("paired", "sight"), True, 1),
    Measure("sight_fault", "Sight, one wrong cell", ("paired", "sight_fault"), True, 1),
    *(
        Measure(f"{blind}{name}", "\u2013 of a blind rule" if blind else title, (*_VERDICTS, *path, name), True, better)
        for name, title, sign in (
            ("pass_given_right", "P(passes | right)", 1),
            ("pass_given_wrong", "P(passes | wrong)", -1),
            ("accuracy", "Own verdict agrees", 1),
        )
        for blind, path, better in (("", (), sign), ("blind_", ("blind",), 0))
    ),
    Measure("repaired", "Repaired by a reflection", ("repaired",), True, 1),
    Measure("garbled", "Garbled texts", ("garbled",), True, -1),
)
BY_NAME: dict[str, Measure] = {measure.name: measure for measure in MEASURES}


def overall(result: Mapping[str, Any]) -> dict[str, Any]:
    """The summary over all answers of an evaluation, with that of its paired test under "paired"."""
    return {**result["overall"], "paired": (result.get("paired") or {}).get("overall") or {}}


def compare(measure: Measure, after: Estimate, before: Estimate) -> dict[str, Any]:
    """One measure of an arm, `after`, against that of another.

    Returns:
      `difference` (an estimate; the arms are taken as independent), `ratio` (of the values, None when the reference is
      0 or either is missing), `clear` (the interval of the difference excludes 0) and `better` (True, False, or None
      when not clear or when the measure has no good direction).
    """
    change = difference(after, before)
    clear = change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
    ratio = after["value"] / before["value"] if change["value"] is not None and before["value"] else None
    better = change["value"] * measure.better > 0 if clear and measure.better else None
    return {"difference": change, "ratio": ratio, "clear": clear, "better": better}


def format_value(measure: Measure, estimate: Estimate, signed: bool = False) -> str:
    """The value alone: "85.2%", "1.56", "+3.1" (a difference of shares, in points), or a dash when there is none."""
    return _number(measure, estimate["value"], signed)


def format_interval(measure: Measure, estimate: Estimate, signed: bool = False) -> str:
    """The interval alone, "83.1-87.0", or "" when there is none."""
    if estimate["low"] is None:
        return ""
    low, high = (_number(measure, estimate[end], signed).rstrip("%") for end in ("low", "high"))
    return f"{low} to {high}" if signed or estimate["low"] < 0 else f"{low}\u2013{high}"


def _number(measure: Measure, value: float | None, signed: bool) -> str:
    if value is None:
        return "\u2013"
    scaled = value * 100 if measure.is_share else value
    digits = 1 if measure.is_share else 3 if measure.name == "outcome" else 2
    text = f"{scaled:+.{digits}f}" if signed else f"{scaled:.{digits}f}"
    return text.replace("-", "\u2212") + ("%" if measure.is_share and not signed else "")


def table(evaluations: Evaluations) -> Table:
    """A rich table that fits three arms into 80 columns: one column an arm, whole per cents in the intervals."""
    output = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="95% intervals in brackets", caption_justify="left")
    output.add_column("")
    for arm in evaluations:
        output.add_column(Text(arm), justify="right", no_wrap=True)
    results = list(evaluations.values())
    summaries = [overall(result) for result in results]
    output.add_row("Answers", *(str(summary["answers"]) for summary in summaries))
    for measure in MEASURES:
        estimates = [measure.of(summary) for summary in summaries]
        if measure.name not in AXES and any(estimate["n"] for estimate in estimates):
            output.add_row(measure.title, *(_cell(measure, estimate) for estimate in estimates))
    scores = [[BY_NAME[axis].of(summary) for axis in AXES] for summary in summaries]
    initials = " ".join(axis[0] for axis in AXES)
    output.add_row(f"Axis scores {initials}", *(_run_of(BY_NAME[AXES[0]], row) for row in scores))
    groups = sorted({group for result in results for group in result["by_edits"]}, key=int)
    for measure, title in ((BY_NAME["exact"], "Exact"), (BY_NAME["images"], "Images")):
        cells = [[measure.of(result["by_edits"].get(group)) for group in groups] for result in results]
        if any(estimate["n"] for row in cells for estimate in row):
            output.add_row(f"{title}, edits {' '.join(groups)}", *(_run_of(measure, row) for row in cells))
    return output


def _cell(measure: Measure, estimate: Estimate) -> Text:
    """Value and interval in few characters: "85.2% [83-87]"."""
    if estimate["low"] is None:
        return Text(format_value(measure, estimate))
    scale, digits = (100, 0) if measure.is_share else (1, 2)
    ends = (f"{estimate[end] * scale:.{digits}f}" for end in ("low", "high"))
    low, high = (re.sub(r"^0(?=\.)", "", end).replace("-", "\u2212") for end in ends)
    return Text.assemble(format_value(measure, estimate), (f" [{low}\u2013{high}]", "dim"))


def _run_of(measure: Measure, estimates: Sequence[Estimate]) -> str:
    """Values alone, side by side: "92 70 64 62%"."""
    if not measure.is_share:
        return " ".join("\u2013" if e["value"] is None else f"{e['value']:.1f}" for e in estimates)
    return " ".join("\u2013" if e["value"] is None else f"{e['value']:.0%}".rstrip("%") for e in estimates) + "%"


def print_table(evaluations: Evaluations, console: Console | None = None) -> None:
    """Prints the before/after table of `evaluations` (arm title -> result) to the terminal."""
    (console or Console()).print(table(evaluations))
