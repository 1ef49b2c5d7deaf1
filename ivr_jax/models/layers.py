"""Parts of the decoder: parameters, projections, embedding, RMSNorm, rotary positions, attention, dropout.

Axes of shapes, here and in all of the package:

    B  rows of a batch     T  tokens of a row (queries)     S  keys (cache positions)  L  layers     V  vocabulary
    D  model width         F  MLP width                     h  width of a head
    H  query heads         K  key and value heads           G = H / K, queries of one key head
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from ivr_jax import sharding

MASKED = -1e30  # a finite minus infinity: a row that may see nothing stays free of NaN
CAUSAL_BLOCKS = 4  # causal attention leaves out the blocks above the diagonal of this many: 10/16 of the work


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: jax.nn.initializers.Initializer,
    dtype: str,
    num_layers: int | None = None,
) -> nnx.Param:
    """A parameter with its logical axes (one name a dimension), which `nnx.get_partition_spec` reads.

    `num_layers`: that many stacked along a leading axis "layers".  Flax places nothing: `jit` with out_shardings does.
    """
    if num_layers is not None:
        shape, axes = (num_layers, *shape), ("layers", *axes)
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} and logical axes {axes} differ in length")
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), **sharding_metadata(axes))


def sharding_metadata(axes: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of an `nnx.Variable` with these logical axes, not placed when it is created."""
    return {"out_sharding": axes, "eager_sharding": False}


def abstract_module(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph of a module and its parameters' shapes; nothing is allocated.

    Shapes carry no mesh: Flax would look for the logical axes among the axes of the mesh in force.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return nnx.split(nnx.eval_shape(make))


def fan_in_normal(fan_in: int, gain: float = 1.0) -> jax.nn.initializers.Initializer:
    """Normal with standard deviation gain / sqrt(fan_in), for kernels that may carry a leading layer axis."""
    return jax.nn.initializers.normal(gain / math.sqrt(fan_in))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: jax.Array, kernel: jax.Array, axes: tuple[str, str], fsdp_over_tensor: bool = False) -> jax.Array:
    """x [..., in] times kernel [in, out] → [..., out], in the dtype of `x`; `axes`: the kernel's.

    On a mesh the kernel is all-gathered in the dtype of `x` (over both of its axes with `fsdp_over_tensor`, see
    `sharding.partition`), and its gradient is reduce-scattered to the kernel's shards.  The gradient is written out as
    one contraction over all leading axes; the one that JAX derives makes XLA transpose the large operand in memory
    first, a quarter of a small model's training step on a CPU.
    """
    kernel = kernel.astype(x.dtype)
    layout = _fsdp_layout(x, kernel, axes, fsdp_over_tensor)
    if layout is not None:
        return layout.product(x, kernel, transposed=False)
    return jnp.matmul(x, sharding.gather(kernel, axes), preferred_element_type=x.dtype)


def _project_forward(x, kernel, axes, fsdp_over_tensor) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel, axes, fsdp_over_tensor), (x, kernel)


