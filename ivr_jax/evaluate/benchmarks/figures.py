"""Figures with coverage, bootstrap intervals over prompts, and paired comparisons.

Every figure is a weighted mean of group means: one group for a flat mean, one a task for a macro average.  A score is
present or missing; missing scores are outside the means and inside the coverage.

Intervals: percentile bootstrap over prompts, resampled within their categories (each benchmark fixes how many prompts a
category has), 95%.  Comparisons: the same resamples for both runs (paired bootstrap), and a two-sided sign test over
prompts (Dixon and Mood, 1946), ties left out.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of one item.

    Attributes:
      item: the item's key.
      value: None when a judgement that it needs is missing.
      got, wanted: judgements that it has and needs.
    """

    item: str
    value: float | None
    got: int = 1
    wanted: int = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Scores whose mean is one term of a figure."""

    scores: tuple[Score, ...]
    weight: float = 1.0

    @property
    def values(self) -> list[float]:
        """The values that are not missing."""
        return [score.value for score in self.scores if score.value is not None]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A weighted mean of group means.

    Attributes:
      name: unique within the summary.
      groups: its terms.
      digits: group means are rounded to this many decimals before they are averaged (an official quirk); None keeps
        them.
      category: the category that it stands for, when it is one bar of the plot by category.
    """

    name: str
    groups: tuple[Group, ...]
    digits: int | None = None
    category: str = ""

    @property
    def value(self) -> float | None:
        """The figure over all scores present; groups without any are left out, as every official script does."""
        terms = [(group.weight, _rounded(mean(group.values), self.digits)) for group in self.groups if group.values]
        total = math.fsum(weight for weight, _ in terms)
        return math.fsum(weight * value for weight, value in terms) / total if total else None

    @property
    def items(self) -> list[str]:
        """Keys of the items that it rests on, in order."""
        return list(dict.fromkeys(score.item for group in self.groups for score in group.scores))

    @property
    def got(self) -> int:
        """Judgements that are there."""
        return sum(score.got for group in self.groups for score in group.scores)

    @property
    def wanted(self) -> int:
        """Judgements that the figure needs."""
        return sum(score.wanted for group in self.groups for score in group.scores)


def mean(values: Sequence[float]) -> float:
    """The mean, its sum correctly rounded."""
    return math.fsum(values) / len(values)


def flat(name: str, scores: Sequence[Score], category: str = "") -> Figure:
    """The plain mean of `scores`."""
    return Figure(name, (Group(tuple(scores)),), category=category)


def macro(name: str, groups: Mapping[str, Sequence[Score]], digits: int | None = None) -> Figure:
    """The unweighted mean of the groups' means."""
    return Figure(name, tuple(Group(tuple(scores)) for scores in groups.values()), digits)


def estimate(figure: Figure, strata: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Value and interval of a figure: `value`, `low`, `high` (None when there is none) and `n`, its items with a score.

    Args:
      strata: category by item key.
      seed: of the resamples; the figure's name is folded in.
    """
    scored = {score.item for group in figure.groups for score in group.scores if score.value is not None}
    value = figure.value
    result = {"value": value, "low": None, "high": None, "n": len(scored)}
    if value is None or len(scored) < 2:
        return result
    counts, keys = resamples([key for key in figure.items if key in scored], strata, seed, figure.name)
    low, high = _interval(_resampled(figure, counts, keys))
    return {**result, "low": low, "high": high}


def resamples(
    keys: Sequence[str], strata: Mapping[str, str], seed: int, name: str
) -> tuple[np.ndarray, dict[str, int]]:
    """How often each item is drawn: float64 [RESAMPLES, items], and the column of each key."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    columns = {key: column for column, key in enumerate(keys)}
    counts = np.zeros((RESAMPLES, len(columns)))
    members: dict[str, list[int]] = {}
    for key, column in columns.items():
        members.setdefault(strata.get(key, ""), []).append(column)
    alone = [name for name, chosen in members.items() if len(chosen) == 1]
    if len(alone) > 1:  # by themselves they would add no variance
        members[""] = members.get("", []) + [members.pop(name)[0] for name in alone if name]
    for stratum in sorted(members):
        chosen = members[stratum]
        share = np.full(len(chosen), 1 / len(chosen))
        counts[:, chosen] = rng.multinomial(len(chosen), share, size=RESAMPLES)
    return counts, columns


def _resampled(figure: Figure, counts: np.ndarray, columns: Mapping[str, int]) -> np.ndarray:
    """The figure of each resample, float64 [RESAMPLES]; NaN where no score was drawn."""
    total, weights = np.zeros(len(counts)), np.zeros(len(counts))
    for group in figure.groups:
        sums, numbers = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
        for score in group.scores:
            if score.value is not None and score.item in columns:
                sums[columns[score.item]] += score.value
                numbers[columns[score.item]] += 1
        drawn = counts @ numbers
        present = drawn > 0
        total += np.where(present, group.weight * (counts @ sums) / np.where(present, drawn, 1), 0)
        weights += np.where(present, group.weight, 0)
    return np.where(weights > 0, total / np.where(weights > 0, weights, 1), np.nan)


def compare(after: Figure, before: Figure, strata: Mapping[str, str], seed: int) -> dict[str, Any]:
    """`after` minus `before` on the items that both have scores for: the paired difference, and the sign test.

    Returns:
      `difference`, `low`, `high`, `n` (items), `wins`, `losses`, `ties` (items), `sign_test` (two-sided p-value, None
      without a win or a loss), `clear` (the interval excludes 0).
    """
    first, second = item_means(after), item_means(before)
    keys = [key for key in first if key in second]
    if not keys:
        return {"difference": None, "low": None, "high": None, "n": 0, "wins": 0, "losses": 0, "ties": 0,
                "sign_test": None, "clear": False}
    kept = set(keys)
    after, before = (restricted(figure, kept) for figure in (after, before))
    counts, columns = resamples(keys, strata, seed, after.name)
    change = _resampled(after, counts, columns) - _resampled(before, counts, columns)
    low, high = _interval(change) if len(keys) > 1 else (None, None)
    wins = sum(first[key] > second[key] for key in keys)
    losses = sum(first[key] < second[key] for key in keys)
    return {
        "difference": after.value - before.value,
        "low": low,
        "high": high,
        "n": len(keys),
        "wins": wins,
        "losses": losses,
        "ties": len(keys) - wins - losses,
        "sign_test": sign_test(wins, losses),
        "clear": low is not None and (low > 0 or high < 0),
    }


def item_means(figure: Figure) -> dict[str, float]:
    """Mean of each item's scores within a figure, items without one left out."""
    values: dict[str, list[float]] = {}
    for group in figure.groups:
        for score in group.scores:
            if score.value is not None:
                values.setdefault(score.item, []).append(score.value)
    return {key: mean(scores) for key, scores in values.items()}


def restricted(figure: Figure, keys: set[str]) -> Figure:
    """The figure over some of its items."""
    groups = (
        dataclasses.replace(group, scores=tuple(score for score in group.scores if score.item in keys))
        for group in figure.groups
    )
    return dataclasses.replace(figure, groups=tuple(groups))


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided p-value of `wins` against `losses` under even odds; None without any."""
    n = wins + losses
    if n == 0:
        return None
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def _interval(values: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    values = values[~np.isnan(values)]
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _rounded(value: float, digits: int | None) -> float:
    return value if digits is None else round(value, digits)
