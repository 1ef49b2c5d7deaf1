"""The loop that all stages share: data -> step -> metrics, logs, checkpoints, alarms, exact resumption.

Resume priority: 1. the newest committed checkpoint of this workdir; 2. the checkpoint that the stage starts from
(`init` in its config); 3. a fresh initialisation.  A run that is killed at any moment loses the steps since the last
checkpoint and nothing else; the resumed run computes the same numbers as an uninterrupted one.

Of several processes all take every step, and process 0 alone prints and logs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from ivr_jax import distributed
from ivr_jax.checkpoints.store import Checkpointer
from ivr_jax.heartbeat import Heartbeat
from ivr_jax.training.metrics import MetricsLog, Pending, check
from ivr_jax.training.throughput import Profile, Throughput, parse_window


class Iterator(Protocol):
    """What the loop needs of a data iterator: JSON state, in and out, the same on every process."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any:
        """The position as JSON values, which a checkpoint stores."""

    def set_state(self, state: Any) -> None:
        """Moves to a position that `get_state` gave."""


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
      activity: what a long step is doing at the moment, for the progress bar; called from another thread.
      close: called once when the run ends, also after an error.
    """

    state: Any
    data: Iterator
    step: Callable[[Any, Any, int], tuple[Any, Mapping[str, Any]]]
    meta: Mapping[str, Any]
    summary: Callable[[Any, int], Mapping[str, float]] | None = None
    zero_gradient: bool = True
    activity: Callable[[], str] = lambda: ""
    close: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long a run is, what it keeps, and what it shows.

    Attributes:
      steps: train up to this step.
      log_every, checkpoint_every: in steps.
      max_checkpoints: newest checkpoints that are kept (0: all).
      staging_gib: most host memory a process fills with arrays on their way to a checkpoint; 0: no bound.
      profile: a window of steps "START:STOP", or None.
      peak: operations a second of one device, for MFU; None: the published figure.
      devices: devices of the mesh, for MFU.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    max_checkpoints: int
    staging_gib: int = 0
    profile: str | None = None
    peak: float | None = None
    devices: int = 1

    def __post_init__(self) -> None:
        if self.profile:
            parse_window(self.profile)  # a wrong window is an error before anything is loaded


def run(stage: Stage, workdir: str | os.PathLike, plan: Plan, name: str) -> Any:
    """Trains as planned and returns the final state.  Writes metrics.jsonl, TensorBoard files and checkpoints.

    SIGTERM (pre-emption) saves a checkpoint and ends the process with status 0; one process that gets it is enough.
    The checkpointer, the profiler, the log and the stage are closed however the run ends.
    """
    workdir, primary = pathlib.Path(workdir), distributed.is_primary()
    say = print if primary else lambda text: None
    with contextlib.ExitStack() as stack:
        stack.callback(stage.close)
        checkpointer = Checkpointer(workdir, plan.max_checkpoints, plan.staging_gib)
        stack.callback(checkpointer.close)
        state, first, sums = _restore(stage, checkpointer)
        if first:
            resumed = f"resumed at step {first} of {plan.steps}"
            say(f"{name}: {resumed if first < plan.steps else f'already trained {first} steps'}")
        if first >= plan.steps:  # nothing is touched, the date of the curves included
            return state
        profile = Profile(workdir, plan.profile if primary else None)
        stack.callback(profile.close)
        log = MetricsLog(workdir, first, primary)
        stack.callback(log.close)
        throughput = Throughput(plan.peak, plan.devices)
        bar = tqdm(total=plan.steps, initial=first, desc=name, unit="step", mininterval=1.0, disable=not primary)
        stack.enter_context(bar)
        heartbeat = stack.enter_context(Heartbeat(bar, stage.activity))
        preempted = stack.enter_context(_Preemption(name))
        pending = Pending(sums)
        clock, timed = time.perf_counter(), first
        for step in range(first, plan.steps):
            done = step + 1
            heartbeat.begin("compiling" if step == first else "")
            waiting = time.perf_counter()
            batch = next(stage.data)
            waited = time.perf_counter() - waiting
            profile.before(step)
            state, values = stage.step(state, batch, step)
            profile.after(step, state)
            pending.add({**values, "data_seconds": waited})
            if done % plan.log_every == 0 or done == plan.steps:
                means = pending.means()  # waits for steps that were only dispatched: before the clock is read
                seconds = (time.perf_counter() - clock) / (done - timed)
                row = _log_row(stage, state, done, means, seconds, throughput)
                log.write(done, row)
                check(done, row, stage.zero_gradient)
                bar.set_postfix_str(" ".join(f"{k} {row[k]:.3g}" for k in list(row)[:4]), refresh=False)
                pending, clock, timed = Pending(), time.perf_counter(), done
            bar.update()
            stop = preempted(done)
            if done % plan.checkpoint_every == 0 or done == plan.steps or stop:
                check(done, pending.means(), stage.zero_gradient)  # only a sound state is saved
                iterator = copy.deepcopy(stage.data.get_state())  # saved in the background, while the run continues
                position = {"iterator": iterator, "pending": pending.pack()}
                checkpointer.save(done, state, position, dict(stage.meta))
            if stop and done < plan.steps:
                checkpointer.wait()
                say(f"{name}: stopped; step {done} is saved. Run the same command to resume.")
                raise SystemExit(0)
        checkpointer.wait()
        return state


def _restore(stage: Stage, checkpointer: Checkpointer) -> tuple[Any, int, Mapping[str, Any] | None]:
    """The newest checkpoint's state, its step, and its metric sums; the stage's own state and 0 without one."""
    shapes = jax.tree.map(_abstract, stage.state)
    if checkpointer.latest() is not None:
        for leaf in jax.tree.leaves(stage.state):  # there is no room for both
            if isinstance(leaf, jax.Array):
                leaf.delete()
    restored = checkpointer.restore(shapes)
    if restored is None:
        return stage.state, 0, None
    stage.data.set_state(restored.data["iterator"])
    return restored.state, restored.step, restored.data["pending"]


def _abstract(value: Any) -> Any:
    if isinstance(value, jax.Array):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
    return value


def _log_row(
    stage: Stage, state: Any, done: int, means: Mapping[str, float], seconds: float, throughput: Throughput
) -> dict[str, float]:
    """One line of the log: mean metrics, rates, and the stage's summary."""
    row = {key: value for key, value in means.items() if not key.startswith("work_")}
    row |= {"seconds_per_step": seconds, **throughput.row(means, seconds)}
    if stage.summary is not None:
        row |= stage.summary(state, done)
    return row


