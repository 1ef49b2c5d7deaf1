"""The interface of an HTTP client of services, and what its two implementations share: images in requests, errors,
the shape of replies.  The implementations are `openai_client.py` and `gateway_client.py`.

A client makes one call and returns a `Reply`, or raises what the caller understands (`Fault`, `Rejected`,
`UserError`).  It neither waits nor retries.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import collections
import dataclasses
import datetime
import email.utils
import functools
import json
import re
import urllib.parse
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx2
import numpy as np
from PIL import Image

from ivr_jax.errors import UserError
from ivr_jax.images import Pixels, encode_png, image_name
from ivr_jax.services.caller import CutOff, Fault, Rejected, Reply
from ivr_jax.services.config import Secrets, ServiceConfig
from ivr_jax.services.replies import Unusable

_RETRIED = frozenset((408, 409, 425, 429))
_REFUSED = {
    401: "the key is refused", 402: "payment is required", 403: "access is forbidden",
    404: "there is no such address or model", 405: "the address takes no such call",
    410: "the address or model is gone",
}  # fmt: skip
_MOVED = frozenset((301, 302, 303, 307, 308))  # not followed: the new address is for the user to trust
_EXCERPT = 200
PARAMETERS = ("max_completion_tokens", "max_tokens", "temperature", "response_format", "size")
_UNSUPPORTED = re.compile(
    r"unsupported|not support|n[o'’]t (?:allowed|permitted|recogni[sz]ed|accept)|unknown|unrecogni[sz]ed|unexpected"
    r"|deprecated|extra|invalid|too large|at most|maximum|\bmust\b|should be|range|between",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context (?:length|window)|(?:input|prompt) tokens|prompt is too long", re.IGNORECASE)
_STATUS_OF_WORD = {
    "rate_limit_exceeded": 429, "rate_limit_error": 429, "resource_exhausted": 429, "insufficient_quota": 429,
    "too_many_requests": 429, "toomanyrequests": 429, "rate_limited": 429, "quota_exceeded": 429, "throttling": 429,
    "invalid_api_key": 401, "authentication_error": 401, "unauthenticated": 401,
    "permission_error": 403, "permission_denied": 403, "model_not_found": 404, "not_found_error": 404, "not_found": 404,
    "invalid_request_error": 400, "invalid_argument": 400, "context_length_exceeded": 400,
    "unsupported_parameter": 400, "unsupported_value": 400, "content_policy_violation": 400,
    "content_filter": 400, "server_error": 500, "api_error": 500, "internal": 500, "internal_error": 500,
    "internal_server_error": 500, "overloaded_error": 503, "engine_overloaded_error": 503, "unavailable": 503,
    "service_unavailable": 503, "deadline_exceeded": 504, "timeout": 504,
}  # fmt: skip
_NO_BASE64 = re.compile(r"\Ab(?=['\"])|\\[nr]|[\s\0\u200b\ufeff]+")  # what may stand in or before it
_DATA_URI = re.compile(r"\A\W*(?:\w*\W{0,2}\(?data:[^,]*,|base64,)", re.IGNORECASE)
# Of `finish_reason`, in lower case:
_CUT_OFF = ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "token_limit", "model_length")
_FILTERED = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "image_safety",
             "guardrail", "refusal")  # fmt: skip
_BROKEN = ("error", "abort", "aborted", "cancelled", "insufficient_system_resource")
_IDLE = 4.0  # seconds a connection is kept unused: uvicorn, and with it vLLM, closes them after 5
_MOST_TOKENS = 10**12
_MANY_PIXELS = 1 << 15  # from which a picture is encoded in a thread


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image beside a text: what it is called there, and its pixels.  Its name is made once."""

    label: str
    pixels: Pixels

    @functools.cached_property
    def name(self) -> str:
        """The image's name (`ivr_jax.images.image_name`)."""
        return image_name(self.pixels)


