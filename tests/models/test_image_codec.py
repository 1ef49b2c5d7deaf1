"""The image codec: batches without padding, and a cache that is bounded in bytes and keeps no batch alive."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ivr_jax.errors import UserError
from ivr_jax.models import image_codec, image_tokenizer
from ivr_jax.models.image_codec import ImageCodec, batch_sizes
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig

CONFIG = ImageTokenizerConfig(
    ch=4, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=8, z_channels=4,
    double_z=False, dropout=0.0, n_embed=16, embed_dim=4, beta=0.25, norm_groups=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return image_tokenizer.init_params(CONFIG, jax.random.key(0))


def images(count: int, shape: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, *shape, 3), np.uint8))


@pytest.mark.parametrize(("count", "pixels", "devices", "expected"), [
    (1, 64, 1, [1]), (9, 64, 1, [4, 4, 1]), (64, 64, 1, [64]), (85, 64, 1, [64, 16, 4, 1]),
    (9, 512 * 512, 1, [4, 4, 1]), (3, 1024 * 1024, 1, [1, 1, 1]), (3, 1 << 24, 1, [1, 1, 1]),
    (1, 64, 8, [8]), (9, 64, 8, [8, 8]), (33, 64, 8, [32, 8]), (0, 64, 1, []),
])  # fmt: skip
def test_batches_hold_what_there_is(count, pixels, devices, expected):
    assert batch_sizes(count, pixels, devices) == expected
    assert batch_sizes(count, pixels, devices, most=1) == [devices] * -(-count // devices)


def test_results_do_not_depend_on_batches_and_are_in_order(params):
    codec, batch = ImageCodec(CONFIG, params), images(6)
    mixed = [*batch, images(1, (4, 12))[0], batch[0]]
    one_by_one = ImageCodec(CONFIG, params, cache_bytes=0)
    codes = codec.encode(mixed)
    assert [code.shape for code in codes] == [(4, 4)] * 6 + [(2, 6), (4, 4)]
    for image, code in zip(mixed, codes, strict=True):
        np.testing.assert_array_equal(one_by_one.encode([image])[0], code)
    decoded = codec.decode(codes)
    assert [x.shape for x in decoded] == [x.shape for x in mixed] and decoded[0].dtype == np.uint8
    np.testing.assert_array_equal(decoded[0], decoded[7])


def test_the_cache_keeps_single_results_and_no_more_bytes_than_it_may(params):
    codec = ImageCodec(CONFIG, params, cache_bytes=10 * 4 * 4 * 4)  # ten codes of 4 x 4
    batch = images(30)
    codec.encode(batch)
    held = list(codec._codes._entries.values())
    assert len(held) == 10 and sum(value.nbytes for value in held) == 640
    assert all(value.base is None for value in held), "a view would keep its batch"
    assert all(isinstance(key, bytes) and len(key) == 16 for key in codec._codes._entries)


def test_what_is_in_the_cache_is_not_computed_again(params, monkeypatch):
    codec, batch = ImageCodec(CONFIG, params), images(5)
    first = codec.encode(batch)

    def fails(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(codec, "_encode", fails)
    again = codec.encode([image.copy() for image in batch])
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(ValueError):
        again[0][0, 0] = 1  # nobody changes what others will be given


def test_shapes_that_share_bytes_are_told_apart():
    flat = np.zeros((4, 16, 3), np.uint8)
    assert image_codec._key(flat) != image_codec._key(flat.reshape(16, 4, 3))


def test_an_image_that_does_not_divide_into_cells_is_named_by_its_shape(params):
    with pytest.raises(UserError) as caught:
        ImageCodec(CONFIG, params).encode(images(1, (7, 8)))
    assert "(7, 8, 3)" in caught.value.what
