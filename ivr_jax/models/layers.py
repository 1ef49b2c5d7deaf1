"""What the decoder is made of: declared parameters, RMSNorm, rotary positions, attention, dropout.

Shapes follow the repository's legend: B batch, T queries, S keys (cache slots), D model width, H query heads,
K kv heads, G = H / K queries a kv head, h head dim, F mlp width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] times kernel [in, out] → [..., out], in the dtype of `x`.

    The gradient of the kernel is written out as one contraction over all leading axes; the one that JAX derives makes
    XLA transpose the large operand in memory first, a quarter of a small model's training step on a CPU.
    """
    return jnp.matmul(x, kernel.astype(x.dtype))


def _project_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel), (x, kernel)


def _project_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    leading = tuple(range(x.ndim - 1))
    back = jax.lax.dot_general(g, kernel.astype(g.dtype), (((g.ndim - 1,), (1,)), ((), ())))
    return back, jax.lax.dot_general(x, g, ((leading, leading), ((), ()))).astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


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
    """Rotary embedding, "rotate half" convention. x [B, T, heads, h]; cos, sin [B, T, h/2]; computed in float32."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped kv heads: the one place where its implementation is chosen.

    Args:
      q: [B, T, H, h]; k, v: [B, S, K, h] with H a multiple of K.
      mask: bool [B or 1, T or 1, S], true where query t may see key s. A query that may see nothing averages values.
      causal: promises that T = S and that the mask hides every later key, so that blocks of them can be left out.
      dropout, key: rate and key for dropping attention weights; no key, no dropout.

    Returns:
      [B, T, H, h] in the dtype of `q`. Scores and softmax are float32.
    """
    length = q.shape[1]
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
