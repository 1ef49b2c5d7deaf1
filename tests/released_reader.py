"""The released folders read whole: what could be read, and what could not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivr_jax.construct.released import Problem, Released, iter_released


def read_released(root: Path, **options: Any) -> tuple[list[Released], list[Problem]]:
    """All trajectories of the folders under `root`, and all problems; `options` are those of `iter_released`."""
    found = list(iter_released(root, **options))
    return [f for f in found if isinstance(f, Released)], [f for f in found if isinstance(f, Problem)]
