"""Several processes as one run: start-up, and collectives of the host beside the training step.

    --distributed                                      a TPU pod, GKE, SLURM or Open MPI: JAX finds the others by itself
    --coordinator=HOST:PORT --process_count=4 --process_id=0      anything else, a loopback test included

Under SLURM and GKE the processes of a job with several tasks join without a flag; otherwise each would write to the
same work directory on its own.  Everything here works, and costs nothing, in a run of one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from ivr_jax.cloud import mirror
from ivr_jax.errors import UserError


def add_flags(values: flags.FlagValues) -> None:
    """The flags of a command that may run as several processes."""
    flags.DEFINE_boolean("distributed", False, "join the other processes of this pod or job", flag_values=values)
    flags.DEFINE_string("coordinator", None, "address HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("process_count", None, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)


def start(call_flags: flags.FlagValues) -> None:
    """Joins the other processes, if there are any; must run before anything else that uses a device.

    Raises UserError for an incomplete set of flags, and when the other processes do not answer.
    """
    explicit = (call_flags.coordinator, call_flags.process_count, call_flags.process_id)
    if explicit != (None, None, None):
        if None in explicit:
            raise UserError("--coordinator, --process_count and --process_id go together.", "Give all three.")
        address, count, index = explicit
        if not 0 <= index < count:
            raise UserError(f"--process_id must be in [0, {count}), not {index}.", "Number the processes from 0.")
        _join(coordinator_address=address, num_processes=count, process_id=index)
    elif call_flags.distributed or in_a_job_of_several(os.environ):
        _join()


def in_a_job_of_several(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or GKE started this process as one of several."""
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return "," in workers or (tasks.isdigit() and int(tasks) > 1)


def _join(**arguments: Any) -> None:
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"the other processes were not found: {reason}.",
                        "Check the flags and that all processes were started; see docs/how-to/pods.md.") from error


def is_primary() -> bool:
    """Whether this is process 0, which alone prints and writes reports, metrics and token examples."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def open_bucket(url: str, without: tuple[str, ...] = ()) -> Iterator[None]:
    """A work directory in a bucket that all processes of a run open: process 0 writes it, the others follow.

    Args:
      url: gs://… or s3://….
      without: subfolders that are not copied (see `mirror.open_folder`).

    Raises:
      UserError: on every process, when the bucket cannot be used.
    """
    with contextlib.ExitStack() as stack:
        if is_primary():
            stack.enter_context(mirror.open_folder(url, without=without))
        barrier("bucket is open")
        if not is_primary():
            stack.callback(mirror.Follower(url).close)
        barrier("bucket is followed")
        yield


def share_folder(folder: str | os.PathLike[str], name: str) -> None:
    """Returns when every process sees what process 0 wrote into a work directory."""
    if jax.process_count() > 1 and is_primary():
        mirror.push(folder)
    barrier(name)
    if mirror.url_of(folder) is not None:
        if not is_primary():
            mirror.refresh(folder)
        barrier(f"{name} copied")


def union(values: Mapping[str, Any]) -> dict[str, Any]:
    """The union of all processes' JSON mappings; of equal keys the lowest process's value."""
    union: dict[str, Any] = {}
    for other in gather(values):
        union = {**other, **union}
    return union


def gather(value: Any) -> list[Any]:
    """Every process's JSON value, in their order."""
    return [json.loads(data) for data in _gather_bytes(json.dumps(value).encode())]


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every process's numpy arrays by name, of whatever shapes, in the order of the processes."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return [dict(np.load(io.BytesIO(data), allow_pickle=False)) for data in _gather_bytes(file.getvalue())]


def _gather_bytes(data: bytes) -> list[bytes]:
    if jax.process_count() == 1:
        return [data]
    mine = np.frombuffer(data, np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def share(count: int, name: str) -> range:
    """Which of `count` items this process handles, as many as every other.  `name` is what an error calls them."""
    processes = jax.process_count()
    if count % processes:
        raise UserError(f"{name} is {count}, which does not divide over {processes} processes.",
                        f"Use a multiple of {processes}.")
    each = count // processes
    return range(jax.process_index() * each, (jax.process_index() + 1) * each)


def fetch(tree: Any) -> Any:
    """Global arrays as numpy arrays on every process; for small ones."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
