"""Kills training again and again at random moments, and compares the run that survives with one left in peace.

    python benchmarks/kill_loop.py --kills=20 --seed=0

Runs the tiny SFT and RL of the tests, RL also with rollouts drawn ahead.  Every kill is a SIGKILL: every third one
while a checkpoint is being written, every third at any moment of a process's first seconds (start, restoring,
compilation), the others at a random moment of the steps after a committed checkpoint.  Prints after which step each run
was killed; ends with an error unless metrics and parameters are equal bit for bit.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
from pathlib import Path

# From here on what lies in the checkout is imported: the path must come first.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("tests", "")]

import tiny_runs  # noqa: E402

STARTING = 12.0  # seconds from the start of a process to its first step, about


def survive(argv: list[str], workdir: Path, straight: Path, last: int, kills: int, rng: random.Random) -> list[int]:
    """Kills the command `kills` times, lets it finish, compares; returns the steps that it was killed after."""
    killed = []
    for number in range(kills):
        newest = tiny_runs.newest_checkpoint(workdir)
        ahead = max(1, 2 * (last - 1 - newest) // (kills - number))  # so that kills are spread over the whole run
        after = min(newest + rng.randint(0, ahead), last - 1)
        delay = 0.0 if number % 3 == 2 else rng.uniform(0, 0.5)
        if number % 3 == 1:
            after, delay = newest, rng.uniform(0, STARTING)
        status, output = tiny_runs.disturbed(argv, workdir, signal.SIGKILL, after, number % 3 == 2, delay)
        if status == 0:  # it had finished before the signal came
            break
        if status != -signal.SIGKILL:
            raise SystemExit(f"the run ended by itself:\n{output}")
        killed.append(tiny_runs.newest_checkpoint(workdir))
        print(f"{workdir.name}: killed after step {killed[-1]} of {last}", flush=True)
    status, output = tiny_runs.disturbed(argv, workdir, signal.SIGCONT, after=1 << 30)
    if status:
        raise SystemExit(f"the run did not finish:\n{output}")
    tiny_runs.assert_same_run(workdir, straight)
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    rng = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = tiny_runs.prepare(Path(folder))
        settings = tiny_runs.sft_settings(runs) | {"steps": 60, "checkpoint_every": 2}
        argv = tiny_runs.trained(runs / "sft", "micro_base", settings)
        print("sft killed after", survive(argv, runs / "sft killed", runs / "sft", 60, wanted.kills, rng), "equal")
        for name, ahead in (("rl", 0), ("rl ahead", 2)):
            settings = tiny_runs.rl_settings(runs / "sft") | {"steps": 16, "checkpoint_every": 1, "overlap": ahead}
            argv = tiny_runs.trained(runs / name, "micro_rl", settings)
            killed = survive(argv, runs / f"{name} killed", runs / name, 16, wanted.kills, rng)
            print(f"{name} killed after", killed, "equal")


if __name__ == "__main__":
    main()
