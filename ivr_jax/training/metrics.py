"""What a run says of itself: sums between two log lines, the log, and the alarms."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ivr_jax import files
from ivr_jax.errors import UserError


class NonFinite(UserError):
    """A metric is not a finite number."""


class ZeroGradient(UserError):
    """Every gradient since the last check was exactly zero."""


class Pending:
    """Float32 sums and denominators since the last log line, fetched from the devices only when they are asked for.

    `pack` and `Pending(packed)` carry them over a restart exactly (a float32 is a float64), so that a resumed line
    equals an uninterrupted one.
    """

    def __init__(self, packed: Mapping[str, Any] | None = None):
        self._sums = {key: tuple(map(np.float32, value)) for key, value in (packed or {}).items()}
        self._queue: list[dict[str, tuple[Any, Any]]] = []

    def add(self, values: Mapping[str, Any]) -> None:
        """One step's metrics: scalars, or (sum, denominator) pairs."""
        pairs = {key: value if isinstance(value, tuple) else (value, 1.0) for key, value in values.items()}
        self._queue.append(pairs)

    def sums(self) -> dict[str, tuple[np.float32, np.float32]]:
        """(sum, denominator) of every metric, added step by step."""
        for pairs, fetched in zip(self._queue, jax.device_get(self._queue), strict=True):
            for key in pairs:  # in the order of the step; what is fetched is sorted
                before = self._sums.get(key, (np.float32(0), np.float32(0)))
                pair = zip(before, fetched[key], strict=True)
                self._sums[key] = tuple(np.float32(a + np.float32(b)) for a, b in pair)
        self._queue = []
        return dict(self._sums)

    def means(self) -> dict[str, float]:
        """Each metric's mean; one that nothing was counted for is left out."""
        return {key: float(total / count) for key, (total, count) in self.sums().items() if count}

    def pack(self) -> dict[str, list[float]]:
        """The sums as JSON values."""
        return {key: [float(total), float(count)] for key, (total, count) in self.sums().items()}


def check(step: int, row: Mapping[str, float], zero_gradient: bool) -> None:
    """The alarms.

    Args:
      row: mean metrics up to `step`.
      zero_gradient: whether a gradient norm of exactly 0 is a fault of this stage.

    Raises NonFinite for a NaN or infinite metric, ZeroGradient when `grad_norm` is 0 and must not be.
    """
    bad = [key for key, value in row.items() if not np.isfinite(value)]
    if bad:
        raise NonFinite(
            f"step {step}: {', '.join(bad)} is not finite.",
            "Lower the learning rate or raise warm-up; the last checkpoint is intact.",
        )
    if zero_gradient and row.get("grad_norm") == 0:
        raise ZeroGradient(f"step {step}: every gradient is exactly zero.",
                           "No token carries loss, or everything is frozen; check data and config.")


class MetricsLog:
    """`metrics.jsonl` (one object a line) and TensorBoard scalars.  Lines after the resumed step are cut off first.

    With `write` false nothing is written: so do all processes of a run but one.
    """

    def __init__(self, workdir: pathlib.Path, first: int, write: bool = True):
        self._path, self._board = workdir / "metrics.jsonl", None
        if not write:
            return
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for number, line in enumerate(lines, 1) if self._step_of(line, number) <= first]
            files.write_file(self._path, "".join(kept))
        self._board = _scalar_writer(workdir / "tensorboard", first + 1)

    def _step_of(self, line: str, number: int) -> int:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path}, line {number} is not a metrics record.", "Remove the line.") from error

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Appends one line."""
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(
                json.dumps({"step": step, **{k: v if np.isfinite(v) else str(v) for k, v in row.items()}}) + "\n"
            )
        for key, value in row.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._board is not None:
            self._board.close()


def _scalar_writer(folder: pathlib.Path, purge_step: int) -> Any:
    """A `tensorboardX.SummaryWriter`.

    Where torch is installed tensorboardX imports it, which takes longer than all other imports together and is of no
    use to scalars; so it does not find it here, unless somebody imported it already.
    """
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=purge_step)
