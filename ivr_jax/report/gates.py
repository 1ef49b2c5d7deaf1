"""Gates: conditions that must hold before a result means anything, each with its threshold and measured value.

The entry gates of the micro-world apply before reinforcement learning.  They have two columns of thresholds: `demo`
for the run of minutes, `reproduce` for the run of hours; a threshold of None is reported and not judged.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.report.tables import BY_NAME

GATES_FILE = "gates.json"
REPORTED = "reported"  # the threshold of a gate that has none
DEMO, REPRODUCE = "demo", "reproduce"

Results = Mapping[str, Mapping[str, Any] | None]  # "base", "sft", "direct", "multi_step", "kinds" -> evaluation


@dataclasses.dataclass(frozen=True)
class Gate:
    """A condition, and whether it is met.

    Attributes:
      name: what is measured.
      threshold: for people (">= 95%"), or "reported" when there is none.
      measured: likewise, "" when it was not measured.
      met: None when it was not measured, or has no threshold.
      value: the measured number.
    """

    name: str
    threshold: str
    measured: str
    met: bool | None
    value: float | None = None

    def __post_init__(self) -> None:
        if (self.measured == "" or self.threshold == REPORTED) != (self.met is None):
            raise UserError(
                f"gate {self.name!r}: a gate is met or not exactly when it was measured and has a threshold.",
                "Correct the gate.",
            )

    @classmethod
    def of(
        cls, name: str, threshold: float | None, measured: float | None, *, at_most: bool = False, unit: str = "%"
    ) -> Gate:
        """A number that must reach `threshold`, or with `at_most` must not exceed it.

        Args:
          threshold: None for a value that is only reported.
          measured: None when it was not measured.
          unit: "%" for shares and their differences, "×" for ratios.
        """
        met = None
        if threshold is not None and measured is not None:
            met = measured <= threshold if at_most else measured >= threshold
        sign = "\u2264" if at_most else "\u2265"
        needed = REPORTED if threshold is None else f"{sign} {_written(threshold, unit, 0)}"
        return cls(name, needed, "" if measured is None else _written(measured, unit, 1), met, measured)


def _written(value: float, unit: str, digits: int) -> str:
    text = f"{value:.{digits}%}" if unit == "%" else f"{value:.2f} {unit}"
    return text.replace("-", "\u2212")


# -- the entry gates of the micro-world --------------------------------------------------------------------------------


def _at(result: Mapping[str, Any] | None, *path: str) -> float | None:
    """The value of the estimate at `path` of an evaluation; None where there is none."""
    found: Any = result
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found.get("value") if isinstance(found, Mapping) else None


def _exact_at(result: Mapping[str, Any] | None, edits: str) -> float | None:
    return BY_NAME["exact"].of(result and result["by_edits"].get(edits))["value"]


def _read_more(results: Results) -> float | None:
    """How much more often a request of the most edits is read right than drawn right."""
    groups = ((results.get("sft") or {}).get("paired") or {}).get("by_edits") or {}
    summary = groups[max(groups, key=int)] if groups else None
    read, drawn = _at(summary, "read_right"), _at(summary, "drawn_right")
    return None if read is None or drawn is None else read - drawn


def _multi_step_lead(results: Results) -> float | None:
    """How much more often multi-step answers are exact than direct ones, at the most edits that both have."""
    ours, theirs = results.get("multi_step"), results.get("direct")
    shared = set(ours["by_edits"]) & set(theirs["by_edits"]) if ours and theirs else set()
    if not shared:
        return None
    most = max(shared, key=int)
    pair = _exact_at(ours, most), _exact_at(theirs, most)
    return None if None in pair else pair[0] - pair[1]


def _worst_kind(results: Results) -> float | None:
    """Exact match of the kind of edit that is drawn worst."""
    splits = (results.get("kinds") or {}).get("by_split") or {}
    found = [_at(summary, "exact") for split, summary in splits.items() if split.startswith("kind/")]
    found = [value for value in found if value is not None]
    return min(found, default=None)


# name, thresholds of demo and reproduce, how it is read off the evaluations
_ENTRY_GATES: tuple[tuple[str, float | None, float | None, Callable[[Results], float | None]], ...] = (
    ("Sight: exact image against one wrong cell", 0.7, 0.9,
     lambda r: _at(r.get("sft"), "paired", "overall", "sight_fault")),
    ("Sight: exact image against own wrong image", 0.3, 0.7,
     lambda r: _at(r.get("sft"), "paired", "overall", "sight")),
    ("Request read right minus drawn right, at the most edits", 0.10, 0.25, _read_more),
    ("Base: one edit, exact, temperature 1", 0.90, 0.95, lambda r: _exact_at(r.get("base"), "1")),
    ("Base: one edit, exact, temperature 0", 0.95, 0.98, lambda r: _exact_at(r.get("kinds"), "1")),
    ("Base: one edit of each kind, exact, temperature 0, the worst kind", None, 0.90, _worst_kind),
    ("Critique right", 0.30, 0.60, lambda r: _at(r.get("sft"), "probes", "critique")),
    ("Sub-instructions right on true prefixes", 0.97, 0.98, lambda r: _at(r.get("sft"), "probes", "step_text")),
    ("Multi-step beats direct at the most edits, by", 0.15, 0.25, _multi_step_lead),
    ("SFT beats its own first images, by", 0.05, 0.10, lambda r: _at(r.get("sft"), "overall", "gain")),
    ("Wrong first image repaired by one reflection", None, 0.50, lambda r: _at(r.get("sft"), "overall", "repaired")),
)  # fmt: skip


def entry_gates(results: Results, column: str = DEMO) -> tuple[Gate, ...]:
    """The micro-world's gates before reinforcement learning; what is not given is not measured.

    Args:
      results: evaluations (`ivr_jax.report.metrics.evaluate`) by name: "base" and "sft" at temperature 1, the latter
        with its probes and its paired test; "direct" and "multi_step", the SFT model held to these; "kinds", the base
        model on single edits at temperature 0.
      column: `DEMO` or `REPRODUCE`.
    """
    return tuple(
        Gate.of(name, demo if column == DEMO else reproduce, measure(results))
        for name, demo, reproduce, measure in _ENTRY_GATES
    )


def print_gates(gates: Sequence[Gate], console: Console | None = None, title: str = "Entry gate") -> None:
    """Prints the gates to the terminal, met or not."""
    output = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (title, "Threshold", "Measured", ""):
        output.add_column(column)
    for gate in gates:
        output.add_row(Text(gate.name), gate.threshold, gate.measured or "\u2013", verdict(gate))
    (console or Console()).print(output)


def verdict(gate: Gate) -> Text:
    """ "met", "not met", "not measured", or nothing for a value that is only reported."""
    if gate.met is None:
        return Text("" if gate.measured else "not measured", "dim")
    return Text("met", "green") if gate.met else Text("not met", "red")


def write_gates(workdir: str | os.PathLike[str], gates: Sequence[Gate]) -> None:
    """Keeps the gates of a run as `gates.json` in its workdir."""
    files.write_json(Path(workdir) / GATES_FILE, [dataclasses.asdict(gate) for gate in gates])


def read_gates(workdir: str | os.PathLike[str]) -> tuple[Gate, ...]:
    """The gates that `write_gates` kept."""
    path = Path(workdir) / GATES_FILE
    try:
        return tuple(Gate(**gate) for gate in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the gates in {path}: {error}.", "Remove the file and run again.") from None
