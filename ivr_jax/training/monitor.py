"""Monitoring of an RL run: alarms, and the limit of judgements that may be missing.

An alarm is a line in the log when it begins (and when it ends), and a metric `alarm_<name>` of 0 or 1:

    zero_variance       hardly any group has members of different reward: nothing to learn from
    zero_gradient       the gradient's norm is nothing
    mode_collapse       nearly all answers use one mode, of several that are allowed
    calibration_drift   P(pass | wrong) has risen far above its value at the start of the run
    truncation          many answers are cut at the answer length

Each looks at the last `window` steps, but that all answers are cut is told at once.  The state is JSON, so that a
resumed run raises the same alarms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from ivr_jax.config import Positive, Section, Share
from ivr_jax.errors import UserError
from ivr_jax.trajectory import Mode

ALARMS = ("zero_variance", "zero_gradient", "mode_collapse", "calibration_drift", "truncation")
_METRICS = ("frac_groups_nonzero_std", "pass_given_wrong", "truncated", *(f"mode_{mode.value}" for mode in Mode))


@dataclasses.dataclass(frozen=True)
class MonitorOptions(Section, name="monitor"):
    """When to raise an alarm, and when to stop.

    Attributes:
      window: steps that an alarm looks back on; before there are so many, only that all answers are cut is told.
      min_frac_nonzero_std: zero_variance when a smaller share of groups has contrast.
      min_grad_norm: zero_gradient when all norms of the window are at or below it.
      max_mode_share: mode_collapse when one mode has more than this share of the answers.
      max_drift: calibration_drift when P(pass | wrong) is more than this above the first window's.
      max_truncated: truncation when a larger share of the answers is cut.
      missing_window: judged answers that the limit of missing ones looks back on.
      max_missing: the run stops when a larger share of them is missing.
    """

    window: Positive = 10
    min_frac_nonzero_std: Share = 0.1
    min_grad_norm: float = 1e-7
    max_mode_share: Share = 0.98
    max_drift: float = 0.25
    max_truncated: Share = 0.2
    missing_window: Positive = 256
    max_missing: Share = 0.5


class Monitor:
    """Sees the metrics of every step, in order.

    Args:
      modes: modes that an answer may use.
    """

    def __init__(self, options: MonitorOptions, modes: Sequence[str]):
        self._options, self._modes = options, tuple(modes)
        self._rows: list[dict[str, Any]] = []  # the last `window` steps
        self._start: list[float] | None = None  # sum and count of pass_given_wrong over the first window
        self._missing: list[list[int]] = []  # (missing, judged) by step
        self._on: list[str] = []

    def observe(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """`alarm_<name>` of each alarm after step number `step`."""
        row = {name: list(map(float, metrics[name])) for name in _METRICS if name in metrics}
        if "grad_norm" in metrics:
            value = metrics["grad_norm"]
            row["grad_norm"] = float(value[0]) / max(float(value[1]), 1.0) if isinstance(value, tuple) else float(value)
        self._rows = [*self._rows, row][-self._options.window :]
        if len(self._rows) == self._options.window:
            if self._start is None:
                self._start = self._sums("pass_given_wrong")
            alarms = self._alarms()
        else:
            alarms = self._early_alarms()
        for name in sorted(set(alarms) - set(self._on)):
            logging.warning("step %d: ALARM %s: %s", step, name, alarms[name])
        for name in sorted(set(self._on) - set(alarms)):
            logging.warning("step %d: alarm %s is over", step, name)
        self._on = sorted(alarms)
        return {f"alarm_{name}": float(name in self._on) for name in ALARMS}

    def count_missing(self, missing: int, judged: int, reasons: Mapping[str, int]) -> None:
        """Notes how many of a step's judged answers are missing.  Raises UserError when the limit is passed."""
        self._missing.append([int(missing), int(judged)])
        while len(self._missing) > 1 and sum(n for _, n in self._missing[1:]) >= self._options.missing_window:
            self._missing.pop(0)
        gone, total = (sum(pair[i] for pair in self._missing) for i in range(2))
        if total >= self._options.missing_window and gone > self._options.max_missing * total:
            likeliest = sorted(reasons.items(), key=lambda item: -item[1])[:3]
            why = ", ".join(f"{reason} ({count}x)" for reason, count in likeliest)
            raise UserError(
                f"the judge failed on {gone} of the last {total} answers{': ' if why else ''}{why}.",
                "Check that it is up, then run the same command again: it resumes from the last checkpoint. "
                "monitor.max_missing is the limit.",
            )

    def _sums(self, name: str) -> list[float]:
        pairs = [row[name] for row in self._rows if name in row]
        return [sum(pair[i] for pair in pairs) for i in range(2)]

    def _share(self, name: str) -> float | None:
        total, count = self._sums(name)
        return total / count if count else None

    def _alarms(self) -> dict[str, str]:
        """The alarms that are on, and why."""
        options, alarms = self._options, {}
        contrast = self._share("frac_groups_nonzero_std")
        if contrast is not None and contrast < options.min_frac_nonzero_std:
            alarms["zero_variance"] = f"{contrast:.0%} of the groups have members of different reward"
        norms = [row.get("grad_norm", 0.0) for row in self._rows]
        if max(norms) <= options.min_grad_norm:
            alarms["zero_gradient"] = f"the largest gradient norm is {max(norms):.1e}"
        for mode in self._modes:
            share = self._share(f"mode_{mode}")
            if len(self._modes) > 1 and share is not None and share > options.max_mode_share:
                alarms["mode_collapse"] = f"{share:.1%} of the answers are {mode}"
        now = self._share("pass_given_wrong")
        start = self._start[0] / self._start[1] if self._start and self._start[1] else None
        if now is not None and start is not None and now > start + options.max_drift:
            alarms["calibration_drift"] = f"a wrong image passes in {now:.0%} of the cases, {start:.0%} at the start"
        cut = self._share("truncated")
        if cut is not None and cut > options.max_truncated:
            alarms["truncation"] = f"{cut:.0%} of the answers are cut at config.answer_length"
        return alarms

    def _early_alarms(self) -> dict[str, str]:
        """Those that need no whole window: nothing can be learnt while every answer is cut."""
        if self._share("truncated") == 1.0:
            return {"truncation": "all answers are cut at config.answer_length"}
        return {}

    def get_state(self) -> dict[str, Any]:
        """What it has observed, as JSON values."""
        return {"rows": self._rows, "start": self._start, "missing": self._missing, "on": self._on}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from what `get_state` gave."""
        self._rows, self._start = list(state["rows"]), state["start"]
        self._missing, self._on = list(state["missing"]), list(state["on"])
