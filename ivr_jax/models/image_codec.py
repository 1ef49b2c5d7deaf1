"""Pixels <-> codes for lists of images of any sizes, with a trained image tokenizer.

Images of one size go through the network in batches of 1, 4, 16 or 64 (times the local devices), the largest first: few
programs to compile, and padding only where there are fewer images than devices.  Identical images and identical codes
are computed once while they stay in a cache whose size is bounded in bytes.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import image_tokenizer

MAX_BATCH = 64  # images a device
MAX_PIXELS = 1 << 21  # pixels of a batch on one device, eight images of 512 x 512: their activations take about 2 GiB
CACHE_BYTES = 1 << 28  # of each direction


class ImageCodec:
    """The parameters are sharded over this process's own devices, so that each process can work on images of its own.

    `encode`: uint8 [height, width, 3] images -> int32 [rows, columns] codes; `decode`: the inverse.

    Args:
      params: the tree of `image_tokenizer.init_params`.
      cache_bytes: most bytes of results that are kept, for each direction.
      batch: most images a device at a time.  Programs for other numbers of images round differently: with 1, codes and
        pixels do not depend on which images are passed together.
    """

    def __init__(
        self,
        config: image_tokenizer.ImageTokenizerConfig,
        params: Any,
        cache_bytes: int = CACHE_BYTES,
        batch: int = MAX_BATCH,
    ):
        self.config, self._batch = config, batch
        self._mesh = sharding.local_mesh()
        placed = sharding.shardings(self._mesh, image_tokenizer.param_axes(config), params)
        self.params = jax.device_put(params, placed)
        self._encode = jax.jit(
            lambda params, x: image_tokenizer.encode(config, params, image_tokenizer.pixels_to_unit(_spread(x)))
        )
        self._decode = jax.jit(
            lambda params, x: image_tokenizer.unit_to_pixels(image_tokenizer.decode(config, params, _spread(x)))
        )
        self._codes, self._pixels = _Cache(cache_bytes), _Cache(cache_bytes)

    def encode(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Raises UserError for an image whose sides are not multiples of the tokenizer's factor."""
        factor = self.config.factor
        for image in images:
            if (
                image.ndim != 3
                or image.shape[2] != 3
                or image.shape[0] % factor
                or image.shape[1] % factor
                or 0 in image.shape
            ):
                raise UserError(
                    f"an image of shape {image.shape} does not divide into {factor}-pixel cells.",
                    f"Resize it to multiples of {factor} first (`ivr_jax.images.fit`).",
                )
        return self._map(self._encode, images, self._codes, 1)

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes int [rows, columns] -> uint8 [rows * factor, columns * factor, 3]."""
        arrays = [np.asarray(c, np.int32) for c in codes]
        return self._map(self._decode, arrays, self._pixels, self.config.factor**2)

    def _map(self, function: Callable, arrays: Sequence[np.ndarray], cache: _Cache, pixels: int) -> list[np.ndarray]:
        """`function` of each array, in batches of one shape; an array's entry [row, column] stands for `pixels`."""
        keys = [_key(x) for x in arrays]
        results = {key: cache.get(key) for key in keys}
        todo = collections.defaultdict(dict)
        for key, x in zip(keys, arrays, strict=True):
            if results[key] is None:
                todo[x.shape][key] = x
        for shape, same in todo.items():
            items = list(same.items())
            for size in batch_sizes(len(items), shape[0] * shape[1] * pixels, self._mesh.size, self._batch):
                part, items = items[:size], items[size:]
                stacked = np.stack([x for _, x in part] + [part[0][1]] * (size - len(part)))
                with jax.set_mesh(self._mesh):
                    computed = np.asarray(function(self.params, stacked))
                for (key, _), value in zip(part, computed, strict=False):
                    results[key] = cache.put(key, value)
        return [results[key] for key in keys]


def batch_sizes(count: int, pixels: int, devices: int, most: int = MAX_BATCH) -> list[int]:
    """Sizes of batches for `count` images of `pixels` pixels each, with `most` or fewer images a device.

    Together they are `count`, or less than `devices` more.
    """
    largest = max(1, min(most, MAX_PIXELS // pixels))
    sizes = [devices * 4**power for power in (3, 2, 1, 0) if 4**power <= largest]
    batches: list[int] = []
    for size in sizes:
        batches += [size] * (count // size)
        count %= size
    return [*batches, devices] if count else batches


def _key(array: np.ndarray) -> bytes:
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _spread(x: jax.Array) -> jax.Array:
    return sharding.constrain(x, ("batch", *(None,) * (x.ndim - 1)))


class _Cache:
    """Least recently used arrays of at most `size` bytes together."""

    def __init__(self, size: int):
        self._size, self._held = size, 0
        self._entries: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: bytes, value: np.ndarray) -> np.ndarray:
        value = value.copy()  # a view would keep the whole batch
        value.setflags(write=False)
        self._entries[key] = value
        self._held += value.nbytes
        while self._held > self._size and self._entries:
            self._held -= self._entries.popitem(last=False)[1].nbytes
        return value
