"""Steps: commands that a longer run consists of, each resumable by itself.

`demo` runs its steps one after another with their output shown.  `reproduce` has a trunk and branches: independent
branches run at the same time, each writing to its own log.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console
from tqdm import tqdm

from ivr_jax.errors import UserError

CORES_VARIABLE = "NPROC"  # XLA makes its CPU thread pools this large
# glibc's malloc asks for huge pages: XLA:CPU allocates a step's buffers anew each time, and a third of a small model's
# training step were page faults (docs/results/seeing.md).  Other C libraries ignore the variable.
MALLOC_VARIABLE, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


@dataclasses.dataclass(frozen=True)
class Step:
    """One command: what it does, the module to run and its arguments."""

    title: str
    module: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The shell command of this step."""
        return shlex.join((_python(), "-m", self.module, *self.arguments))


def _python() -> str:
    """What a user types for this interpreter: "python" where the shell finds it under that name, else its path."""
    here, found = pathlib.Path(sys.executable), shutil.which("python")
    if found and pathlib.Path(found).absolute().parent == here.parent:
        return "python"
    return str(here.relative_to(pathlib.Path.cwd()) if here.is_relative_to(pathlib.Path.cwd()) else here)


@dataclasses.dataclass(frozen=True)
class Branch:
    """Steps in order, which need no other branch; `name` is that of their log file."""

    name: str
    steps: tuple[Step, ...]


def configured(title: str, module: str, config: str, workdir: pathlib.Path, *settings: str) -> Step:
    """The step `python -m ivr_jax.MODULE --config=CONFIG --workdir=WORKDIR --config.KEY=VALUE ...`.

    `settings` are texts `key=value`.
    """
    keys = tuple(f"--config.{setting}" for setting in settings)
    return Step(title, f"ivr_jax.{module}", (f"--config={config}", f"--workdir={workdir}", *keys))


def environment(**more: str) -> dict[str, str]:
    """The variables that a step runs with: those of this process and `more`, and huge pages unless tunables are set."""
    return {MALLOC_VARIABLE: HUGE_PAGES, **os.environ, **more}


def run_step(step: Step, number: int, count: int, console: Console) -> float:
    """Runs one command with its output shown; returns its seconds.  Raises UserError when it fails."""
    console.rule(f"[bold]{number}/{count}  {step.title}")
    console.print(f"$ {step.command}", style="dim", highlight=False, soft_wrap=True)
    clock = time.perf_counter()
    command = [sys.executable, "-m", step.module, *step.arguments]
    status = subprocess.run(command, check=False, env=environment()).returncode
    if status:
        raise UserError(
            f"step {number} ({step.title}) ended with status {status}.",
            "Fix the error above, then run the same command again.",
        )
    return time.perf_counter() - clock


def run_branches(branches: Sequence[Branch], jobs: int, logs: pathlib.Path, title: str) -> None:
    """Runs `branches`, `jobs` at a time, each on its share of the cores.

    Args:
      branches: in the order in which they start.
      jobs: how many run at once.
      logs: folder for `<branch>.log`, each step's command and output; made when missing.
      title: of the progress bar, which counts steps.

    Raises:
      UserError: a step failed.  No other step is started then; running ones are awaited.
    """
    logs.mkdir(parents=True, exist_ok=True)
    cores = max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else os.cpu_count() // jobs)
    variables = environment(**{CORES_VARIABLE: str(cores)})
    failed = threading.Event()

    def run(branch: Branch) -> None:
        with open(logs / f"{branch.name}.log", "a", encoding="utf-8") as log:
            for step in branch.steps:
                if failed.is_set():
                    return
                bar.set_postfix_str(f"{branch.name}: {step.title}")
                print(f"$ {step.command}", file=log, flush=True)
                command = [sys.executable, "-m", step.module, *step.arguments]
                clock = time.perf_counter()
                status = subprocess.run(command, check=False, stdout=log, stderr=log, env=variables).returncode
                print(f"[{step.title}: {time.perf_counter() - clock:.0f} s, status {status}]", file=log, flush=True)
                if status:
                    failed.set()
                    raise UserError(
                        f"{branch.name}: {step.title} ended with status {status}; {log.name} says why.",
                        "Fix it, then run the same command again.",
                    )
                bar.update()

    with (
        tqdm(total=sum(len(branch.steps) for branch in branches), desc=title, unit="step") as bar,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        running = [pool.submit(run, branch) for branch in branches]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        except BaseException:
            failed.set()
            raise
