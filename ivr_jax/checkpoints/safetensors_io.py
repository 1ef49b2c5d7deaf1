"""Safetensors files, one part of a tensor in memory at a time, in both directions.

Reading is the safetensors library's (`safe_open` and slices); a file is opened for each read, so that what is mapped of
it does not add up in memory.  The library can only write tensors that are in memory whole, so the files are written
here: 8 bytes little-endian header length, a JSON header that gives each tensor's dtype, shape and [begin, end) in the
data, then the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import safetensors

from ivr_jax import files
from ivr_jax.checkpoints.lazy import PART_BYTES, Index
from ivr_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")  # weights that are not read
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_AGAIN = "Download or export the checkpoint again."


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `read` fetches it or a part of it, nothing is kept."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, index: Index = ()) -> np.ndarray:
        """A fresh array of `dtype`: the tensor, or its part at `index` (a slice for each axis, with start and stop).

        Raises UserError when the file is gone or damaged.
        """
        size = tuple(part.stop - part.start for part in index)
        if 0 in size:  # the library refuses one that starts where the tensor ends
            return np.empty(size, self.dtype)
        with _opened(self.file) as file:
            if not self.shape:
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[index or (slice(None),)]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing.", _AGAIN) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}).", _AGAIN) from None


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write.

    Attributes:
      fetch: produces its rows `start` … `stop − 1` (of the first axis) with exactly this dtype, when their turn comes;
        `fetch(0, 1)` is all of a tensor without axes.
      source: tensors with the same source are fetched one after the other, wherever they lie in the files.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[int, int], np.ndarray]
    source: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return self.dtype.itemsize * math.prod(self.shape)

    def parts(self) -> Iterator[np.ndarray]:
        """The tensor as consecutive contiguous parts of about `PART_BYTES`. ValueError if one is not as planned."""
        for start, stop in row_blocks(self.shape, self.dtype.itemsize):
            part = np.ascontiguousarray(self.fetch(start, stop))
            wanted = (stop - start, *self.shape[1:]) if self.shape else ()
            if part.shape != wanted or part.dtype != self.dtype:
                raise ValueError(f"{self.name}: fetched {part.dtype}{part.shape}, not {self.dtype}{wanted}")
            yield part


def row_blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive runs of rows, `PART_BYTES` or one row each; a tensor without axes is one row."""
    stop = shape[0] if shape else 1
    rows = max(1, PART_BYTES // max(1, itemsize * math.prod(shape[1:])))
    for first in range(0, stop, rows):
        yield first, min(first + rows, stop)


def digest(parts: Iterable[np.ndarray]) -> str:
    """SHA-256 of a tensor's bytes, given as its consecutive parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(_bytes(part))
    return total.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def open_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. UserError when it is missing, truncated or not a safetensors file."""
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():
            part = file.get_slice(name)
            code = part.get_dtype()
            if code not in DTYPES:
                raise UserError(f"tensor {name} in {path} has dtype {code}.",
                                f"Only {', '.join(DTYPES)} can be read; convert the checkpoint first.")
            tensors[name] = StoredTensor(name, path, DTYPES[code], tuple(part.get_shape()))
    return tensors


def _no_weights(directory: Path) -> UserError:
    """Says what is there instead of safetensors."""
    if not directory.is_dir():
        return UserError(f"there is no folder {directory}.", "Name the folder that holds the checkpoint.")
    others = sorted(path.name for path in directory.iterdir() if path.suffix in _OTHER_FORMATS)
    holds = f"{others[0]}, which is not read" if others else "no weights"
    return UserError(f"{directory} holds {holds}, and no safetensors.",
                     "Save the model as safetensors (in transformers: save_pretrained), or download those files.")


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory: by its index if there is one, else those of its one file.

    That file is `model.safetensors`, whatever adapters and optimizers left beside it, or else the only one of its kind.
    """
    if (directory / INDEX).is_file():
        return _open_indexed(directory)
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    if directory / SINGLE in found and not any(_SHARD.fullmatch(path.name) for path in found):
        found = [directory / SINGLE]
    if not found:
        raise _no_weights(directory)
    if len(found) != 1:
        raise UserError(f"{directory} holds {len(found)} safetensors files and no {INDEX}.",
                        "A checkpoint is one file, or several with their index; download it again.")
    return open_file(found[0])


def _open_indexed(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    try:
        weight_map = dict(files.read_json(index, _AGAIN)["weight_map"])
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
    """Write one file, fetching a part of one tensor at a time."""
    _fill([(path, tensors)])


def write_directory(directory: Path, tensors: Sequence[PlannedTensor], shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` (one tensor at least) and their index.

    The files hold the tensors in the order given; they are fetched source by source.
    """
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    _fill([(directory / name, shard) for name, shard in zip(names, shards, strict=True)])
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    (directory / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2))


def _fill(files: Sequence[tuple[Path, Sequence[PlannedTensor]]]) -> None:
    with contextlib.ExitStack() as stack:
        places: list[tuple[PlannedTensor, IO[bytes], int]] = []
        streams = []
        for path, tensors in files:
            stream = stack.enter_context(path.open("wb"))
            streams.append(stream)
            header = _header(tensors)
            stream.write(header)
            offset = len(header)
            for tensor in tensors:
                places.append((tensor, stream, offset))
                offset += tensor.nbytes
        for tensor, stream, offset in sorted(places, key=lambda place: place[0].source):
            stream.seek(offset)
            for part in tensor.parts():
                stream.write(_bytes(part))
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded
