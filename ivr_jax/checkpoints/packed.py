"""A small model as a folder of three files, as the package carries one (`--checkpoint=micro`).

    model.json                    metadata of both networks as their checkpoints record it, and `origin`: command,
                                  commit, seed, data and figures
    backbone.safetensors          the backbone's parameters; names are paths in its tree, "layers/attention/q"
    image_tokenizer.safetensors   the same of the image tokenizer

Only models of the micro text tokenizer are packed: it is part of the program.  `python -m ivr_jax.convert --pack`
writes such a folder, `system.load` reads it wherever it reads a checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ivr_jax import files
from ivr_jax.errors import UserError

PACKED_MICRO = "micro"  # what `--checkpoint` calls the model of the package
FOLDER = Path(__file__).parent / "micro"
RECORD, NETWORKS = "model.json", ("backbone", "image_tokenizer")
MAX_BYTES = 6_000_000  # of the package's own model, all files together


def folder_of(path: str | os.PathLike[str]) -> Path | None:
    """The packed folder that `path` names: the package's own for `PACKED_MICRO`, else `path` if it is one."""
    if str(path) == PACKED_MICRO:
        if not (FOLDER / RECORD).is_file():
            raise UserError("this installation carries no model.", "Install it again, or train one: make demo.")
        return FOLDER
    return Path(path) if (Path(path) / RECORD).is_file() else None


def write(folder: Path, networks: Mapping[str, tuple[Mapping[str, Any], Any]], origin: Mapping[str, Any]) -> int:
    """Writes a packed folder whole, in place of an earlier one; returns its size in bytes.

    Args:
      networks: metadata and parameters (a tree of arrays) of each of `NETWORKS`.
      origin: command, commit, seed, data and figures; JSON values.
    """
    with files.NewFolder(folder, overwrite=True) as partial:
        for name in NETWORKS:
            save_file(_flat(networks[name][1]), str(partial / f"{name}.safetensors"))
        record = {"origin": dict(origin), **{name: dict(networks[name][0]) for name in NETWORKS}}
        files.write_json(partial / RECORD, record)
        for file in partial.iterdir():
            file.chmod(0o644)  # the library makes them private
        return sum(file.stat().st_size for file in partial.iterdir())


def read_record(folder: Path) -> dict[str, Any]:
    """`origin`, and the metadata of both networks.  Raises UserError when the file is damaged."""
    record = files.read_json_object(folder / RECORD, "Pack the model again.")
    for name in NETWORKS:
        network = record.get(name)
        if not isinstance(network, dict) or not isinstance(network.get("model"), dict):
            raise UserError(f"{folder / RECORD} does not describe the network {name}.", "Pack the model again.")
    return record


def read_params(folder: Path, name: str, like: Any, padded: Sequence[str] = ()) -> Any:
    """Parameters of network `name` in the shapes, dtypes and, where they have any, shardings of `like`.

    Tensors named in `padded` get zeros at the end of axes that are longer in `like`.

    Raises UserError when the file is damaged or holds other tensors.
    """
    file = folder / f"{name}.safetensors"
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}).", "Pack the model again.") from None
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, wanted in paths:
        tensor = stored.get(_name(path))
        if tensor is not None and _name(path) in padded and tensor.ndim == len(wanted.shape):
            more = np.maximum(np.subtract(wanted.shape, tensor.shape), 0)
            tensor = np.pad(tensor, [(0, count) for count in more])
        if tensor is None or tensor.shape != wanted.shape:
            found = "is missing" if tensor is None else f"is {tensor.shape}"
            raise UserError(f"{file}: the tensor {_name(path)} {found}, not {wanted.shape}.", "Pack the model again.")
        leaves.append(jax.device_put(tensor.astype(wanted.dtype), wanted.sharding))
    if len(stored) != len(leaves):
        raise UserError(f"{file} holds {len(stored)} tensors, the model {len(leaves)}.", "Pack the model again.")
    return jax.tree_util.tree_unflatten(structure, leaves)


def _flat(params: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {_name(path): np.ascontiguousarray(np.asarray(leaf)) for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
