"""Pixels <-> codes for lists of images of any sizes, with a trained image tokenizer.

Images of one size go through the network in batches of a fixed shape (few compilations); identical images and
identical codes are computed once while they stay in a small cache.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import image_tokenizer


class ImageCodec:
    """The parameters lie over this process's own devices, so that each process can work on images of its own.

    `encode`: uint8 [height, width, 3] images -> int32 [rows, columns] codes; `decode`: the way back."""

    def __init__(
        self, config: image_tokenizer.ImageTokenizerConfig, params: Any, batch: int = 64, remember: int = 20_000
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
        self._codes, self._pixels = _Cache(remember), _Cache(remember)

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
        return self._map(self._encode, images, self._codes)

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes int [rows, columns] -> uint8 [rows * factor, columns * factor, 3]."""
        return self._map(self._decode, [np.asarray(c, np.int32) for c in codes], self._pixels)

    def _map(self, function: Callable, arrays: Sequence[np.ndarray], cache: _Cache) -> list[np.ndarray]:
        keys: list[Hashable] = [(x.shape, x.tobytes()) for x in arrays]
        results = {key: cache.get(key) for key in keys}
        todo = collections.defaultdict(dict)
        for key, x in zip(keys, arrays, strict=True):
            if results[key] is None:
                todo[x.shape][key] = x
        for same in todo.values():
            items = list(same.items())
            for start in range(0, len(items), self._batch):
                part = items[start : start + self._batch]
                size = self._batch if len(items) > 8 else 8  # two shapes: a full batch, and a small one
                stacked = np.stack([x for _, x in part] + [part[0][1]] * (size - len(part)))
                with jax.set_mesh(self._mesh):
                    computed = np.asarray(function(self.params, stacked))
                for (key, _), value in zip(part, computed, strict=False):
                    results[key] = cache.put(key, value)
        return [results[key] for key in keys]


def _spread(x: jax.Array) -> jax.Array:
    return sharding.constrain(x, ("batch", *(None,) * (x.ndim - 1)))


class _Cache:
    """Least recently used, `size` entries."""

    def __init__(self, size: int):
        self._size, self._entries = size, collections.OrderedDict()

    def get(self, key: Hashable) -> np.ndarray | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, value: np.ndarray) -> np.ndarray:
        self._entries[key] = value
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return value
