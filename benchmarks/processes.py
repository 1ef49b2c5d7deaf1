"""Fine-tuning as several real processes on this machine: against one process, killed, and asked to stop.

    python benchmarks/processes.py --count=4

Runs the tiny fine-tuning of the tests as one process and as `count` that find each other over loopback; kills one of
them with SIGKILL, starts all again, sends SIGTERM to one alone, starts all again.  Prints the largest relative
difference of the loss, and ends with an error unless the disturbed run equals the undisturbed one bit for bit.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# From here on what lies in the checkout is imported: the path must come first.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("tests", "")]

import tiny_runs  # noqa: E402
from test_training_processes import finish, processes  # noqa: E402


def after(workdir: Path, step: int, started: list[subprocess.Popen]) -> None:
    """Returns when step `step` is saved."""
    while tiny_runs.newest_checkpoint(workdir) < step:
        if any(process.poll() is not None for process in started):
            raise SystemExit(f"a process ended by itself: {[process.communicate()[0] for process in started]}")
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        runs = tiny_runs.prepare(Path(folder))
        changes = {"steps": 16, "batch": 4, "grad_accum_steps": 1, "data.streams": 4, "optimizer.kind": "adamw"}
        settings = tiny_runs.sft_settings(runs) | changes | {"log_every": 1, "checkpoint_every": 2}
        argv = tiny_runs.trained(runs / "alone", "micro_base", settings)
        finish(processes(argv, runs / "together", count))
        pairs = zip(tiny_runs.metrics(runs / "alone"), tiny_runs.metrics(runs / "together"), strict=True)
        print("largest relative difference of the loss:", max(abs(b["loss"] / a["loss"] - 1) for a, b in pairs))
        disturbed = runs / "disturbed"
        started = processes(argv, disturbed, count)
        after(disturbed, 4, started)
        started[-1].send_signal(signal.SIGKILL)
        time.sleep(1)
        for process in started:  # as a scheduler does
            process.kill()
            process.communicate()
        print("killed at step", tiny_runs.newest_checkpoint(disturbed))
        started = processes(argv, disturbed, count)
        after(disturbed, tiny_runs.newest_checkpoint(disturbed) + 2, started)
        started[-1].send_signal(signal.SIGTERM)
        said = finish(started)[0]
        print(next((line for line in said.splitlines() if "asked to stop" in line), "nobody stopped"))
        finish(processes(argv, disturbed, count))
        tiny_runs.assert_same_run(disturbed, runs / "together")
        print(f"{count} processes, disturbed and not: equal")


if __name__ == "__main__":
    main()