class PictureEncoder:
    """Pictures as they are sent: PNG in base64, scaled down.  Many questions show one picture; it is encoded once.

    Args:
      longest_side: pixels a side, at most.
      room: bytes of encoded pictures that are remembered, those used last.
      most: how many are remembered, however small.
    """

    def __init__(self, longest_side: int, room: int = 64 << 20, most: int = 1024):
        self._longest_side, self._room, self._most = longest_side, room, most
        self._kept: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def base64(self, picture: Picture) -> str:
        """The PNG in base64."""
        async with self._locks.setdefault(picture.name, asyncio.Lock()):
            text = self._kept.get(picture.name)
            if text is not None:
                self._kept.move_to_end(picture.name)
                return text
            if picture.pixels.size < 3 * _MANY_PIXELS:
                text = self._encoded(picture)
            else:
                text = await asyncio.to_thread(self._encoded, picture)
            self._kept[picture.name] = text
            self._room -= len(text)
            while self._room < 0 or len(self._kept) > self._most:
                self._room += len(self._kept.popitem(last=False)[1])
            return text

    async def uri(self, picture: Picture) -> str:
        """The PNG as a data URI."""
        return "data:image/png;base64," + await self.base64(picture)

    async def png(self, picture: Picture) -> bytes:
        """The PNG itself."""
        return base64.b64decode(await self.base64(picture))

    def _encoded(self, picture: Picture) -> str:
        return base64.b64encode(encode(picture.pixels, self._longest_side)).decode()


class HttpClient(Protocol):
    """One protocol over HTTP."""

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        """Asks for a text that fits the JSON schema."""

    async def first_token(self, text: str, pictures: Sequence[Picture], count: int) -> Reply:
        """The `count` likeliest first tokens of an answer, as a JSON list of [text, log-probability]."""

    async def draw(self, text: str, sources: Sequence[Picture]) -> Reply:
        """Asks for an image: `sources` edited as the text says, or, without sources, drawn from the text alone."""

    async def close(self) -> None:
        """Ends all connections."""


def encode(pixels: Pixels, longest_side: int) -> bytes:
    """PNG of uint8 [height, width, 3], scaled down to at most `longest_side` a side."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)  # never enlarges
    return encode_png(np.asarray(picture))


def decode_base64(text: Any) -> bytes:
    """The bytes of base64 as servers write it: plain or URL-safe, with line ends, without padding, in a data URI.

    Raises Unusable.
    """
    if not isinstance(text, str) or not text.strip():
        raise Unusable("the answer holds no image")
    text = text.strip()
    if text.startswith(("http://", "https://")):
        raise Unusable("the answer is the address of an image, not an image")
    payload = urllib.parse.unquote(_DATA_URI.sub("", text)) if "%" in text else _DATA_URI.sub("", text)
    payload = _NO_BASE64.sub("", payload.replace("\\/", "/")).strip("\"')").rstrip("=")
    payload = payload.translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Unusable("the answer's image is no base64") from None


# -- what a server says --


def outcome_of_status(status: int, headers: Mapping[str, str], body: str, who: str, parameter: str = "") -> Exception:
    """The exception that an HTTP error status means.

    Args:
      headers: of the reply; `Retry-After` is honoured.
      body: what the server says, without secrets; quoted in short.
      who: the service's name.
      parameter: the request's parameter that the server complains about, where it names one.
    """
    quoted = " ".join(body.split())[:_EXCERPT]
    if status in _RETRIED or status >= 500:
        return Fault(str(status), quoted, retry_after(headers))
    if status in _MOVED:
        return UserError(f"{who}: its address redirects elsewhere (status {status}), which is not followed.",
                         "Set base_url to the address where it is.")
    if status in _REFUSED:
        return UserError(f"{who}: {_REFUSED[status]} (status {status}: {quoted}).",
                         "Check its base_url, its model and the environment variable with its key.")
    return Rejected(f"status {status}: {quoted}", refused_parameter(body, parameter))


def refused_parameter(message: str, parameter: str = "") -> str:
    """The parameter of `PARAMETERS` that a server does not take, or takes no such value of; "" for other complaints.

    A prompt that does not fit the context is such a complaint: it is about one question, not about a setting.
    """
    if _TOO_LONG.search(message):
        return ""
    if parameter in PARAMETERS:
        return parameter
    places = {name: message.find(name) for name in PARAMETERS if re.search(rf"\b{name}\b", message)}
    if "size" in places and not re.search(r"""['"`]size['"`]""", message):  # a common word
        del places["size"]
    return min(places, key=places.get) if places and _UNSUPPORTED.search(message) else ""


