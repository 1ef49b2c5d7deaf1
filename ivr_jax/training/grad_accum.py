"""Gradients of several micro-batches, added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # (parameters, part, the layers' sums or None) → loss, metrics


def accumulate_gradients(loss: Loss, params: Any, parts: Any, dtype: str, in_place: bool) -> tuple[Any, Any]:
    """Gradient with respect to `params`, and metrics, each summed over the micro-batches.

    Args:
      loss: sum of the losses of one micro-batch, and metrics to add up.
      parts: a tree of arrays whose leading axis counts micro-batches.
      dtype: of the gradients' sum.
      in_place: the gradients of `params["layers"]` are added where they come about (`models.accumulate_scan`), so that
        one such tree exists and not two; the layers must be recomputed in full then.
    """

    def rounded(gradients: Any) -> Any:
        # XLA:TPU moves the all-reduce of a gradient behind the loop that adds it up, and fails where the sum is
        # float32 (RET_CHECK in while_loop_all_reduce_code_motion): the barrier keeps it inside.
        return jax.lax.optimization_barrier(jax.tree.map(lambda g: g.astype(dtype), gradients))

    def one(total: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
        gradients, metrics = total
        if in_place:
            rest, layers = _without_layers(gradients), gradients["layers"]
            (new, layers), counted = jax.grad(_of_sums, (0, 1), has_aux=True)(_without_layers(params), layers, part)
            gradients = {**jax.tree.map(jnp.add, rest, rounded(new)), "layers": layers}
        else:
            new, counted = jax.grad(lambda params: loss(params, part, None), has_aux=True)(params)
            gradients = jax.tree.map(jnp.add, gradients, rounded(new))
        return (gradients, jax.tree.map(jnp.add, metrics, counted)), None

    def _of_sums(rest: Any, sums: Any, part: Any) -> tuple[jax.Array, Any]:
        return loss({**rest, "layers": params["layers"]}, part, sums)

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    metrics = jax.eval_shape(lambda part: loss(params, part, None)[1], first)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params), jax.tree.map(jnp.zeros_like, metrics)
    total, _ = jax.lax.scan(one, nothing, parts)
    return total


def _without_layers(params: Any) -> Any:
    return {key: value for key, value in params.items() if key != "layers"}
