"""Attention that leaves out hidden blocks, against the plain attention, in value and gradient."""

from __future__ import annotations

import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax.models import layers
from ivr_jax.models.blocked_attention import BLOCK, _Documents, _visits, blocked_attention

LENGTH = 3 * BLOCK + 10  # padded to four blocks
ROWS = {
    "several examples": ((70, 90), (20, 5, 130)),  # lengths of the examples of each row, the rest is padding
    "one long example": ((LENGTH,), (LENGTH - 1,)),
    "a block of padding": ((40,), (BLOCK, BLOCK)),
}


def segments_of(rows: tuple[tuple[int, ...], ...], length: int = LENGTH) -> np.ndarray:
    """int32 [B, T]: 1, 2, … for the examples of each row, 0 after them."""
    packed = [np.repeat(np.arange(len(row) + 1), (*row, length - sum(row))) for row in rows]
    numbers = [np.where(row == len(of), 0, row + 1) for row, of in zip(packed, rows, strict=True)]
    return np.stack(numbers).astype("int32")


def operands(batch: int = 2, length: int = LENGTH, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype="float32"):
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, length, n, width)), dtype) for n in (heads, kv_heads, kv_heads, heads)]


@jax.jit
def both(q, k, v, g, segments, prefixes):
    """(values, gradients of q, k and v) of the blocked and of the plain attention; padding counts as 0."""
    real = (segments > 0)[:, :, None, None]

    def of(attend):
        mixed, gradients = jax.vjp(lambda *x: jnp.where(real, attend(*x), 0), q, k, v)
        return mixed, gradients(g.astype(mixed.dtype))

    mask = layers.causal_mask(q.shape[1], segments, prefixes)
    return of(lambda *x: blocked_attention(*x, segments, prefix_ids=prefixes)), of(
        lambda *x: layers.attention(*x, mask)
    )


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_values_and_gradients_equal_those_of_plain_attention(rows):
    segments = segments_of(rows)
    for found, expected in zip(*map(jax.tree.leaves, both(*operands(), segments, 0 * segments)), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_answers_see_their_shared_prompt():
    segments = segments_of(((60, 70, 65), (30, 100, 40)))
    prefixes = np.where(segments > 1, 1, 0).astype("int32")
    for found, expected in zip(*map(jax.tree.leaves, both(*operands(), segments, prefixes)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = both(*operands(), segments, 0 * prefixes)[0][0]
    assert np.abs(np.asarray(both(*operands(), segments, prefixes)[0][0] - alone))[segments > 1].max() > 0.1


def test_rows_without_segments_are_one_example():
    q, k, v, _ = operands()
    np.testing.assert_array_equal(
        blocked_attention(q, k, v, None), blocked_attention(q, k, v, jnp.ones(q.shape[:2], jnp.int32))
    )


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    segments = segments_of(ROWS["several examples"])
    (mixed, gradients), (expected, _) = both(*operands(dtype="bfloat16"), segments, 0 * segments)
    assert {x.dtype for x in (mixed, *gradients)} == {jnp.bfloat16.dtype}
    exact = both(*(x.astype(jnp.float32) for x in operands(dtype="bfloat16")), segments, 0 * segments)[1]
    for found, value in zip((mixed, *gradients), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), value, atol=0.02 * float(jnp.abs(value).max()))


def test_blocks_that_share_no_example_are_left_out():
    """Three examples of two blocks each, then padding: 3 of the 6 x 7 / 2 pairs a row, and the padding's diagonal."""
    segments = jnp.asarray(segments_of(((2 * BLOCK, 2 * BLOCK, BLOCK),), 6 * BLOCK))
    places = jnp.arange(6 * BLOCK)[None]
    order, counts = _visits(_Documents(segments, 0 * segments, segments, places))
    assert counts.tolist() == [[1, 2, 1, 2, 1, 1]]
    visited = [sorted(order[0, n, :count].tolist()) for n, count in enumerate(counts[0])]
    assert visited == [[0], [0, 1], [2], [2, 3], [4], [5]]
    prefixes = jnp.where(segments > 1, 1, 0)
    _, counts = _visits(_Documents(segments, prefixes, segments, places))
    assert counts.tolist() == [[1, 2, 3, 4, 3, 1]]


SHARDED = """
import json, sys
import jax, numpy as np
from models.test_blocked_attention import *
from ivr_jax import sharding
segments = segments_of(((70, 90), (20, 5, 130), (200,), (10,)), 256)
prefixes = np.where(segments > 1, 1, 0).astype("int32")
inputs = *operands(4, 256), segments, prefixes
for mesh in json.loads(sys.argv[1]):
    over_tensor = mesh.pop("fsdp_over_tensor", False)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        def attend(q, k, v):
            return jnp.where((segments > 0)[:, :, None, None],
                             blocked_attention(q, k, v, segments, over_tensor, prefixes), 0)
        mixed, gradients = jax.jit(lambda q, k, v, g: (lambda m, f: (m, f(g)))(*jax.vjp(attend, q, k, v)))(*inputs[:4])
    expected = jax.tree.leaves(both(*inputs)[1])
    print(max(float(np.abs(jax.device_get(x) - y).max()) for x, y in zip([mixed, *gradients], expected)))
"""


def test_on_a_mesh_it_equals_plain_attention():
    """Rows over fsdp, heads (or rows) over tensor, queries over sequence, and rows that do not divide."""
    meshes = [{"fsdp": 2, "tensor": 2, "sequence": 2}, {"tensor": 2, "sequence": 4}, {"fsdp": 8}]
    meshes += [{"fsdp": 2, "tensor": 2, "sequence": 2, "fsdp_over_tensor": True}]
    lines = commands.on_devices(8, SHARDED, json.dumps(meshes), JAX_NUMPY_RANK_PROMOTION="raise")
    errors = [float(line) for line in lines]
    assert len(errors) == 4 and max(errors) < 1e-5
