"""Arrays that stay on disk until a part of them is asked for.

The one notion that checkpoints of both kinds are read through: a tensor in safetensors seen with our axes, or an array
in an Orbax store.  Nothing is kept; what `[...]` returns belongs to the caller.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

Index = tuple[slice, ...]
PART_BYTES = 1 << 25  # 32 MiB: what is in memory at a time, and the size of a chunk in a store


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array of `shape` and `dtype`; `read` takes one slice an axis (start, stop, no step) and returns that part."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: slice | Sequence[slice]) -> np.ndarray:
        """The part at `index`: slices without steps, for the first axes or all of them; `[()]` is the whole array."""
        index = (index,) if isinstance(index, slice) else tuple(index)
        index += (slice(None),) * (len(self.shape) - len(index))
        bounds = (part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        return self.read(tuple(slice(*bound) for bound in bounds))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.dtype.itemsize * math.prod(self.shape)


def place(array: LazyArray, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """The array on its devices, each of which is given its own part only; on the default device without a sharding."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__, dtype=array.dtype)


def place_tree(tree: Any, shardings: Any = None) -> Any:
    """`place` for a tree of lazy arrays and, if given, the tree of their shardings."""
    return jax.tree.map(place, tree) if shardings is None else jax.tree.map(place, tree, shardings)


def part_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """A shape of at most `PART_BYTES` to cut an array into: single layers first, then the longest side in halves."""
    part = list(shape)
    if len(part) > 2 and itemsize * math.prod(part) > PART_BYTES:
        part[0] = 1
    while itemsize * math.prod(part) > PART_BYTES and max(part) > 1:
        longest = part.index(max(part))
        part[longest] = -(-part[longest] // 2)
    return tuple(part)


def parts(shape: Sequence[int], part: Sequence[int]) -> Iterator[Index]:
    """Index of each part of an array, in order; those at the far ends may be smaller than `part`."""
    starts = (range(0, size, step) for size, step in zip(shape, part, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + step, size)) for a, step, size in zip(corner, part, shape, strict=True))
