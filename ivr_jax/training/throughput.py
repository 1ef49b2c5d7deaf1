"""How fast a run is: tokens a second, model FLOP/s utilisation, device memory, and a profile of some steps."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.models.backbone_config import BackboneConfig

HALVES = ("rollout", "update")  # of an RL step, which take turns
# Dense bfloat16 operations a second of one device, as published; patterns are tried in order on its lower-case kind.
PEAK = {
    r"tpu v4": 275e12, r"tpu v5 ?(lite|e)": 197e12, r"tpu v5": 459e12, r"tpu v6": 918e12, r"tpu ?v?7": 2307e12,
    r"h100 pcie": 756e12, r"h100|h200|gh200": 989e12, r"b200|gb200": 2250e12, r"a100": 312e12, r"l40s": 362e12,
    r"\bl4\b": 121e12, r"v100": 125e12,
}  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """Published dense bfloat16 operations a second of a device kind; None for one that is not in the table."""
    return next((value for pattern, value in PEAK.items() if re.search(pattern, kind.lower())), None)


def train_flops(config: BackboneConfig, tokens: float, attended: float) -> float:
    """Operations that the mathematics of a training step needs, forwards and backwards, nothing recomputed.

    Args:
      tokens: tokens that are not padding: 6 operations for each parameter that multiplies (embedding table left out).
      attended: sum over these tokens of the keys each sees: 12 operations a key, head and head dim in each layer.
    """
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    matrices = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * matrices * tokens + 12.0 * width * attended


class Throughput:
    """Turns what steps counted into rates.

    A stage's steps may return "work_tokens" and "work_flops", sums over all devices of one step, and for each of
    `HALVES` "work_HALF_tokens", "work_HALF_flops" and "HALF_seconds".
    """

    def __init__(self, peak: float | None = None, devices: int = 1):
        """`peak`: operations a second of one device, by default as published; `devices`: how many the steps run on."""
        self._peak = peak or peak_flops(jax.devices()[0].device_kind)
        self._devices = devices

    def row(self, means: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Rates of a log line, from the means of the metrics of its steps, and the seconds that one took.

        tokens_per_second; mfu (share of the peak of the devices in use) where the peak is known; both of each half
        under "HALF_…"; device_gib and device_peak_gib of the fullest device of this process, where the platform tells.
        """
        rates = self._rates(means, "", seconds)
        for half in HALVES:
            if means.get(f"{half}_seconds"):
                rates |= self._rates(means, f"{half}_", means[f"{half}_seconds"])
        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        for name, key in (("device_gib", "bytes_in_use"), ("device_peak_gib", "peak_bytes_in_use")):
            if all(key in s for s in stats):
                rates[name] = max(s[key] for s in stats) / 2**30
        return rates


    def _rates(self, means: Mapping[str, float], prefix: str, seconds: float) -> dict[str, float]:
        rates = {}
        if f"work_{prefix}tokens" in means:
            rates[f"{prefix}tokens_per_second"] = means[f"work_{prefix}tokens"] / seconds
        if f"work_{prefix}flops" in means and self._peak:
            rates[f"{prefix}mfu"] = means[f"work_{prefix}flops"] / (seconds * self._peak * self._devices)
        return rates


def parse_window(text: str) -> tuple[int, int]:
    """START and STOP of a window of steps; UserError when it is not START:STOP with START < STOP."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--profile={text} is no window of steps.", "Write --profile=10:13, say.")
    return int(match[1]), int(match[2])


class Profile:
    """A profile of the steps START:STOP, written to `<workdir>/profile` for TensorBoard or Perfetto."""

    def __init__(self, workdir: pathlib.Path, window: str | None):
        """Raises UserError for a window that is not START:STOP with START < STOP."""
        self._folder, self._running = workdir / "profile", False
        self._start, self._stop = parse_window(window) if window else (-1, -1)

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """Call after each step, with something of the devices to wait for."""
        if self._running and step + 1 >= self._stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a profile that is still open."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def rl_work(
    config: BackboneConfig,
    lengths: np.ndarray,
    sampled: int,
    in_passes: np.ndarray,
    iterations: int,
    forward_passes: int,
) -> dict[str, float]:
    """Tokens, and operations that their mathematics needs, of an RL step and of its two halves.

    Args:
      lengths: int [P * M], tokens of every prompt and answer; sampled: of the answers alone.
      in_passes: int [N], those of the answers that the update learns from: a prompt counts once an answer, also where
        packed rows compute it once for several.
      iterations: times that it learns from them; forward_passes: further passes over them, without a gradient.

    Returns:
      `work_rollout_…`: what was sampled; `work_update_…`: what the policy passes with a gradient; `work_flops`: both.
    """
    lengths = lengths.astype(np.float64)
    in_passes = in_passes.astype(np.float64)
    # A training step is three forward passes: one forward, and twice that much backward.
    rollout = train_flops(config, lengths.sum(), (lengths**2).sum() / 2) / 3
    training = train_flops(config, in_passes.sum(), (in_passes**2).sum() / 2)
    update = training * (iterations + forward_passes / 3)
    return {
        "work_flops": rollout + update,
        "work_rollout_tokens": float(sampled),
        "work_rollout_flops": rollout,
        "work_update_tokens": in_passes.sum() * iterations,
        "work_update_flops": update,
    }
