"""Regression guard: ratios (never times) of this commit beside those stored before, on the same kind of machine.

    make bench          measures, prints what became slower than the tolerance, appends to benchmarks/history.jsonl

Ratios are ours against PyTorch, or against our own simpler path, measured in one run, so that they may be compared
between days.  A ratio is slower when it fell below the best stored median of the same machine by more than the
tolerance and its range does not reach that median.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
HISTORY = HERE / "history.jsonl"
COMMANDS = {
    "micro": ["side_by_side.py", "--size=micro", "--cores=1"],
    "small": ["side_by_side.py", "--size=small", "--only=generate,sft", "--cores=1"],
}


def machine() -> str:
    """Processor and number of cores: what ratios are compared within."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    file = pathlib.Path(path)
    return file.read_text().splitlines() if file.exists() else []


def measured(sizes: list[str]) -> dict[str, dict[str, float]]:
    """Name -> ratio, low and high by CPU time, which other programs hardly change."""
    found: dict[str, dict[str, float]] = {}
    for command in (COMMANDS[size] for size in sizes):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "ratios.json"
            subprocess.run([sys.executable, str(HERE / command[0]), *command[1:], f"--json={file}"], check=True)
            found |= {name: clocks["cpu"] for name, clocks in json.loads(file.read_text()).items()}
    return found


def slower(now: dict[str, dict[str, float]], before: list[dict[str, Any]], tolerance: float) -> dict[str, float]:
    """Names of ratios that fell, with the best earlier median of the same machine.

    Args:
      now: see `measured`.
      before: earlier lines of the history, of this machine.
      tolerance: a share; .1 allows a tenth less.
    """
    fallen = {}
    for name, ratio in now.items():
        best = max((line["ratios"][name]["ratio"] for line in before if name in line["ratios"]), default=0.0)
        if ratio["ratio"] < best * (1 - tolerance) and ratio["high"] < best:
            fallen[name] = best
    return fallen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which a ratio may fall")
    parser.add_argument("--sizes", default=",".join(COMMANDS), help="sizes of the decoder to measure")
    options = parser.parse_args()
    history = [json.loads(line) for line in _lines(str(HISTORY))]
    here = machine()
    before = [line for line in history if line["machine"] == here]
    now = measured(options.sizes.split(","))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with HISTORY.open("a") as file:
        file.write(json.dumps({"commit": commit, "machine": here, "ratios": now}) + "\n")
    fallen = slower(now, before, options.tolerance)
    for name, best in fallen.items():
        print(f"slower: {name} is {now[name]['ratio']:.2f}, was {best:.2f}")
    if not fallen:
        print(f"no ratio fell by more than {options.tolerance:.0%} against {len(before)} earlier runs on this machine")
    sys.exit(1 if fallen else 0)


if __name__ == "__main__":
    main()
