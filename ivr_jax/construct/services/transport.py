"""What a transport is, and how images travel.

A transport makes one call and tells what happened in the caller's terms (`Reply`, `Fault`, `Rejected`, `UserError`); it
neither waits nor repeats.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime
import email.utils
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from ivr_jax.construct.interfaces import Pixels
from ivr_jax.construct.services.caller import Fault, Rejected, Reply
from ivr_jax.construct.services.replies import Unusable
from ivr_jax.errors import UserError
from ivr_jax.images import image_name

_RETRIED = frozenset((408, 409, 425, 429))
_REFUSED = {401: "the key is refused", 403: "access is forbidden", 404: "there is no such address or model"}
_EXCERPT = 200


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image beside a text: what it is called there, and its pixels.

    Several questions may show the same picture; its name and its PNG are made once.
    """

    label: str
    pixels: Pixels

    @functools.cached_property
    def name(self) -> str:
        """The image's name (`ivr_jax.images.image_name`)."""
        return image_name(self.pixels)

    def encoded(self, longest_side: int) -> bytes:
        """PNG, scaled down to at most `longest_side` a side."""
        kept = self.__dict__.setdefault("_encoded", {})
        if longest_side not in kept:
            kept[longest_side] = encode(self.pixels, longest_side)
        return kept[longest_side]


class Transport(Protocol):
    """One way to speak with a service."""

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        """Asks for a text that fits the JSON schema."""

    async def draw(self, text: str, sources: Sequence[Pixels]) -> Reply:
        """Asks for an image: `sources` edited as the text says, or, without sources, drawn from the text alone."""

    async def close(self) -> None:
        """Ends all connections."""


def encode(pixels: Pixels, longest_side: int) -> bytes:
    """PNG of uint8 [height, width, 3], scaled down to at most `longest_side` a side."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)  # never enlarges
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def decode_base64(text: Any) -> bytes:
    """The bytes of base64, with or without a data URI around it.  Raises Unusable."""
    if not isinstance(text, str) or not text.strip():
        raise Unusable("the answer holds no image")
    if text.startswith(("http://", "https://")):
        raise Unusable("the answer is the address of an image, not an image")
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise Unusable("the answer's image is no base64") from None


def outcome_of_status(status: int, headers: Mapping[str, str], body: str, who: str) -> Exception:
    """The exception that an HTTP error status means; `body` (without secrets) is quoted in short."""
    quoted = " ".join(body.split())[:_EXCERPT]
    if status in _RETRIED or status >= 500:
        return Fault(str(status), quoted, retry_after(headers))
    if status in _REFUSED:
        return UserError(f"{who}: {_REFUSED[status]} (status {status}: {quoted}).",
                         "Check its base_url, its model and the environment variable with its key.")
    return Rejected(f"status {status}: {quoted}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` (a number or an HTTP date) or `retry-after-ms` asks for; None without a usable one."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            value = headers["retry-after"].strip()
            try:
                seconds = float(value)
            except ValueError:
                until = email.utils.parsedate_to_datetime(value)
                if until.tzinfo is None:
                    until = until.replace(tzinfo=datetime.UTC)
                seconds = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
        else:
            return None
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), 1e9) if seconds == seconds else None
