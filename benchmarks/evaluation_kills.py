"""Kills benchmark runs again and again at random moments, resumes them, and compares them with undisturbed runs.

    python benchmarks/evaluation_kills.py --kills=20 --seed=0

Ends with an error unless what the killed runs wrote is byte-equal, and no recorded call or answer was made again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# From here on what lies in the checkout is imported: the path must come first.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("tests", "")]

import benchmark_kills as kills  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", choices=("judge", "generate"), default=None)
    wanted = parser.parse_args()
    for half, run in (("judge", kills.judge_kills), ("generate", kills.generate_kills)):
        if wanted.half in (None, half):
            with tempfile.TemporaryDirectory() as folder:
                found = run(wanted.kills, Path(folder), wanted.seed)
            print(
                f"{half}: {found.hit} of {wanted.kills} kills met a running process, {found.partial} in the middle of "
                f"its work; {found.done} done, equal: {found.equal}, made again: {found.repeated}", flush=True,
            )  # fmt: skip
            if not found.equal or found.repeated:
                raise SystemExit("a killed run is not as good as an undisturbed one")


if __name__ == "__main__":
    main()
