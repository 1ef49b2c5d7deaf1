"""What the decoder is made of: declared parameters, RMSNorm, rotary positions, attention, dropout.

Shapes follow the repository's legend: B batch, T queries, S keys (cache slots), D model width, H query heads,
K kv heads, G = H / K queries a kv head, h head dim, F mlp width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from ivr_jax import sharding
from ivr_jax.models import fused_attention

MASKED = -1e30  # a finite minus infinity: a row that may see nothing stays free of NaN
CAUSAL_BLOCKS = 4  # causal attention leaves out the blocks above the diagonal of this many: 10/16 of the work


def declare(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: jax.nn.initializers.Initializer, dtype: str
) -> nnx.Param:
    """A parameter and all there is to know of it: shape, logical axes (one name a dimension), initialiser, dtype."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in length")
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


def fan_in_normal(fan_in: int, gain: float = 1.0) -> jax.nn.initializers.Initializer:
    """Normal with standard deviation gain / sqrt(fan_in), for kernels that may carry a leading layer axis."""
    return jax.nn.initializers.normal(gain / math.sqrt(fan_in))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: jax.Array, kernel: jax.Array, axes: tuple[str, str], dtype: str | None = None, gathered: bool = False
) -> jax.Array:
    """x [..., in] times kernel [in, out] → [..., out], in the dtype of `x` (or `dtype`); `axes`: the kernel's.

    On a mesh the kernel is gathered in the dtype of `x` (whole when `gathered`, see `sharding.partition`), and its
    gradient goes straight back to where the kernel lies (a reduce-scatter).  The gradient is written out as one
    contraction over all leading axes; the one that JAX derives makes XLA transpose the large operand in memory first, a
    quarter of a small model's training step on a CPU.
    """
    kernel, wanted = kernel.astype(x.dtype), jnp.dtype(dtype or x.dtype)
    if (own := _own_rows(x, kernel, axes, gathered)) is not None:
        return own.product(x, kernel, wanted, transposed=False)
    return jnp.matmul(x, sharding.gather(kernel, axes), preferred_element_type=wanted)


def _project_forward(x, kernel, axes, dtype, gathered) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel, axes, dtype, gathered), (x, kernel)


def _project_backward(
    axes, dtype, gathered, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    g = g.astype(x.dtype)
    if (own := _own_rows(x, kernel, axes, gathered)) is not None:
        back = own.product(g, kernel.astype(g.dtype), g.dtype, transposed=True)
        return back, own.gradient(x, g).astype(kernel.dtype)
    whole = sharding.gather(kernel.astype(g.dtype), axes)
    back = jax.lax.dot_general(g, whole, (((g.ndim - 1,), (1,)), ((), ())))
    return back, _kernel_gradient(x, g, axes).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def project_gathered(
    x: jax.Array, kernel: jax.Array, whole: jax.Array, axes: tuple[str, str], dtype: str
) -> jax.Array:
    """`project` in a loop, with `whole`, the kernel as `sharding.gather` made it before the loop in the dtype of `x`.

    The gradient is that of `kernel`, in its own dtype, and `whole` gets none.
    """
    return jnp.matmul(x, whole, preferred_element_type=jnp.dtype(dtype))


def _project_gathered_forward(x, kernel, whole, axes, dtype) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return project_gathered(x, kernel, whole, axes, dtype), (x, kernel, whole)


def _project_gathered_backward(axes, dtype, saved, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, whole = saved
    g = g.astype(x.dtype)
    back = jax.lax.dot_general(g, whole, (((g.ndim - 1,), (1,)), ((), ())))
    return back, _kernel_gradient(x, g, axes).astype(kernel.dtype), None


project_gathered.defvjp(_project_gathered_forward, _project_gathered_backward)


class _OwnRows(NamedTuple):
    """Products of devices that each hold rows of their own and gather the kernel: all its collectives are written out.

    Rows and tokens become one axis first: XLA:TPU cannot fuse the products of a batch of one row.
    `rows`: mesh axes that cut B and T; `shards`: those that cut each axis of the kernel.
    """

    rows: tuple[tuple[str, ...], ...]
    shards: tuple[tuple[str, ...], ...]

    def product(self, x: jax.Array, kernel: jax.Array, dtype: Any, transposed: bool) -> jax.Array:
        """x [B, T, in] times the kernel [in, out], or [B, T, out] times its transpose."""

        def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
            for axis, names in enumerate(self.shards):
                for name in reversed(names):  # one after the other: of two at once XLA makes a sum of zeros
                    kernel = jax.lax.all_gather(kernel, name, axis=axis, tiled=True)
            flat, contracted = x.reshape(-1, x.shape[-1]), int(transposed)
            made = jax.lax.dot_general(flat, kernel, (((1,), (contracted,)), ((), ())), preferred_element_type=dtype)
            return made.reshape(*x.shape[:-1], -1)

        specs = PartitionSpec(*self.rows, None), PartitionSpec(*self.shards)
        return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(x, kernel)

    def gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """x [B, T, in] and g [B, T, out] → [in, out], added up over all devices where the kernel's shards lie."""
        others = tuple(name for names in self.rows for name in names if name not in ("fsdp", "tensor"))

        def local(x: jax.Array, g: jax.Array) -> jax.Array:
            x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
            share = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))
            for axis, names in enumerate(self.shards):
                for name in names:
                    share = jax.lax.psum_scatter(share, name, scatter_dimension=axis, tiled=True)
            return jax.lax.psum(share, others)

        given, lies = PartitionSpec(*self.rows, None), PartitionSpec(*self.shards)
        return jax.shard_map(local, in_specs=(given, given), out_specs=lies, check_vma=False)(x, g)


