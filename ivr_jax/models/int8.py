"""Weights and caches of inference as int8: symmetric, rounded to the nearest of 255 values of a float32 scale.

A kernel has one scale for each output channel, a cache one for each vector of a position and head.  Both factor out of
the matrix products that read them, so that a product takes the int8 values as they are and its result is scaled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ivr_jax.models import lora

LARGEST = 127
SCALE = "_scale"  # follows a kernel's name


def quantise(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """x → int8 values in the shape of x, and float32 scales that keep `axis` with size 1; x is about their product.

    The error is at most half a scale, which is the largest magnitude along `axis` / 127.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / LARGEST
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale))
    return values.astype(jnp.int8), scale


def dequantise(values: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `quantise`, up to its rounding, in `dtype`."""
    return (values.astype(jnp.float32) * scale).astype(dtype)


def quantise_kernel(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[L, in, out] → int8 [L, in, out] and float32 scales [L, out]."""
    values, scale = quantise(kernel, axis=-2)
    return values, scale[..., 0, :]


def quantise_kernels(params: dict[str, Any]) -> dict[str, Any]:
    """A decoder's parameters with the kernels of its layers as int8: 91% of Emu3.5's.

    The embedding table, of which few rows are read, the output matrix and the norms stay as they are.
    """
    layers = dict(params["layers"])
    for name, place in lora.PLACES.items():
        values, scale = quantise_kernel(params["layers"][place][name])
        layers[place] = {**layers[place], name: values, name + SCALE: scale}
    return {**params, "layers": layers}
