"""A scan over layers whose backward pass adds to a running sum of gradients in place.

What JAX derives makes the gradients of all layers first, an array for each parameter, and adds them to the sum of
earlier micro-batches after that: two whole trees at once.  Here the sum is an argument whose *cotangent* is the new
sum, so the backward loop carries it and adds one layer at a time:

    loss, new_sums = jax.value_and_grad(lambda sums: f(scan(layer, x, params, sums, around)))(sums)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(layer: Callable[..., jax.Array], x: jax.Array, params: Any, sums: Any, around: Any) -> jax.Array:
    """x after all layers; each layer's input is kept for the backward pass, and everything else computed again.

    Args:
      layer: (around, number, one layer's parameters, x) → x; no arrays in its closure.
      params: stacked parameters, leading axis L.
      sums: a tree of the same shapes, in any float dtype.  It does not change the value; the cotangent that it gets is
        itself plus the gradient with respect to `params`, added in the gradient's dtype and rounded once a layer.
      around: what all layers share; it gets no gradient, nor does `params`.
    """
    return _forward(layer, x, params, sums, around)[0]


def _forward(layer, x, params, sums, around):
    def one(x, inputs):
        return layer(around, *_sliced(inputs), x), x

    numbers = jnp.arange(jax.tree.leaves(params)[0].shape[0])
    after, kept = jax.lax.scan(one, x, (numbers, params))
    return after, (kept, numbers, params, sums, around)


def _sliced(inputs: Any) -> Any:
    """One layer's part, which stays one: XLA would cast all layers' parameters before the loop, and keep that."""
    return jax.lax.optimization_barrier(inputs)


def _backward(layer, saved, g):
    kept, numbers, params, sums, around = saved

    def one(carry, inputs):
        (g, sums), (number, own), x = carry, _sliced(inputs[:2]), inputs[2]
        _, pull = jax.vjp(functools.partial(layer, around, number), own, x)
        gradient, g = pull(g)
        gradient = jax.lax.optimization_barrier(gradient)  # XLA fails where it tries to move sums out of the loop

        def add(total: jax.Array, new: jax.Array) -> jax.Array:
            return total.at[number].set((total[number].astype(new.dtype) + new).astype(total.dtype))

        return (g, jax.tree.map(add, sums, gradient)), None

    (g, sums), _ = jax.lax.scan(one, (g, sums), (numbers, params, kept), reverse=True)
    return g, None, sums, None


scan.defvjp(_forward, _backward)
