"""What is in a chip's HBM during a program, from the compiler's own buffer assignment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from ivr_jax.compile.topologies import GIB

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)$")
_VALUE = re.compile(r"^ value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
_SHAPE = re.compile(r"^([a-z]+\d*)\[([\d,]*)\]")
_EXCEEDED = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()"
                       r"([\d.]+)([KMGT])")  # fmt: skip
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value in the heap of temporaries: [offset, offset + size) bytes, and its type ("bf16", (64, 4, 2048, 5120))."""

    name: str
    size: int
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes a chip by kind; `capacity` is what a program may use."""

    kinds: Mapping[str, int]
    capacity: float

    @property
    def total(self) -> int:
        """Bytes of one chip."""
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        """Whether a chip holds it."""
        return self.total <= self.capacity


def read_heap(text: str) -> tuple[int, list[Buffer]]:
    """The HBM heap of temporaries in a dumped buffer assignment: its size in bytes, and the values that share it.

    Raises:
      ValueError: the text is no buffer assignment of a scheduled TPU program.
    """
    size, buffers, inside = None, [], False
    for line in text.splitlines():
        if allocation := _ALLOCATION.match(line):
            rest = allocation.group(2)
            inside = "preallocated-temp" in rest and " color " not in rest
            if inside:
                size = (size or 0) + int(allocation.group(1))
        elif inside and (value := _VALUE.match(line)):
            shape = _SHAPE.match(value.group(4))
            if shape is not None:
                dims = tuple(int(n) for n in shape.group(2).split(",") if n)
                buffers.append(Buffer(value.group(1), int(value.group(2)), int(value.group(3)), shape.group(1), dims))
    if size is None:
        raise ValueError("no heap of temporaries in this buffer assignment")
    return size, buffers


def divide_heap(
    size: int, buffers: Iterable[Buffer], param_shapes: Sequence[tuple[int, ...]], layers: int
) -> dict[str, int]:
    """The heap's bytes as gradients, activations kept for the backward pass, and the rest; they add up to `size`.

    Args:
      param_shapes: shapes of a chip's shards of the parameters; a float32 or bfloat16 value of such a shape is a
        gradient (or a parameter cast for use).
      layers: a value with this leading axis, and no parameter's shape, is kept for every layer.
    """
    shapes = set(param_shapes)
    spans: dict[str, list[tuple[int, int]]] = {"gradients": [], "activations": []}
    for buffer in buffers:
        if buffer.shape in shapes and len(buffer.shape) > 1:
            spans["gradients"].append((buffer.offset, buffer.offset + buffer.size))
        elif buffer.shape[:1] == (layers,) and len(buffer.shape) > 2:
            spans["activations"].append((buffer.offset, buffer.offset + buffer.size))
    kept = _covered(spans["activations"])
    gradients = _covered(spans["gradients"] + spans["activations"]) - kept
    return {"gradients": gradients, "activations": kept, "temporaries": size - kept - gradients}


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    total, end = 0, 0
    for first, last in sorted(spans):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def exceeded(message: str) -> tuple[float, float] | None:
    """(bytes wanted, bytes there are) of a compiler error that says a program does not fit into HBM, else None.

    A kernel that needs more of another memory (vmem) than a core has is no matter of the config.
    """
    match = _EXCEEDED.search(message)
    if match is None or re.search(r"memory space (?!hbm)\w+", message):
        return None
    return float(match.group(1)) * _UNITS[match.group(2)], float(match.group(3)) * _UNITS[match.group(4)]


def gib(size: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"
