"""Emu3.5 and transformers checkpoints in and out: safetensors as PyTorch users have them ⇄ our parameter trees.

The decoder has the tensor names of a Llama/Qwen3 model in transformers, the image tokenizer those of Emu3.5's IBQ code
(`backbone_slots`, `image_tokenizer_slots`).
Their matrices are [out, in] and their convolutions [out, in, height, width]; ours are [in, out] and [height, width, in,
out]. Everything moves a part of one tensor at a time, is checked strictly, and takes its final name only when it is
complete.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh

from ivr_jax import files, sharding
from ivr_jax.checkpoints.lazy import Index, LazyArray, place_tree
from ivr_jax.checkpoints.safetensors_io import (
    DTYPES,
    INDEX,
    PlannedTensor,
    open_directory,
    row_blocks,
    write_directory,
)
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, image_tokenizer
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig

SHARD_BYTES = 5_000_000_000
Keys = tuple[str, ...]


class TensorPlace(NamedTuple):
    """Where a tensor of theirs sits among our parameters.

    Attributes:
      path: keys into our tree.
      layer: index on the leading layer axis, or None where there is none.
      order: transposition from their axes to ours.
      shape: their shape.
    """

    path: Keys
    layer: int | None
    order: tuple[int, ...]
    shape: tuple[int, ...]


_LAYER_NAMES = {
    ("attention_norm",): "input_layernorm", ("mlp_norm",): "post_attention_layernorm",
    **{("attention", name): f"self_attn.{name}_proj" for name in "qkvo"},
    **{("attention", name): f"self_attn.{name}" for name in ("q_norm", "k_norm")},
    **{("mlp", name): f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}  # fmt: skip


def backbone_slots(config: BackboneConfig) -> dict[str, TensorPlace]:
    """Every tensor name of the decoder in a transformers checkpoint, with its place here; padding left out."""
    rows, width = config.vocab_size, config.hidden_size
    slots = {"model.embed_tokens.weight": TensorPlace(("embed",), None, (0, 1), (rows, width))}
    stacked = backbone.param_shapes(config)["layers"]
    for layer in range(config.num_hidden_layers):
        for path, name in _LAYER_NAMES.items():
            ours = _get(stacked, path).shape[1:]
            order = tuple(reversed(range(len(ours))))
            slots[f"model.layers.{layer}.{name}.weight"] = TensorPlace(("layers", *path), layer, order, ours[::-1])
    slots["model.norm.weight"] = TensorPlace(("final_norm",), None, (0,), (width,))
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = TensorPlace(("lm_head",), None, (1, 0), (rows, width))
    return slots


def image_tokenizer_slots(config: ImageTokenizerConfig) -> dict[str, TensorPlace]:
    """Every tensor name of the image tokenizer in a PyTorch checkpoint, with its place here."""
    slots = {}
    for path, shape in _leaves(image_tokenizer.param_shapes(config)):
        leaf = "weight" if path[-1] in ("kernel", "scale") else path[-1]
        order = (2, 3, 1, 0) if len(shape.shape) == 4 else tuple(range(len(shape.shape)))
        theirs = tuple(shape.shape[order.index(axis)] for axis in range(len(order)))
        slots[".".join((*path[:-1], leaf))] = TensorPlace(path, None, order, theirs)
    return slots


def export_backbone(
    config: BackboneConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    model_type: str = "qwen3",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write `directory` so that transformers loads it strictly: safetensors (shards and index) and config.json.

    Args:
      params: the tree of `backbone.init_params`, or one of LazyArrays; a part of one layer is fetched at once.
      model_type: "qwen3" for stock transformers, "Emu3" for Emu3.5's own code.
      dtype: of the written tensors, the parameters' own by default.

    Raises:
      UserError: the directory has content already (and not `overwrite`), or cannot be written. It is whole or absent.
    """
    fields = config.to_hf(model_type)
    written = dtype or jnp.dtype(config.param_dtype).name
    fields |= {"torch_dtype": written, "dtype": written}
    with files.NewFolder(directory, overwrite=overwrite) as target:
        write_directory(target, planned_tensors(backbone_slots(config), params, written), shard_bytes)
        (target / "config.json").write_text(json.dumps(fields, indent=2))


