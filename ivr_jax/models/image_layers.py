"""Layers of the image tokenizer: convolution, group norm, residual block, spatial attention, resampling.

Pixels and latents are channels-last here, [B, height, width, C]; kernels are [height, width, in, out]. Attribute names
are those of the public PyTorch checkpoints, so that a parameter's path is its name there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ivr_jax.models import layers

NORM_EPS = 1e-6


def conv(inputs: int, outputs: int, size: int, config: Any, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    """A square convolution with bias, stride 1 or 2; stride 2 pads one row below and one column right only."""
    padding = (0, 1) if stride == 2 else (size // 2, size // 2)
    return nnx.Conv(
        inputs, outputs, (size, size), stride, padding=(padding, padding), dtype=config.dtype,
        param_dtype=config.param_dtype, kernel_init=layers.fan_in_normal(size * size * inputs), rngs=rngs,
        kernel_metadata=layers.sharding_metadata(("kernel_height", "kernel_width", "conv_in", "conv_out")),
        bias_metadata=layers.sharding_metadata(("conv_out",)),
    )  # fmt: skip


class GroupNorm(nnx.Module):
    """Group norm over [height, width, channels of a group], computed in float32.

    `nnx.GroupNorm` reduces all axes of a group at once: 1.6 to 14 times slower forwards on a busy CPU core, and 1.5 to
    2.4 times with the gradient (benchmarks/image_layers.py).
    """

    def __init__(self, channels: int, config: Any, rngs: nnx.Rngs):
        dtype = config.param_dtype
        self.scale = layers.param(rngs, (channels,), ("conv_out",), jax.nn.initializers.ones, dtype)
        self.bias = layers.param(rngs, (channels,), ("conv_out",), jax.nn.initializers.zeros, dtype)
        self.groups = config.norm_groups

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        share = x.shape[3] // self.groups

        def mean(values: jax.Array) -> jax.Array:
            # Over space first, then over a group's channels: several times faster on a CPU than both at once.
            of_group = jnp.mean(jnp.mean(values, axis=(1, 2)).reshape(-1, self.groups, share), axis=2)
            return jnp.repeat(of_group, share, axis=1)[:, None, None, :]

        centred = wide - mean(wide)
        scale, bias = (param[...].astype(jnp.float32)[None, None, None, :] for param in (self.scale, self.bias))
        return (centred * (jax.lax.rsqrt(mean(jnp.square(centred)) + NORM_EPS) * scale) + bias).astype(x.dtype)


class ResBlock(nnx.Module):
    """norm, swish, conv, norm, swish, dropout, conv, plus a shortcut (1×1 conv where the channel count changes)."""

    def __init__(self, inputs: int, outputs: int, config: Any, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, config, rngs)
        self.conv1 = conv(inputs, outputs, 3, config, rngs)
        self.norm2 = GroupNorm(outputs, config, rngs)
        self.conv2 = conv(outputs, outputs, 3, config, rngs)
        self.changes = inputs != outputs
        if self.changes:
            self.nin_shortcut = conv(inputs, outputs, 1, config, rngs)
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(layers.dropout(jax.nn.silu(self.norm2(y)), self.dropout, key))
        return (self.nin_shortcut(x) if self.changes else x) + y


class SpatialAttention(nnx.Module):
    """One-head attention over all cells, residual."""

    def __init__(self, channels: int, config: Any, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config, rngs)
        self.q = conv(channels, channels, 1, config, rngs)
        self.k = conv(channels, channels, 1, config, rngs)
        self.v = conv(channels, channels, 1, config, rngs)
        self.proj_out = conv(channels, channels, 1, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        cells, normal = height * width, self.norm(x)
        q, k, v = (project(normal).reshape(batch, cells, 1, channels) for project in (self.q, self.k, self.v))
        mixed = layers.attention(q, k, v, jnp.ones((1, 1, cells), bool))
        return x + self.proj_out(mixed.reshape(x.shape))


class Downsample(nnx.Module):
    """Half the height and width."""

    def __init__(self, channels: int, config: Any, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, config, rngs, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbour ×2, then a convolution."""

    def __init__(self, channels: int, config: Any, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        return self.conv(doubled.reshape(batch, 2 * height, 2 * width, channels))
