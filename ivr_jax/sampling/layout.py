"""The rollout layout of the weights: the same arrays, cut for drawing answers instead of for learning.

Learning cuts parameters along the model width ("fsdp") and gathers them layer by layer, once for a large batch.
Drawing reads every weight for every token, so there nothing must be gathered: heads, mlp width and vocabulary are cut
("tensor"), the width is whole, and what is left of the devices holds copies with their own part of the slots ("data").
Both are the one table of `sharding.py`, on two meshes of the same devices in the same order, so that one jitted program
moves the weights from device to device; the host never sees them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import backbone


def rollout_mesh(mesh: Mesh, tensor: int = 0) -> Mesh:
    """The devices of `mesh`, in its order, as "data" x "tensor".

    Args:
      tensor: shards of every weight; 0 takes those of a weight in training, fsdp x tensor.
    """
    count = mesh.devices.size
    tensor = tensor or mesh.shape["fsdp"] * mesh.shape["tensor"]
    if tensor < 1 or count % tensor:
        raise UserError(
            f"{count} devices do not divide into groups of {tensor}, the tensor shards of rollouts.",
            "Set the tensor shards of rollouts to a divisor of the number of devices.",
        )
    return Mesh(mesh.devices.reshape(count // tensor, 1, tensor, 1), sharding.MESH_AXES)


class RolloutLayout:
    """Makes rollout weights from training weights; called once an update.

        layout = RolloutLayout(config, mesh, dtype="bfloat16")
        weights = layout(state.params)
        with jax.set_mesh(layout.mesh):
            sample(layout.config, weights, ...)

    Attributes:
      mesh: of rollouts; config: the backbone's, with the rollout's dtype for weights and activations.
    """

    def __init__(self, config: backbone.BackboneConfig, mesh: Mesh, tensor: int = 0, dtype: str | None = None):
        """`mesh`: that of training; `tensor`: see `rollout_mesh`; `dtype`: None keeps that of training."""
        self.mesh = rollout_mesh(mesh, tensor)
        self.config = config if dtype is None else dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
        shapes = backbone.param_shapes(self.config)
        self.shardings = sharding.shardings(self.mesh, backbone.param_axes(config), shapes)
        self._same = mesh.devices.size == 1 and self.config == config
        self._move = jax.jit(self._cast, out_shardings=self.shardings)

    def __call__(self, params: Any) -> Any:
        """The weights in rollout layout; on one device and in the same dtype, `params` themselves."""
        return params if self._same else self._move(params)

    def _cast(self, params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.dtype(self.config.param_dtype)), params)
