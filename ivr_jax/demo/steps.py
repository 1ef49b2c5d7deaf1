"""Steps: commands that a longer run consists of, each resumable by itself.

`demo` runs its steps one after another with their output shown, and evaluations beside the training that follows them.
`reproduce` has a trunk and branches: independent branches run at the same time, each writing to its own log.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
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
    """One command: what it does, the module to run and its arguments.

    `beside`: no later step reads what it writes, so it may run while they do.
    """

    title: str
    module: str
    arguments: tuple[str, ...]
    beside: bool = False

    @property
    def argv(self) -> list[str]:
        """What is executed: this interpreter, the module and its arguments."""
        return [sys.executable, "-m", self.module, *self.arguments]

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


def accelerator_possible() -> bool:
    """Whether JAX may find an accelerator here, which one program holds, or fills the memory of, at a time."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(importlib.util.find_spec(plugin) is not None for plugin in ("libtpu", "jax_plugins"))


def run_step(step: Step, number: int, count: int, console: Console) -> float:
    """Runs one command with its output shown; returns its seconds.  Raises UserError when it fails."""
    console.rule(f"[bold]{number}/{count}  {step.title}")
    console.print(f"$ {step.command}", style="dim", highlight=False, soft_wrap=True)
    clock = time.perf_counter()
    status = subprocess.run(step.argv, check=False, env=environment()).returncode
    if status:
        raise _failed(f"step {number} ({step.title})", status, "Fix the error above")
    return time.perf_counter() - clock


def _failed(what: str, status: int, remedy: str) -> UserError:
    return UserError(f"{what} ended with status {status}.", f"{remedy}, then run the same command again.")


class Beside:
    """Runs steps one after another while its user runs others; each one's output is shown when it has ended.

    A context manager: left by an error, it ends the step that runs and drops those that wait.  Both are resumed when
    the same command is run again.

    Args:
      logs: folder for `<number>_<module>.log`, a step's output; made when missing.
      count: of all steps, for their headings.
      console: where the output is shown.
    """

    def __init__(self, logs: pathlib.Path, count: int, console: Console):
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._count, self._console = logs, count, console
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "beside")
        self._waiting: list[tuple[int, Step, concurrent.futures.Future[float]]] = []
        self._process: subprocess.Popen | None = None
        self._given_up = threading.Event()

    def add(self, step: Step, number: int) -> None:
        """Runs `step` when those that were added before it have ended."""
        self._console.rule(f"[bold]{number}/{self._count}  {step.title}")
        self._console.print(f"$ {step.command}", style="dim", highlight=False, soft_wrap=True)
        self._console.print(f"Runs beside the next steps; output: {self._log(step, number)}", soft_wrap=True)
        self._waiting.append((number, step, self._pool.submit(self._run, step, self._log(step, number))))

    def show(self, *, wait: bool = False) -> dict[str, float]:
        """Shows the output of those that have ended, of all with `wait`: the seconds each took, by its title.

        Raises:
          UserError: a step failed.
        """
        seconds = {}
        while self._waiting and (wait or self._waiting[0][2].done()):
            number, step, running = self._waiting[0]
            if not running.done():
                self._console.print(f"Waiting for step {number}: {self._log(step, number)}", soft_wrap=True)
            concurrent.futures.wait([running])
            self._console.rule(f"[bold]{number}/{self._count}  {step.title}")
            written = self._log(step, number).read_bytes().decode("utf-8", errors="replace")  # "\r" ends no line here
            for line in written.split("\n")[:-1]:
                self._console.print(line.rsplit("\r", 1)[-1], markup=False, highlight=False, soft_wrap=True)
            del self._waiting[0]
            seconds[step.title] = running.result()
        return seconds

    def _log(self, step: Step, number: int) -> pathlib.Path:
        return self._logs / f"{number:02d}_{step.module.rpartition('.')[2]}.log"

    def _run(self, step: Step, log: pathlib.Path) -> float:
        clock = time.perf_counter()
        with open(log, "w", encoding="utf-8") as output:
            variables = environment(COLUMNS=str(self._console.width))
            self._process = subprocess.Popen(step.argv, stdout=output, stderr=subprocess.STDOUT, env=variables)
            if self._given_up.is_set():  # while the process was being made
                self._process.terminate()
            status = self._process.wait()
        if status:
            raise _failed(f"the step beside the others ({step.title})", status, f"Fix the error in {log}")
        return time.perf_counter() - clock

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._given_up.set()
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
        self._pool.shutdown(cancel_futures=kind is not None)


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
                clock = time.perf_counter()
                status = subprocess.run(step.argv, check=False, stdout=log, stderr=log, env=variables).returncode
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
