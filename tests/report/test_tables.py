"""Arms side by side: comparisons and the terminal table."""

from __future__ import annotations

import io

import pytest
from answers_fixture import plain_answer
from rich.console import Console

from ivr_jax.report.metrics import evaluate
from ivr_jax.report.tables import (
    BY_NAME,
    compare,
    format_interval,
    format_value,
    print_table,
)


def arm(right: int, wrong: int, images: int = 1, edits: int = 2) -> dict:
    """The evaluation of a model with so many right and wrong answers of `images` images each."""
    return evaluate([plain_answer(images, exact=i < right, key=str(i), edits=edits) for i in range(right + wrong)])


def printed(show, *arguments, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(*arguments, console)
    return console.file.getvalue()


def compared(name: str, after: dict, before: dict) -> dict:
    measure = BY_NAME[name]
    return compare(measure, measure.of(after["overall"]), measure.of(before["overall"]))


def test_arms_are_compared_measure_by_measure():
    base, sft = arm(20, 80), arm(80, 20, images=2)
    exact = compared("exact", sft, base)
    assert exact["difference"]["value"] == pytest.approx(0.6)
    assert exact["difference"]["low"] == pytest.approx(0.4744, abs=1e-4)  # Wilson: 13.3-28.9% and 71.1-86.7%
    assert exact["ratio"] == pytest.approx(4.0) and exact["clear"] and exact["better"] is True
    images = compared("images", sft, base)
    assert images["ratio"] == 2.0 and images["clear"] and images["better"] is False  # more images is no improvement
    shares = compared("multi_step", sft, base)
    assert shares["clear"] and shares["better"] is None  # no mode is better in itself
    same = compared("exact", arm(21, 79), base)
    assert not same["clear"] and same["better"] is None
    assert compared("reflection", sft, base)["ratio"] is None  # nothing to divide by


def test_numbers_are_written_for_people():
    exact, outcome, images = BY_NAME["exact"], BY_NAME["outcome"], BY_NAME["images"]
    estimate = {"value": 0.8523, "low": 0.831, "high": 0.8704, "n": 9}
    assert (format_value(exact, estimate), format_interval(exact, estimate)) == ("85.2%", "83.1–87.0")
    assert (format_value(outcome, estimate), format_value(images, estimate)) == ("0.852", "0.85")
    fall = {"value": -0.125, "low": -0.2, "high": 0.05, "n": 9}
    assert format_value(exact, fall, signed=True) == "−12.5"
    assert format_interval(exact, fall, signed=True) == "−20.0 to +5.0"
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert (format_value(exact, nothing), format_interval(exact, nothing)) == ("–", "")


def test_three_arms_fit_into_a_terminal_of_80_columns():
    text = printed(print_table, {"Base": arm(20, 80), "SFT": arm(80, 20, images=2), "SFT + RL": arm(90, 10)})
    lines = [line.strip() for line in text.splitlines()]
    exact = next(line for line in lines if line.startswith("Exact match"))
    assert [word for word in exact.split() if word.endswith("%")] == ["20.0%", "80.0%", "90.0%"]
    assert any(line.startswith("Images per answer") and "2.00 [2.00–2.00]" in line for line in lines)
    assert any(line.startswith("Exact, edits 2") and line.endswith("90%") for line in lines)
    assert len(lines) <= 29  # no row is broken in two


def test_text_in_square_brackets_is_printed_as_it_is():
    assert "[bold]x" in printed(print_table, {"[bold]x": arm(1, 1)})
