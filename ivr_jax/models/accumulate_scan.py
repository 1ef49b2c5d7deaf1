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
        number, own = inputs
        return layer(around, number, _inside(number, own), x), x

    numbers = jnp.arange(jax.tree.leaves(params)[0].shape[0])
    after, kept = jax.lax.scan(one, x, (numbers, params))
    return after, (kept, numbers, params, sums, around)


def _inside(number: jax.Array, own: Any) -> Any:
    """One layer's parameters, plus a zero that only the loop knows: what is done with them stays inside the loop.

    XLA would cast the parameters of all layers to the dtype of computation before the loop, and keep that copy.
    """
    nothing = jnp.minimum(number, 0)
    return jax.tree.map(lambda p: p + nothing.astype(p.dtype), own)


def _backward(layer, saved, g):
    kept, numbers, params, sums, around = saved
    totals, tree = jax.tree.flatten(sums)
    small = [total.ndim < 3 for total in totals]  # XLA:TPU fails on in-place sums of what all devices add up: vectors

    def add(total: jax.Array, new: jax.Array) -> jax.Array:
        return (total.astype(new.dtype) + new).astype(total.dtype)

    def one(carry, inputs):
        (g, large), (number, own, x) = carry, inputs
        _, pull = jax.vjp(functools.partial(layer, around, number), _inside(number, own), x)
        gradient, g = pull(g)
        vectors, matrices = _sorted(tree.flatten_up_to(gradient), small)
        large = [total.at[number].set(add(total[number], new)) for total, new in zip(large, matrices, strict=True)]
        return (g, large), vectors

    few, large = _sorted(totals, small)
    (g, large), vectors = jax.lax.scan(one, (g, large), (numbers, params, kept), reverse=True)
    few, large = iter(map(add, few, vectors)), iter(large)
    return g, None, tree.unflatten([next(few if is_small else large) for is_small in small]), None


def _sorted(leaves: list[Any], small: list[bool]) -> tuple[list[Any], list[Any]]:
    return tuple([leaf for leaf, is_small in zip(leaves, small, strict=True) if is_small == wanted]
                 for wanted in (True, False))  # fmt: skip


scan.defvjp(_forward, _backward)
