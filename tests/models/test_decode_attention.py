"""The Pallas kernel over the slot cache, run by Pallas' interpreter, against plain attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax.errors import UserError
from ivr_jax.models import backbone, decode_attention, int8, kv_cache, layers
from ivr_jax.models.backbone_config import BackboneConfig


@pytest.mark.parametrize(("length", "slots", "dtype"), [(1, 256, "float32"), (2, 384, "float32"), (1, 256, "bfloat16")])
def test_the_kernel_equals_plain_attention_over_what_each_row_has_filled(length, slots, dtype):
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, width, count = 3, 4, 2, 64, 2
    q = jnp.asarray(rng.normal(size=(batch, length, heads, width)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(count, batch, kv_heads, slots, width)), dtype) for _ in range(2))
    positions = jnp.asarray(np.array([0, 130, slots - length])[:, None] + np.arange(length), jnp.int32)
    found = decode_attention.decode_attention(q, k, v, positions, 1, interpret=True)
    mask = jnp.arange(slots)[None, None] <= positions[:, :, None]
    expected = layers.attention(q, k[1].swapaxes(1, 2), v[1].swapaxes(1, 2), mask)
    assert found.dtype == q.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize(("length", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_the_kernel_on_an_int8_cache_equals_plain_attention_on_its_values(length, dtype):
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, width, count, slots = 3, 4, 2, 64, 2, 384
    q = jnp.asarray(rng.normal(size=(batch, length, heads, width)), dtype)
    k, v = (int8.quantise(jnp.asarray(rng.normal(size=(count, batch, kv_heads, slots, width)), jnp.float32), axis=-1)
            for _ in range(2))  # fmt: skip
    positions = jnp.asarray(np.array([0, 130, slots - length])[:, None] + np.arange(length), jnp.int32)
    found = decode_attention.decode_attention(q, k[0], v[0], positions, 1, (k[1], v[1]), interpret=True)
    mask = jnp.arange(slots)[None, None] <= positions[:, :, None]
    plain = (int8.dequantise(values[1], scale[1], dtype).swapaxes(1, 2) for values, scale in (k, v))
    expected = layers.attention(q, *plain, mask)
    assert found.dtype == q.dtype
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)


def test_slots_that_a_row_has_not_filled_are_not_read():
    """Their NaN would spread to everything that is computed with them."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 1, 2, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 2, 1, 4096, 64)), jnp.float32) for _ in range(2))
    empty = jnp.arange(4096)[None, None, None, :, None] >= 2048
    k, v = (jnp.where(empty, jnp.nan, x) for x in (k, v))
    positions = jnp.asarray([[3], [2047]], jnp.int32)
    found = decode_attention.decode_attention(q, k, v, positions, 0, interpret=True)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("cache_dtype", ["", "int8"])
def test_decoding_with_the_kernel_equals_decoding_without(monkeypatch, cache_dtype):
    kernel = functools.partial(decode_attention.decode_attention, interpret=True)
    monkeypatch.setattr(decode_attention, "decode_attention", kernel)
    config = BackboneConfig(32, 64, 96, 2, 4, 2, 64, cache_dtype=cache_dtype)
    params = backbone.init_params(config, jax.random.key(0))
    tokens = jnp.asarray([[5], [9]], jnp.int32)
    positions = jnp.asarray([[0], [0]], jnp.int32)
    cache = kv_cache.init_cache(config, 2, 128)
    expected, _ = backbone.apply(config, params, tokens, positions, cache=cache)
    fused = dataclasses.replace(config, decode_kernel="pallas")
    found, after = backbone.apply(fused, params, tokens, positions, cache=cache)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found, _ = backbone.apply(fused, params, tokens + 1, positions + 1, cache=after)
    expected, _ = backbone.apply(config, params, tokens + 1, positions + 1, cache=after)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UserError) as error:
        BackboneConfig(32, 64, 96, 2, 4, 2, 64, decode_kernel="fast")
    assert "decode_kernel" in error.value.what
