"""One part of a command, in a process of a Ray cluster: the same command line, and which part of the work it is."""

from __future__ import annotations

import dataclasses
import importlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

import ivr_jax
from ivr_jax import cli
from ivr_jax.cluster.coordinator import SharedLimits
from ivr_jax.errors import UserError
from ivr_jax.files import InUse

_REPORT_EVERY = 1.0  # seconds
_LOCKED_FOR = 180.0  # seconds until another machine's lock on the part counts as an error
_ASK_AGAIN = 1.0


@dataclasses.dataclass(frozen=True)
class Command:
    """What every part of a run has in common.

    Attributes:
      function: "module:name" of what a part calls, with `argv` and a `Part`; it returns a JSON value.
      argv: the command line.
      folder: where it was given; relative paths in it start there.
      mark: a file in the folder that all machines must share.
      parts: how many there are.
      version: of this program.
    """

    function: str
    argv: tuple[str, ...]
    folder: str
    mark: str
    parts: int
    version: str = ivr_jax.__version__


@dataclasses.dataclass(frozen=True)
class Part:
    """Part `index` of `count`.

    Attributes:
      bar: counts what is done; nobody sees it, its numbers go to the bar of the whole run.
      limits: makes the limits of a service's calls, shared by all parts.
    """

    index: int
    count: int
    bar: tqdm
    limits: Callable[[Any], SharedLimits]


def run_part(command: Command, index: int, coordinator: Any) -> dict[str, Any]:
    """Runs one part: {"value": …}; for bad input, which another try would meet again, {"what": …, "remedy": …}."""
    try:
        return {"value": _run(command, index, coordinator)}
    except UserError as error:
        return {"what": error.what, "remedy": error.remedy}


def _run(command: Command, index: int, coordinator: Any) -> Any:
    import ray

    host = os.uname().nodename
    if command.version != ivr_jax.__version__:
        raise UserError(f"the machine {host} has version {ivr_jax.__version__} of ivr_jax, this one {command.version}.",
                        "Install the same version on all machines.")
    if os.path.isdir(command.folder):
        os.chdir(command.folder)
    if not Path(command.mark).exists():
        raise UserError(f"the machine {host} does not see {Path(command.mark).parent}.",
                        "Name a folder that all machines of the cluster share, at the same path.")
    cli.set_up_jax()
    module, _, name = command.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    attempt = uuid.uuid4().hex
    until = time.monotonic() + _LOCKED_FOR
    with open(os.devnull, "w") as nowhere, tqdm(file=nowhere) as bar:
        part = Part(index, command.parts, bar, lambda config: SharedLimits(coordinator, attempt, config))
        ended = threading.Event()

        def report(end: bool = False) -> Any:
            return coordinator.report.remote(index, attempt, int(bar.n), int(bar.total or 0), end)

        ray.get(report())  # calls of an attempt that nobody knows would not be counted

        def keep_reporting() -> None:
            while not ended.wait(_REPORT_EVERY):
                report()

        reporter = threading.Thread(target=keep_reporting, daemon=True)
        reporter.start()
        try:
            while True:
                try:
                    return function(command.argv, part)
                except InUse:  # the machine that had this part before is not quite gone
                    if time.monotonic() > until:
                        raise
                    time.sleep(_ASK_AGAIN)
        finally:
            ended.set()
            reporter.join()
            report(end=True)
