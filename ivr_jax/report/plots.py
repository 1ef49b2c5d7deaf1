"""Plots, drawn by matplotlib: as SVG inside a page, in the colours of its style sheet, and as PNG files beside it.

Two kinds: the curve of one metric over training steps, and estimates with their intervals, group by group and arm by
arm.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from ivr_jax.errors import UserError
from ivr_jax.report.intervals import Estimate

if TYPE_CHECKING:  # an extra: training and generation write pages without plots
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARM_COLOURS = ("#8b8f98", "#c08a2b", "#2f6f8f", "#7a5aa6", "#4f8a5b", "#b3543f")
_INK, _FAINT, _MEAN = "#22262b", "#d9d9d4", "#2f6f90"
_MAX_POINTS = 240
# Colours of the drawings -> variables of report.css.
_PAGE_COLOURS = {colour: f"--arm{number}" for number, colour in enumerate(ARM_COLOURS)}
_PAGE_COLOURS |= {_INK: "--muted", _FAINT: "--line", _MEAN: "--accent"}
# Style rules for the whole page, and ids that every figure has; markers keep theirs, which are hashes.
_PAGE_WIDE = re.compile(r'<defs>\s*<style.*?</style>\s*</defs>|(?<=<g) id="[^"]*"', re.DOTALL)
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over training: `steps` and `values` of equal length, steps ascending, values finite."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Series:
    """One arm's estimates, one for each group of the plot (None where the arm has no such group)."""

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


def _offset(number: int, count: int) -> float:
    """Horizontal offset of arm `number` of `count` from the middle of its group."""
    return (number - (count - 1) / 2) * min(0.12, 0.6 / count)


def _y_range(plot: IntervalPlot) -> tuple[float, float]:
    """0 to 1 for shares; else a little beyond every interval."""
    if plot.percent:
        return 0.0, 1.0
    seen = [e for line in plot.series for e in line.estimates if e and e["value"] is not None]
    ends = [estimate[end] for estimate in seen for end in ("value", "low", "high") if estimate[end] is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return (low - 0.08 * (high - low), high + 0.08 * (high - low)) if high > low else (low - 0.5, high + 0.5)


def draw_curve(axes: Axes, curve: Curve) -> None:
    """The curve: values faint, their running mean on top; a single value as a dot."""
    steps, values = thin(curve)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, values, color=_MEAN, alpha=0.35, linewidth=1, marker=marker)
    axes.plot(steps, smooth(values), color=_MEAN, linewidth=1.6)
    axes.locator_params(axis="x", nbins=3, integer=True)
    axes.locator_params(axis="y", nbins=4)
    dress(axes)


def draw_intervals(axes: Axes, plot: IntervalPlot) -> None:
    """Estimates with whiskers, one dot for each group and arm, an arm's dots joined by a line."""
    for number, line in enumerate(plot.series):
        shown = [
            (index + _offset(number, len(plot.series)), e)
            for index, e in enumerate(line.estimates)
            if e is not None and e["value"] is not None
        ]
        below = [e["value"] - e["low"] if e["low"] is not None else 0.0 for _, e in shown]
        above = [e["high"] - e["value"] if e["high"] is not None else 0.0 for _, e in shown]
        axes.errorbar(
            [x for x, _ in shown], [e["value"] for _, e in shown], yerr=[below, above], marker="o", markersize=4.5,
            linewidth=1.4, elinewidth=1, capsize=0, color=ARM_COLOURS[number % len(ARM_COLOURS)],
            label=_plain(line.arm),
        )  # fmt: skip
    axes.set_xticks(range(len(plot.groups)), [_plain(group) for group in plot.groups])
    axes.set_ylim(*_y_range(plot))
    if plot.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    dress(axes)


def curve_svg(curve: Curve) -> Markup:
    """The curve as an SVG element."""
    figure, axes = new_figure(3.2, 1.7)
    draw_curve(axes, curve)
    return _svg(figure, f"{curve.name}, from {short(curve.values[0])} to {short(curve.values[-1])}")


def interval_svg(plot: IntervalPlot) -> Markup:
    """The plot as an SVG element; its legend is part of the page."""
    figure, axes = new_figure(4.4, 2.4)
    draw_intervals(axes, plot)
    return _svg(figure, plot.title)


def curves_png(path: Path, title: str, curves: Sequence[Curve]) -> None:
    """All `curves` of a stage as small multiples in one PNG file."""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = _empty_figure(4.2 * columns, 2.4 * rows + 0.4)
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12, color=_INK)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(_plain(curve.name), loc="left", fontsize=9, color=_INK)
        draw_curve(axes, curve)
    save_figure(path, figure)


def interval_png(path: Path, plot: IntervalPlot) -> None:
    """The plot of `interval_svg` as a PNG file."""
    figure, axes = new_figure(6.4, 3.6)
    axes.set_title(_plain(plot.title), loc="left", fontsize=11, color=_INK)
    draw_intervals(axes, plot)
    axes.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A white figure of `width` x `height` inches with one pair of axes."""
    figure = _empty_figure(width, height)
    return figure, figure.add_subplot()


def _empty_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed, and plots need it.", "pip install 'ivr_jax[report]'") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def save_figure(path: Path, figure: Figure) -> None:
    """Writes the figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(path))


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element in the page's colours, which follow its light or dark style sheet."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    for artist in figure.findobj():
        artist.set_clip_on(False)  # clip paths are references, which a page with several figures would mix up
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=_NO_METADATA)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") + len("<svg") :]
    drawing = _PAGE_WIDE.sub("", drawing)
    for colour, variable in _PAGE_COLOURS.items():
        drawing = drawing.replace(colour, f"var({variable})")
    head = Markup('<svg class="plot" role="img" aria-label="{}"').format(label)
    return head + Markup(drawing)  # every text in it was escaped by the SVG backend


def dress(axes: Axes) -> None:
    """The common style: no box, a faint horizontal grid, small ticks."""
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