def check_no_error(reply: Any, headers: Mapping[str, str], secrets: Secrets, who: str) -> None:
    """Raises what an error inside a reply of status 200 means, by its own code."""
    if isinstance(reply, list):  # Gemini sends a list of one
        reply = field(reply, 0)
    choice = field(reply, "choices", 0)
    error = field(reply, "error") or field(choice, "error") or field(choice, "message", "error")
    is_answer = not isinstance(reply, Mapping) or any(reply.get(name) for name in ("choices", "data", "response"))
    if not error and not is_answer:
        errors = reply.get("errors")
        error = field(errors, 0) if isinstance(errors, list) else errors
        codes = [_status_of(reply.get(name)) for name in _CODES]
        if not error and (reply.get("object") == "error" or any(code >= 400 for code in codes)):
            error = reply
    if not error:
        return
    message = field(error, "message") or field(error, "msg") or field(error, "detail") or error
    codes = [error, *(field(error, name) for name in _CODES)]
    status = next((known for known in map(_status_of, codes) if known), 0)
    body = secrets.hide(message if isinstance(message, str) else json.dumps(message, default=str))
    if not status:
        raise Fault("error in a reply", " ".join(body.split())[:_EXCERPT], retry_after(headers))
    raise outcome_of_status(status, headers, body, who, str(field(error, "param") or ""))


_CODES = ("code", "status_code", "http_status", "status", "type")  # fields that may say what kind an error is of


def _status_of(code: Any) -> int:
    """The HTTP status that an error's code means; 0 for one that means nothing known."""
    if isinstance(code, int | str) and not isinstance(code, bool) and str(code).isdecimal():
        return int(code) if 300 <= int(code) < 600 else 0
    return _STATUS_OF_WORD.get(re.sub(r"[\s-]+", "_", code.strip().lower()), 0) if isinstance(code, str) else 0


def chat_reply(completion: Any, config: ServiceConfig, secrets: Secrets) -> Reply:
    """The text of a chat completion.

    Raises:
      Rejected: the model refuses, or its filter stops it.
      CutOff: the answer reached `max_tokens`.
      Fault: there is no text.
    """
    choice = field(completion, "choices", 0)
    message = field(choice, "message")
    tokens = usage_of(completion)
    if refusal := field(message, "refusal") or _part(message, "refusal"):
        raise Rejected(f"refused: {secrets.hide(str(refusal))[:_EXCERPT]}")
    reasons = (field(choice, name) for name in ("finish_reason", "native_finish_reason", "stop_reason"))
    ended = {str(reason).rpartition(".")[2].lower() for reason in reasons}  # also "FinishReason.MAX_TOKENS"
    if ended & set(_FILTERED):
        raise Rejected("stopped by the content filter")
    if ended & set(_CUT_OFF):
        limit = f"max_tokens={config.max_tokens}" if config.max_tokens else "the server's own limit (max_tokens=0)"
        raise CutOff(f"the answer was cut off at {limit}", Reply("", None, *tokens))
    if broken := ended & set(_BROKEN):
        raise Fault("error in a reply", f"the answer ended with finish_reason={broken.pop()}")
    if not isinstance(message, Mapping):
        said = secrets.hide(json.dumps(completion, default=str))[:_EXCERPT]
        raise Fault("unusable answer", f"the reply holds no message: {said}", sick=False)
    text = message_text(message)
    if not text:
        raise Fault("unusable answer", _why_no_text(message, field(choice, "finish_reason")), sick=False)
    return Reply(secrets.hide(text), None, *tokens)


