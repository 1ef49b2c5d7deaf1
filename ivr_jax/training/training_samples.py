"""Training samples in the form that the report shows: and which of their tokens carry loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from ivr_jax.data.store import TrajectorySource
from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.report.answers import make_answer, write_answers
from ivr_jax.trajectory import Mode

PER_MODE = 6
SEARCHED = 2000


def write_training_samples(
    folder: str | os.PathLike[str],
    dataset: TrajectorySource,
    tokenizer: TextTokenizer,
    encode_images: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
) -> None:
    """Writes up to `PER_MODE` trajectories of every mode, from the first `SEARCHED` of `dataset`, into `folder`."""
    chosen = {mode: [] for mode in Mode}
    for index in range(min(SEARCHED, len(dataset))):
        trajectory = dataset[index]
        if len(chosen[trajectory.mode]) < PER_MODE:
            chosen[trajectory.mode].append(trajectory)
    answers, images = [], {}
    for trajectory in (t for same in chosen.values() for t in same):
        held = dataset.images(trajectory)
        codes = dict(zip(held, encode_images(list(held.values())), strict=True))
        _, segments = codec.encode_answer(tokenizer, trajectory, codes)
        truth = tuple(r.evaluation for r in trajectory.rounds)
        answers.append(make_answer(trajectory, segments, truth=truth, trained=True))
        images |= held
    write_answers(folder, answers, images)
