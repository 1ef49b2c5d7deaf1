"""Time of the image tokenizer's group norm against Flax's, and of a 3 × 3 convolution against matrix products.

    python benchmarks/image_layers.py                    both
    python benchmarks/image_layers.py --only=conv        norm or conv

Prints milliseconds, the least of 15 calls: wall time of norms that take turns, forwards and with the gradient, and CPU
time of convolutions of 8 images, forwards.
"""

from __future__ import annotations

import argparse
import functools
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ivr_jax.models.image_layers import NORM_EPS, GroupNorm


def run(function: Any, state: Any, x: jax.Array) -> None:
    jax.block_until_ready(function(state, x))


def milliseconds(modules: dict[str, nnx.Module], x: jax.Array) -> dict[str, list[float]]:
    """For each module the least time of a call, and of its gradient with respect to parameters and x."""
    calls: dict[str, list[Any]] = {}
    for name, module in modules.items():
        graph, state = nnx.split(module)

        def forward(state: Any, x: jax.Array, graph: Any = graph) -> jax.Array:
            return nnx.merge(graph, state)(x)

        def loss(state: Any, x: jax.Array, forward: Any = forward) -> jax.Array:
            return jnp.square(forward(state, x)).sum()

        functions = jax.jit(forward), jax.jit(jax.grad(loss, (0, 1)))
        calls[name] = [functools.partial(run, function, state, x) for function in functions]
        for call in calls[name]:
            call()
    least = {name: [float("inf")] * 2 for name in calls}
    for _ in range(15):
        for name, pair in calls.items():
            for index, call in enumerate(pair):
                start = time.perf_counter()
                call()
                least[name][index] = min(least[name][index], 1e3 * (time.perf_counter() - start))
    return least


def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, y, x, in] and [3, 3, in, out] → [B, y, x, out], as the models do."""
    sides = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), sides, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _shifted(x: jax.Array) -> list[list[jax.Array]]:
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[padded[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]


def of_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    patches = jnp.concatenate([part for row in _shifted(x) for part in row], -1)
    return patches @ kernel.reshape(-1, kernel.shape[3])


def of_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows = [jnp.concatenate(row, -1) for row in _shifted(x)]
    return sum(row @ part.reshape(-1, kernel.shape[3]) for row, part in zip(rows, kernel, strict=True))


def of_shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return sum(part @ kernel[i, j] for i, row in enumerate(_shifted(x)) for j, part in enumerate(row))


def then_shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    products = jnp.einsum("byxi,hwio->byxhwo", x, kernel)
    height, width = x.shape[1:3]
    padded = jnp.pad(products, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    return sum(padded[:, i : i + height, j : j + width, i, j] for i in range(3) for j in range(3))


def convolutions() -> None:
    for side, inputs, outputs in ((64, 3, 16), (64, 8, 8), (64, 16, 16), (32, 32, 32), (16, 64, 64), (8, 64, 64)):
        x = jax.random.normal(jax.random.key(0), (8, side, side, inputs))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, inputs, outputs))
        expected, found = convolved(x, kernel), []
        for form in (convolved, of_patches, of_rows, of_shifted, then_shifted):
            call, least = jax.jit(form), float("inf")
            np.testing.assert_allclose(call(x, kernel), expected, atol=1e-3)
            for _ in range(15):
                start = time.process_time()
                jax.block_until_ready(call(x, kernel))
                least = min(least, 1e3 * (time.process_time() - start))
            found.append(f"{form.__name__} {least:.2f}")
        print(f"{side} x {side}, {inputs} to {outputs}: {', '.join(found)} ms", flush=True)


def norms() -> None:
    for shape in ((32, 32, 32, 16), (32, 16, 16, 32), (32, 8, 8, 64)):
        x = jax.random.normal(jax.random.key(0), shape)
        config = types.SimpleNamespace(param_dtype="float32", norm_groups=8)
        modules = {
            "ours": GroupNorm(shape[-1], config, nnx.Rngs(0)),
            "nnx.GroupNorm": nnx.GroupNorm(shape[-1], 8, epsilon=NORM_EPS, rngs=nnx.Rngs(0)),
        }
        for name, (forward, gradient) in milliseconds(modules, x).items():
            print(f"{shape} {name}: {forward:.2f} ms forwards, {gradient:.2f} ms with gradient")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("norm", "conv"))
    only = parser.parse_args().only
    if only != "conv":
        norms()
    if only != "norm":
        convolutions()


if __name__ == "__main__":
    main()
