"""Estimates with 95% intervals: Wilson for shares, percentile bootstrap for means, MOVER for differences.

An estimate is a plain JSON object, `{"value": float | None, "low": float | None, "high": float | None, "n": int}`;
`value` is None when nothing was observed, `low` and `high` are None when an interval cannot be given (a mean of
fewer than two observations).

Sources: E. B. Wilson (1927) for the score interval; G. Y. Zou and A. Donner (2008) for the difference of two
independent estimates from their separate intervals (MOVER), which for two Wilson intervals is Newcombe's method 10.
"""

from __future__ import annotations

import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

Estimate: TypeAlias = dict[str, Any]

CONFIDENCE = 0.95
RESAMPLES = 2000
NOTHING: Mapping[str, Any] = {"value": None, "low": None, "high": None, "n": 0}
_Z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def share(outcomes: Sequence[bool]) -> Estimate:
    """The share of true values, with Wilson's score interval (never outside [0, 1], sound at 0 and at n)."""
    n = len(outcomes)
    if n == 0:
        return dict(NOTHING)
    p = sum(map(bool, outcomes)) / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # Rounding may leave the bound a hair inside the value at p = 0 and p = 1, where it is exactly that value.
    return {"value": p, "low": max(0.0, min(p, centre - half)), "high": min(1.0, max(p, centre + half)), "n": n}


def mean(values: Sequence[float], seed: int, name: str) -> Estimate:
    """The mean, with a percentile bootstrap interval of `RESAMPLES` resamples.

    `name` is folded into `seed`, so that every quantity has its own stream and none depends on the order of calls.
    A resample is drawn as multinomial counts over the distinct values: the same distribution as drawing n values
    with replacement, and cheap for scores, which take few values.
    """
    n = len(values)
    if n == 0:
        return dict(NOTHING)
    value = float(np.mean(values))
    if n == 1:
        return {"value": value, "low": None, "high": None, "n": 1}
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    means = rng.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": value, "low": float(low), "high": float(high), "n": n}


def difference(estimate: Estimate, reference: Estimate) -> Estimate:
    """`estimate - reference`, the two taken as independent (cautious when both were measured on the same prompts).

    `n` is the smaller of the two.  Without both intervals there is a value but no interval.
    """
    n = min(estimate["n"], reference["n"])
    if estimate["value"] is None or reference["value"] is None:
        return {**NOTHING, "n": n}
    value = estimate["value"] - reference["value"]
    if None in (estimate["low"], reference["low"]):
        return {"value": value, "low": None, "high": None, "n": n}
    below = math.hypot(estimate["value"] - estimate["low"], reference["high"] - reference["value"])
    above = math.hypot(estimate["high"] - estimate["value"], reference["value"] - reference["low"])
    return {"value": value, "low": value - below, "high": value + above, "n": n}
