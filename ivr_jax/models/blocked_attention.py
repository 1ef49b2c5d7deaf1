"""Causal attention of packed rows on a CPU: blocks of queries and keys that share no example are left out.

A row of T tokens holds several examples, and a token sees its own alone, so most pairs of blocks under the diagonal
are hidden.  Loops of dynamic length visit the others: softmax is computed online, and the backward pass computes
weights again from their stored logarithmic sums (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).

Axes as in `layers.py`, and n = T / BLOCK blocks of a row, R = BLOCK * G queries of a block and kv head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ivr_jax import sharding
from ivr_jax.models.layers import MASKED

BLOCK = 64  # queries, and keys, of a block: the fastest of 32, 64 and 88 for rows of 704 tokens
SAVED = "attention"  # checkpoint name of the results, for remat policies


class _Documents(NamedTuple):
    """Which keys a query sees: int32 [B, T] each.

    Attributes:
      queries: the segment of each query (0: padding); prefixes: another segment that it sees (0: none).
      keys: the segment of each key, of all T keys where the queries are split over devices.
      places: index in the row of each query.
    """

    queries: jax.Array
    prefixes: jax.Array
    keys: jax.Array
    places: jax.Array


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    fsdp_over_tensor: bool = False,
    prefix_ids: jax.Array | None = None,
) -> jax.Array:
    """q [B, T, H, h] and k, v [B, T, K, h], with the mask that `layers.causal_mask` makes → [B, T, H, h].

    What a query of padding (segment 0) sees is not defined, but it is finite.  On a mesh each device computes its own
    rows, heads and (over "sequence") queries; an axis that does not divide is not split.
    """
    length = q.shape[1]
    segments = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    prefixes = jnp.zeros_like(segments) if prefix_ids is None else prefix_ids.astype(jnp.int32)
    if padding := -length % BLOCK:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segments, prefixes = (jnp.pad(x, ((0, 0), (0, padding))) for x in (segments, prefixes))
    places = jnp.broadcast_to(jnp.arange(length + padding), segments.shape)

    def run(q, k, v, *documents):
        return _attend(q, k, v, _Documents(*documents))

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        blocks = q.shape[0], q.shape[1] // BLOCK, k.shape[2]
        rows, across, heads = sharding.spec(blocks, ("batch", "length", "q_heads"), fsdp_over_tensor)
        q_spec, kv_spec = PartitionSpec(rows, across, heads, None), PartitionSpec(rows, None, heads, None)
        own, of_all = PartitionSpec(rows, across), PartitionSpec(rows, None)
        specs = (q_spec, kv_spec, kv_spec, own, own, of_all, own)
        run = jax.shard_map(run, in_specs=specs, out_specs=q_spec, check_vma=False)
    return run(q, k, v, segments, prefixes, segments, places)[:, :length]


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, documents: _Documents) -> jax.Array:
    return _forward(q, k, v, documents)[0]


def _attend_forward(q, k, v, documents) -> tuple[jax.Array, tuple]:
    mixed, log_sums = checkpoint_name(_forward(q, k, v, documents), SAVED)
    return mixed, (q, k, v, documents, mixed, log_sums)


def _visits(documents: _Documents) -> tuple[jax.Array, jax.Array]:
    """Blocks of keys that each block of queries visits: int32 [B, n, n of the keys], of which the first [B, n] count.

    All that hold a key which a query of the block sees, and perhaps others between its smallest and largest segment;
    of padding the block on the diagonal, so that no query is without keys.
    """
    batch, length = documents.queries.shape
    keys = documents.keys.reshape(batch, 1, -1, BLOCK)
    most = keys.max(-1)
    least = jnp.where(keys > 0, keys, most[..., None]).min(-1)
    near = jnp.zeros((batch, length, keys.shape[2]), bool)
    for segments in (documents.queries, documents.prefixes):
        segments = segments[:, :, None]
        near |= (segments > 0) & (least <= segments) & (segments <= most)
    near = near.reshape(batch, -1, BLOCK, keys.shape[2]).any(2)
    diagonal = documents.places[:, ::BLOCK, None] // BLOCK
    number = jnp.arange(keys.shape[2])[None, None, :]
    visited = near & (number <= diagonal) | (number == diagonal)
    return jnp.argsort(~visited, axis=-1).astype(jnp.int32), visited.sum(-1, dtype=jnp.int32)


def _visible(documents: _Documents, row: jax.Array, block: jax.Array, key_block: jax.Array) -> jax.Array:
    """bool [queries, keys] of one pair of blocks."""

    def part(x: jax.Array, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(x, (row, block * BLOCK), (1, BLOCK))[0]

    own, prefix, place = (part(x, block)[:, None] for x in (documents.queries, documents.prefixes, documents.places))
    key = part(documents.keys, key_block)[None, :]
    earlier = (key_block * BLOCK + jnp.arange(BLOCK))[None, :] <= place
    return earlier & ((key == own) | ((key == prefix) & (prefix > 0)))


def _queries(x: jax.Array, kv_heads: int, row: jax.Array, block: jax.Array) -> jax.Array:
    """Block of x [B, T, H, h] → [K, R, h]."""
    heads, width = x.shape[2:]
    part = jax.lax.dynamic_slice(x, (row, block * BLOCK, 0, 0), (1, BLOCK, heads, width))
    part = part.reshape(BLOCK, kv_heads, heads // kv_heads, width).transpose(1, 0, 2, 3)
    return part.reshape(kv_heads, -1, width)


def _put_queries(into: jax.Array, part: jax.Array, row: jax.Array, block: jax.Array) -> jax.Array:
    """`into` [B, T, H, h] with a block as `_queries` gave it."""
    kv_heads, _, width = part.shape
    part = part.reshape(kv_heads, BLOCK, -1, width).transpose(1, 0, 2, 3).reshape(1, BLOCK, -1, width)
    return jax.lax.dynamic_update_slice(into, part.astype(into.dtype), (row, block * BLOCK, 0, 0))


def _keys(x: jax.Array, row: jax.Array, key_block: jax.Array) -> jax.Array:
    """Block of x [B, K, T, h] → [K, BLOCK, h]."""
    return jax.lax.dynamic_slice(x, (row, 0, key_block * BLOCK, 0), (1, x.shape[1], BLOCK, x.shape[3]))[0]


def _forward(q, k, v, documents) -> tuple[jax.Array, jax.Array]:
    """[B, T, H, h], and the logarithm of each query's sum of weights, float32 [B, n, K, R]."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    rows_each, groups = length // BLOCK, heads // kv_heads
    order, counts = _visits(documents)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def one_block(number: jax.Array, carry: tuple) -> tuple:
        row, block = number // rows_each, number % rows_each
        queries = _queries(q, kv_heads, row, block) * jnp.asarray(width**-0.5, q.dtype)

        def visit(step: jax.Array, carry: tuple) -> tuple:
            mixed, largest, total = carry
            key_block = order[row, block, step]
            scores = jnp.einsum(
                "ktx,ksx->kts", queries, _keys(k, row, key_block), preferred_element_type=jnp.float32
            ).reshape(kv_heads, BLOCK, groups, BLOCK)
            visible = _visible(documents, row, block, key_block)[None, :, None, :]
            scores = jnp.where(visible, scores, MASKED).reshape(kv_heads, -1, BLOCK)
            new_largest = jnp.maximum(largest, scores.max(-1))
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            more = jnp.einsum(
                "kts,ksx->ktx", weights.astype(v.dtype), _keys(v, row, key_block), preferred_element_type=jnp.float32
            )
            return mixed * shrink[..., None] + more, new_largest, total * shrink + weights.sum(-1)

        shape = (kv_heads, BLOCK * groups)
        start = jnp.zeros((*shape, width)), jnp.full(shape, -jnp.inf), jnp.zeros(shape)
        mixed, largest, total = jax.lax.fori_loop(0, counts[row, block], visit, start)
        all_mixed, log_sums = carry
        all_mixed = _put_queries(all_mixed, mixed / total[..., None], row, block)
        sums = (largest + jnp.log(total))[None, None]
        return all_mixed, jax.lax.dynamic_update_slice(log_sums, sums, (row, block, 0, 0))

    sums_shape = (batch, rows_each, kv_heads, BLOCK * groups)
    carry = jax.lax.empty(q.shape, v.dtype), jax.lax.empty(sums_shape, jnp.float32)
    return jax.lax.fori_loop(0, batch * rows_each, one_block, carry)


