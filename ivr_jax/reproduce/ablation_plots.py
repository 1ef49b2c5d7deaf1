"""Plots of an ablation: images and quality by complexity, the Pareto front, and arms over their training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ivr_jax.report.plots import ARM_COLOURS, Curve, dress, new_figure, save_figure, smooth
from ivr_jax.reproduce.arm import Arm

_SHOWN = ("base", "sft", "full", "no_step_reward", "no_bonus", "truthful")
_COLOURS = dict(zip(_SHOWN, ARM_COLOURS, strict=True))


def draw(
    folder: Path,
    arms: Mapping[str, Arm],
    curves: Mapping[str, Mapping[str, tuple[Curve, ...]]],
    curve_titles: Mapping[str, str],
) -> list[tuple[str, Path]]:
    """Writes every plot that the arms allow as PNG; returns (title, file) in order.

    Args:
      folder: made when missing.
      arms: by name, as `reproduction.gather` finds them.
      curves: metric -> arm -> one curve a seed.
      curve_titles: metric -> title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []

    def plot(stem: str, title: str) -> Axes:
        figure, axes = new_figure(6.4, 4.2)
        axes.set_title(title, loc="left", fontsize=11)
        made.append((title, folder / f"{stem}.png", figure))
        return axes

    for figure, title, share in (("images", "Images per answer by number of edits", False),
                                 ("exact", "Exact match by number of edits", True)):  # fmt: skip
        axes = plot(f"{figure}_by_edits", f"{title}, temperature 1")
        for name in (name for name in _SHOWN if name in arms):
            _by_edits(axes, arms[name], f"{figure}_by_edits", _COLOURS[name])
        axes.set_xlabel("edits", fontsize=9)
        if share:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(frameon=False, fontsize=8)
        dress(axes)
    _pareto(plot("pareto", "Exact match against images, temperature 1"), arms)
    _calibration(plot("calibration", "Images that an arm passes, temperature 1"), arms)
    for metric, by_arm in curves.items():
        if by_arm:
            axes = plot(f"{metric}_over_training", f"{curve_titles[metric]} over RL, one line a seed")
            for arm, lines in by_arm.items():
                for number, curve in enumerate(lines):
                    label = arms[arm].title if not number and arm in arms else None
                    values = smooth(np.asarray(curve.values))
                    axes.plot(curve.steps, values, color=_COLOURS[arm], linewidth=1.3, label=label)
            axes.set_xlabel("step", fontsize=9)
            axes.legend(frameon=False, fontsize=8)
            dress(axes)
    for _, path, figure in made:
        save_figure(path, figure)
    return [(title, path) for title, path, _ in made]


def _by_edits(axes: Axes, arm: Arm, figure: str, colour: str) -> None:
    """The mean over seeds as a line, and each seed as a dot."""
    groups = sorted({group for seed in arm.t1 for group in seed[figure]}, key=int)
    axes.plot([int(g) for g in groups], [arm.mean(figure, 1, g) for g in groups], color=colour, label=arm.title)
    for group in groups:
        values = arm.values(figure, 1, group)
        axes.plot([int(group)] * len(values), values, "o", color=colour, markersize=3.5)
    axes.set_xticks([int(g) for g in groups])


def _pareto(axes: Axes, arms: Mapping[str, Arm]) -> None:
    """Every arm as a dot; the line joins those that no other beats in both images and exact match."""
    points = {name: (arm.mean("images"), arm.mean("exact")) for name, arm in arms.items() if name != "base"}
    for name, (x, y) in points.items():
        axes.plot(x, y, "o", color=_COLOURS.get(name, "#9aa0a6"), markersize=6)
    everything = points.values()
    best = sorted(p for p in everything if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in everything))
    axes.plot(*zip(*best, strict=True), color="#22262b", linewidth=0.9, linestyle="--")
    axes.set_xlabel("images per answer", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.margins(x=0.06, y=0.08)
    low, high = axes.get_ylim()
    heights = {name: (y - low) / (high - low) for name, (_, y) in points.items()}
    for name, height in _apart(heights, 0.05).items():
        axes.annotate(
            arms[name].title, points[name], xytext=(1.03, height), textcoords="axes fraction", va="center",
            fontsize=6.5, color=_COLOURS.get(name, "#5a6068"),
            arrowprops={"arrowstyle": "-", "color": "#c3c7cc", "linewidth": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip
    dress(axes)


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights of labels, in their order and at least `gap` from one another, near to what was asked for."""
    names = sorted(heights, key=heights.__getitem__)
    placed: dict[str, float] = {}
    below = -np.inf
    for name in names:
        below = placed[name] = max(heights[name], below + gap)
    above = max(1.0, max(heights.values()))  # what was pushed past the top comes down again
    for name in reversed(names):
        above = placed[name] = min(placed[name], above)
        above -= gap
    return placed


def _calibration(axes: Axes, arms: Mapping[str, Arm]) -> None:
    """Two bars an arm: how often it passes an image that is right, and one that is wrong."""
    for shift, figure, colour in ((0.2, "pass_given_right", "#4f8a5b"), (-0.2, "pass_given_wrong", "#b3543f")):
        values = [arm.mean(figure) or 0.0 for arm in arms.values()]
        axes.barh(np.arange(len(arms)) + shift, values, 0.36, color=colour, label=figure[11:])
    axes.set_yticks(range(len(arms)), [arm.title for arm in arms.values()], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)
    dress(axes)