def export_image_tokenizer(
    config: ImageTokenizerConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model.safetensors` under PyTorch names and `config.yaml`; errors as in `export_backbone`."""
    with files.NewFolder(directory, overwrite=overwrite) as target:
        plan = planned_tensors(image_tokenizer_slots(config), params, dtype or config.param_dtype)
        write_directory(target, plan, shard_bytes=1 << 62)
        (target / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def import_backbone(
    directory: str | os.PathLike[str], *, mesh: Mesh | None = None, **options: Any
) -> tuple[BackboneConfig, dict[str, Any]]:
    """Read a decoder from a transformers directory: config and parameter tree.

    Args:
      mesh: where the arrays go, as the sharding table says; every device is given its own part, and beside the arrays
        there is only that part in memory. The default device without one.
      options: fields of BackboneConfig that config.json does not know; `param_dtype` (float32 by default) is what the
        tensors are converted to.

    Raises:
      UserError: missing, unexpected, truncated or misshapen tensors, by name and file; or an unusable config.json.
    """
    config, tree = open_backbone(directory, **options)
    return config, _place(tree, mesh, backbone.param_axes(config))


def open_backbone(directory: str | os.PathLike[str], **options: Any) -> tuple[BackboneConfig, dict[str, Any]]:
    """As `import_backbone`, everything checked, but a tree of LazyArrays: tensors are read when they are indexed."""
    source = Path(directory)
    config = BackboneConfig.from_hf(read_mapping(source, ("config.json",)), **options)
    slots, shapes = backbone_slots(config), backbone.param_shapes(config)
    stored = needed_weights(config, open_weights(source), source)
    return config, _lazy_tree(slots, _checked(slots, stored, source), shapes)


_FREQUENCIES = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")  # buffers that some versions store


def needed_weights(config: BackboneConfig, stored: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """`stored` without what the decoder has or computes anyway, if it says the same.

    That is the output matrix of a model whose output is tied to its embedding, and tables of rotary frequencies.

    Raises:
      UserError: it says something else, so that config.json does not describe these weights.
    """
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(_FREQUENCIES)}
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    for name in stored.keys() - kept.keys():
        table = np.asarray(stored[name].read(), np.float64)
        if config.rope_scaling is None and not (
            table.shape == frequencies.shape and np.allclose(table, frequencies, rtol=1e-2)
        ):
            raise UserError(f"tensor {name} in {stored[name].file} holds other rotary frequencies than rope_theta "
                            f"{config.rope_theta:g} of config.json gives.", "Find out which of the two is right.")
    head, embedding = kept.get("lm_head.weight"), kept.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        width = slice(0, embedding.shape[-1])
        for start, stop in row_blocks(embedding.shape, embedding.dtype.itemsize) if same else ():
            part = (slice(start, stop), width)
            same = same and np.array_equal(head.read(part), embedding.read(part))
        if not same:
            raise UserError(f"tensor lm_head.weight in {head.file} differs from the embedding, and config.json of "
                            f"{where} says tie_word_embeddings.", "Set tie_word_embeddings to false if it belongs.")
        del kept["lm_head.weight"]
    return kept


def import_image_tokenizer(
    directory: str | os.PathLike[str], *, mesh: Mesh | None = None, **options: Any
) -> tuple[ImageTokenizerConfig, dict[str, Any]]:
    """Read an image tokenizer: `config.yaml` or `config.json`, and safetensors or else `model.ckpt` (needs torch).

    Tensors under `loss.` (a training checkpoint's discriminator) are left out. Arguments and errors as in
    `import_backbone`; a `model.ckpt` is read with `weights_only`, so that a pickle never runs code.
    """
    config, tree = open_image_tokenizer(directory, **options)
    return config, _place(tree, mesh, image_tokenizer.param_axes(config))


def open_image_tokenizer(
    directory: str | os.PathLike[str], **options: Any
) -> tuple[ImageTokenizerConfig, dict[str, Any]]:
    """As `import_image_tokenizer`, everything checked, but a tree of LazyArrays."""
    source = Path(directory)
    config = ImageTokenizerConfig.from_dict(read_mapping(source, ("config.yaml", "config.json")), **options)
    slots, shapes = image_tokenizer_slots(config), image_tokenizer.param_shapes(config)
    return config, _lazy_tree(slots, _checked(slots, open_weights(source), source), shapes)


def open_weights(directory: Path) -> Mapping[str, Any]:
    """The tensors of a checkpoint by name (each with `shape`, `dtype`, `file`, `read`), without those of a loss."""
    pickled = directory / "model.ckpt"
    if any(directory.glob("*.safetensors")) or (directory / INDEX).exists() or not pickled.exists():
        stored: Mapping[str, Any] = open_directory(directory)
    else:
        stored = _open_torch(pickled)
    return {name: tensor for name, tensor in stored.items() if not name.startswith("loss.")}


def planned_tensors(slots: Mapping[str, TensorPlace], params: Mapping[str, Any], dtype: str) -> list[PlannedTensor]:
    """Our parameters as their tensors, fetched a part at a time: names, order of axes and `dtype` as a file would hold.

    A leaf of `params` needs `shape`, `dtype` and indexing by slices: numpy and JAX arrays, and LazyArrays.
    """
    target = jnp.dtype(dtype)

    def fetcher(slot: TensorPlace) -> Callable[[int, int], np.ndarray]:
        def fetch(start: int, stop: int) -> np.ndarray:
            leaf, theirs = _get(params, slot.path), (slice(start, stop), *(slice(size) for size in slot.shape[1:]))
            index = tuple(theirs[axis] for axis in slot.order)  # the vocabulary's padding stays outside
            ours = leaf[index] if slot.layer is None else leaf[(slice(slot.layer, slot.layer + 1), *index)]
            ours = np.asarray(ours if slot.layer is None else ours[0])
            with np.errstate(over="ignore"):  # what a narrow dtype cannot hold becomes infinite
                return ours.transpose(np.argsort(slot.order)).astype(target, copy=False)

        return fetch

    return [PlannedTensor(name, target, slot.shape, fetcher(slot), slot.path) for name, slot in slots.items()]


def _checked(slots: Mapping[str, TensorPlace], stored: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """`stored`, whose names and shapes are exactly those of `slots`; else a UserError that says which are not."""
    missing, unexpected = sorted(slots.keys() - stored.keys()), sorted(stored.keys() - slots.keys())
    for names, what in ((missing, "lacks"), (unexpected, "has the unexpected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the checkpoint {where} {what} tensor {names[0]}{more}.",
                            "Check that config and weights belong together and are complete.")
    for name, slot in slots.items():
        if tuple(stored[name].shape) != slot.shape:
            raise UserError(f"tensor {name} in {stored[name].file} has shape {list(stored[name].shape)}, "
                            f"the config wants {list(slot.shape)}.", "Check that config and weights belong together.")
    return stored


def _lazy_tree(
    slots: Mapping[str, TensorPlace], stored: Mapping[str, Any], shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """Our tree, each array a view of their tensors."""
    parts: dict[Keys, list[str]] = {}
    for name, slot in slots.items():
        parts.setdefault(slot.path, []).append(name)
    tree: dict[str, Any] = {}
    for path, names in parts.items():
        _set(tree, path, _lazy(_get(shapes, path), [(stored[name], slots[name]) for name in names]))
    return tree


def _lazy(ours: jax.ShapeDtypeStruct, sources: Sequence[tuple[Any, TensorPlace]]) -> LazyArray:
    """One array of our tree: one tensor of theirs, or those of all layers in order."""
    stacked = sources[0][1].layer is not None

    def read(index: Index) -> np.ndarray:
        found = np.zeros([part.stop - part.start for part in index], ours.dtype)
        if not stacked:
            fill(found, *sources[0], index)
        else:
            for target, source in zip(found, sources[index[0]], strict=True):
                fill(target, *source, index[1:])
        return found

    def fill(target: np.ndarray, tensor: Any, slot: TensorPlace, index: Index) -> None:
        theirs = [slice(0, 0)] * len(index)
        for part, axis in zip(index, slot.order, strict=True):  # zeros stay where the vocabulary is padded
            theirs[axis] = slice(min(part.start, slot.shape[axis]), min(part.stop, slot.shape[axis]))
        part = tensor.read(tuple(theirs)).transpose(slot.order)
        target[tuple(slice(size) for size in part.shape)] = part

    return LazyArray(ours.shape, np.dtype(ours.dtype), read)


def _place(tree: dict[str, Any], mesh: Mesh | None, axes: Any) -> dict[str, Any]:
    return place_tree(tree, None if mesh is None else sharding.shardings(mesh, axes, tree))


class _TorchTensor(NamedTuple):
    """A tensor of a loaded `model.ckpt`, with the interface of `StoredTensor`."""

    tensor: Any
    dtype: np.dtype
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, index: Index = ()) -> np.ndarray:
        part = self.tensor.detach()[index].contiguous()
        if self.dtype == jnp.bfloat16:  # numpy alone does not know it
            return part.view(_torch().int16).numpy().view(self.dtype)
        return part.numpy()


def _torch() -> Any:
    import torch  # an extra: only pickled checkpoints need it

    return torch


def _open_torch(path: Path) -> dict[str, _TorchTensor]:
    try:
        torch = _torch()
    except ImportError:
        raise UserError(f"{path} is a PyTorch pickle, and PyTorch is not installed.",
                        "Install torch, or convert the file to safetensors elsewhere.") from None
    try:
        mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds; all of them mean that the file is unfit
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no plain PyTorch checkpoint ({reason}).",
                        "It must hold tensors only; get the file again, or convert it to safetensors.") from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict of tensors.", "Give the checkpoint of the image tokenizer.")
    dtypes = {getattr(torch, dtype.name): dtype for dtype in DTYPES.values()}
    for name, tensor in state.items():
        if tensor.dtype not in dtypes:
            raise UserError(f"tensor {name} in {path} has dtype {tensor.dtype}.",
                            f"Only {', '.join(dtype.name for dtype in DTYPES.values())} can be read.")
    return {name: _TorchTensor(tensor, dtypes[tensor.dtype], path) for name, tensor in state.items()}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping in which a key stands twice, as JSON files are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        files.unique_keys([(str(key.value), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def read_mapping(directory: Path, names: Sequence[str]) -> Mapping[str, Any]:
    """The first of the JSON or YAML files `names` that is in `directory`. UserError when none is, or it is unfit."""
    path = next((directory / name for name in names if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory} has no {' or '.join(names)}.", "Name a folder that holds a complete checkpoint.")
    try:
        text = files.read_text(path)
        is_json = path.suffix == ".json"
        value = json.loads(text, object_pairs_hook=files.unique_keys) if is_json else yaml.load(text, _UniqueKeys)
    except (ValueError, RecursionError, yaml.YAMLError, OSError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}).", "Get the file again.") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{path} holds no mapping.", "Get the file again.")
    return value


def _get(tree: Mapping[str, Any], path: Keys) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: Keys, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _leaves(tree: Mapping[str, Any], prefix: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value