class _Preemption:
    """Remembers SIGTERM; calling it after a step says whether to stop there, on all processes at the same step.

    The signal is answered by a thread: Python's own handlers wait until a compiled program has come to its end.
    """

    def __init__(self, name: str):
        self._name = name
        self._asked = False
        self._began, self._seconds = time.monotonic(), 0.0  # of this step, and what the last one took
        # With several processes JAX's coordination service watches for the signal, and agrees on a step.
        self._alone = jax.process_count() == 1

    def __enter__(self) -> _Preemption:
        if self._alone:
            self._signals, written = os.pipe()
            os.set_blocking(written, False)
            self._previous_fd = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            self._written = written
            self._previous = signal.signal(signal.SIGTERM, self._remember)
            self._thread = threading.Thread(target=self._answer, name="preemption", daemon=True)
            self._thread.start()
        return self

    def _remember(self, *_: Any) -> None:
        self._asked = True

    def _answer(self) -> None:
        """Reads the numbers of signals as they come; ends with the pipe."""
        while number := os.read(self._signals, 1):
            if number[0] == signal.SIGTERM:
                left = self._began + self._seconds - time.monotonic()
                known = f"about {round(left)} s" if left >= 1 else "which takes longer than the one before"
                about = f", {known}" if self._seconds else ""
                os.write(2, f"\n{self._name}: asked to stop; saving after this step{about}.\n".encode())

    def __call__(self, done: int) -> bool:
        now = time.monotonic()
        self._began, self._seconds = now, now - self._began
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(done)

    def __exit__(self, *_: Any) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)
            signal.set_wakeup_fd(self._previous_fd)
            os.close(self._written)
            self._thread.join()
            os.close(self._signals)