def _own_rows(x: jax.Array, kernel: jax.Array, axes: tuple[str, str], gathered: bool) -> _OwnRows | None:
    """How `gathered` products lie on the mesh in force; None where there is no mesh, or shapes do not divide."""
    mesh, lies = jax.sharding.get_abstract_mesh(), sharding.spec(kernel.shape, axes)
    if not gathered or mesh.empty or mesh.size == 1 or x.ndim != 3:
        return None
    rows = sharding.spec(x.shape[:-1], ("batch", "length"), gathered)
    if None in rows or lies != sharding.partition(axes):
        return None
    rows, shards = (tuple((p,) if isinstance(p, str) else tuple(p or ()) for p in parts) for parts in (rows, lies))
    return _OwnRows(rows, shards)


def _kernel_gradient(x: jax.Array, g: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """x [..., in] and g [..., out] → [in, out], each device's share added up where the kernel's shard lies.

    The collectives are written out: left to itself the partitioner gathers x whole for kernels split by rows.
    """
    leading = tuple(range(x.ndim - 1))
    mesh, lies = jax.sharding.get_abstract_mesh(), sharding.spec((x.shape[-1], g.shape[-1]), axes)
    rows = sharding.spec(x.shape[:-1], ("batch", "length")) if x.ndim == 3 else (None,)
    if mesh.empty or mesh.size == 1 or rows[0] is None or lies != sharding.partition(axes):
        return sharding.constrain(jax.lax.dot_general(x, g, ((leading, leading), ((), ()))), axes)
    scattered = next(i for i, part in enumerate(lies) if "fsdp" in (part or ()))

    def local(x: jax.Array, g: jax.Array) -> jax.Array:
        share = jax.lax.dot_general(x, g, ((leading, leading), ((), ())))
        share = jax.lax.psum_scatter(share, "fsdp", scatter_dimension=scattered, tiled=True)
        others = [axis for axis in ("data", "sequence") if mesh.shape[axis] > 1 and (axis == "data" or rows[1])]
        return jax.lax.psum(share, others) if others else share

    specs = tuple(PartitionSpec(*rows, "tensor" if "tensor" in (part or ()) else None) for part in lies)
    return jax.shard_map(local, in_specs=specs, out_specs=lies, check_vma=False)(x, g)


project.defvjp(_project_forward, _project_backward)


def look_up(table: jax.Array, tokens: jax.Array, dtype: str, gathered: bool = False) -> jax.Array:
    """Rows `tokens` int [B, T] of `table` [V, D], axes ("vocab_rows", "width") → [B, T, D] in `dtype`.

    On a mesh each tensor shard looks up the ids that it holds; the sum over the shards is scattered over the tokens,
    or over the rows of the batch when `gathered` (see `sharding.partition`).
    """
    mesh, where = jax.sharding.get_abstract_mesh(), sharding.spec(tokens.shape, ("batch", "length"))
    if mesh.empty or mesh.size == 1 or where[0] is None or table.shape[0] % (mesh.shape["tensor"] * mesh.shape["fsdp"]):
        return _rows(table.astype(dtype), tokens)
    split, tensor = where[1] is not None, mesh.shape["tensor"]
    own_rows = gathered and tokens.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"]) % tensor == 0
    own_tokens = not own_rows and split and tokens.shape[1] // mesh.shape["sequence"] % tensor == 0

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(table, "fsdp", axis=0, tiled=True)
        whole = jax.lax.pcast(whole, ("data", "sequence") if split else ("data",), to="varying")
        here = tokens - jax.lax.axis_index("tensor") * whole.shape[0]
        mine = (here >= 0) & (here < whole.shape[0])
        found = jnp.where(mine[..., None], _rows(whole, jnp.where(mine, here, 0)), 0)
        if own_rows or own_tokens:
            return jax.lax.psum_scatter(found, "tensor", scatter_dimension=0 if own_rows else 1, tiled=True)
        return jax.lax.psum(found, "tensor")

    rows = (*where[0], "tensor") if own_rows else where[0]
    out = PartitionSpec(rows, ("sequence", "tensor") if own_tokens else where[1], None)
    specs = (sharding.partition(("vocab_rows", "width")), where)
    return jax.shard_map(local, in_specs=specs, out_specs=out)(table.astype(dtype), tokens)


@jax.custom_vjp
def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table, whose gradient is summed in float32: an image's end of row occurs thousands of times a batch."""
    return table[index]


def _rows_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[index], (table, index)


def _rows_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, index = saved
    wide = jnp.promote_types(g.dtype, jnp.float32)
    return jnp.zeros_like(table, wide).at[index].add(g.astype(wide)).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32, returned in the dtype of `x`; `scale` has that axis's size."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))).astype(x.dtype)


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: Mapping[str, Any] | None, trained_length: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, float32 [B, T, h/2] each, for integer `positions` [B, T].

    `scaling` is None, `{"rope_type": "linear", "factor"}` (positions divided by the factor) or
    `{"rope_type": "dynamic", "factor"}` (NTK: beyond `trained_length` the base grows with the longest position *of this
    call*, as in transformers; a generation that crosses `trained_length` so keeps its older keys at the older base).
    """
    base = jnp.float32(theta)
    angle_positions = positions.astype(jnp.float32)
    if scaling and scaling["rope_type"] == "linear":
        angle_positions = angle_positions / scaling["factor"]
    elif scaling and scaling["rope_type"] == "dynamic":
        factor = scaling["factor"]
        length = jnp.maximum(jnp.max(angle_positions) + 1.0, float(trained_length))
        base = base * (factor * length / trained_length - (factor - 1.0)) ** (head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = angle_positions[:, :, None] * (base ** -exponents)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding, "rotate half" convention. x [B, T, heads, h]; cos, sin [B, T, h/2]; computed in float32.

    The halves change places by a product with a matrix of 0, 1 and -1, which is exact: a TPU computes with halves of
    its lanes at half its speed, and joins them slowly.
    """
    cos, sin = (jnp.concatenate([table, table], axis=-1)[:, :, None, :] for table in (cos, sin))
    half = np.eye(x.shape[-1] // 2)
    swap = jnp.asarray(np.block([[0 * half, half], [-half, 0 * half]]), x.dtype)  # (first, second) → (-second, first)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    turned = jnp.matmul(x, swap, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    causal: bool = False,
    segment_ids: jax.Array | None = None,
    kernel: str = "plain",
    gathered: bool = False,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped kv heads: the one place where its implementations meet.

    Args:
      q: [B, T, H, h]; k, v: [B, S, K, h] with H a multiple of K.
      mask: bool [B or 1, T or 1, S], true where query t may see key s. A query that may see nothing averages values.
        None for a fused kernel, which makes its own.
      causal: promises that T = S and that the mask hides every later key, so that blocks of them can be left out.
      segment_ids: int [B, T] for a fused kernel: a token sees its own segment only; None: all of the row is one.
      kernel: what `fused_attention.choose` said: "plain", "splash" (TPU) or "cudnn" (GPU).
      gathered: how rows and heads lie on a mesh, see `sharding.partition`.
      dropout, key: rate and key for dropping attention weights; no key, no dropout.

    Returns:
      [B, T, H, h] in the dtype of `q`. Scores and softmax are float32.
    """
    length = q.shape[1]
    if kernel != "plain":
        return fused_attention.KERNELS[kernel](q, k, v, segment_ids, gathered)
    if length == 1:
        return _attend_once(q, k, v, mask)
    if not causal or length % CAUSAL_BLOCKS or length < 16 * CAUSAL_BLOCKS:
        return _attend(q, k, v, mask, dropout, key)
    size, mask = length // CAUSAL_BLOCKS, jnp.broadcast_to(mask, (mask.shape[0], length, length))
    blocks = []
    for block in range(CAUSAL_BLOCKS):
        seen, rows = (block + 1) * size, slice(block * size, (block + 1) * size)
        block_key = None if key is None else jax.random.fold_in(key, block)
        blocks.append(_attend(q[:, rows], k[:, :seen], v[:, :seen], mask[:, rows, :seen], dropout, block_key))
    return jnp.concatenate(blocks, axis=1)


def _attend(q, k, v, mask, dropout, key) -> jax.Array:
    """Heads first and the G queries of a kv head side by side: one matrix product a kv head, forwards and backwards."""
    batch, length, heads, width = q.shape
    kv_heads, slots = k.shape[2], k.shape[1]
    groups = heads // kv_heads
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, length, kv_heads, groups, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, slots)
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1).reshape(batch, kv_heads, groups * length, 1)
    weights = drop(weights, dropout, key).reshape(batch, kv_heads, groups * length, slots).astype(v.dtype)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32) / total
    mixed = mixed.reshape(batch, kv_heads, groups, length, width).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, width).astype(v.dtype)


def _attend_once(q, k, v, mask) -> jax.Array:
    """One query a row, as in decoding: the keys are read where they lie, never transposed."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :, :], scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, heads, width)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity when `key` is None or `rate` is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
