"""Images that users have sent: decoded, checked, held in memory by the name of their content, never on disk."""

from __future__ import annotations

import base64
import binascii
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ivr_jax.errors import UserError
from ivr_jax.images import decode_image, fit, image_name
from ivr_jax.serve.limits import Limits

LARGEST_AREA = 1024 * 1024  # pixels that are kept of an image: no model draws larger ones
LONGEST_RATIO = 20  # of the sides of an image


def decode_upload(data: bytes, limits: Limits, what: str = "the image") -> np.ndarray:
    """Pixels uint8 [height, width, 3] of an uploaded file, reduced to about `LARGEST_AREA`.

    Size is checked first, then width x height as the file's header says, then it is decompressed (rotation, colour
    spaces and transparency as in `images.load_image`).  Raises UserError naming the fault.
    """
    if len(data) > limits.upload_bytes:
        raise UserError(
            f"{what} is a file of {len(data) / 1e6:.0f} MB; at most {limits.upload_bytes >> 20} MB are taken.",
            "Scale it down.",
        )
    try:
        with Image.open(io.BytesIO(data)) as header:
            width, height = header.size
    except Exception:
        raise UserError(f"{what} is not an image file.", "Give a PNG, JPEG, WebP or another common image.") from None
    if width * height > limits.upload_pixels:
        raise UserError(
            f"{what} holds {width} x {height} pixels; at most {limits.upload_pixels / 1e6:.0f} million are taken.",
            "Scale it down.",
        )
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise UserError(f"{what} is too long and narrow: {width} x {height} pixels.", "Crop it.")
    pixels = decode_image(data, what)
    if pixels.shape[0] * pixels.shape[1] <= LARGEST_AREA:
        return pixels
    return fit(pixels, LARGEST_AREA, 1)


def from_data_url(url: str, limits: Limits, what: str = "the image") -> np.ndarray:
    """Pixels of a `data:image/...;base64,` address.  Raises UserError for any other: the server fetches nothing."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise UserError(f"{what} is not a data: address with base64.", "Send the image itself; nothing is fetched.")
    if len(data) > limits.upload_bytes * 4 // 3 + 4:
        raise UserError(f"{what} is larger than {limits.upload_bytes >> 20} MB.", "Scale it down.")
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{what} is not valid base64.", "Encode the file's bytes.") from None
    return decode_upload(decoded, limits, what)


class Uploads:
    """The least recently used go first; safe between threads."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, pixels: np.ndarray) -> str:
        """Keeps an image; returns its name."""
        name = image_name(pixels)
        with self._lock:
            self._images[name] = pixels
            self._images.move_to_end(name)
            while len(self._images) > self._limits.stored_images:
                self._images.popitem(last=False)
        return name

    def get(self, name: str) -> np.ndarray:
        """Raises UserError for an image that is not here (any more)."""
        with self._lock:
            if name not in self._images:
                raise UserError("a reference image is not on the server any more.", "Add it again.")
            self._images.move_to_end(name)
            return self._images[name]

    def take(self, names: Sequence[str]) -> tuple[np.ndarray, ...]:
        """The images of a request.  Raises UserError for too many, and for one that is not here."""
        if len(names) > self._limits.references:
            raise UserError(
                f"{len(names)} reference images were given; at most {self._limits.references} are taken.",
                "Remove some.",
            )
        return tuple(self.get(name) for name in names)
