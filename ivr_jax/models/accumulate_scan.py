"""A scan over layers whose backward pass adds to a running sum of gradients in place.

What JAX derives makes the gradients of all layers first, an array for each parameter, and adds them to the sum of
earlier micro-batches after that: two whole trees at once.  Here the sum is an argument whose *cotangent* is the new
sum, so the backward loop carries it and adds one layer at a time:

    loss, new = jax.value_and_grad(lambda grad_accum: f(scan(layer, x, params, grad_accum, shared)))(grad_accum)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(layer: Callable[..., jax.Array], x: jax.Array, params: Any, grad_accum: Any, shared: Any) -> jax.Array:
    """x after all layers; each layer's input is kept for the backward pass, and everything else computed again.

    Args:
      layer: (shared, number, one layer's parameters, x) → x; no arrays in its closure.
      params: stacked parameters, leading axis L.
      grad_accum: a tree of the same shapes, in any float dtype.  It does not change the value; its cotangent is itself
        plus the gradient with respect to `params`, added in the gradient's dtype and rounded once a layer.
      shared: what all layers share; it gets no gradient, nor does `params`.
    """
    return _forward(layer, x, params, grad_accum, shared)[0]


def _forward(layer, x, params, grad_accum, shared):
    def one(x, inputs):
        number, own = inputs
        return layer(shared, number, _inside_loop(number, own), x), x

    numbers = jnp.arange(jax.tree.leaves(params)[0].shape[0])
    after, layer_inputs = jax.lax.scan(one, x, (numbers, params))
    return after, (layer_inputs, numbers, params, grad_accum, shared)


def _inside_loop(number: jax.Array, own: Any) -> Any:
    """One layer's parameters, plus a zero that only the loop knows: what is done with them stays inside the loop.

    XLA would cast the parameters of all layers to the dtype of computation before the loop, and keep that copy.
    """
    zero = jnp.minimum(number, 0)
    return jax.tree.map(lambda p: p + zero.astype(p.dtype), own)


def _backward(layer, saved, g):
    layer_inputs, numbers, params, grad_accum, shared = saved
    leaves, tree = jax.tree.flatten(grad_accum)
    # XLA:TPU fails on in-place sums of what all devices add up, which vectors are: they are added after the loop.
    is_vector = [leaf.ndim < 3 for leaf in leaves]

    def add(total: jax.Array, new: jax.Array) -> jax.Array:
        return (total.astype(new.dtype) + new).astype(total.dtype)

    def one(carry, inputs):
        g, matrices = carry
        number, own, x = inputs
        _, pull = jax.vjp(functools.partial(layer, shared, number), _inside_loop(number, own), x)
        gradient, g = pull(g)
        new_vectors, new_matrices = _separate(tree.flatten_up_to(gradient), is_vector)
        matrices = [total.at[number].set(add(total[number], new))
                    for total, new in zip(matrices, new_matrices, strict=True)]  # fmt: skip
        return (g, matrices), new_vectors

    vectors, matrices = _separate(leaves, is_vector)
    (g, matrices), new_vectors = jax.lax.scan(one, (g, matrices), (numbers, params, layer_inputs), reverse=True)
    vectors = iter([add(total, new) for total, new in zip(vectors, new_vectors, strict=True)])
    matrices = iter(matrices)
    return g, None, tree.unflatten([next(vectors if flag else matrices) for flag in is_vector]), None


def _separate(leaves: list[Any], is_vector: list[bool]) -> tuple[list[Any], list[Any]]:
    vectors = [leaf for leaf, flag in zip(leaves, is_vector, strict=True) if flag]
    matrices = [leaf for leaf, flag in zip(leaves, is_vector, strict=True) if not flag]
    return vectors, matrices


scan.defvjp(_forward, _backward)
