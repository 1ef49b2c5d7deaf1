"""Time of the image tokenizer's group norm against Flax's, forwards, and forwards and backwards.

    python benchmarks/image_layers.py

Prints milliseconds, the least of 15 calls that take turns.
"""

from __future__ import annotations

import functools
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
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


def main() -> None:
    for shape in ((32, 32, 32, 16), (32, 16, 16, 32), (32, 8, 8, 64)):
        x = jax.random.normal(jax.random.key(0), shape)
        config = types.SimpleNamespace(param_dtype="float32", norm_groups=8)
        modules = {
            "ours": GroupNorm(shape[-1], config, nnx.Rngs(0)),
            "nnx.GroupNorm": nnx.GroupNorm(shape[-1], 8, epsilon=NORM_EPS, rngs=nnx.Rngs(0)),
        }
        for name, (forward, gradient) in milliseconds(modules, x).items():
            print(f"{shape} {name}: {forward:.2f} ms forwards, {gradient:.2f} ms with gradient")


if __name__ == "__main__":
    main()
