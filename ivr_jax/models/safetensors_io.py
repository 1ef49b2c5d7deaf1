"""Safetensors files, one tensor in memory at a time, in both directions.

The format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header that gives each tensor's dtype,
shape and [begin, end) in the data, then the data.  Written and read here directly, so that a file never stands in
memory whole and a mapped file never counts as memory; nothing in it is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from ivr_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000
INDEX = "model.safetensors.index.json"
_AGAIN = "Download or export the checkpoint again."


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `read()` fetches it, nothing is kept."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor as a fresh array of `dtype` and `shape`."""
        flat = np.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset)
        return flat.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: `fetch()` produces it when its turn comes, with exactly this dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. UserError when it is missing, truncated or not a safetensors file."""
    if not path.is_file():
        raise UserError(f"{path} is missing.", _AGAIN)
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(_HEADER_LIMIT, size - 8):
            raise UserError(f"{path} is truncated or no safetensors file.", _AGAIN)
        try:
            header = json.loads(stream.read(length))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            tensors = [_stored(path, name, entry, 8 + length, size) for name, entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has a broken header ({error}).", _AGAIN) from None
    return {tensor.name: tensor for tensor in tensors}


def _stored(path: Path, name: str, entry: Mapping, start: int, size: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"tensor {name} in {path} has dtype {entry['dtype']}.",
                        f"Only {', '.join(DTYPES)} can be read; convert the checkpoint first.")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name}: shape {shape}, offsets {begin}…{end}")
    if end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor {name}: {end - begin} bytes for shape {shape}")
    if start + end > size:
        raise UserError(f"tensor {name} in {path} is truncated: it should end at byte {start + end}, "
                        f"the file has {size}.", _AGAIN)
    return StoredTensor(name, path, dtype, shape, start + begin)


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory: by its index if there is one, else its one `*.safetensors` file."""
    if (directory / INDEX).is_file():
        return _open_indexed(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{directory} holds {len(files)} safetensors files and no {INDEX}.",
                        "A checkpoint is one file, or several with their index; download it again.")
    return open_file(files[0])


def _open_indexed(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        shards = sorted(set(weight_map.values()))
        inside = all(Path(shard).name == shard for shard in shards)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a checkpoint index ({error}).", _AGAIN) from None
    if not inside:
        raise UserError(f"{index} names files outside its own folder.", _AGAIN)
    found = {shard: open_file(directory / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in found[shard]:
            raise UserError(f"tensor {name} is missing from {directory / shard}, where the index puts it.", _AGAIN)
    for shard, tensors in found.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                raise UserError(f"tensor {name} in {directory / shard} is not in the index.", _AGAIN)
    return {name: found[shard][name] for name, shard in weight_map.items()}


def write_file(path: Path, tensors: Sequence[PlannedTensor]) -> None:
    """Write one file, fetching one tensor at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.fetch())
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name}: fetched {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def write_directory(directory: Path, tensors: Sequence[PlannedTensor], shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (one tensor at least) and their index."""
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    (directory / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2))
