"""Gates and figures of several runs side by side: the same recipe with other seeds, or other numbers of threads.

    python -m ivr_jax.report.ranges --runs=runs/demo_seed0,runs/demo_seed1,runs/demo_seed2 --workdir=runs/ranges

Each run is a working directory of `make demo` or `make reproduce`.  Prints mean, least and greatest value of each gate
and of the main figures of each evaluation, with every run's own value, and writes them as ranges.json:

    {"runs": [name ...], "gates": [ROW], "figures": [ROW]}
    ROW = {"name", "threshold" (gates), "arm" (figures), "values": [float | None, one a run], "mean", "low", "high",
           "met": how many runs meet the threshold (gates)}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ivr_jax import cli, files
from ivr_jax.errors import UserError
from ivr_jax.report.gates import read_gates
from ivr_jax.report.metrics import EVALUATION_FILE, read_evaluation
from ivr_jax.report.tables import BY_NAME, overall

RANGES_FILE = "ranges.json"
FIGURES = (
    "exact", "first_exact", "gain", "images", "direct", "reflection", "multi_step", "sight", "sight_fault",
    "pass_given_wrong", "garbled",
)  # fmt: skip


def ranges(runs: Sequence[Path]) -> dict[str, Any]:
    """The module's ranges.json.

    Raises UserError when fewer than two runs are given, or one has no gates.
    """
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run is no range.", "Give --runs=RUN,RUN,... of at least two working directories.")
    by_run = [{gate.name: gate for gate in read_gates(run)} for run in runs]
    gates = []
    for name, gate in by_run[0].items():
        same = [found.get(name) for found in by_run]
        row = _row(name, [one and one.value for one in same])
        gates.append(row | {"threshold": gate.threshold, "met": sum(bool(one and one.met) for one in same)})
    figures = []
    for folder in sorted({path.parent.name for run in runs for path in run.glob(f"eval_*/{EVALUATION_FILE}")}):
        results = [_evaluation(run / folder) for run in runs]
        for name in FIGURES:
            values = [BY_NAME[name].of(result and overall(result))["value"] for result in results]
            figures.append(_row(name, values) | {"arm": folder.removeprefix("eval_")})
    measured = [row for row in figures if row["mean"] is not None]
    return {"runs": [str(run) for run in runs], "gates": gates, "figures": measured}


def _evaluation(folder: Path) -> dict[str, Any] | None:
    return read_evaluation(folder) if (folder / EVALUATION_FILE).is_file() else None


def _row(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    return {
        "name": name,
        "values": list(values),
        "mean": mean,
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def print_ranges(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints gates, then figures: mean, range, and each run's value."""
    output = console or Console()
    runs = len(found["runs"])
    table = Table("Gate", "Threshold", "Mean", "Range", "Each run", "Met", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in found["gates"]:
        table.add_row(Text(row["name"]), row["threshold"], *_cells(row, True), f"{row['met']} of {runs}")
    output.print(table)
    table = Table("Figure", "Mean", "Range", "Each run", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in found["figures"]:
        name = Text(f"{row['arm']}: {row['name'].replace('_', ' ')}")
        table.add_row(name, *_cells(row, BY_NAME[row["name"]].is_share))
    output.print(table)


def _cells(row: Mapping[str, Any], is_share: bool) -> tuple[str, str, str]:
    def written(value: float | None) -> str:
        text = "\u2013" if value is None else f"{value:.1%}" if is_share else f"{value:.2f}"
        return text.replace("-", "\u2212")

    each = " ".join(map(written, row["values"]))
    return written(row["mean"]), f"{written(row['low'])} to {written(row['high'])}", each


def main(call: cli.Call) -> None:
    found = ranges([Path(run) for run in call.flags.runs])
    files.write_json(call.workdir / RANGES_FILE, found)
    print_ranges(found)


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_list("runs", [], "working directories of the runs", flag_values=values)


def entry() -> None:
    cli.run(main, config=False, add_flags=add_flags)


if __name__ == "__main__":
    entry()
