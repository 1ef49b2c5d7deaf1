"""Two runs of one benchmark side by side: paired differences, sign test, wins by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import figures as figures_lib
from ivr_jax.evaluate.benchmarks.interface import MODES, Benchmark, Item, Judged


def obstacles(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Why two runs (their `run.json`) cannot be compared; empty when they can."""
    reasons = []
    if first.get("data") != second.get("data"):
        reasons.append("they have other prompts")
    for name, title in (("rewriter", "rewritten prompts"), ("samples", "images a prompt")):
        if first.get(name) != second.get(name):
            reasons.append(f"{title}: {first.get(name) or 'none'} and {second.get(name) or 'none'}")
    judges = [run.get("judge") or {} for run in (first, second)]
    for name in sorted({*judges[0], *judges[1]} - {"date", "server", "label"}):
        if judges[0].get(name) != judges[1].get(name):
            reasons.append(f"the judge's {name}: {judges[0].get(name)!r} and {judges[1].get(name)!r}")
    return reasons


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any], force: bool = False) -> list[str]:
    """The obstacles that `force` overrides.

    Raises:
      UserError: the runs are of different benchmarks, or cannot be compared and `force` is not set.
    """
    if first.get("benchmark") != second.get("benchmark"):
        raise UserError(f"the runs are of {first.get('benchmark')!r} and {second.get('benchmark')!r}.",
                        "Compare two runs of one benchmark.")
    reasons = obstacles(first, second)
    if reasons and not force:
        raise UserError(f"the runs cannot be compared: {'; '.join(reasons)}.",
                        "Judge both alike, or give --force to compare nevertheless.")
    return reasons


def compare(
    benchmark: Benchmark, items: Sequence[Item], first: Judged, second: Judged, seed: int = 0
) -> dict[str, Any]:
    """The second run against the first.

    Returns:
      `figures`: mode -> name -> `figures.compare`; `wins`: mode -> category -> [wins, losses, ties] of the headline
      figure over prompts; `items`: mode -> key -> the headline's difference.
    """
    strata = {item.key: item.category for item in items}
    result: dict[str, Any] = {"figures": {}, "wins": {}, "items": {}}
    for mode in MODES:
        before = {figure.name: figure for figure in benchmark.figures(items, first, mode)}
        after = {figure.name: figure for figure in benchmark.figures(items, second, mode)}
        result["figures"][mode] = {
            name: figures_lib.compare(after[name], before[name], strata, seed) for name in after if name in before
        }
        old, new = (figures_lib.item_means(found[benchmark.headline]) for found in (before, after))
        change = {key: new[key] - old[key] for key in new if key in old}
        wins: dict[str, list[int]] = {}
        for key, difference in change.items():
            counts = wins.setdefault(strata[key], [0, 0, 0])
            counts[0 if difference > 0 else 1 if difference < 0 else 2] += 1
        result["wins"][mode] = wins
        result["items"][mode] = change
    return result
