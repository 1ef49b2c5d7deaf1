"""Parameters in and out of an Orbax checkpoint a part at a time, for conversions of models larger than memory.

`write` makes an ordinary checkpoint (step 0 of a workdir, as `store.read_params` and training read it) out of
lazy arrays: Orbax commits the step and writes the description of the tree, and each array becomes a Zarr array of its
own, filled chunk by chunk.  `open_params` gives the arrays of any checkpoint as lazy arrays.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from ivr_jax.checkpoints import store
from ivr_jax.checkpoints.lazy import PART_BYTES, Index, LazyArray, part_shape, parts
from ivr_jax.cloud.objects import is_url, kvstore
from ivr_jax.errors import UserError
from ivr_jax.models import lora


def write(workdir: str | os.PathLike[str], params: Any, meta: Mapping[str, Any]) -> None:
    """A workdir with one checkpoint, step 0, of a tree of LazyArrays; a chunk of one array is in memory at a time.

    Raises OSError when it cannot be written.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax warns of features that are not used here, and logs what it raises
    try:
        registry = ocp.type_handlers.create_type_handler_registry((LazyArray, _ChunkWriter()))
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry),
            "data": ocp.JsonCheckpointHandler(), "meta": ocp.JsonCheckpointHandler(),
        }  # fmt: skip
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        folder = Path(workdir).absolute() / store.FOLDER
        with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
            state, data = ocp.args.PyTreeSave({"params": params}), ocp.args.JsonSave({"state": None})
            manager.save(0, args=ocp.args.Composite(state=state, data=data, meta=ocp.args.JsonSave(dict(meta))))
    finally:
        logging.set_verbosity(verbosity)


class _ChunkWriter(ocp.type_handlers.TypeHandler):
    """How Orbax writes a LazyArray: it reads back as a `jax.Array`."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Sequence[LazyArray], infos: Sequence[Any], args: Any = None) -> list:
        for array, info in zip(values, infos, strict=True):
            chunk = part_shape(array.shape, array.dtype.itemsize)
            with _writing():
                store = await ts.open(
                    {"driver": "zarr", "kvstore": _files(info.path), "store_data_equal_to_fill_value": True},
                    create=True, dtype=array.dtype.name, shape=array.shape,
                    chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
                )  # fmt: skip
            for index in parts(array.shape, chunk):
                part = array[index]
                with _writing():
                    await store[index].write(part)
        return []

    async def metadata(self, infos: Sequence[Any]) -> Any:
        raise NotImplementedError("this handler only writes")

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Any:
        raise NotImplementedError("this handler only writes")


def open_params(path: str | os.PathLike[str], like: Any) -> Any:
    """The parameters of the checkpoint at `path` (see `store.resolve`) as a tree of LazyArrays shaped like `like`.

    One array, the last one read, is held whole if its chunks are larger than a part: reading a part of such a chunk
    costs as much as reading the chunk. Adapters (LoRA) are merged into the kernels that they adapt, as they are read.

    Raises:
      UserError: an array is missing, damaged, or of another shape.
    """
    state = store.step_folder(path) / "state"
    adapted = store.read_meta(path).get("lora")
    if adapted:
        like = lora.abstract_sharded(like, lora.LoraOptions(**adapted))
    held: dict[str, np.ndarray] = {}
    is_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(state)

    def one(keys: Any, leaf: Any) -> LazyArray:
        name = "params." + jax.tree_util.keystr(keys, simple=True, separator=".")
        inside = {"driver": "ocdbt", "base": _files(state), "path": f"{name}/"}
        kvstore = inside if is_ocdbt else _files(state / name)
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        try:
            stored = ts.open(spec, open=True, read=True).result()
        except (ValueError, OSError) as error:
            raise _damaged(state, name, error) from error
        if stored.shape != tuple(leaf.shape):
            raise UserError(f"array {name} of {str(state.parent)!r} has shape {list(stored.shape)}, "
                            f"its config wants {list(leaf.shape)}.", "The checkpoint is damaged; use another step.")
        dtype = stored.dtype.numpy_dtype
        wide = dtype.itemsize * math.prod(stored.chunk_layout.read_chunk.shape or ()) > PART_BYTES  # a scalar has None

        def read(index: Index) -> np.ndarray:
            try:
                if not wide:
                    return stored[index].read().result()
                if name not in held:
                    held.clear()
                    held[name] = stored.read().result()
                return held[name][index]
            except (ValueError, OSError) as error:
                raise _damaged(state, name, error) from error

        return LazyArray(tuple(leaf.shape), dtype, read)

    params = jax.tree_util.tree_map_with_path(one, like)
    return _merged(params) if adapted else params


def _merged(params: Any) -> Any:
    """`lora.merge` of a tree of LazyArrays, done for each part when it is read."""
    merged, scale = {**lora.base(params)}, params[lora.SCALE][()]
    merged["layers"] = dict(params["layers"])
    for place, group in params[lora.ADAPTERS].items():
        merged["layers"][place] = dict(merged["layers"][place])
        for name, pair in group.items():
            kernel = params["layers"][place][name]
            merged["layers"][place][name] = LazyArray(kernel.shape, kernel.dtype, _adapted(kernel, pair, scale))
    return merged


def _adapted(kernel: LazyArray, pair: Mapping[str, LazyArray], scale: np.ndarray) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        layers, rows, columns = index
        product = np.matmul(pair["a"][layers, rows], scale * pair["b"][layers, :, columns])
        return (kernel[index].astype(np.float32) + product).astype(kernel.dtype)

    return read


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """TensorStore raises ValueError where a disk is full."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _files(folder: os.PathLike[str]) -> dict[str, str]:
    return kvstore(f"{folder}/") if is_url(folder) else {"driver": "file", "path": f"{folder}/"}


def _damaged(state: Path, name: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0][:200]
    return UserError(f"array {name} of {str(state.parent)!r} cannot be read: {reason}.",
                     "The checkpoint is damaged, or was made with another model config; use another step.")
