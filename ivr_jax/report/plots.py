"""Plots, twice: SVG inside the page (sharp on a phone, light or dark with it) and PNG files beside it (matplotlib).

Two kinds: the curve of one metric over training steps, and estimates with their intervals, group by group and arm by
arm.  The SVG carries class names only; colours come from the page's style sheet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ivr_jax.report.intervals import Estimate

ARM_COLOURS = ("#8b8f98", "#c08a2b", "#2f6f8f", "#7a5aa6", "#4f8a5b", "#b3543f")
_INK, _FAINT = "#22262b", "#d9d9d4"
_MAX_POINTS = 240


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over training: `steps` and `values` of equal length, steps ascending, values finite."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Series:
    """One arm's estimates, one for each group of the plot it stands in (None where the arm has no such group)."""

    arm: str
    estimates: tuple[Estimate | None, ...]


@dataclasses.dataclass(frozen=True)
class IntervalPlot:
    """Estimates of one measure: groups along x, one series an arm; `stem` names its PNG file."""

    stem: str
    title: str
    groups: tuple[str, ...]
    series: tuple[Series, ...]
    percent: bool


def thin(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, averaged in equal bins down to at most `_MAX_POINTS` points: float64 [P], float64 [P]."""
    steps, values = np.asarray(curve.steps, np.float64), np.asarray(curve.values, np.float64)
    bins = min(_MAX_POINTS, len(steps))
    return (
        np.array([part.mean() for part in np.array_split(steps, bins)]),
        np.array([part.mean() for part in np.array_split(values, bins)]),
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """A running mean of about a twelfth of the points, centred, without phase shift: float64 [P] -> float64 [P]."""
    half = len(values) // 24
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def short(value: float) -> str:
    """A number in few characters, for an axis or a caption: 0.0123, 12.5, 3.2e-05, 12000."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}".replace("-", "\u2212")
    return f"{value:.2g}".replace("-", "\u2212")


class _Frame:
    """Maps data to the view box of an SVG plot and draws its grid."""

    left, right, top, bottom = 46, 10, 10, 22

    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float]):
        self.width, self.height = width, height
        self.x, self.y = x, y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)

    def at_x(self, value: float) -> float:
        span = self.x[1] - self.x[0]
        share = (value - self.x[0]) / span if span else 0.5
        return round(self.left + share * (self.width - self.left - self.right), 1)

    def at_y(self, value: float) -> float:
        share = (value - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)

    def y_grid(self, percent: bool) -> list[Markup]:
        lines = []
        for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(*self.y):
            if self.y[0] - 1e-12 <= tick <= self.y[1] + 1e-12:
                at, label = self.at_y(tick), f"{tick:.0%}" if percent else short(float(tick))
                lines.append(
                    Markup(
                        '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}" '
                        'text-anchor="end">{}</text>'
                    ).format(self.left, self.width - self.right, at, at, self.left - 5, at + 3.5, label)
                )
        return lines

    def x_label(self, x: float, label: str, anchor: str = "middle") -> Markup:
        return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, self.height - 6, anchor, label)

    def svg(self, label: str, parts: Sequence[str]) -> Markup:
        head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            self.width, self.height, label
        )
        return head + Markup("").join(parts) + Markup("</svg>")


def curve_svg(curve: Curve) -> Markup:
    """The curve as an SVG element: raw values faint, their running mean on top."""
    steps, values = thin(curve)
    frame = _Frame(320, 160, (float(steps[0]), float(steps[-1])), (float(values.min()), float(values.max())))
    parts = frame.y_grid(percent=False)
    if len(steps) == 1:
        parts.append(
            Markup('<circle class="mean" cx="{}" cy="{}" r="3"/>').format(frame.at_x(steps[0]), frame.at_y(values[0]))
        )
    else:
        for kind, line in (("raw", values), ("mean", smooth(values))):
            points = " ".join(f"{frame.at_x(x)},{frame.at_y(y)}" for x, y in zip(steps, line, strict=True))
            parts.append(Markup('<polyline class="{}" points="{}"/>').format(kind, points))
    parts.append(frame.x_label(frame.left, f"step {curve.steps[0]}", "start"))
    if curve.steps[-1] != curve.steps[0]:
        parts.append(frame.x_label(frame.width - frame.right, str(curve.steps[-1]), "end"))
    return frame.svg(f"{curve.name}, from {short(curve.values[0])} to {short(curve.values[-1])}", parts)