def message_text(message: Mapping[str, Any]) -> str:
    """A chat message's content; of a list of parts the text parts, joined, without thoughts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) and "parts" in content:
        content = content["parts"]
    if isinstance(content, Mapping) and not content.keys() & {"type", "text", "content"}:
        return json.dumps(content)  # the answer's own object, parsed already
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else field(part, "text") or field(part, "content")
        kind = "text" if isinstance(part, str) else field(part, "type") or "text"
        if isinstance(text, Mapping):
            text = text.get("value")
        if kind in ("text", "output_text") and isinstance(text, str) and field(part, "thought") is not True:
            texts.append(text)
    return "".join(texts)


def _part(message: Any, kind: str) -> Any:
    """The field `kind` of the first part of a message's content that is of this kind, or None."""
    content = field(message, "content")
    parts = content if isinstance(content, list) else []
    return next((field(part, kind) for part in parts if field(part, "type") == kind), None)


def _why_no_text(message: Mapping[str, Any], ended: Any) -> str:
    if message.get("tool_calls"):
        return "the reply is a tool call, without text"
    content = message.get("content")
    kinds = [str(field(part, "type")) for part in content] if isinstance(content, list) else []
    thought = isinstance(content, str) and bool(content) or any("think" in kind or "reason" in kind for kind in kinds)
    if thought or message.get("reasoning_content") or message.get("reasoning"):
        return "the reply holds reasoning and no answer"
    if content:
        return "the reply's content holds no text"
    why = "" if ended in (None, "stop") else f" (finish_reason={str(ended)[:40]})"
    return f"the answer is empty{why}"


def usage_of(reply: Any) -> tuple[int, int]:
    """Tokens read and written, as the server counted them."""
    usage = field(reply, "usage")
    read = field(usage, "prompt_tokens") or field(usage, "input_tokens")
    written = field(usage, "completion_tokens") or field(usage, "output_tokens")
    return _token_count(read), _token_count(written)


def _token_count(value: Any) -> int:
    """A count as a server reports it; 0 for anything that cannot be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS else 0


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


def proxy_note(url: str) -> str:
    """What is added to the error of a lost connection: through which proxy of the environment it went; "" for none.

    Raises:
      UserError: the proxy is of a kind that the clients do not speak with.
    """
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies_environment()
    name = next((name for name in (parts.scheme, "all") if proxies.get(name)), "")
    if not name or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    proxy = proxies[name] if "://" in proxies[name] else f"http://{proxies[name]}"
    try:
        found = urllib.parse.urlsplit(proxy)
        address = f"{found.hostname}:{found.port}" if found.port else found.hostname
    except ValueError:
        found = address = None
    if address is None or found.scheme not in ("http", "https"):  # its text may hold a password
        kind = f"of the kind {found.scheme}" if address else "no address"
        raise UserError(f"the proxy that {name.upper()}_PROXY names is {kind}.",
                        "Name an HTTP proxy, or unset the variable; NO_PROXY leaves hosts out.")
    return f" (through the proxy {address} of {name.upper()}_PROXY)"


def connection_limits(in_flight: int) -> httpx2.Limits:
    """A connection for every call at a time, kept while it is used."""
    return httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight, keepalive_expiry=_IDLE)


def field(value: Any, *steps: str | int) -> Any:
    """`value[step]...` of a parsed JSON reply, or None where there is no such thing."""
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def parsed(body: bytes) -> Any:
    """The JSON of a reply's body.  Raises Fault when it is none (a web page with status 200, say)."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Fault("unusable answer", "the reply is no JSON", sick=False) from None
