"""The settings of one service, and where its secrets come from.

Secrets are read from environment variables, are held in memory only, and are cut out of every text that leaves the
client (`Secrets.hide`): a server that repeats a key must not get it into an error, the cache or a dataset.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Annotated

from ivr_jax.config import Count, NotNegative, OneOf, Positive, Range, Section
from ivr_jax.errors import UserError

KINDS = ("", "world", "openai", "gateway", "checkpoint")
Seconds = Annotated[float, Range(1e-3)]
STRUCTURED = ("auto", "json_schema", "json_object", "none")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class ServiceConfig(Section, name="service"):
    """One service.  What `identity` names decides what it answers; the rest only how it is asked.

    Attributes:
      kind: "world", "openai", "gateway", "checkpoint", or "" for none.
      base_url: where it is, without credentials or query ("https://host/v1").
      model: its name there.
      key_variable: the environment variable that holds the key (gateway: the secret); "" for a server without keys.
      app_variable, source: the gateway's application id (an environment variable) and source name.
      checkpoint: workdir of the model, for the kind "checkpoint".
      temperature, max_tokens: of texts; a temperature below 0 is not sent, nor a max_tokens of 0.
      structured: how to ask for JSON: "json_schema", "json_object", "none", or "auto" (schema until it is refused).
      image_side: images are scaled down to at most this many pixels a side before they are sent.
      size: the size asked of drawn images ("auto", "1024x1024").
      image_reply: value of `response_format` for drawn images; "" does not send it.
      in_flight: calls at a time.
      requests_per_minute, tokens_per_minute: 0 for no limit.
      image_tokens: what one image counts for in `tokens_per_minute`.
      timeout: seconds for one whole call.
      tries: calls for one question, faults and unusable answers together.
      first_wait, longest_wait: seconds of back-off; a longer `Retry-After` ends the question instead.
      breaker_failures: failed calls in a row that open the breaker.
      breaker_rest: seconds between probes of an open breaker.
      patience: seconds for which an open breaker is waited for; after that the service is down.
      price_in, price_out, price_image: cost of a million tokens read and written, and of one drawn image.
    """

    kind: Annotated[str, OneOf(*KINDS)]
    base_url: str
    model: str
    key_variable: str
    app_variable: str
    source: str
    checkpoint: str
    temperature: float
    max_tokens: Count
    structured: Annotated[str, OneOf(*STRUCTURED)]
    image_side: Positive
    size: str
    image_reply: str
    in_flight: Positive
    requests_per_minute: NotNegative
    tokens_per_minute: NotNegative
    image_tokens: Count
    timeout: Seconds
    tries: Positive
    first_wait: Seconds
    longest_wait: Seconds
    breaker_failures: Positive
    breaker_rest: NotNegative
    patience: NotNegative
    price_in: NotNegative
    price_out: NotNegative
    price_image: NotNegative

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_variable", "app_variable"):
            if getattr(self, name) and not _VARIABLE.fullmatch(getattr(self, name)):  # it may be the key: not shown
                raise UserError(f"the service's {name} is no name of an environment variable.",
                                "Put the key into an environment variable, and that variable's name here.")
        if self.kind in ("openai", "gateway"):
            self._check_url()
            if not self.model:
                raise UserError(f"a service of the kind {self.kind!r} names no model.", "Set its `model`.")
        if self.kind == "checkpoint" and not self.checkpoint:
            raise UserError("a service of the kind 'checkpoint' names none.", "Set its `checkpoint` to a workdir.")

    def _check_url(self) -> None:
        try:
            url = urllib.parse.urlsplit(self.base_url)
            fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            raise UserError("the service's base_url cannot be read.", "Write it as https://host/v1.") from None
        if url.username or url.password or url.query or url.fragment:  # may hold a key: not shown
            raise UserError("the service's base_url holds credentials, a query or a fragment.",
                            "Leave only scheme, host and path; the key belongs in an environment variable.")
        if not fine:
            raise UserError(f"the service's base_url is {self.base_url!r}.", "Write it as https://host/v1.")

    @property
    def name(self) -> str:
        """For summaries and errors."""
        return f"{self.kind}:{self.model or self.checkpoint}".rstrip(":")

    def identity(self) -> dict[str, object]:
        """What its answers depend on; part of the key under which they are recorded."""
        return {
            "kind": self.kind,
            "model": self.model or self.checkpoint,
            "temperature": self.temperature,
            "image_side": self.image_side,
            "size": self.size,
        }


# Settings that may change between two parts of one run: they decide how a service is asked, not what it answers.
CHANGEABLE = tuple(
    field.name
    for field in dataclasses.fields(ServiceConfig)
    if field.name not in ("kind", "model", "checkpoint", "temperature", "image_side", "size")
)


class Secrets:
    """Values that must never be written anywhere."""

    def __init__(self, values: Iterable[str]):
        known = sorted({value for value in values if len(value) >= 4}, key=len, reverse=True)
        self._pattern = re.compile("|".join("".join(map(_written, value)) for value in known)) if known else None

    def hide(self, text: str) -> str:
        """`text` without them, however JSON may write them, and without halves of characters, which no file takes."""
        if self._pattern is not None:
            text = self._pattern.sub("[secret]", text)
        return text.encode("utf-8", "replace").decode("utf-8")

    def __repr__(self) -> str:
        return "Secrets(...)"


def _written(character: str) -> str:
    """A pattern of the character and of its escapes in JSON."""
    plain = "" if character.isalnum() else r"\\?"
    return rf"(?:{plain}{re.escape(character)}|\\u(?i:{ord(character):04x}))"


def secret(variable: str, environment: Mapping[str, str] | None = None) -> str:
    """The value of an environment variable; "" for no variable.  UserError when it is not set, or no header value."""
    if not variable:
        return ""
    value = (os.environ if environment is None else environment).get(variable, "").strip()
    if not value:
        raise UserError(f"the environment variable {variable} is not set.", f"export {variable}=… with the key.")
    if not value.isascii() or not value.isprintable() or " " in value:
        raise UserError(f"the environment variable {variable} holds characters that no key has.", "Set it again.")
    return value
