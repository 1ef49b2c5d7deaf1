"""Several processes as one run: start-up, and the few things that they tell each other beside the training step.

    --distributed                                      a TPU pod, GKE, SLURM or Open MPI: JAX finds the others by itself
    --coordinator=HOST:PORT --process_count=4 --process_id=0      anything else, a loopback test included

Under SLURM and GKE a job of several tasks is joined without a flag, because tasks that did not know of each other would
all write to one work directory.  Everything here works, and costs nothing, in a run of one process.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from ivr_jax.errors import UserError


def add_flags(values: flags.FlagValues) -> None:
    """The flags of a command that may run as several processes."""
    flags.DEFINE_boolean("distributed", False, "join the other processes of this pod or job", flag_values=values)
    flags.DEFINE_string("coordinator", None, "address HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("process_count", None, "how many processes there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)


def start(call_flags: flags.FlagValues) -> None:
    """Joins the other processes, if there are any; must come before anything else that touches a device.

    Raises UserError for flags that do not belong together, and when the others do not answer.
    """
    explicit = (call_flags.coordinator, call_flags.process_count, call_flags.process_id)
    if explicit != (None, None, None):
        if None in explicit:
            raise UserError("--coordinator, --process_count and --process_id belong together.", "Give all three.")
        address, count, index = explicit
        if not 0 <= index < count:
            raise UserError(f"process {index} of {count} cannot be.", "Number the processes from 0.")
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


def union(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all processes' JSON mappings together; of equal keys the lowest process's value."""
    found: dict[str, Any] = {}
    for theirs in gather(values):
        found = {**theirs, **found}
    return found


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
    """Which of `count` things this process does; every process does as many.  `name` is what an error calls them."""
    processes = jax.process_count()
    if count % processes:
        raise UserError(f"{name} is {count}, which does not divide over {processes} processes.",
                        f"Use a multiple of {processes}.")
    each = count // processes
    return range(jax.process_index() * each, (jax.process_index() + 1) * each)


def fetch(tree: Any) -> Any:
    """Arrays of the mesh as numpy arrays on every process, each of them whole; for small ones."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
