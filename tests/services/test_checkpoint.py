"""A checkpoint of our own in construction: as the generator, and as the model that draws G1."""

from __future__ import annotations

import asyncio

import numpy as np
import tiny_model

from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.checkpoint import CheckpointGenerator
from ivr_jax.services.journal import Journal

SYSTEM = tiny_model.system()


def test_drawings_depend_on_the_question_alone_and_are_recorded(tmp_path):
    (sample,), (images,) = tiny_model.requests(1, sources=1)
    sources = list(images.values())

    async def draw(system, journal, attempts):
        generator = CheckpointGenerator(system, "tiny", SamplingOptions(), 5, journal)
        return [await generator.generate(sample, sample.prompt, sources, None, attempt) for attempt in attempts]

    with Journal(tmp_path / "journal") as journal:
        first = asyncio.run(draw(SYSTEM, journal, range(3)))
        known = asyncio.run(draw(None, journal, range(3)))  # without a model: all of it is on record
        assert journal.usage()["checkpoint:tiny"]["answers"] == 3
    other_order = asyncio.run(draw(SYSTEM, None, (2, 0)))
    assert all(np.array_equal(a, b) for a, b in zip(first, known, strict=True))
    assert np.array_equal(other_order[0], first[2]) and np.array_equal(other_order[1], first[0])
    assert len({image.tobytes() for image in first}) > 1
    assert {image.shape for image in first} == {(32, 32, 3)}
