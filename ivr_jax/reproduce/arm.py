"""One arm of the ablation: a model under one setting, with the figures of its seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: its title, the seeds that are evaluated, and their figures at temperature 1 and 0 (see the module)."""

    title: str
    seeds: tuple[int, ...]
    t1: tuple[dict[str, Any], ...]
    t0: tuple[dict[str, Any], ...]

    def values(self, figure: str, temperature: int = 1, group: str = "") -> list[float]:
        """The figure of each seed that has it; `group` picks from a figure by groups ("images_by_edits", "3")."""
        found = [seed.get(figure) or {} for seed in (self.t1 if temperature else self.t0)]
        found = [(estimate.get(group) or {}) if group else estimate for estimate in found]
        return [estimate["value"] for estimate in found if estimate.get("value") is not None]

    def at(self, seeds: Sequence[int]) -> Arm:
        """The same arm at those of `seeds` that it has, temperature 1 alone."""
        kept = [(seed, figures) for seed, figures in zip(self.seeds, self.t1, strict=True) if seed in seeds]
        return Arm(self.title, tuple(seed for seed, _ in kept), tuple(figures for _, figures in kept), ())

    def mean(self, figure: str, temperature: int = 1, group: str = "") -> float | None:
        """The mean of `values` over seeds; None without any."""
        values = self.values(figure, temperature, group)
        return math.fsum(values) / len(values) if values else None
