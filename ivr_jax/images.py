"""Images on disk and their names.

Pixels are uint8 [height, width, 3] RGB everywhere in the package.  An image's name is the hash of its content, so
equal images have one name and one file.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from ivr_jax import files
from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import is_url
from ivr_jax.errors import UserError

Pixels: TypeAlias = np.ndarray  # uint8 [height, width, 3]
Images: TypeAlias = Mapping[str, Pixels]  # image name -> pixels

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000")  # not EPS: Pillow runs it
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # bytes of one text in a PNG (prompts, XMP); Pillow refuses files over 1 MiB
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28  # bytes of all of them
BITS_PER_SAMPLE, MAX_SAMPLE_VALUES = 258, (281, 341)  # TIFF tags
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
MAX_MEGAPIXELS = 64
MAX_SIDE = 1 << 15  # pixels: a line of 64 megapixels would grow by its height when it is fitted


def image_name(pixels: np.ndarray) -> str:
    """32 hexadecimal characters: the SHA-256 of shape and bytes.  `pixels` uint8 [height, width, 3]."""
    _check_pixels(pixels)
    digest = hashlib.sha256(np.array(pixels.shape, "<i8").tobytes())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()[:32]


def _check_pixels(pixels: Pixels) -> None:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"an image must be uint8 [height, width, 3], not {getattr(pixels, 'dtype', type(pixels))} "
                        f"{getattr(pixels, 'shape', '')}.", "Convert it to RGB pixels first.")


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a file, which may be in a bucket, as uint8 [height, width, 3].

    Conversions: the EXIF rotation is applied; transparency is composited on white; 16-bit samples keep their 8 high
    bits; CMYK, grey and palette images become RGB; of an animation the first frame counts.

    Raises UserError for a file that is missing, is no image of one of `FORMATS`, is truncated, holds more than 64
    megapixels, or more than 32,768 pixels a side; and for samples of unknown range, which would turn black: 32-bit
    integers and floats, and 16-bit samples that use 14 bits at most, unless the file says which value is white.
    """
    file = inputs.local(path) if is_url(path) else Path(path)
    if file.is_fifo():
        raise UserError(f"{path} is a pipe.", "Name a file: reading an image needs to go back in it.")
    return _read(file, str(path))


def decode_image(data: bytes, what: str) -> np.ndarray:
    """`load_image` of a file's bytes; `what` names them in errors."""
    return _read(io.BytesIO(data), what)


