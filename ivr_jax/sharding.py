"""Logical-to-mesh axis rules, and the mesh.

Arrays name their axes for what they mean ("vocab", "mlp", "batch"); `RULES` alone says which mesh axis splits them:

    data      copies of the model, each with its part of the batch
    fsdp      parameters and optimizer state along the model width, and the batch
    tensor    heads, MLP width and vocabulary
    sequence  tokens of one row (long rollouts)

One CPU device is a mesh of 1×1×1×1 and runs the same code.

`pjit` is here under its present name: since JAX 0.4 `jax.jit` with `in_shardings` and `out_shardings` on a mesh is what
`pjit` was.  `training.state.shard_state` initialises parameters and optimizer state with `jax.jit(..., out_shardings=
shardings(mesh, axes, shapes))`, every training step is a `jax.jit` with the same `out_shardings` under `jax.set_mesh`,
and `constrain` pins activations inside of it.  Parameters carry their logical axes as Flax metadata,
given where a weight is made (`models.layers.param`, called in `models/backbone.py`):
`nnx.get_partition_spec` reads them, and gives mesh axes under `nnx.logical_axis_rules(tuple(RULES.items()))`.

With `fsdp_over_tensor` training uses the tensor shards in a second way: each takes rows of the batch of its own, like
an fsdp shard, and kernels are all-gathered along both of their axes for use.  The vocabulary is split either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ivr_jax.errors import UserError

Axes = Sequence[str | None]
Part = str | tuple[str, ...] | None  # one entry of a PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
RULES: dict[str, Part] = {
    # parameters of the decoder
    "layers": None, "vocab": "tensor", "embed": "fsdp", "q_heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
    "head_dim": None,
    # rows of kernels that lead back to the model width, which is not split: 5120 / 32 would fill 160 of 256 lanes
    "vocab_rows": ("tensor", "fsdp"), "q_rows": ("tensor", "fsdp"), "mlp_rows": ("tensor", "fsdp"),
    "rank": None,  # of adapters, which may be replicated
    # parameters of the image tokenizer
    "codes": "fsdp", "code_dim": None, "kernel_height": None, "kernel_width": None, "conv_in": None, "conv_out": "fsdp",
    # activations and caches
    "batch": ("data", "fsdp"), "length": "sequence", "cache_length": "sequence", "width": None,
    "residual": ("sequence", "tensor"),  # tokens between the halves of a layer
    "height": None, "columns": None, "channels": None,
}  # fmt: skip
LARGE = 1 << 20  # entries from which an array must not be replicated by accident


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`.

    Args:
      shape: size of each axis; axes not named have size 1, and one axis may be −1 (all that is left). Default: all
        devices along "data".
      devices: all devices by default.

    Raises:
      UserError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = dict(shape if shape is not None else {"data": -1})
    if unknown := sorted(shape.keys() - set(MESH_AXES)):
        raise UserError(f"the mesh has an unknown axis {unknown[0]!r}.", f"Its axes are {', '.join(MESH_AXES)}.")
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    if any(not isinstance(size, int) or size < -1 or size == 0 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"the mesh {shape} is not possible.", "Give positive sizes; one axis may be -1, the rest.")
    known = math.prod(size for size in sizes if size != -1)
    if known > len(devices):
        raise UserError(f"the mesh {shape} needs {known} devices at least, there are {len(devices)}.",
                        "Lower its sizes: 1 for an axis that is not to be split.")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f"the mesh {dict(zip(MESH_AXES, sizes, strict=True))} wants {math.prod(sizes)} devices, "
                        f"there are {len(devices)}.", "Change the mesh sizes so that their product is that number.")
    if len(devices) == 1:
        return Mesh(np.array(devices).reshape(sizes), MESH_AXES)
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), MESH_AXES)


def mesh_of(sizes: Mapping[str, int]) -> Mesh:
    """The mesh of a config's `mesh` section.

    All ones mean one device, also in a process that has several; anything else must use every device there is.
    """
    if jax.process_count() == 1 and set(sizes.values()) == {1}:
        if len(jax.devices()) > 1:
            print(f"mesh: one of {len(jax.devices())} devices is used; set the sizes under config.mesh to use all.")
        return make_mesh(sizes, jax.devices()[:1])
    return make_mesh(sizes)


def parse_mesh(text: str) -> Mesh:
    """The mesh that a flag describes: "tensor:4", or "fsdp:2,tensor:4".  It uses every device there is.

    Raises UserError as `make_mesh`, and for a text of another form.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, count = part.partition(":")
        if axis not in MESH_AXES or not count.isdecimal() or int(count) < 1:
            raise UserError(f"--mesh={text} is not understood.", f"Write AXIS:DEVICES; axes: {', '.join(MESH_AXES)}.")
        sizes[axis] = int(count)
    return make_mesh(sizes)


