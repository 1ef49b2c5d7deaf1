"""Runs a command in parts on a Ray cluster: `--engine=ray --shards=64`.

A part is a Ray task.  Ray chooses its machine, and runs it again elsewhere when that machine is lost; a part picks up
what it finds of itself in the folder that all machines share.  Services are called within one set of limits, and one
bar shows the whole.  Ray is a cluster of machines that trust one another: it authenticates nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ivr_jax import cli, files
from ivr_jax.cluster.coordinator import Coordinator, Progress
from ivr_jax.cluster.part import Command, run_part
from ivr_jax.errors import UserError

LOCAL, RAY = "local", "ray"
_STORE = 100 << 20  # bytes of Ray's object store on this machine: what passes through it are counts
_POLL, _LAST_LOOK = 1.0, 10.0  # seconds between two looks at the parts, and for the last one
_HEAD_SILENT = 20.0  # seconds without an answer of the head after which the run ends
_COORDINATOR_SILENT = 60.0  # of the coordinator, which may be starting anew on a busy machine
_COORDINATOR_STARTS = 300.0  # before its first answer
_AGAIN = "Give the same command again: what is finished is kept."


def add_flags(values: flags.FlagValues) -> None:
    """The flags of a command that can run on Ray."""
    flags.DEFINE_enum("engine", LOCAL, [LOCAL, RAY], "local: in this process; ray: in parts on a Ray cluster",
                      flag_values=values)
    flags.DEFINE_integer("shards", 16, "with --engine=ray: in how many parts", lower_bound=1, upper_bound=99_999,
                         flag_values=values)
    flags.DEFINE_string("ray_address", None, "with --engine=ray: HOST:PORT of a cluster's head; by default a cluster "
                        "of this machine alone, for this command", flag_values=values)
    flags.DEFINE_list("shard_resources", ["CPU=1"], "with --engine=ray: what a part needs, as CPU=8,TPU=4",
                      flag_values=values)
    flags.DEFINE_integer("shard_retries", 5, "with --engine=ray: how often a part is run again after its machine was "
                         "lost; -1 for ever", lower_bound=-1, flag_values=values)


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a command runs on Ray.

    Attributes:
      parts: in how many parts.
      address: HOST:PORT of the head; "" for a cluster of this machine alone.
      resources: what a part needs, by Ray's names.
      retries: of a part whose machine is lost.
    """

    parts: int
    address: str = ""
    resources: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"CPU": 1})
    retries: int = 5

    def run(
        self, function: str, argv: Sequence[str], shared: Path, bar: tqdm, indices: Sequence[int] | None = None
    ) -> dict[int, Any]:
        """Runs parts; returns what each gave.

        Args:
          function: see `Command`.
          argv: the command line, which every part parses for itself.
          shared: an existing folder that all machines see at the same path.
          bar: of the whole run.
          indices: which of the parts; all by default.

        Raises:
          UserError: no cluster answers, it stops answering, a part met bad input, or was lost too often.
        """
        wanted = list(range(self.parts) if indices is None else indices)
        if not wanted:
            return {}
        mark = shared / f".seen-{secrets.token_hex(8)}"
        files.write_file(mark, "")
        command = Command(function, tuple(argv), os.getcwd(), str(mark), self.parts)
        try:
            with self._cluster() as ray:
                return self._results(ray, command, wanted, bar)
        finally:
            mark.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Any]:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to anybody
        try:
            import ray
        except ModuleNotFoundError:
            raise UserError("Ray is not installed.", "Run pip install 'ivr_jax[ray]'.") from None
        stopped_by = signal.getsignal(signal.SIGTERM)
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not self.address:
            here = {"object_store_memory": _STORE, "_node_ip_address": "127.0.0.1"}
            ray.init("local", include_dashboard=False, **here, **quiet)
            has = ray.cluster_resources()
            if lacking := [name for name, count in self.resources.items() if has.get(name, 0) < count]:
                ray.shutdown()
                raise UserError(f"this machine has {has.get(lacking[0], 0):g} of {lacking[0]} for Ray; a part needs "
                                f"{self.resources[lacking[0]]:g}.", "Lower --shard_resources, or name --ray_address.")
        else:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # a head that is lost fills the screen otherwise
            if not _answers(self.address):
                raise UserError(f"no Ray cluster answers at {self.address}.",
                                "Start one (ray start --head --port=6379), or correct --ray_address.")
            try:
                ray.init(self.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"the Ray cluster at {self.address} cannot be joined: {reason}",
                                "If it was started with a token (the default of `ray start` where ~/.ray/auth_token "
                                "exists), set RAY_AUTH_MODE=token. See docs/how-to/ray.md.") from error
        try:
            yield ray
        finally:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, stopped_by)  # Ray has put its own in place

    def _results(self, ray: Any, command: Command, wanted: Sequence[int], bar: tqdm) -> dict[int, Any]:
        # Beside this process, which it need not outlive; a soft affinity puts it on any machine, which may be lost.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        coordinator = ray.remote(Coordinator).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=100_000, scheduling_strategy=here
        ).remote()
        needs = dict(self.resources)
        options = {"num_cpus": needs.pop("CPU", 0), "num_gpus": needs.pop("GPU", 0), "resources": needs}
        task = ray.remote(run_part).options(max_retries=self.retries, scheduling_strategy="SPREAD", **options)
        open_ = {task.remote(command, index, coordinator): index for index in wanted}
        results: dict[int, Any] = {}
        asked = coordinator.progress.remote()
        head = self.address if self.address.startswith("ray://") else ray.get_runtime_context().gcs_address
        signs = Signs()
        while open_:
            ended, _ = ray.wait(list(open_), num_returns=len(open_), timeout=_POLL)
            for ref in ended:
                index = open_.pop(ref)
                results[index] = _value(ray, ref, index, self.retries)
            told = False
            if ray.wait([asked], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):  # the actor is being started anew
                    _show(bar, ray.get(asked), len(results), len(wanted))
                    told = True
                asked = coordinator.progress.remote()
            if open_ and signs.lost(_answers(head), told):
                raise UserError("the head of the Ray cluster no longer answers, or was started anew; "
                                f"{len(results)} of {len(wanted)} parts are finished.", _AGAIN)
        with contextlib.suppress(ray.exceptions.RayError):
            _show(bar, ray.get(asked, timeout=_LAST_LOOK), len(results), len(wanted))
        return results


