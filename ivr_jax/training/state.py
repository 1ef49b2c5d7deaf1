"""What a stage learns, and how it is sharded on the mesh."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ivr_jax import sharding
from ivr_jax.models import lora


class TrainState(NamedTuple):
    """Everything a stage learns: parameters (adapters and what they adapt, with LoRA) and optimiser state."""

    params: Any
    opt_state: Any


def shard_state(
    mesh: jax.sharding.Mesh, axes: Any, params: Any, optimizer: optax.GradientTransformation
) -> tuple[TrainState, tuple[TrainState, jax.sharding.NamedSharding]]:
    """A fresh training state on the mesh, and the shardings of a step's outputs (state, metrics).

    Args:
      axes: logical axes of the parameters.
      params: parameters, which the state takes over; or a function that makes them, each shard where it belongs.
    """
    make = params if callable(params) else lambda: params

    def fresh() -> TrainState:
        made = make()
        return TrainState(made, optimizer.init(lora.split(made)[0]))

    shapes = jax.eval_shape(fresh)
    placed = sharding.shardings(mesh, sharding.state_axes(axes, shapes.params, shapes), shapes)
    if callable(params):
        state = jax.jit(fresh, out_shardings=placed)()
    else:
        held = jax.device_put(params, placed.params)
        state = TrainState(held, jax.jit(optimizer.init, out_shardings=placed.opt_state)(lora.split(held)[0]))
    return state, (placed, sharding.replicated(mesh))


def apply_gradients(
    state: TrainState, gradients: Any, denominator: jax.Array, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """The state after one step on the sum of `gradients` (of `lora.split(params)[0]`) over `denominator`, and the norm
    of their quotient before it is clipped."""
    trained, frozen = lora.split(state.params)
    count = jnp.maximum(denominator, 1)
    mean = jax.tree.map(lambda g, p: (g.astype(jnp.float32) / count).astype(p.dtype), gradients, trained)
    updates, opt_state = optimizer.update(mean, state.opt_state, trained)
    return TrainState(lora.join(optax.apply_updates(trained, updates), frozen), opt_state), optax.tree.norm(mean)


def micro_batches(count: int, x: jax.Array) -> jax.Array:
    """[B, T] -> [count, B / count, T]: every count-th row, so that no row leaves the device that holds it."""
    parts = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
    return sharding.constrain(parts, (None, "batch", "length"))