def _project_backward(axes, fsdp_over_tensor, saved, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    g = g.astype(x.dtype)
    layout = _fsdp_layout(x, kernel, axes, fsdp_over_tensor)
    if layout is not None:
        x_gradient = layout.product(g, kernel.astype(g.dtype), transposed=True)
        return x_gradient, layout.kernel_gradient(x, g).astype(kernel.dtype)
    return _project_gradients(x, kernel, sharding.gather(kernel.astype(g.dtype), axes), g, axes)


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def project_gathered(
    x: jax.Array, kernel: jax.Array, gathered: jax.Array, axes: tuple[str, str], dtype: str
) -> jax.Array:
    """`project` to `dtype` in a loop: `gathered` is what `sharding.gather` made of the kernel before the loop.

    The gradient is that of `kernel`, in its own dtype; `gathered`, in the dtype of `x`, gets none.
    """
    return jnp.matmul(x, gathered, preferred_element_type=jnp.dtype(dtype))


def _project_gathered_forward(x, kernel, gathered, axes, dtype) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return project_gathered(x, kernel, gathered, axes, dtype), (x, kernel, gathered)


def _project_gathered_backward(axes, dtype, saved, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, gathered = saved
    return *_project_gradients(x, kernel, gathered, g.astype(x.dtype), axes), None


project_gathered.defvjp(_project_gathered_forward, _project_gathered_backward)


def _project_gradients(x, kernel, gathered, g, axes) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [..., in] and of the kernel, from g [..., out] and the gathered kernel [in, out]."""
    x_gradient = jax.lax.dot_general(g, gathered, (((g.ndim - 1,), (1,)), ((), ())))
    return x_gradient, _kernel_gradient(x, g, axes).astype(kernel.dtype)


def _kernel_gradient(x: jax.Array, g: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """x [..., in] and g [..., out] → [in, out], summed over all devices into the kernel's shards.

    The collectives are written out: left to itself the partitioner gathers all of x for kernels split by rows.
    """
    leading = tuple(range(x.ndim - 1))
    mesh = jax.sharding.get_abstract_mesh()
    kernel_spec = sharding.spec((x.shape[-1], g.shape[-1]), axes)
    rows = sharding.spec(x.shape[:-1], ("batch", "length")) if x.ndim == 3 else (None,)
    if mesh.empty or mesh.size == 1 or rows[0] is None or kernel_spec != sharding.partition(axes):
        return sharding.constrain(jax.lax.dot_general(x, g, ((leading, leading), ((), ()))), axes)
    scattered = next(i for i, part in enumerate(kernel_spec) if "fsdp" in (part or ()))

    def local(x: jax.Array, g: jax.Array) -> jax.Array:
        share = jax.lax.dot_general(x, g, ((leading, leading), ((), ())))
        share = jax.lax.psum_scatter(share, "fsdp", scatter_dimension=scattered, tiled=True)
        others = [axis for axis in ("data", "sequence") if mesh.shape[axis] > 1 and (axis == "data" or rows[1])]
        return jax.lax.psum(share, others) if others else share

    specs = tuple(PartitionSpec(*rows, "tensor" if "tensor" in (part or ()) else None) for part in kernel_spec)
    return jax.shard_map(local, in_specs=specs, out_specs=kernel_spec, check_vma=False)(x, g)


class _FsdpLayout(NamedTuple):
    """Products of devices that each hold rows of their own and gather the kernel, with all collectives written out.

    Rows and tokens become one axis first: XLA:TPU cannot fuse the products of a batch of one row.

    Attributes:
      rows: mesh axes over which B and T are split.
      kernel: mesh axes over which each axis of the kernel is split.
    """

    rows: tuple[tuple[str, ...], ...]
    kernel: tuple[tuple[str, ...], ...]

    def product(self, x: jax.Array, kernel: jax.Array, transposed: bool) -> jax.Array:
        """x [B, T, in] times the kernel [in, out], or [B, T, out] times its transpose."""

        def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
            for axis, names in enumerate(self.kernel):
                for name in reversed(names):  # one after the other: of two at once XLA makes a sum of zeros
                    kernel = jax.lax.all_gather(kernel, name, axis=axis, tiled=True)
            flat = x.reshape(-1, x.shape[-1])
            contracted = (((1,), (int(transposed),)), ((), ()))
            made = jax.lax.dot_general(flat, kernel, contracted, preferred_element_type=x.dtype)
            return made.reshape(*x.shape[:-1], -1)

        x_spec, kernel_spec = PartitionSpec(*self.rows, None), PartitionSpec(*self.kernel)
        mapped = jax.shard_map(local, in_specs=(x_spec, kernel_spec), out_specs=x_spec, check_vma=False)
        return mapped(x, kernel)

    def kernel_gradient(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """x [B, T, in] and g [B, T, out] → [in, out], summed over all devices into the kernel's shards."""
        others = tuple(name for names in self.rows for name in names if name not in ("fsdp", "tensor"))

        def local(x: jax.Array, g: jax.Array) -> jax.Array:
            x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
            share = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())))
            for axis, names in enumerate(self.kernel):
                for name in names:
                    share = jax.lax.psum_scatter(share, name, scatter_dimension=axis, tiled=True)
            return jax.lax.psum(share, others)

        x_spec, kernel_spec = PartitionSpec(*self.rows, None), PartitionSpec(*self.kernel)
        return jax.shard_map(local, in_specs=(x_spec, x_spec), out_specs=kernel_spec, check_vma=False)(x, g)


