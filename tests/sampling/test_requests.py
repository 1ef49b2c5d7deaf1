"""How much room an answer gets, when the size of its images is known and when the model chooses it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import FREE
from ivr_jax.sampling.requests import Prepared, image_tokens, room
from ivr_jax.trajectory import Sample


def model(context: int = 32768, **meta):
    """What `room` reads of a system: an image tokenizer trained at 256 x 256, cells of 16 pixels."""
    image_codec = SimpleNamespace(config=SimpleNamespace(resolution=256, factor=16))
    return SimpleNamespace(image_codec=image_codec, config=SimpleNamespace(max_position_embeddings=context), meta=meta)


def prepared(size: tuple[int, int], prompt: int = 100) -> Prepared:
    return Prepared(Sample("key", "A cat."), {}, size, prompt)


OWN = {"hf_config": {"image_area": 720 * 720}}


@pytest.mark.parametrize("size, meta, area, wanted, expected", [
    ((16, 16), OWN, 0, 0, 5 * image_tokens(16, 16)),
    (FREE, {}, 0, 0, 5 * image_tokens(16, 16)),
    (FREE, OWN, 0, 0, 5 * image_tokens(45, 45)),  # as large as the model draws, not as its image tokenizer was trained
    (FREE, OWN, 1024 * 1024, 0, 5 * image_tokens(64, 64)),
    (FREE, OWN, 0, 4000, 4000),
    (FREE, {"hf_config": {"image_area": "large"}}, 0, 0, 5 * image_tokens(16, 16)),
])  # fmt: skip
def test_room_for_five_images(size, meta, area, wanted, expected):
    assert room(prepared(size), model(**meta), wanted, area) == expected


def test_room_ends_with_the_context():
    assert room(prepared(FREE, 1000), model(3000, **OWN), 0) == 2000  # a smaller image may fit
    with pytest.raises(UserError):
        room(prepared((45, 45), 1000), model(3000), 0)
