"""The regression guard compares medians of the same machine, and forgives what the ranges cover."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "regressions.py"
spec = importlib.util.spec_from_file_location("regressions", FILE)
regressions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(regressions)


def ratio(median: float, low: float, high: float) -> dict[str, float]:
    return {"ratio": median, "low": low, "high": high}


BEFORE = [{"ratios": {"step": ratio(1.0, 0.9, 1.1)}}, {"ratios": {"step": ratio(1.5, 1.4, 1.6)}}]


def test_a_fallen_ratio_is_named_with_the_best_one_before():
    assert regressions.slower({"step": ratio(1.2, 1.1, 1.3)}, BEFORE, 0.1) == {"step": 1.5}


def test_within_the_tolerance_nothing_is_slower():
    assert regressions.slower({"step": ratio(1.4, 1.3, 1.45)}, BEFORE, 0.1) == {}


def test_a_range_that_reaches_the_median_is_no_regression():
    assert regressions.slower({"step": ratio(1.2, 0.9, 1.5)}, BEFORE, 0.1) == {}


def test_a_new_ratio_has_nothing_to_be_compared_with():
    assert regressions.slower({"other": ratio(0.1, 0.1, 0.1)}, BEFORE, 0.1) == {}
