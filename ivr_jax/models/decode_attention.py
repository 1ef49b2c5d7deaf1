"""Attention of one or a few new tokens over the KV cache, as a Pallas TPU kernel (untested on a TPU).

Plain attention reads all of every row.  This kernel reads the blocks of positions that a row has filled, and computes
softmax as it goes, so that scores are never stored: the online softmax of FlashAttention (arXiv 2205.14135).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from ivr_jax import sharding
from ivr_jax.models.kv_cache import CACHE_AXES

# Cache positions that are read at a time: a step of the grid costs some tenths of a microsecond beside its copy, in
# which a TPU reads half a megabyte.
BLOCKS = (2048, 1024, 512, 256, 128)
MASKED = -1e30  # a finite minus infinity


def fits(cache_length: int, length: int) -> bool:
    """Whether the kernel supports `cache_length` cache positions a row and `length` new tokens."""
    return cache_length % BLOCKS[-1] == 0 and length <= 8


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    layer: int | jax.Array,
    scales: tuple[jax.Array | None, jax.Array | None] = (None, None),
    interpret: bool = False,
) -> jax.Array:
    """Attention of q over the cache positions 0 … position of its row.

    Args:
      q: [B, T, H, h].
      k, v: the cache of all layers, [L, B, K, S, h], with the keys and values of q's tokens in it.
      positions: int32 [B, T], ascending in a row; the result at a negative position (padding) means nothing.
      layer: which of the L is read.
      scales: float32 [L, B, K, S, 1] of k and of v where they are int8, else None.
      interpret: runs the kernel's program on any platform, slowly.

    Returns:
      [B, T, H, h] in the dtype of `q`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    run = functools.partial(_on_one_device, interpret=interpret)
    scales = tuple(scale for scale in scales if scale is not None)
    if not mesh.empty and mesh.size > 1:
        cache = sharding.spec(k.shape, CACHE_AXES)
        rows, heads = cache[1], cache[2]
        q_spec = PartitionSpec(rows, None, heads)
        specs = (q_spec, cache, cache, PartitionSpec(rows), PartitionSpec(), *[cache] * len(scales))
        run = jax.shard_map(run, in_specs=specs, out_specs=q_spec, check_vma=False)
    return run(q, k, v, positions, layer, *scales)


def _on_one_device(q, k, v, positions, layer, *scales, interpret: bool) -> jax.Array:
    batch, length, heads, width = q.shape
    _, _, kv_heads, cache_length, _ = k.shape
    queries = heads // kv_heads * length
    block = next(size for size in BLOCKS if cache_length % size == 0)
    # [B, T, K, G, h] → [B, K, T · G, h]: the queries of a key head are the rows of one matrix product.
    grouped = q.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 1, 3, 4)
    grouped = grouped.reshape(batch, kv_heads, queries, width)
    last = jnp.maximum(positions.max(axis=1), 0) // block  # the last block that a row needs

    def cache_index(row, head, step, layer, last, positions):
        # Steps past the last block name it again, which moves nothing.
        return layer[0], row, head, jnp.minimum(step, last[row]), 0

    def scale_index(row, head, step, layer, last, positions):
        return head, layer[0], row // scale_rows, jnp.minimum(step, last[row])

    # XLA:TPU stores scales in tiles of 8 rows x 128 positions, and would copy those of all layers into another layout.
    scale_rows = 8 if batch % 8 == 0 else batch
    query_spec = pl.BlockSpec((1, 1, queries, width), lambda row, head, step, *_: (row, head, 0, 0))
    cache_spec = pl.BlockSpec((1, 1, 1, block, width), cache_index)
    scale_spec = pl.BlockSpec((1, 1, scale_rows, block), scale_index)
    scales = [scale[..., 0].transpose(2, 0, 1, 3) for scale in scales]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, kv_heads, cache_length // block),
        in_specs=[query_spec, cache_spec, cache_spec, *[scale_spec] * len(scales)],
        out_specs=query_spec,
        scratch_shapes=[pltpu.VMEM((queries, 1), jnp.float32), pltpu.VMEM((queries, 1), jnp.float32),
                        pltpu.VMEM((queries, width), jnp.float32)],
    )  # fmt: skip
    kernel = functools.partial(_kernel, block=block, length=length, scale=width**-0.5)
    mixed = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype), grid_spec=grid, interpret=interpret,
        name="decode_attention",
    )(layer, last, positions, grouped, k, v, *scales)  # fmt: skip
    mixed = mixed.reshape(batch, kv_heads, length, -1, width).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(q.shape)


def _kernel(layer, last, positions, q, k, v, *rest, block: int, length: int, scale: float):
    """One block of positions of one row and key head; `largest`, `total` and `mixed` are carried over the blocks.

    The scales of int8 keys multiply the scores, those of values the weights: one factor a position, not one a number.
    """
    *scales, out, largest, total, mixed = rest
    row, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        largest[...] = jnp.full_like(largest, MASKED)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(step <= last[row])
    def _add():
        keys, values = k[0, 0, 0], v[0, 0, 0]
        scores = jax.lax.dot_general(q[0, 0], keys.astype(q.dtype), (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32) * scale  # fmt: skip
        if scales:
            mine = pl.ds(row % scales[0].shape[2], 1)
            scores = scores * scales[0][0, 0, mine, :]
        key_position = step * block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) // (scores.shape[0] // length)
        position = jnp.zeros(scores.shape, jnp.int32)
        for t in range(length):  # scalars are read one by one
            position = jnp.where(token == t, positions[row, t], position)
        scores = jnp.where(key_position <= position, scores, MASKED)
        higher = jnp.maximum(largest[...], scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - higher)
        shrink = jnp.exp(largest[...] - higher)
        total[...] = total[...] * shrink + weights.sum(axis=1, keepdims=True)
        if scales:
            weights, values = weights * scales[1][0, 0, mine, :], values.astype(q.dtype)
        mixed[...] = mixed[...] * shrink + jnp.dot(
            weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        largest[...] = higher

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish():
        out[0, 0] = (mixed[...] / total[...]).astype(out.dtype)
