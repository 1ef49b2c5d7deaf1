"""The decoder's KV cache: keys and values of every layer, as they are or as int8, written and read in place.

Letters as in `layers.py`; L layers, S cache positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ivr_jax import sharding
from ivr_jax.models import int8
from ivr_jax.models.backbone_config import BackboneConfig

Layers = jax.Array | tuple[jax.Array, ...]

CACHE_AXES = ("layers", "batch", "kv_heads", "cache_length", "head_dim")  # of each array of a cache


class KVCache(NamedTuple):
    """Keys (rotated) and values of every layer and cache position: k, v [L, B, K, S, h]. Cache position = position.

    k_scale, v_scale: float32 [L, B, K, S, 1], of int8 keys and values (`int8.quantise`); else None.
    After `unstack` each is a tuple of L arrays, without their first axis.
    """

    k: Layers
    v: Layers
    k_scale: Layers | None = None
    v_scale: Layers | None = None


def init_cache(config: BackboneConfig, batch: int, cache_length: int) -> KVCache:
    """An empty cache of `cache_length` positions a row, in `cache_dtype`, or the compute dtype."""
    dtype = config.cache_dtype or config.dtype
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, cache_length, config.head_dim)

    def empty(shape: tuple[int, ...], dtype: str) -> jax.Array:
        return sharding.constrain(jnp.zeros(shape, dtype), CACHE_AXES)

    cache = KVCache(empty(shape, dtype), empty(shape, dtype))
    if dtype != "int8":
        return cache
    scales = (*shape[:-1], 1)
    return cache._replace(k_scale=empty(scales, "float32"), v_scale=empty(scales, "float32"))


def unstack(cache: KVCache) -> KVCache:
    """The cache with each layer in arrays of its own, for a loop whose layers are numbered by Python's integers.

    XLA:CPU copies a layer out of a stacked cache each time before it is read.
    """
    return KVCache(*(None if x is None else tuple(x[layer] for layer in range(len(x))) for x in cache))


def stack(cache: KVCache) -> KVCache:
    """The reverse of `unstack`."""
    return KVCache(*(None if x is None else jnp.stack(x) for x in cache))


def length(cache: KVCache) -> int:
    """S, the positions of a row."""
    return jax.tree.leaves(cache.k)[0].shape[-2]


def write(
    cache: KVCache, k: jax.Array, v: jax.Array, layer: int | jax.Array, cache_positions: jax.Array
) -> KVCache:
    """The cache with new keys and values [B, T, K, h] of one layer, rounded if it is int8.

    `cache_positions`: int32 [B, T], where each token is written; S or more: nowhere.
    """
    new = KVCache(k, v)
    if cache.k_scale is not None:
        (k, k_scale), (v, v_scale) = int8.quantise(k, axis=-1), int8.quantise(v, axis=-1)
        new = KVCache(k, v, k_scale, v_scale)
    return KVCache(*(
        None if stored is None else _written_layer(stored, x, layer, cache_positions)
        for stored, x in zip(cache, new, strict=True)
    ))  # fmt: skip


def read(cache: KVCache, layer: int | jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S, K, h] of one layer in `dtype`."""
    k, v, *scales = (None if stored is None else stored[layer].swapaxes(1, 2) for stored in cache)
    if scales[0] is None:
        return k.astype(dtype), v.astype(dtype)
    return int8.dequantise(k, scales[0], dtype), int8.dequantise(v, scales[1], dtype)


def _written_layer(stored: Layers, new: jax.Array, layer: Any, places: jax.Array) -> Layers:
    if not isinstance(stored, tuple):
        return _written(stored, new, layer, places)
    (written,) = _written(stored[layer][None], new, 0, places)
    return (*stored[:layer], written, *stored[layer + 1 :])


def _written(stored: jax.Array, new: jax.Array, layer: int | jax.Array, places: jax.Array) -> jax.Array:
    """The cache [L, B, K, S, h] with `new` [B, T, K, h] of one layer at `places` [B, T], without those past the end.

    Each device writes its own part, rows and heads as one axis: where one update spans heads, XLA:TPU stores the heads
    of a position together, and copies all of a layer's cache before it can be read.
    """
    place = sharding.spec(stored.shape, CACHE_AXES)

    def local(stored: jax.Array, new: jax.Array, layer: jax.Array, places: jax.Array) -> jax.Array:
        count, rows, heads, wide, width = stored.shape
        if place[3] is not None:
            places = places - jax.lax.axis_index(place[3]) * wide
            places = jnp.where(places < 0, wide, places)
        flat = stored.reshape(count, rows * heads, wide, width)
        new = new.astype(stored.dtype).swapaxes(1, 2).reshape(rows * heads, -1, width)
        index = jnp.arange(rows * heads)[:, None]
        flat = flat.at[layer, index, jnp.repeat(places, heads, axis=0)].set(new, mode="drop")
        return flat.reshape(stored.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return local(stored, new, layer, places)
    given = place, PartitionSpec(place[1], None, place[2]), PartitionSpec(), PartitionSpec(place[1])
    return jax.shard_map(local, in_specs=given, out_specs=place, check_vma=False)(stored, new, layer, places)
