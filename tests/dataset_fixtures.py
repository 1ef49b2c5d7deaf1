"""Small datasets for tests: every mode, one shared source, text beyond ASCII."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ivr_jax.data.store import TrajectoryWriter
from ivr_jax.images import image_name
from ivr_jax.trajectory import AxisVerdict, Evaluation, Reflection, Round, Sample, Step, Trajectory


def evaluation(passed: bool) -> Evaluation:
    return Evaluation(*(AxisVerdict(passed, "warum – 夕暮れ", 5 if passed else 1.5) for _ in range(4)))


def example(index: int, shape: tuple[int, int] = (6, 8)) -> tuple[Trajectory, dict[str, np.ndarray]]:
    """Sample `index`: in turn direct, reflection and multi-step, all on one shared source."""
    rng = np.random.default_rng(index)
    source = np.zeros((*shape, 3), np.uint8)
    drawn = [rng.integers(0, 256, (*shape, 3), np.uint8) for _ in range(1 + index % 3)]
    causes = [None, Reflection("off", "mend"), Step("then")] if index % 3 == 1 else [None, Step("first"), Step("then")]
    rounds = [
        Round(
            cause,
            image_name(image),
            evaluation(image is drawn[-1]),
            evaluation(True) if isinstance(cause, Step) else None,
        )
        for cause, image in zip(causes, drawn, strict=False)
    ]
    sample = Sample(
        f"key/{index}",
        "tu es",
        (image_name(source),),
        "a fact",
        ("addition", "pose")[index % 2],
        {"target": [index, None]},
    )
    return Trajectory(sample, tuple(rounds)), {image_name(image): image for image in [source, *drawn]}


def build(path: Path, count: int = 5) -> Path:
    with TrajectoryWriter(path, {"seed": 7}) as writer:
        for index in range(count):
            writer.add(*example(index))
    return path
