"""Weights and caches as int8: the rounding, and a decoder that computes with them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax.errors import UserError
from ivr_jax.models import backbone, int8, kv_cache
from ivr_jax.models.backbone_config import BackboneConfig

CONFIG = BackboneConfig(32, 16, 24, 2, 4, 2, 8)


def test_the_error_is_at_most_half_a_scale_and_zeros_stay():
    x = np.random.default_rng(0).normal(size=(2, 64, 3)).astype(np.float32)
    x[1, :, 2] = 0
    values, scale = int8.quantise(jnp.asarray(x), axis=1)
    assert values.dtype == jnp.int8 and scale.shape == (2, 1, 3) and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale[:, 0], np.abs(x).max(1) / 127, rtol=1e-6)
    back = np.asarray(int8.dequantise(values, scale, "float32"))
    assert (np.abs(back - x) <= 0.5001 * np.asarray(scale)).all() and not back[1, :, 2].any()
    assert np.abs(np.asarray(values, int)).max() == 127


def test_a_number_that_is_none_does_not_vanish():
    values, scale = int8.quantise(jnp.asarray([[1.0, jnp.nan]]), axis=1)
    assert np.isnan(int8.dequantise(values, scale, "float32")).all()


def test_a_decoder_with_int8_kernels_computes_what_their_values_say():
    params = backbone.init_params(CONFIG, jax.random.key(0))
    rounded, config = int8.quantise_kernels(params), dataclasses.replace(CONFIG, weight_dtype="int8")
    shapes = backbone.param_shapes(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), rounded) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    layers = {name: dict(part) if isinstance(part, dict) else part for name, part in params["layers"].items()}
    for place in ("attention", "mlp"):
        held = rounded["layers"][place]
        for name in [name for name in held if name + int8.SCALE in held]:
            scale = held[name + int8.SCALE][:, None]
            layers[place][name] = int8.dequantise(held[name], scale, "float32")
    tokens, positions = jnp.asarray([[3, 1, 4, 1, 5]]), jnp.arange(5)[None]
    found, _ = backbone.apply(config, rounded, tokens, positions)
    expected, _ = backbone.apply(CONFIG, {**params, "layers": layers}, tokens, positions)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    exact, _ = backbone.apply(CONFIG, params, tokens, positions)
    assert 1e-4 < np.abs(found - exact).max() < 0.2


def test_an_int8_cache_gives_nearly_the_same_and_needs_no_other_arguments():
    config = dataclasses.replace(CONFIG, cache_dtype="int8")
    params = backbone.init_params(CONFIG, jax.random.key(0))
    tokens, positions = jnp.asarray([[3, 1, 4, 1, 5]]), jnp.arange(5)[None]
    cache = kv_cache.init_cache(config, 1, 8)
    assert cache.k.dtype == jnp.int8 and cache.k_scale.shape == (2, 1, 2, 8, 1)
    first, cache = backbone.apply(config, params, tokens[:, :3], positions[:, :3], cache=cache)
    rest, cache = backbone.apply(config, params, tokens[:, 3:], positions[:, 3:], cache=cache)
    whole, at_once = backbone.apply(config, params, tokens, positions, cache=kv_cache.init_cache(config, 1, 8))
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-5)
    np.testing.assert_allclose(cache.v_scale, at_once.v_scale, rtol=1e-5)
    exact, _ = backbone.apply(CONFIG, params, tokens, positions)
    assert 1e-5 < np.abs(whole - exact).max() < 0.1


@pytest.mark.parametrize("name", ["weight_dtype", "cache_dtype"])
def test_another_type_than_int8_is_refused(name):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(CONFIG, **{name: "int4"})
    assert name in caught.value.what and "int4" in caught.value.what


def test_int8_weights_are_not_trained_from_nothing():
    with pytest.raises(UserError) as caught:
        backbone.init_params(dataclasses.replace(CONFIG, weight_dtype="int8"), jax.random.key(0))
    assert "weight_dtype" in caught.value.what


def test_int8_weights_with_float16_are_refused():
    """The products before the scale overflow: 127 times an activation, summed."""
    for dtype in ("bfloat16", "float32"):
        assert dataclasses.replace(CONFIG, weight_dtype="int8", dtype=dtype).dtype == dtype
    with pytest.raises(UserError) as caught:
        dataclasses.replace(CONFIG, weight_dtype="int8", dtype="float16")
    assert "float16" in caught.value.what
