"""What the image tokenizer is made of: convolution, group norm, residual block, spatial attention, resampling.

Pixels and latents are channels-last here, [B, height, width, C]; kernels are [height, width, in, out]. Attribute names
are those of the public PyTorch checkpoints, so that a parameter's path is its name there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ivr_jax.models import layers

NORM_EPS = 1e-6


class Conv(nnx.Module):
    """A square convolution with bias, stride 1 or 2; stride 2 pads one row below and one column right only."""

    def __init__(self, inputs: int, outputs: int, size: int, rngs: nnx.Rngs, dtype: str, stride: int = 1):
        init = layers.fan_in_normal(size * size * inputs)
        axes = ("kernel_height", "kernel_width", "conv_in", "conv_out")
        self.kernel = layers.param(rngs, (size, size, inputs, outputs), axes, init, dtype)
        self.bias = layers.param(rngs, (outputs,), ("conv_out",), jax.nn.initializers.zeros, dtype)
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        size = kernel.shape[0]
        if size == 1:
            return x @ kernel[0, 0] + bias[None, None, None, :]
        padding = ((0, 1), (0, 1)) if self.stride == 2 else ((size // 2,) * 2,) * 2
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, padding, dimension_numbers=numbers)
        return out + bias[None, None, None, :]


class GroupNorm(nnx.Module):
    """Group norm over [height, width, channels of a group], computed in float32."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs, dtype: str):
        self.scale = layers.param(rngs, (channels,), ("conv_out",), jax.nn.initializers.ones, dtype)
        self.bias = layers.param(rngs, (channels,), ("conv_out",), jax.nn.initializers.zeros, dtype)
        self.groups = groups

    def __call__(self, x: jax.Array) -> jax.Array:
        wide, share = x.astype(jnp.float32), x.shape[3] // self.groups

        def mean(values: jax.Array) -> jax.Array:
            # Over space first, then over a group's channels: several times faster on a CPU than both at once.
            of_group = jnp.mean(jnp.mean(values, axis=(1, 2)).reshape(-1, self.groups, share), axis=2)
            return jnp.repeat(of_group, share, axis=1)[:, None, None, :]

        centred = wide - mean(wide)
        scale, bias = (param[...].astype(jnp.float32)[None, None, None, :] for param in (self.scale, self.bias))
        return (centred * (jax.lax.rsqrt(mean(jnp.square(centred)) + NORM_EPS) * scale) + bias).astype(x.dtype)


class ResBlock(nnx.Module):
    """norm, swish, conv, norm, swish, dropout, conv, plus a shortcut (1×1 conv where the channel count changes)."""

    def __init__(self, inputs: int, outputs: int, groups: int, dropout: float, rngs: nnx.Rngs, dtype: str):
        self.norm1 = GroupNorm(inputs, groups, rngs, dtype)
        self.conv1 = Conv(inputs, outputs, 3, rngs, dtype)
        self.norm2 = GroupNorm(outputs, groups, rngs, dtype)
        self.conv2 = Conv(outputs, outputs, 3, rngs, dtype)
        if inputs != outputs:
            self.nin_shortcut = Conv(inputs, outputs, 1, rngs, dtype)
        self.dropout, self.changes = dropout, inputs != outputs

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(layers.dropout(jax.nn.silu(self.norm2(y)), self.dropout, key))
        return (self.nin_shortcut(x) if self.changes else x) + y


class SpatialAttention(nnx.Module):
    """One-head attention over all cells, residual."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs, dtype: str):
        new = functools.partial(Conv, channels, channels, 1, rngs, dtype)
        self.norm = GroupNorm(channels, groups, rngs, dtype)
        self.q, self.k, self.v, self.proj_out = new(), new(), new(), new()

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        batch, height, width, channels = x.shape
        cells, normal = height * width, self.norm(x)
        q, k, v = (conv(normal).reshape(batch, cells, 1, channels) for conv in (self.q, self.k, self.v))
        mixed = layers.attention(q, k, v, jnp.ones((1, 1, cells), bool))
        return x + self.proj_out(mixed.reshape(x.shape))


class Downsample(nnx.Module):
    """Half the height and width."""

    def __init__(self, channels: int, rngs: nnx.Rngs, dtype: str):
        self.conv = Conv(channels, channels, 3, rngs, dtype, stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbour ×2, then a convolution."""

    def __init__(self, channels: int, rngs: nnx.Rngs, dtype: str):
        self.conv = Conv(channels, channels, 3, rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        doubled = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
        return self.conv(doubled.reshape(batch, 2 * height, 2 * width, channels))