def _fsdp_layout(x: jax.Array, kernel: jax.Array, axes: tuple[str, str], fsdp_over_tensor: bool) -> _FsdpLayout | None:
    """The layout of `fsdp_over_tensor` on the mesh in force; None without a mesh, or where shapes do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if not fsdp_over_tensor or mesh.empty or mesh.size == 1 or x.ndim != 3:
        return None
    rows = sharding.spec(x.shape[:-1], ("batch", "length"), fsdp_over_tensor)
    kernel_spec = sharding.spec(kernel.shape, axes)
    if None in rows or kernel_spec != sharding.partition(axes):
        return None
    return _FsdpLayout(tuple(map(sharding.mesh_axes, rows)), tuple(map(sharding.mesh_axes, kernel_spec)))


def embed_lookup(table: jax.Array, tokens: jax.Array, dtype: str, fsdp_over_tensor: bool = False) -> jax.Array:
    """Rows `tokens` int [B, T] of `table` [V, D], axes ("vocab_rows", "width") → [B, T, D] in `dtype`.

    On a mesh each tensor shard looks up the ids that it holds; the sum over the shards is scattered over the tokens,
    or over the rows of the batch with `fsdp_over_tensor` (see `sharding.partition`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, columns = sharding.spec(tokens.shape, ("batch", "length"))
    if mesh.empty or mesh.size == 1 or rows is None or table.shape[0] % (mesh.shape["tensor"] * mesh.shape["fsdp"]):
        return _rows(table.astype(dtype), tokens)
    tensor = mesh.shape["tensor"]
    rows_a_device = tokens.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"])
    tokens_a_device = tokens.shape[1] // mesh.shape["sequence"]
    by_rows = fsdp_over_tensor and rows_a_device % tensor == 0
    by_tokens = not by_rows and columns is not None and tokens_a_device % tensor == 0

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = jax.lax.all_gather(table, "fsdp", axis=0, tiled=True)
        table = jax.lax.pcast(table, ("data",) if columns is None else ("data", "sequence"), to="varying")
        index = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        held = (index >= 0) & (index < table.shape[0])
        found = jnp.where(held[..., None], _rows(table, jnp.where(held, index, 0)), 0)
        if by_rows or by_tokens:
            return jax.lax.psum_scatter(found, "tensor", scatter_dimension=0 if by_rows else 1, tiled=True)
        return jax.lax.psum(found, "tensor")

    in_specs = (sharding.partition(("vocab_rows", "width")), PartitionSpec(rows, columns))
    out_rows = (*rows, "tensor") if by_rows else rows
    out_specs = PartitionSpec(out_rows, ("sequence", "tensor") if by_tokens else columns, None)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)(table.astype(dtype), tokens)


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


def causal_mask(
    length: int, segment_ids: jax.Array | None = None, prefix_ids: jax.Array | None = None
) -> jax.Array:
    """bool [B or 1, T, T]: earlier tokens, of the same segment only where `segment_ids` [B, T] are given (0: padding,
    which sees padding), and of the segment `prefix_ids` [B, T] (0: none)."""
    order = jnp.arange(length)
    causal = (order[None, :] <= order[:, None])[None]
    if segment_ids is None:
        return causal
    seen = segment_ids[:, None, :] == segment_ids[:, :, None]
    if prefix_ids is not None:
        seen |= (segment_ids[:, None, :] == prefix_ids[:, :, None]) & (prefix_ids[:, :, None] > 0)
    return causal & seen


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    causal: bool = False,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped kv heads; `fused_attention` has the kernels of accelerators.

    Args:
      q: [B, T, H, h]; k, v: [B, S, K, h] with H a multiple of K.
      mask: bool [B or 1, T or 1, S], true where query t may see key s. A query that may see nothing averages values.
      causal: promises that T = S and that the mask hides every later key, so that blocks of them can be left out.
      dropout_rate, key: of attention weights; no key, no dropout.

    Returns:
      [B, T, H, h] in the dtype of `q`. Scores and softmax are float32.
    """
    length = q.shape[1]
    if length == 1:
        return _attend_once(q, k, v, mask)
    if not causal or length % CAUSAL_BLOCKS or length < 16 * CAUSAL_BLOCKS:
        return _attend(q, k, v, mask, dropout_rate, key)
    size = length // CAUSAL_BLOCKS
    mask = jnp.broadcast_to(mask, (mask.shape[0], length, length))
    blocks = []
    for block in range(CAUSAL_BLOCKS):
        end = (block + 1) * size
        rows = slice(block * size, end)
        block_key = None if key is None else jax.random.fold_in(key, block)
        blocks.append(_attend(q[:, rows], k[:, :end], v[:, :end], mask[:, rows, :end], dropout_rate, block_key))
    return jnp.concatenate(blocks, axis=1)


def _attend(q, k, v, mask, dropout_rate, key) -> jax.Array:
    """Heads first and the G queries of a kv head side by side: one matrix product a kv head, forwards and backwards."""
    batch, length, heads, width = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    groups = heads // kv_heads
    q = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, length, kv_heads, groups, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, keys)
    scores = jnp.where(mask[:, None, None, :, :], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1).reshape(batch, kv_heads, groups * length, 1)
    weights = dropout(weights, dropout_rate, key).reshape(batch, kv_heads, groups * length, keys).astype(v.dtype)
    mixed = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32) / total
    mixed = mixed.reshape(batch, kv_heads, groups, length, width).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, width).astype(v.dtype)


def _attend_once(q, k, v, mask) -> jax.Array:
    """One query a row, as in decoding: the keys are read as they are stored, never transposed."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = (q * jnp.asarray(width**-0.5, q.dtype)).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None, :, :], scores, MASKED), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, length, heads, width)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity when `key` is None or `rate` is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))
