"""Several runs side by side."""

from __future__ import annotations

import io

import pytest
from answers_fixture import plain_answer
from rich.console import Console

from ivr_jax.errors import UserError
from ivr_jax.report.gates import Gate, write_gates
from ivr_jax.report.metrics import evaluate, write_evaluation
from ivr_jax.report.ranges import print_ranges, ranges


def run(root, name: str, sight: float | None, right: int):
    write_gates(root / name, [Gate.of("Sight", 0.7, sight), Gate.of("Repair", None, 0.5)])
    answers = [plain_answer(1, exact=i < right, key=str(i)) for i in range(4)]
    paired = {"overall": {"sight": {"value": sight}, "sight_fault": {"value": None}}}
    write_evaluation(root / name / "eval_sft", evaluate(answers) | {"paired": paired})
    return root / name


def test_gates_and_figures_have_their_mean_range_and_each_value(tmp_path):
    runs = [run(tmp_path, "a", 0.8, 1), run(tmp_path, "b", 0.6, 3), run(tmp_path, "c", None, 2)]
    write_evaluation(runs[0] / "eval_rl", evaluate([plain_answer()]))
    found = ranges(runs)
    sight, repair = found["gates"]
    assert (sight["values"], sight["met"], sight["low"], sight["high"]) == ([0.8, 0.6, None], 1, 0.6, 0.8)
    assert sight["mean"] == pytest.approx(0.7) and (repair["met"], repair["threshold"]) == (0, "reported")
    figures = {(row["arm"], row["name"]): row for row in found["figures"]}
    assert figures["sft", "exact"]["values"] == [0.25, 0.75, 0.5] and figures["sft", "exact"]["mean"] == 0.5
    assert figures["rl", "exact"]["values"] == [1.0, None, None]
    assert figures["sft", "sight"]["high"] == 0.8 and ("sft", "sight_fault") not in figures
    console = Console(file=io.StringIO(), width=160)
    print_ranges(found, console)
    assert "60.0% to 80.0%" in console.file.getvalue() and "1 of 3" in console.file.getvalue()


def test_one_run_is_no_range(tmp_path):
    with pytest.raises(UserError):
        ranges([run(tmp_path, "a", 0.8, 1)])