class Signs:
    """Signs of life of the cluster that was given the parts.

    A head that was started anew accepts connections and knows nothing of them: what it does not have is the actor that
    they share.

    Args:
      clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._reached = self._told = clock()
        self._patience = _COORDINATOR_STARTS

    def lost(self, reached: bool, told: bool) -> bool:
        """Whether the parts are given up.

        Args:
          reached: the head accepts connections now.
          told: the coordinator has answered since the last call.
        """
        now = self._clock()
        if told:
            self._told, self._patience = now, _COORDINATOR_SILENT
        if reached:
            self._reached = now
        else:  # it may come back as another one
            self._patience = _HEAD_SILENT
        return now - self._reached > _HEAD_SILENT or now - self._told > self._patience


def from_call(call: cli.Call) -> Engine | None:
    """What the flags of `add_flags` say; None for this process alone.

    Raises UserError when they do not fit together, and for a work directory that no other machine sees.
    """
    values = call.flags
    if values.engine == LOCAL:
        for name in ("shards", "ray_address", "shard_resources", "shard_retries"):
            if values[name].present:
                raise UserError(f"--{name} was given without --engine=ray.", "Add --engine=ray.")
        return None
    if call.bucket is not None:
        raise UserError(f"the parts of --engine=ray share a folder, which {call.bucket} is not.",
                        "Name a folder that all machines see; a dataset can be copied to the bucket afterwards.")
    needs: dict[str, float] = {}
    for word in values.shard_resources:
        name, _, count = word.partition("=")
        try:
            needs[name.strip()] = float(count)
        except ValueError:
            needs[name.strip()] = -1
    if not needs or any(not name or not 0 <= count < float("inf") for name, count in needs.items()):
        raise UserError(f"--shard_resources is {','.join(values.shard_resources)!r}.", "Write it as CPU=8,TPU=4.")
    return Engine(values.shards, values.ray_address or "", needs, values.shard_retries)


def _value(ray: Any, ref: Any, index: int, retries: int) -> Any:
    """What part `index` returned."""
    try:
        result = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if "failed to import" in str(error) or isinstance(error.cause, ModuleNotFoundError):
            raise UserError("a machine of the Ray cluster lacks a package that this one has: "
                            f"{str(error).strip().splitlines()[-1]}", "Install ivr_jax there as here.") from error
        raise
    except ray.exceptions.RayError as error:
        raise UserError(f"part {index} was lost {retries + 1} times ({type(error).__name__}).", _AGAIN) from error
    if "what" in result:
        raise UserError(result["what"], result["remedy"])
    return result["value"]


def _answers(address: str) -> bool:
    """Whether something accepts connections at HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return True
    except (OSError, ValueError):
        return False


def _show(bar: tqdm, progress: Progress, ended: int, parts: int) -> None:
    """The counts of all parts on one bar; parts that have not begun count as the mean of those that have."""
    if progress.reported:
        bar.total = round(progress.total * parts / progress.reported)
    again = sum(count - 1 for count in progress.attempts.values())
    words = [f"{ended} of {parts} parts ended", f"{progress.running} running"]
    bar.set_postfix_str(" | ".join([*words, *([f"{again} run again"] if again else [])]), refresh=False)
    bar.n = progress.done
    bar.refresh()
