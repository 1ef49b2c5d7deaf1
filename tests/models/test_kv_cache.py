"""The cache with each layer in arrays of its own is the stacked one, written and read alike."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax.models import kv_cache
from ivr_jax.models.backbone_config import BackboneConfig

CONFIG = BackboneConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
                        num_key_value_heads=2, head_dim=4)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_layers_apart_are_written_and_read_as_stacked_ones_are(dtype):
    config = dataclasses.replace(CONFIG, dtype="float32", cache_dtype="" if dtype == "float32" else dtype)
    stacked = kv_cache.init_cache(config, batch=2, cache_length=5)
    apart = kv_cache.unstack(stacked)
    assert len(apart.k) == 3 and apart.k[0].shape == (2, 2, 5, 4) and kv_cache.length(apart) == 5
    places = jnp.asarray([[1, 2], [4, 5]])  # the last is past the end
    for layer in (0, 2, 0):
        k, v = jax.random.normal(jax.random.key(layer), (2, 2, 2, 2, 4))
        stacked = kv_cache.write(stacked, k, v, layer, places)
        apart = kv_cache.write(apart, k, v, layer, places)
        for found, expected in zip(
            kv_cache.read(apart, layer, "float32"), kv_cache.read(stacked, layer, "float32"), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
            assert np.asarray(expected).any()
    jax.tree.map(np.testing.assert_array_equal, kv_cache.stack(apart), stacked)
    assert (kv_cache.stack(apart).k_scale is None) == (dtype == "float32")
