"""The loop that all stages share: data -> step -> metrics, logs, checkpoints, alarms, exact resumption.

Resume priority: 1. the newest committed checkpoint of this workdir; 2. the checkpoint that the stage starts from
(`init` in its config); 3. a fresh initialisation.  A run that is killed at any moment loses the steps since the last
checkpoint and nothing else; the resumed run computes the same numbers as an uninterrupted one.

Of several processes all take every step, and process 0 alone prints and logs.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from ivr_jax import distributed
from ivr_jax.checkpoints.store import Checkpointer
from ivr_jax.training.metrics import MetricsLog, Pending, check
from ivr_jax.training.throughput import Profile, Throughput, parse_window


class Iterator(Protocol):
    """What the loop needs of a data iterator: JSON state, in and out, the same on every process."""

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
      zero_gradient: whether gradients of exactly zero stop the run (not in RL, where all answers may be alike).
    """

    state: Any
    data: Iterator
    step: Callable[[Any, Any, int], tuple[Any, Mapping[str, Any]]]
    meta: Mapping[str, Any]
    summary: Callable[[Any, int], Mapping[str, float]] | None = None
    zero_gradient: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, what it keeps, and what it shows.

    Attributes:
      steps: train up to this step.
      log_every, checkpoint_every: in steps.
      max_checkpoints: newest checkpoints that stay (0: all).
      staging_gib: most host memory a process fills with arrays on their way to a checkpoint; 0: no bound.
      profile: a window of steps "START:STOP", or None.
      peak: operations a second of one device, for MFU; None: what is published of it.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    max_checkpoints: int
    staging_gib: int = 0
    profile: str | None = None
    peak: float | None = None

    def __post_init__(self) -> None:
        if self.profile:
            parse_window(self.profile)  # a wrong one is said before anything is loaded


def run(stage: Stage, workdir: str | os.PathLike, plan: Plan, name: str) -> Any:
    """Trains as planned and returns the final state.  Writes metrics.jsonl, TensorBoard files and checkpoints.

    SIGTERM (pre-emption) saves a checkpoint and ends the process with status 0; one process that gets it is enough.
    """
    workdir, primary = pathlib.Path(workdir), distributed.is_primary()
    say = print if primary else lambda text: None
    profile = Profile(workdir, plan.profile if primary else None)
    checkpointer = Checkpointer(workdir, plan.max_checkpoints, plan.staging_gib)
    state, first = stage.state, 0
    like = jax.tree.map(_like, state)
    if checkpointer.latest() is not None:
        for leaf in jax.tree.leaves(state):  # there is no room for both
            if isinstance(leaf, jax.Array):
                leaf.delete()
    restored = checkpointer.restore(like)
    if restored is not None:
        state, first = restored.state, restored.step
        stage.data.set_state(restored.data["iterator"])
        resumed = first < plan.steps
        say(f"{name}: resumed at step {first} of {plan.steps}" if resumed else f"{name}: already trained {first} steps")
    if first >= plan.steps:  # nothing is touched, the date of the curves included
        checkpointer.close()
        return state
    log, throughput = MetricsLog(workdir, first, primary), Throughput(plan.peak)
    bar = tqdm(total=plan.steps, initial=first, desc=name, unit="step", mininterval=1.0, disable=not primary)
    with _Preemption() as preempted, bar:
        pending = Pending(restored.data["pending"] if restored is not None else None)
        clock, timed = time.perf_counter(), first
        for step in range(first, plan.steps):
            waiting = time.perf_counter()
            batch = next(stage.data)
            waited = time.perf_counter() - waiting
            profile.before(step)
            state, values = stage.step(state, batch, step)
            profile.after(step, state)
            pending.add({**values, "data_seconds": waited})
            done = step + 1
            if done % plan.log_every == 0 or done == plan.steps:
                means = pending.means()
                seconds = (time.perf_counter() - clock) / (done - timed)
                row = {key: value for key, value in means.items() if not key.startswith("work_")}
                row |= {"seconds_per_step": seconds, **throughput.row(means, seconds)}
                if stage.summary is not None:
                    row |= stage.summary(state, done)
                log.write(done, row)
                check(done, row, stage.zero_gradient)
                bar.set_postfix_str(" ".join(f"{k} {row[k]:.3g}" for k in list(row)[:4]), refresh=False)
                pending, clock, timed = Pending(), time.perf_counter(), done
            bar.update()
            stop = preempted(done)
            if done % plan.checkpoint_every == 0 or done == plan.steps or stop:
                check(done, pending.means(), stage.zero_gradient)  # what is saved is sound
                position = {"iterator": stage.data.get_state(), "pending": pending.pack()}
                checkpointer.save(done, state, position, dict(stage.meta))
            if stop and done < plan.steps:
                checkpointer.wait()
                say(f"{name}: asked to stop; saved step {done}. Run the same command to go on.")
                raise SystemExit(0)
        checkpointer.wait()
    profile.close()
    checkpointer.close()
    log.close()
    return state


def _like(value: Any) -> Any:
    return (
        jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
        if isinstance(value, jax.Array)
        else value
    )


class _Preemption:
    """Remembers SIGTERM; calling it after a step says whether to stop there, on all processes at the same step."""

    def __enter__(self) -> _Preemption:
        self._asked = False
        # With several processes JAX's coordination service watches for the signal, and agrees on a step.
        self._alone = jax.process_count() == 1
        self._previous = signal.signal(signal.SIGTERM, self._remember) if self._alone else None
        return self

    def _remember(self, *_: Any) -> None:
        self._asked = True

    def __call__(self, done: int) -> bool:
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(done)

    def __exit__(self, *_: Any) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)