def interval_svg(plot: IntervalPlot) -> Markup:
    """Estimates with whiskers, one dot for each group and arm, an arm's dots joined by a line."""
    count = len(plot.series)
    frame = _Frame(440, 230, (-0.5, len(plot.groups) - 0.5), _y_range(plot))
    parts = frame.y_grid(plot.percent)
    parts += [frame.x_label(frame.at_x(index), group) for index, group in enumerate(plot.groups)]
    for number, line in enumerate(plot.series):
        colour, dots = f"arm{number % len(ARM_COLOURS)}", []
        for index, estimate in enumerate(line.estimates):
            if estimate is None or estimate["value"] is None:
                continue
            x = frame.at_x(index + _offset(number, count))
            dots.append((x, frame.at_y(estimate["value"])))
            if estimate["low"] is not None:
                parts.append(
                    Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                        colour, x, x, frame.at_y(estimate["low"]), frame.at_y(estimate["high"])
                    )
                )
        points = " ".join(f"{x},{y}" for x, y in dots)
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(colour, points))
        parts += [
            Markup('<circle class="{}" cx="{}" cy="{}" r="3.6"><title>{}</title></circle>').format(
                colour, x, y, line.arm
            )
            for x, y in dots
        ]
    return frame.svg(plot.title, parts)


def _offset(number: int, count: int) -> float:
    """Where arm `number` of `count` stands beside the middle of its group."""
    return (number - (count - 1) / 2) * min(0.12, 0.6 / count)


def _y_range(plot: IntervalPlot) -> tuple[float, float]:
    """0 to 1 for shares; else a little beyond every interval."""
    if plot.percent:
        return 0.0, 1.0
    seen = [e for line in plot.series for e in line.estimates if e and e["value"] is not None]
    ends = [estimate[end] for estimate in seen for end in ("value", "low", "high") if estimate[end] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return (low - 0.08 * (high - low), high + 0.08 * (high - low)) if high > low else (low - 0.5, high + 0.5)


def curves_png(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """All `curves` of a stage as small multiples in one PNG file."""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.4 * rows + 0.4), dpi=130, layout="constrained", facecolor="white")
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12, color=_INK)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = thin(curve)
        axes.plot(steps, values, color=ARM_COLOURS[2], alpha=0.3, linewidth=1, marker="o" if len(steps) == 1 else None)
        axes.plot(steps, smooth(values), color=ARM_COLOURS[2], linewidth=1.6)
        axes.set_title(_plain(curve.name), loc="left", fontsize=9, color=_INK)
        dress(axes)
    FigureCanvasAgg(figure).print_png(str(path))


def interval_png(path: Path, plot: IntervalPlot) -> None:
    """The plot of `interval_svg` as a PNG file."""
    figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for number, line in enumerate(plot.series):
        shown = [
            (index + _offset(number, len(plot.series)), e)
            for index, e in enumerate(line.estimates)
            if e is not None and e["value"] is not None
        ]
        x, y = [at for at, _ in shown], [e["value"] for _, e in shown]
        reach = [
            [e["value"] - e["low"] if e["low"] is not None else 0.0 for _, e in shown],
            [e["high"] - e["value"] if e["high"] is not None else 0.0 for _, e in shown],
        ]
        axes.errorbar(
            x,
            y,
            yerr=reach,
            marker="o",
            markersize=4.5,
            linewidth=1.4,
            elinewidth=1,
            capsize=0,
            clip_on=False,
            color=ARM_COLOURS[number % len(ARM_COLOURS)],
            label=_plain(line.arm),
        )
    axes.set_xticks(range(len(plot.groups)), [_plain(group) for group in plot.groups])
    axes.set_ylim(*_y_range(plot))
    if plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title(_plain(plot.title), loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, fontsize=8)
    dress(axes)
    FigureCanvasAgg(figure).print_png(str(path))


def dress(axes) -> None:
    """The house style: no box, a faint horizontal grid, small ticks."""
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _plain(text: str) -> str:
    """`text` without matplotlib's mathematics: a dollar sign is a dollar sign."""
    return text.replace("$", r"\$")


def interval_plots(evaluations: Mapping[str, Mapping]) -> list[IntervalPlot]:
    """The before/after plots that `evaluations` (arm title -> result) allow."""
    groups = sorted({group for result in evaluations.values() for group in result["by_edits"]}, key=int)
    plots = []
    for measure, title, percent in (
        ("exact", "Exact match by number of edits", True),
        ("images", "Images per answer by number of edits", False),
    ):
        series = tuple(
            Series(arm, tuple(result["by_edits"].get(group, {}).get(measure) for group in groups))
            for arm, result in evaluations.items()
        )
        if any(e and e["n"] for line in series for e in line.estimates):
            plots.append(IntervalPlot(f"{measure}_by_edits", title, tuple(groups), series, percent))
    return plots
