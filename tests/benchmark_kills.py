"""Benchmark runs that are killed with SIGKILL at random moments and resumed, in processes forked from a server."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import time
from pathlib import Path

import benchmark_fixtures as fixtures
from benchmark_model import SETTINGS, write_model
from benchmark_runs import Prepared, judging
from openai_service import Behaviour

COMMAND, LOADED = "ivr_jax.evaluate.__main__", "ivr_jax.evaluate.benchmarks.command"
LATENCY = 0.05  # seconds of the scripted judge
_QUESTION = re.compile(r"Looked at, ([0-9a-f]{16})")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of the kills.

    Attributes:
      hit: kills that met a running process.
      partial: those after which some of the work was on record, and not all of it.
      equal: whether what the killed run wrote is byte-equal to what an undisturbed run wrote.
      repeated: calls (or answers) that were on record when a process was killed, and were made again.
      done: judgements (or answers) at the end.
    """

    hit: int
    partial: int
    equal: bool
    repeated: int
    done: int


def _command(arguments: list[str], log: str) -> None:
    import importlib

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [COMMAND, *arguments]
    importlib.import_module(COMMAND).entry()


def start(target, *arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([COMMAND, LOADED])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def finish(arguments: list[str], log: Path) -> float:
    """Runs the command to its end; the seconds that it took."""
    clock = time.monotonic()
    process = start(_command, arguments, str(log))
    process.join()
    assert process.exitcode == 0, log.read_text(errors="replace")[-3000:]
    return time.monotonic() - clock


def kill(arguments: list[str], log: Path, seconds: float) -> bool:
    """Starts the command and kills it after `seconds`; false when it had ended before."""
    process = start(_command, arguments, str(log))
    process.join(seconds)
    process.kill()  # does nothing to a process that has ended
    process.join()
    return process.exitcode == -signal.SIGKILL


def questions_on_record(workdir: Path) -> set[str]:
    """Ids of the questions whose replies are kept: among the judgements, or in the judge's cache."""
    found: set[str] = set()
    with contextlib.suppress(FileNotFoundError):
        found |= set(_QUESTION.findall((workdir / "judgements.jsonl").read_text(errors="replace")))
    database = workdir / "judge_cache/journal.sqlite"
    if database.exists():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as connection:
            for (text,) in connection.execute("select text from calls"):
                found |= set(_QUESTION.findall(text or ""))
    return found


def judge_kills(kills: int, root: Path, seed: int = 0) -> Outcome:
    """KRIS-Bench, 105 questions, judged with some calls in flight."""
    rng, prepared = random.Random(seed), Prepared("kris", root)
    with judging(behaviour=Behaviour(latency=LATENCY)) as (service, url):
        finish(prepared.arguments(url, root / "whole", "--config.judge.in_flight=2"), root / "log")
        # Again, since the first process also loads what the later ones share.
        usual = finish(prepared.arguments(url, root / "again", "--config.judge.in_flight=2"), root / "log")
        arguments = prepared.arguments(url, root / "killed", "--config.judge.in_flight=2")
        total = len(questions_on_record(root / "whole"))
        service.log.answered.clear()
        hit = partial = repeated = 0
        for _ in range(kills):
            known, asked = questions_on_record(root / "killed"), service.log.answered.copy()
            met = kill(arguments, root / "log", rng.uniform(0.05, 0.4) * usual)
            hit += met
            repeated += sum(service.log.answered[question] > asked[question] for question in known)
            partial += met and 0 < len(questions_on_record(root / "killed")) < total
            if not met:  # all is judged: the next kill needs a run with work left
                assert (root / "killed/summary.json").read_bytes() == (root / "whole/summary.json").read_bytes()
                shutil.rmtree(root / "killed")
                service.log.answered.clear()
        known, asked = questions_on_record(root / "killed"), service.log.answered.copy()
        finish(arguments, root / "log")
        repeated += sum(service.log.answered[question] > asked[question] for question in known)
    lines = [json.loads(line) for line in (root / "killed/judgements.jsonl").read_text().splitlines()]
    addresses = [(line["item"], line["sample"], line["metric"]) for line in lines]
    repeated += len(addresses) - len(set(addresses))
    whole, killed = ((root / name / "summary.json").read_bytes() for name in ("whole", "killed"))
    return Outcome(hit, partial, whole == killed, repeated, len(lines))


def _write_model(folder: str) -> None:
    write_model(Path(folder))


def generate_kills(kills: int, root: Path, seed: int = 0) -> Outcome:
    """WISE's seven prompts, two answers at a time."""
    rng = random.Random(seed)
    fixtures.write_wise(root / "data")
    process = start(_write_model, str(root / "model"))
    process.join()

    def arguments(name: str) -> list[str]:
        return [
            "--benchmark=wise", f"--data={root / 'data'}", f"--workdir={root / name}", "--samples=1",
            f"--checkpoint={root / 'model/backbone'}", *SETTINGS, "--config.batch=2", "--generate_only",
        ]  # fmt: skip

    finish(arguments("first"), root / "log")  # fills the compilation cache
    usual = finish(arguments("whole"), root / "log")
    whole = _written(root / "whole")
    total = sum(name.endswith("answer.json") for name in whole)
    hit = partial = repeated = 0
    seen: dict[Path, int] = {}
    for _ in range(kills):
        met = kill(arguments("killed"), root / "log", rng.uniform(0.2, 1.0) * usual)
        hit += met
        now = {path: path.stat().st_mtime_ns for path in (root / "killed").rglob("answer.json")}
        repeated += sum(now.get(path) != written for path, written in seen.items())
        partial += met and 0 < len(now) < total
        seen = now
        if not met:  # all is drawn: the next kill needs a run with work left
            assert _written(root / "killed") == whole
            shutil.rmtree(root / "killed")
            seen = {}
    finish(arguments("killed"), root / "log")
    killed = _written(root / "killed")
    return Outcome(hit, partial, whole == killed, repeated, sum(name.endswith("answer.json") for name in killed))


def _written(workdir: Path) -> dict[str, bytes]:
    """Images and answers by path; hidden files are what a killed process was writing."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for folder in ("images", "answers")
        for path in sorted((workdir / folder).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
