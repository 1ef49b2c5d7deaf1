"""Where `G1` comes from: a checkpoint of our own (the model that is to be trained), or the generator service."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from ivr_jax.construct.escalation import Request
from ivr_jax.construct.interfaces import Images
from ivr_jax.sampling.chain import SamplingOptions
from ivr_jax.sampling.rollout import draw_first_images
from ivr_jax.system import System
from ivr_jax.trajectory import Sample


def with_first_images(
    system: System, tasks: Iterable[tuple[Sample, Images]], seed: int, batch: int, options: SamplingOptions
) -> Iterator[Request]:
    """Draws `G1` of each (sample, images) with `system`, `batch` at a time; the last batch is filled up."""
    waiting: list[tuple[Sample, Images]] = []
    key, number = jax.random.key(seed), 0

    def drawn(part: Sequence[tuple[Sample, Images]]) -> Iterator[Request]:
        filled = list(part) + [part[0]] * (batch - len(part))
        firsts: list[np.ndarray] = draw_first_images(
            system, [s for s, _ in filled], [i for _, i in filled], jax.random.fold_in(key, number), options
        )
        return (Request(sample, images, first) for (sample, images), first in zip(part, firsts, strict=False))

    for task in tasks:
        waiting.append(task)
        if len(waiting) == batch:
            yield from drawn(waiting)
            waiting, number = [], number + 1
    if waiting:
        yield from drawn(waiting)