def local_mesh() -> Mesh:
    """All devices of this process along "fsdp": for what a process computes alone, such as encoding images."""
    return make_mesh({"fsdp": -1}, jax.local_devices())


def partition(axes: Axes, fsdp_over_tensor: bool = False) -> PartitionSpec:
    """The partition of an array with these logical axes (None: an axis that is never split).

    Args:
      fsdp_over_tensor: of an activation in layers that gather their kernels: "tensor" splits the batch, and nothing
        else.

    Raises:
      ValueError: a logical axis that the table does not know, or two axes of one array on the same mesh axis.
    """
    used: set[str] = set()
    parts: list[Part] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} is not in the sharding table")
        rule = RULES[axis] if axis is not None else None
        if fsdp_over_tensor:
            rule = (*RULES["batch"], "tensor") if axis == "batch" else _without(rule, "tensor")
        if clash := used & set(mesh_axes(rule)):
            raise ValueError(f"logical axes {tuple(axes)} put two axes of one array on mesh axis {min(clash)!r}")
        used |= set(mesh_axes(rule))
        parts.append(rule)
    return PartitionSpec(*parts)


def mesh_axes(part: Part) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def sharding(mesh: Mesh, axes: Axes, shape: Sequence[int], name: str = "an array") -> NamedSharding:
    """The sharding of an array of this shape.

    An axis that does not divide is not split in an array of fewer than `LARGE` entries.

    Raises:
      UserError: an axis of a larger array that does not divide; or a larger array that a mesh with fsdp or tensor
        shards would replicate, unless it is an adapter of low rank, small beside its kernel.
    """
    parts: list[Part] = []
    large = math.prod(shape) >= LARGE
    for axis, size, part in zip(axes, shape, partition(axes), strict=True):
        shards = _shards(mesh, part)
        if size % shards == 0:
            parts.append(part)
        elif large:
            raise UserError(f"{name} of shape {tuple(shape)} does not divide: axis {axis!r} has {size} entries for "
                            f"{shards} shards of mesh axis {part!r}.", _advice(axis, size, shards))
        else:
            parts.append(None)
    must_split = large and _shards(mesh, ("fsdp", "tensor")) > 1
    must_split = must_split and not {"batch", "length", "cache_length", "rank"} & set(axes)
    if must_split and all(_shards(mesh, part) == 1 for part in parts):
        raise UserError(f"{name} of shape {tuple(shape)} with axes {tuple(axes)} would be replicated on every device.",
                        "Give one of its axes a mesh axis in ivr_jax/sharding.py, or use another mesh.")
    return NamedSharding(mesh, PartitionSpec(*parts))


def shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """`sharding` for a tree: `axes` holds a tuple of logical axes where `shapes` holds an array or its shape."""

    def one(path: Any, leaf: Any, names: Axes) -> NamedSharding:
        return sharding(mesh, names, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def state_axes(axes: Any, params: Any, state: Any) -> Any:
    """Logical axes of a training state, optimiser moments included.

    Args:
      axes, params: a model's logical axes, and its parameters or their shapes.
      state: any tree that holds arrays of a parameter's shape under that parameter's path (moments, gradients).

    Returns:
      A tree like `state`: a parameter's axes where its path ends in the parameter's and the shape is the same, else
      one None a dimension (`sharding` refuses a large array of that kind).
    """
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    paths = jax.tree_util.tree_leaves_with_path(params)
    known = {_words(path): (leaf.shape, axis) for (path, leaf), axis in zip(paths, names, strict=True)}

    def one(path: Any, leaf: Any) -> Axes:
        words = _words(path)
        for start in range(len(words)):
            shape, found = known.get(words[start:], (None, None))
            if shape == leaf.shape:
                return found
        return (None,) * len(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, state)


def abstract_sharded(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """`shapes` with the sharding of each array, as ShapeDtypeStructs: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x, held: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held), shapes, shardings(mesh, axes, shapes)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: scalars, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, rows: int, name: str, fsdp_over_tensor: bool = False) -> None:
    """Raises UserError unless `rows` rows divide evenly over the mesh; `fsdp_over_tensor`: see `partition`."""
    shards = _shards(mesh, partition(("batch",), fsdp_over_tensor)[0])
    if rows % shards:
        over = "data x fsdp x tensor, because of model.fsdp_over_tensor" if fsdp_over_tensor else "data x fsdp"
        raise UserError(f"{name} is {rows}, which does not divide over {shards} shards (mesh {over}).",
                        _advice("batch", rows, shards))


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """int [n]: the rows of a global batch of `rows` that this process's devices hold, in ascending order."""
    placed = NamedSharding(mesh, PartitionSpec(RULES["batch"]))
    mine = {part[0].indices(rows)[:2] for part in placed.addressable_devices_indices_map((rows,)).values()}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(mine)])


def global_batch(
    mesh: Mesh, batch: Mapping[str, np.ndarray], rows: int, axes: Mapping[str, Axes] | None = None
) -> dict[str, jax.Array]:
    """One global batch of `rows` rows from each process's own `local_rows` of it.

    Args:
      axes: of arrays by name; of the others the first axis is "batch" and the second, if there is one, "length".
    """

    def one(name: str, x: np.ndarray) -> jax.Array:
        own = (axes or {}).get(name) or ("batch", "length", *(None,) * x.ndim)[: x.ndim]
        placed = sharding(mesh, own, (rows, *x.shape[1:]), name)
        return jax.make_array_from_process_local_data(placed, x, (rows, *x.shape[1:]))

    return {name: one(name, np.asarray(x)) for name, x in batch.items()}


def constrain(x: jax.Array, axes: Axes, fsdp_over_tensor: bool = False) -> jax.Array:
    """Pin an activation inside a jitted function to the mesh in force (`jax.set_mesh`); without one, do nothing.

    `fsdp_over_tensor`: see `partition`.
    """
    return _pin(x, partition(axes, fsdp_over_tensor))


def gather(x: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as a layer uses it: all-gathered over "fsdp", still split over the other mesh axes."""
    parts = partition(axes)
    return _pin(_pin(x, parts), PartitionSpec(*(_without(part, "fsdp") for part in parts)))


def spec(shape: Sequence[int], axes: Axes, fsdp_over_tensor: bool = False) -> PartitionSpec:
    """The partition of an activation of this shape on the mesh in force; an axis that does not divide is not split."""
    return _dividing(shape, partition(axes, fsdp_over_tensor))


def _dividing(shape: Sequence[int], parts: PartitionSpec) -> PartitionSpec:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return PartitionSpec(*(None,) * len(shape))
    return PartitionSpec(*(part if size % _shards(mesh, part) == 0 else None
                           for size, part in zip(shape, parts, strict=True)))  # fmt: skip


def _pin(x: jax.Array, parts: PartitionSpec) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, _dividing(x.shape, parts))


def _without(part: Part, name: str) -> tuple[str, ...] | None:
    return tuple(axis for axis in mesh_axes(part) if axis != name) or None


def _words(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _shards(mesh: Any, part: Part) -> int:
    return math.prod(mesh.shape[name] for name in mesh_axes(part))


def _advice(axis: str | None, size: int, shards: int) -> str:
    if axis in ("vocab", "vocab_rows"):
        return f"Set the model's vocab_multiple to a multiple of {shards}; exports never show the padding."
    if axis == "batch":
        return f"Use a batch that is a multiple of {shards}."
    best = max(n for n in range(1, shards + 1) if size % n == 0)
    return f"Use at most {best} shards for it, or a size that is a multiple of {shards}."
