"""The loop that all stages share: data -> step -> metrics, logs, checkpoints, alarms, exact resumption.

Resume priority: 1. the newest committed checkpoint of this workdir; 2. the checkpoint that the stage starts from
(`init` in its config); 3. a fresh initialisation.  A run that is killed at any moment loses the steps since the last
checkpoint and nothing else; the resumed run computes the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from clu import metrics as clu_metrics
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ivr_jax.errors import UserError
from ivr_jax.training.checkpoint import Checkpointer


class Iterator(Protocol):
    """What the loop needs of a data iterator: JSON state, in and out."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage, ready to run.

    Attributes:
      state: initial state, a pytree of arrays.
      data: iterator of batches.
      step: (state, batch, step number) -> (state, metrics).  A metric is a scalar, or a (sum, denominator) pair,
        averaged exactly between two log lines.
      meta: JSON values stored in every checkpoint; `kind` says what the parameters are.
      summary: called with (state, step) at every log line for extra metrics, may be slow.
    """

    state: Any
    data: Iterator
    step: Callable[[Any, Any, int], tuple[Any, Mapping[str, Any]]]
    meta: Mapping[str, Any]
    summary: Callable[[Any, int], Mapping[str, float]] | None = None


class NonFinite(UserError):
    """A metric is not a finite number."""


def run(
    stage: Stage, workdir: str | os.PathLike, steps: int, log_every: int, checkpoint_every: int, keep: int, name: str
) -> Any:
    """Trains to `steps` and returns the final state.  Writes metrics.jsonl, TensorBoard files and checkpoints.

    SIGTERM (pre-emption) saves a checkpoint and ends the process with status 0.
    """
    workdir = pathlib.Path(workdir)
    checkpointer = Checkpointer(workdir, keep)
    state, first = stage.state, 0
    restored = checkpointer.restore(jax.tree.map(_like, state))
    if restored is not None:
        state, first = restored.state, restored.step
        stage.data.set_state(restored.data["iterator"])
        print(
            f"{name}: resumed at step {first} of {steps}" if first < steps else f"{name}: already trained {first} steps"
        )
    if first >= steps:  # nothing is touched, the date of the curves included
        checkpointer.close()
        return state
    log = MetricsLog(workdir, first)
    with _Preemption() as preempted, tqdm(total=steps, initial=first, desc=name, unit="step", mininterval=1.0) as bar:
        pending = _unpack(restored.data["pending"]) if restored is not None else {}
        clock = time.perf_counter()
        for step in range(first, steps):
            waiting = time.perf_counter()
            batch = next(stage.data)
            waited = time.perf_counter() - waiting
            state, values = stage.step(state, batch, step)
            pending = _merge(pending, {**values, "data_seconds": waited})
            done = step + 1
            if done % log_every == 0 or done == steps:
                row = {key: float(value.compute()) for key, value in pending.items()}
                row["seconds_per_step"] = (time.perf_counter() - clock) / (done - max(first, done - log_every))
                if stage.summary is not None:
                    row |= stage.summary(state, done)
                log.write(done, row)
                bar.set_postfix_str(" ".join(f"{k} {row[k]:.3g}" for k in list(row)[:4]), refresh=False)
                pending, clock = {}, time.perf_counter()
            bar.update()
            if done % checkpoint_every == 0 or done == steps or preempted():
                position = {"iterator": stage.data.get_state(), "pending": _pack(pending)}
                checkpointer.save(done, state, position, dict(stage.meta))
            if preempted() and done < steps:
                checkpointer.wait()
                print(f"{name}: asked to stop; saved step {done}. Run the same command to go on.")
                raise SystemExit(0)
    checkpointer.wait()
    checkpointer.close()
    log.close()
    return state


def _merge(pending: dict[str, clu_metrics.Average], values: Mapping[str, Any]) -> dict[str, clu_metrics.Average]:
    merged = dict(pending)
    for key, value in values.items():
        total, count = value if isinstance(value, tuple) else (value, 1.0)
        average = clu_metrics.Average(total=jax.numpy.float32(total), count=jax.numpy.float32(count))
        merged[key] = merged[key].merge(average) if key in merged else average
    return merged


def _pack(pending: Mapping[str, clu_metrics.Average]) -> dict[str, list[float]]:
    """Sums since the last log line, exactly (a float32 is a float64), so a resumed line equals an uninterrupted one."""
    return {key: [float(value.total), float(value.count)] for key, value in pending.items()}


def _unpack(packed: Mapping[str, Any]) -> dict[str, clu_metrics.Average]:
    return {key: clu_metrics.Average(*map(jax.numpy.float32, value)) for key, value in packed.items()}


def _like(value: Any) -> Any:
    return (
        jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        if isinstance(value, jax.Array)
        else value
    )


class MetricsLog:
    """`metrics.jsonl` (one object a line) and TensorBoard scalars.  Lines after the resumed step are cut off first."""

    def __init__(self, workdir: pathlib.Path, first: int):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= first]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(self._path)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one line; raises NonFinite after writing it when a value is NaN or infinite."""
        with self._path.open("a") as file:
            file.write(
                json.dumps({"step": step, **{k: v if np.isfinite(v) else str(v) for k, v in row.items()}}) + "\n"
            )
        for key, value in row.items():
            self._board.add_scalar(key, value, step)
        bad = [key for key, value in row.items() if not np.isfinite(value)]
        if bad:
            raise NonFinite(
                f"step {step}: {', '.join(bad)} is not finite.",
                "Lower the learning rate or raise warm-up; the last checkpoint is intact.",
            )

    def close(self) -> None:
        self._board.close()


class _Preemption:
    """Remembers SIGTERM; calling it says whether one came."""

    def __enter__(self) -> _Preemption:
        self._asked = False
        self._previous = signal.signal(signal.SIGTERM, self._remember)
        return self

    def _remember(self, *_: Any) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._previous)
