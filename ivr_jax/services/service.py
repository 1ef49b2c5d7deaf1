"""One service: its HTTP client behind a careful caller, and every answer recorded under what was asked.

The record is content-addressed: the key of an answer is the hash of the service's identity, the prompt, the images and
the number of the try.  A question that was answered once is never asked again, by this process or a later one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ivr_jax.errors import UserError
from ivr_jax.images import Pixels, decode_image
from ivr_jax.interfaces import ServiceDown, ServiceFailed
from ivr_jax.services.caller import RAISE_MAX_TOKENS, Caller, CutOff, Fault, Reply
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.http_client import HttpClient, Picture
from ivr_jax.services.limits import Limits
from ivr_jax.services.replies import Unusable

T = TypeVar("T")
_CHARACTERS_PER_TOKEN = 3.5  # rough, for the token limit only
_LARGE = 1 << 15  # bytes from which an image is decoded in a thread


@dataclasses.dataclass(frozen=True)
class Recorded:
    """An answer as it is kept.

    Attributes:
      text: what was answered; None for an image.
      image: the name of the image that was drawn; None for a text.
      tokens_in, tokens_out, cost: what it took.
      cut_off: the `max_tokens` at which an answer broke off that is of no use then; None for a complete answer.
    """

    text: str | None
    image: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    cut_off: int | None = None


class Records(Protocol):
    """Where answers are kept (`ivr_jax.services.journal.Journal`)."""

    def call(self, digest: str) -> Recorded | None:
        """The recorded answer, if there is one."""

    def record_call(self, digest: str, service: str, answer: Recorded) -> None:
        """Keeps an answer; it is on disk when this returns."""

    def image(self, name: str) -> Pixels | None:
        """The pixels of a recorded image; None when they are gone or damaged."""

    async def add_image(self, pixels: Pixels) -> str:
        """Keeps an image and returns its name."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
      text: the rendered prompt.
      pictures: labelled images, in order.
      schema: JSON schema of the answer; None asks for an image.
      attempt: tells repeated questions apart.
      top_tokens: asks for the likeliest first tokens with their log-probabilities instead of an answer; how many.
    """

    text: str
    pictures: tuple[Picture, ...] = ()
    schema: Mapping[str, Any] | None = None
    attempt: int = 0
    top_tokens: int = 0

    def digest(self, identity: Mapping[str, Any]) -> str:
        """Hexadecimal SHA-256 of everything that the answer depends on."""
        asked = {
            "service": identity,
            "text": self.text,
            "pictures": [[picture.label, picture.name] for picture in self.pictures],
            "schema": self.schema,
            "attempt": self.attempt,
        }
        if self.top_tokens:
            asked["top_tokens"] = self.top_tokens
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Service:
    """Answers questions, from the record when it can.

    Args:
      config: the service's settings.
      client: of its protocol.
      records: where its answers are kept; None keeps nothing.
      has_fallback, limits: see `Caller`.
    """

    def __init__(
        self,
        config: ServiceConfig,
        client: HttpClient,
        records: Records | None,
        has_fallback: bool = False,
        limits: Limits | None = None,
    ):
        self.config, self.client, self.records = config, client, records
        self.caller = Caller(config, has_fallback, limits=limits)
        self._identity = config.identity()
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    @property
    def name(self) -> str:
        """The name in the config."""
        return self.config.name

    def recorded(self, digest: str, read: Callable[[str], T]) -> T | None:
        """What `read` makes of the text recorded under `digest`; None without one, or when it cannot be read."""
        found = self.records.call(digest) if self.records else None
        if found is None or found.text is None:
            return None
        try:
            value = read(found.text)
        except Unusable:
            return None
        self.caller.counts.recorded += 1
        return value

    def digest(self, question: Question) -> str:
        """Under what the answer to a question is recorded."""
        return question.digest(self._identity)

    async def text(self, question: Question, read: Callable[[str], T]) -> T:
        """What `read` makes of the answer's text.  Raises ServiceFailed."""
        digest = self.digest(question)
        async with self._lock(digest):
            value = self.recorded(digest, read)
            if value is not None:
                return value
            self._check_limit_was_raised(digest)
            value, reply = await self.caller.call(
                lambda complaint: self._ask(question, digest, complaint),
                lambda reply: (read(reply.text or ""), reply),
                self._tokens(question),
            )
            self._record(digest, reply, reply.text, None)
            return value

    async def _ask(self, question: Question, digest: str, complaint: str) -> Reply:
        if question.top_tokens:
            return await self.client.first_token(question.text, question.pictures, question.top_tokens)
        text = _with_complaint(question.text, complaint)
        try:
            return await self.client.chat(text, question.pictures, question.schema or {})
        except CutOff as error:
            self._record(digest, error.reply, None, None, self.config.max_tokens)
            raise

    def _check_limit_was_raised(self, digest: str) -> None:
        """Raises ServiceFailed for a question whose answer broke off at the `max_tokens` of now, or at a higher one."""
        found = self.records.call(digest) if self.records else None
        if found is None or found.cut_off is None:
            return
        limit = self.config.max_tokens
        if limit == found.cut_off or 0 < limit < found.cut_off:
            what = f"{self.name}: the answer was cut off at max_tokens={found.cut_off}, and is not asked for again."
            raise ServiceFailed(what, RAISE_MAX_TOKENS, "cut off")

    async def image(self, question: Question) -> Pixels:
        """The image drawn from the question's pictures, uint8 [height, width, 3].  Raises ServiceFailed."""
        digest = self.digest(question)

        async def draw(complaint: str) -> tuple[Pixels, Reply]:
            reply = await self.client.draw(question.text, question.pictures)
            if len(reply.image or b"") < _LARGE:
                return _decoded(reply), reply
            return await asyncio.to_thread(_decoded, reply), reply

        async with self._lock(digest):
            found = self.records.call(digest) if self.records else None
            pixels = self.records.image(found.image) if found and found.image else None
            if pixels is not None:
                self.caller.counts.recorded += 1
                return pixels
            pixels, reply = await self.caller.call(draw, lambda drawn: drawn, self._tokens(question))
            name = await self.records.add_image(pixels) if self.records else None
            self._record(digest, reply, None, name)
            return pixels

    def _record(
        self, digest: str, reply: Reply, text: str | None, image: str | None, cut_off: int | None = None
    ) -> None:
        if self.records:
            config = self.config
            cost = (reply.tokens_in * config.price_in + reply.tokens_out * config.price_out) / 1e6
            cost += config.price_image if reply.image is not None else 0.0
            answer = Recorded(text, image, reply.tokens_in, reply.tokens_out, cost, cut_off)
            self.records.record_call(digest, self.name, answer)

    def _tokens(self, question: Question) -> int:
        text = len(question.text) / _CHARACTERS_PER_TOKEN + self.config.max_tokens
        return int(text + self.config.image_tokens * len(question.pictures))

    def _lock(self, digest: str) -> asyncio.Lock:
        """Equal questions that are asked at the same time wait for one answer."""
        return self._locks.setdefault(digest, asyncio.Lock())


async def first_answer(services: Sequence[Service], question: Question, read: Callable[[str], T]) -> T:
    """The answer of the first service that has one; a recorded answer, whosever, goes before any new call.

    Raises:
      ServiceFailed: every service failed; the first one's failure, but `ServiceDown` only when all of them are down.
    """
    for service in services if len(services) > 1 else ():
        value = service.recorded(service.digest(question), read)
        if value is not None:
            return value
    failures: list[ServiceFailed] = []
    for service in services:
        try:
            return await service.text(question, read)
        except ServiceFailed as error:
            failures.append(error)
    raise next((error for error in failures if not isinstance(error, ServiceDown)), failures[0])


def _with_complaint(text: str, complaint: str) -> str:
    """The prompt of a second try, which says what was wrong with the answer to the first."""
    return f"{text}\n\nYour last answer could not be used ({complaint}). Give the JSON alone." if complaint else text


def _decoded(reply: Reply) -> Pixels:
    try:
        return decode_image(reply.image or b"", "the drawn image")
    except UserError as error:
        raise Fault("unusable answer", error.what, sick=False) from None