def _read(file: Path | io.BytesIO, what: str) -> np.ndarray:
    try:
        with Image.open(file, formats=_formats()) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels > MAX_MEGAPIXELS:
                raise UserError(f"{what} holds {megapixels:.0f} megapixels; at most {MAX_MEGAPIXELS} are read.",
                                "Scale it down.")
            if max(image.size) > MAX_SIDE:
                raise UserError(f"{what} holds {max(image.size)} pixels a side; at most {MAX_SIDE} are read.",
                                "Crop it.")
            deep = any(";16" in str(tile.args) for tile in getattr(image, "tile", ()))
            image.load()
            if image.format == "PNG" and not _all_rows_came(image, file):
                raise UserError(f"{what} ends before its last row: the rest would be black.", "Copy or make it again.")
            return _turned(_to_rgb(image, deep, what), _orientation(image))
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no image file {what}.", "Check the path.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{what} holds more than {MAX_MEGAPIXELS} megapixels.", "Scale it down.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{what} is no image of a known format.",
                        f"Save it as PNG or JPEG; what can be read: {', '.join(_formats())}.") from error
    except Exception as error:  # what a decoder raises for a damaged file is not limited to a few types
        raise UserError(f"{what} cannot be read as an image ({error}).",
                        "The file is damaged, or may not be read: copy or make it again.") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _all_rows_came(image: Image.Image, file: Path | io.BytesIO) -> bool:
    """Whether the pixel data of a PNG fill it.  Pillow takes a zlib stream that ends early and leaves zeros behind it.

    The data are only counted where zeros end the picture, or where rows come interlaced.
    """
    if np.asarray(image)[-1].any() and not image.info.get("interlace"):
        return True
    data = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    needed = 0
    for left, top, right, down in passes:
        columns = max(0, -(-(width - left) // right))
        rows = max(0, -(-(height - top) // down))
        needed += rows * (1 + (columns * depth * PNG_CHANNELS[colour] + 7) // 8) if columns else 0
    stream, came, at = zlib.decompressobj(), 0, 8
    while at + 8 <= len(data) and came < needed:
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            came += len(stream.decompress(data[at + 8 : at + 8 + size], needed))
        at += size + 12
    return came >= needed


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the tags are a small file system of their own; a picture is good without them
        return 1


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """`pixels` as a viewer shows them.  (`ImageOps.exif_transpose` also writes the tags anew, which some refuse.)"""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image: Image.Image, deep: bool, what: str) -> Pixels:
    """`deep`: the file holds 16 bits a sample, of which Pillow has kept the 8 high ones in a colour image."""
    if image.mode.startswith("I") or image.mode == "F":
        samples = np.asarray(image).astype(np.float64)
        white = _white(image, samples, what)
        grey = np.clip(samples * (256 / (white + 1)) if white > 1 else samples * 255, 0, 255).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):  # the sample that is transparent
            grey[samples == clear] = 255
        return np.repeat(grey[..., None], 3, 2)
    colours = np.asarray(image.convert("RGB")) if deep else None  # before white shows through
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if colours is not None and 0 < colours.max() < 64:
        raise _unknown_range(what, f"16 bits a sample, of which at most {int(colours.max()).bit_length() + 8} are used")
    return np.array(image.convert("RGB"))


def _white(image: Image.Image, samples: np.ndarray, what: str) -> float:
    """The sample value that is white.  Raises UserError when nothing says which one it is."""
    largest = float(samples.max())
    for stated in _stated_whites(image):
        is_default = stated >= 65535 and largest < stated / 4  # many writers put the largest number of the type there
        if samples.min() >= 0 and largest <= stated and not is_default:
            return stated
    if image.mode != "F" and samples.min() >= 0 and largest < 1 << 16:
        if image.format == "PPM":  # Pillow has scaled the file's own largest value to this
            return 65535.0
        if image.mode != "I" or image.format == "PNG":
            if largest >= 1 << 14 or largest == 0:
                return 65535.0
            raise _unknown_range(what, f"16-bit samples up to {largest:.0f}")
    raise _unknown_range(what, f"samples from {samples.min():g} to {largest:g}")


def _stated_whites(image: Image.Image) -> Iterator[float]:
    """What a TIFF's tags say: MaxSampleValue, SMaxSampleValue, and what 9 to 15 bits a sample can hold."""
    tags = getattr(image, "tag_v2", {})
    for name in (*MAX_SAMPLE_VALUES, BITS_PER_SAMPLE):
        value = tags.get(name)
        value = value[0] if isinstance(value, tuple) and value else value
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError, OverflowError):
            number = float(value)
            if name == BITS_PER_SAMPLE:
                number = 2.0**number - 1 if 8 < number < 16 else 0.0
            if number > 0 and np.isfinite(number):
                yield number


def _unknown_range(what: str, holds: str) -> UserError:
    return UserError(f"{what} holds {holds}, and does not say which value is white.", "Save it with 8 bits a sample.")


def encode_png(pixels: Pixels, compress_level: int = 1) -> bytes:
    """PNG of uint8 [height, width, 3]; the same pixels and level always give the same bytes."""
    _check_pixels(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def data_uri(pixels: Pixels) -> str:
    """uint8 [height, width, 3] as a `data:` address of a PNG, for pages that hold their images."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels, 6)).decode()


def save_png(path: str | os.PathLike[str], pixels: Pixels) -> None:
    """Writes uint8 [height, width, 3] as a PNG file, whole or not at all.  Raises UserError when it cannot."""
    files.write_file(path, encode_png(pixels))


def crop_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle square of uint8 [height, width, 3], resized to side x side; bicubic.

    An image that already has that size is returned as it is.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    least = min(height, width)
    top, left = (height - least) // 2, (width - least) // 2
    square = Image.fromarray(pixels[top : top + least, left : left + least])
    return np.array(square.resize((side, side), Image.Resampling.BICUBIC))


def fitted_size(height: float, width: float, area: int, multiple: int) -> tuple[int, int]:
    """Height and width of about `area` pixels with this aspect ratio, each a multiple of `multiple`, and at least one.

    The released rule of Emu3.5: the height that gives the area, cut to a whole number, then the width, then both
    rounded to the nearest multiple, halves up.
    """
    aspect = width / height
    rows = max(1, int((area / aspect) ** 0.5))
    columns = int(rows * aspect)
    fitted = [max(1, (side + multiple // 2) // multiple) * multiple for side in (rows, columns)]
    return fitted[0], fitted[1]


def fit(pixels: np.ndarray, area: int, multiple: int) -> np.ndarray:
    """Resizes to `fitted_size`, bicubic; an image that already has that size is returned as it is."""
    height, width = pixels.shape[:2]
    rows, columns = fitted_size(height, width, area, multiple)
    if (rows, columns) == (height, width):
        return pixels
    return np.array(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC))
