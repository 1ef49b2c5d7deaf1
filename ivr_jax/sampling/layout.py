"""The rollout layout of the weights: the same numbers, sharded for sampling answers instead of for learning.

Learning shards parameters along the model width ("fsdp") and gathers them layer by layer, once for a large batch.
Sampling reads every weight for every token, so there nothing must be gathered: heads, mlp width and vocabulary are
sharded ("tensor"), the model width is not, and the remaining devices hold copies with their own slots ("data").
Both are the one table of `sharding.py`, on two meshes of the same devices in the same order, so that one jitted program
moves the weights from device to device; the host never sees them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ivr_jax import sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.checkpoints.system import System
from ivr_jax.config import Count, OneOf, Section, as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, int8, lora


@dataclasses.dataclass(frozen=True)
class LayoutOptions(Section, name="rollout"):
    """A config's section `rollout`: how weights and caches are held where answers are sampled.

    Attributes:
      dtype: of weights and activations; "" keeps that of the checkpoint, or of training.
      tensor: shards of every weight; 0: see `RolloutLayout`.
      weight_dtype, cache_dtype, decode_kernel: see `BackboneConfig`.
    """

    dtype: str = ""
    tensor: Count = 0
    weight_dtype: Annotated[str, OneOf("", "int8")] = ""
    cache_dtype: Annotated[str, OneOf("", "int8")] = ""
    decode_kernel: Annotated[str, OneOf("plain", "pallas")] = "plain"

    @property
    def model_options(self) -> dict[str, Any]:
        """Those that are fields of BackboneConfig."""
        names = ("weight_dtype", "cache_dtype", "decode_kernel")
        dtype = {"dtype": self.dtype, "param_dtype": self.dtype} if self.dtype else {}
        return {**dtype, **{name: getattr(self, name) for name in names}}


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of `mesh`, in its order, as "data" x "tensor", with `tensor` shards of every weight."""
    count = mesh.devices.size
    if tensor < 1 or count % tensor:
        raise UserError(
            f"{count} devices do not divide into groups of {tensor}, the tensor shards of rollouts.",
            "Set the tensor shards of rollouts to a divisor of the number of devices.",
        )
    return Mesh(mesh.devices.reshape(count // tensor, 1, tensor, 1), sharding.MESH_AXES)


def own_part(mesh: Mesh) -> Mesh:
    """The part of a rollout mesh that this process samples its own answers on: the copies that are on its devices.

    Raises UserError when a copy of the weights is spread over devices of several processes.
    """
    process = jax.process_index()
    mine = np.array([[device.process_index == process for device in row.flat] for row in mesh.devices])
    if (mine.any(1) != mine.all(1)).any() or not mine.any():
        raise UserError(
            f"a copy of the rollout's weights, {mesh.shape['tensor']} shards, would be spread over several processes.",
            "Set config.rollout.tensor to the devices of one process or fewer, and order config.mesh so that data and "
            "fsdp count processes.",
        )
    return Mesh(mesh.devices[mine.all(1)], sharding.MESH_AXES)


def load_sampler(
    path: str | os.PathLike[str],
    mesh: Mapping[str, int],
    rollout: Any,
    image_tokenizer: str | os.PathLike[str] | None = None,
    text_tokenizer: str | os.PathLike[str] | None = None,
) -> System:
    """The model at `path` for sampling alone: its weights are read straight into the rollout layout.

    Every device reads its own shards, which are cast on the way; no other copy of the weights is made.  The programs
    that use it run inside `System.on_mesh`.  For one process.

    Args:
      mesh: a config's section `mesh`; all ones: one device.
      rollout: its section `rollout` (`LayoutOptions`).
      image_tokenizer, text_tokenizer: where they are, for a checkpoint that does not record them.

    Raises:
      UserError: see `system.load`; the mesh is not that of the devices.
    """
    devices, wanted = sharding.mesh_of(mesh), as_dataclass(LayoutOptions, rollout)
    several = devices.size > 1
    options = systems.answering_options(devices if several else None, **wanted.model_options)

    def layout(config: backbone.BackboneConfig) -> Mesh:
        return RolloutLayout(config, devices, LayoutOptions(tensor=wanted.tensor)).mesh

    where = layout if several else None
    return systems.load(path, image_tokenizer, text_tokenizer_path=text_tokenizer, mesh=where, **options)


class RolloutLayout:
    """Makes rollout weights from training weights; called once an update.

        layout = RolloutLayout(config, mesh, LayoutOptions(dtype="bfloat16"))
        weights = layout(state.params)
        with jax.set_mesh(layout.mesh):
            sample(layout.config, weights, ...)

    Adapters (LoRA) are merged into the kernels on the way, and int8 weights are made of the sum.  With several
    processes each one gets weights on its own devices, and samples answers without waiting for the others.

    Attributes:
      mesh: of rollouts; config: the backbone's, with the rollout's dtype for weights and activations.
    """

    def __init__(self, config: backbone.BackboneConfig, mesh: Mesh, options: LayoutOptions = LayoutOptions()):
        """`mesh`: that of training.

        `options.tensor` 0 cuts weights as training does (fsdp x tensor), as far as key and value heads and the devices
        of one process divide.
        """
        shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
        each = mesh.devices.size // jax.process_count()
        tensor = options.tensor or math.gcd(shards, each, config.num_key_value_heads)
        everywhere = rollout_mesh(mesh, tensor)
        self.mesh = own_part(everywhere) if jax.process_count() > 1 else everywhere
        self.config = dataclasses.replace(config, **options.model_options)
        shapes, axes = backbone.param_shapes(self.config), backbone.param_axes(self.config)
        self.shardings = sharding.shardings(self.mesh, axes, shapes)
        self._trained, self._one = config, mesh.devices.size == 1
        self._move = jax.jit(self._cast, out_shardings=sharding.shardings(everywhere, axes, shapes))

    @property
    def exact(self) -> bool:
        """Whether the sampler's log-probabilities are the trainer's to about 1e-5.

        They are when everything is float32, products included.  With less, as accelerators do by default, one token at
        a time and all tokens together round otherwise.
        """
        precise = jax.config.values["jax_default_matmul_precision"] in ("highest", "float32")
        products = jax.default_backend() == "cpu" or precise
        return products and self.config == self._trained and self.config.dtype == self.config.param_dtype == "float32"

    def __call__(self, params: Any) -> Any:
        """The weights in rollout layout; on one device and in the same dtype, `params` themselves."""
        if self._one and self.config == self._trained and lora.ADAPTERS not in params:
            return params
        moved = self._move(params)
        return moved if jax.process_count() == 1 else jax.tree.map(_own, moved, self.shardings)

    def _cast(self, params: Any) -> Any:
        cast = jax.tree.map(lambda x: x.astype(jnp.dtype(self.config.param_dtype)), lora.merge(params))
        return int8.quantise_kernels(cast) if self.config.weight_dtype else cast


def _own(x: jax.Array, placed: NamedSharding) -> jax.Array:
    """This process's copy of an array of which every process has one."""
    return jax.make_array_from_single_device_arrays(x.shape, placed, [part.data for part in x.addressable_shards])