def _attend_backward(saved, g) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Scores are computed transposed, [K, keys, R]: XLA:CPU multiplies slowly along the first axis of both operands."""
    q, k, v, documents, mixed, log_sums = saved
    batch, length, heads, width = q.shape
    kv_heads, scale = k.shape[2], width**-0.5
    rows_each, groups = length // BLOCK, heads // kv_heads
    order, counts = _visits(documents)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    wide_keys = k.swapaxes(2, 3)

    def one_block(number: jax.Array, carry: tuple) -> tuple:
        row, block = number // rows_each, number % rows_each
        queries = _queries(q, kv_heads, row, block) * jnp.asarray(scale, q.dtype)
        gradient = _queries(g, kv_heads, row, block)
        given = gradient.astype(jnp.float32) * _queries(mixed, kv_heads, row, block).astype(jnp.float32)
        given = given.sum(-1)[:, None, :]
        sums = log_sums[row, block][:, None, :]

        def product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.einsum(formula, x.astype(q.dtype), y, preferred_element_type=jnp.float32)

        def visit(step: jax.Array, carry: tuple) -> tuple:
            q_part, k_gradient, v_gradient = carry
            key_block = order[row, block, step]
            scores = product("ksx,ktx->kst", _keys(k, row, key_block), queries)
            weights = jnp.exp(scores - sums).reshape(kv_heads, BLOCK, BLOCK, groups)
            visible = _visible(documents, row, block, key_block).T[None, :, :, None]
            weights = jnp.where(visible, weights, 0).reshape(kv_heads, BLOCK, -1)
            changes = weights * (product("ksx,ktx->kst", _keys(v, row, key_block), gradient) - given)
            keys = jax.lax.dynamic_slice(wide_keys, (row, 0, 0, key_block * BLOCK), (1, kv_heads, width, BLOCK))[0]
            q_part = q_part + product("kxs,kst->kxt", keys, changes.astype(q.dtype))
            at = (row, 0, key_block * BLOCK, 0)

            def add(into: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
                part = jax.lax.dynamic_slice(into, at, (1, kv_heads, BLOCK, width))
                return jax.lax.dynamic_update_slice(into, part + product("kst,ktx->ksx", x, y)[None], at)

            return q_part, add(k_gradient, changes, queries), add(v_gradient, weights, gradient)

        q_gradient, k_gradient, v_gradient = carry
        start = jnp.zeros((kv_heads, width, BLOCK * groups)), k_gradient, v_gradient
        q_part, k_gradient, v_gradient = jax.lax.fori_loop(0, counts[row, block], visit, start)
        return _put_queries(q_gradient, q_part.swapaxes(1, 2) * scale, row, block), k_gradient, v_gradient

    carry = jax.lax.empty(q.shape, q.dtype), jnp.zeros(k.shape), jnp.zeros(v.shape)
    q_gradient, k_gradient, v_gradient = jax.lax.fori_loop(0, batch * rows_each, one_block, carry)
    k_gradient, v_gradient = (x.transpose(0, 2, 1, 3).astype(k.dtype) for x in (k_gradient, v_gradient))
    return q_gradient, k_gradient, v_gradient, None


_attend.defvjp(_attend_forward, _attend_backward)
