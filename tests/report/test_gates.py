"""Gates: met, not met, not measured or only reported, and where the entry gates read their values."""

from __future__ import annotations

import io

import pytest
from answers_fixture import plain_answer
from rich.console import Console

from ivr_jax.errors import UserError
from ivr_jax.report.gates import DEMO, REPRODUCE, Gate, entry_gates, print_gates, read_gates, write_gates
from ivr_jax.report.intervals import share
from ivr_jax.report.metrics import evaluate


def arm(right: int, wrong: int, edits: int) -> dict:
    return evaluate([plain_answer(1, exact=i < right, key=str(i), edits=edits) for i in range(right + wrong)])


def seen(value: float) -> dict:
    return {"value": value, "low": value, "high": value, "n": 9}


def results() -> dict:
    sft = evaluate([plain_answer(2, exact=i < 90, key=str(i), edits=4) for i in range(100)])
    sft["probes"] = {"step_text": share([True, False]), "critique": share([])}
    hardest = {"read_right": seen(0.6), "drawn_right": seen(0.4)}
    sft["paired"] = {"overall": {"sight": seen(0.4), "sight_fault": seen(0.8)}, "by_edits": {"1": {}, "4": hardest}}
    kinds = evaluate([plain_answer(1, exact=i % 4 > 0, key=str(i), edits=1) for i in range(40)])
    exact = {"kind/put": 1.0, "kind/move": 0.5, "mixture": 0.1}
    kinds["by_split"] = {split: {"exact": seen(value)} for split, value in exact.items()}
    return {"base": arm(96, 4, edits=1), "sft": sft, "kinds": kinds, "direct": arm(45, 55, edits=4),
            "multi_step": arm(83, 17, edits=4)}  # fmt: skip


def test_each_gate_reads_its_own_figure():
    gates = {gate.name: gate for gate in entry_gates(results(), DEMO)}
    values = {name: gate.value and round(gate.value, 6) for name, gate in gates.items()}
    assert list(values.values()) == [0.8, 0.4, 0.2, 0.96, 0.75, 0.5, None, 0.5, 0.38, 0.9, None]
    met = [gate.met for gate in gates.values()]
    assert met == [True, True, True, True, False, None, None, False, True, True, None]


def test_the_longer_run_has_higher_thresholds():
    demo, reproduce = entry_gates(results(), DEMO), entry_gates(results(), REPRODUCE)
    assert [gate.name for gate in demo] == [gate.name for gate in reproduce]
    assert [gate.met for gate in reproduce][:3] == [False, False, False] and reproduce[5].met is False


def test_without_any_evaluation_nothing_is_measured():
    assert {(gate.met, gate.measured) for gate in entry_gates({})} == {(None, "")}
    lonely = entry_gates({"direct": arm(1, 1, edits=2), "multi_step": arm(1, 1, edits=3)})
    assert {gate.met for gate in lonely} == {None}  # no number of edits in common


def test_a_gate_is_judged_exactly_when_it_was_measured_and_has_a_threshold():
    with pytest.raises(UserError):
        Gate("g", "≥ 1", "", True)
    with pytest.raises(UserError):
        Gate("g", "≥ 1", "2", None)
    assert Gate.of("g", 0.05, -0.026) == Gate("g", "≥ 5%", "−2.6%", False, -0.026), "a minus, as in the tables"
    assert Gate.of("g", 0.7, 0.65, at_most=True, unit="×") == Gate("g", "≤ 0.70 ×", "0.65 ×", True, 0.65)
    assert Gate.of("g", None, 0.5) == Gate("g", "reported", "50.0%", None, 0.5)
    assert Gate.of("g", 0.5, None) == Gate("g", "≥ 50%", "", None, None)


def test_gates_are_printed_as_they_are_written():
    console = Console(file=io.StringIO(), width=100, color_system=None)
    print_gates([Gate.of("[red]gate", 0.1, 0.2), Gate.of("b", 0.1, 0.0), Gate.of("c", 0.1, None)], console)
    lines = [line for line in console.file.getvalue().splitlines() if "%" in line]
    assert [line.split()[0] for line in lines] == ["[red]gate", "b", "c"]
    assert [line.rstrip().endswith(word) for line, word in zip(lines, ("met", "not met", "not measured"), strict=True)]


def test_gates_are_kept(tmp_path):
    gates = (Gate.of("a", 0.01, 0.02), Gate.of("b", 0.01, None), Gate.of("c", None, 0.5))
    write_gates(tmp_path, gates)
    assert read_gates(tmp_path) == gates
    (tmp_path / "gates.json").write_text('[{"name": 1}]')
    with pytest.raises(UserError):
        read_gates(tmp_path)
