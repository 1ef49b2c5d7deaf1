"""The gateway that the released scripts speak with, for those who have access to one.

    POST BASE/chat_completions          {"model", "messages", "temperature", "max_tokens"}
                                        -> {"code": 0, "response": text}  or  {"code": 0, "detail": chat completion}
    POST BASE/txt2img/gemini/generate   {"model", "prompt", "image_urls": [data URI, ...], "image_format": "base64"}
                                        -> {"code": 0, "data": {"urls": [base64]}}

Every request carries X-AppID, X-Source, X-Timestamp (seconds) and X-Authorization, which is the hexadecimal
HMAC-SHA256 of "x-timestamp: T\\nx-source: S" under the secret.  A code other than 0 is an error of the gateway.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2

from ivr_jax.construct.interfaces import Pixels
from ivr_jax.construct.services.caller import Fault, Reply
from ivr_jax.construct.services.config import Secrets, ServiceConfig
from ivr_jax.construct.services.replies import Unusable
from ivr_jax.construct.services.transport import Picture, data_uri, decode_base64, encode, outcome_of_status


def sign(secret: str, source: str, timestamp: int) -> str:
    """The value of X-Authorization."""
    text = f"x-timestamp: {timestamp}\nx-source: {source}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


class GatewayTransport:
    """See `Transport`.

    Args:
      config: the service.
      app, secret: the application's id and secret.
      clock: seconds since 1970.
    """

    def __init__(self, config: ServiceConfig, app: str, secret: str, clock: Callable[[], float] = time.time):
        self._config, self._app, self._secret, self._clock = config, app, secret, clock
        self._secrets = Secrets([secret, app])
        limits = httpx2.Limits(max_connections=config.in_flight, max_keepalive_connections=config.in_flight)
        self._client = httpx2.AsyncClient(timeout=config.timeout, limits=limits)

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        content: list[dict[str, Any]] = []
        for picture in pictures:
            png = await asyncio.to_thread(picture.encoded, self._config.image_side)
            content.append({"type": "text", "text": f"{picture.label}:"})
            content.append({"type": "image_url", "image_url": {"url": data_uri(png), "detail": "auto"}})
        content.append({"type": "text", "text": text})
        body: dict[str, Any] = {"model": self._config.model, "messages": [{"role": "user", "content": content}]}
        if self._config.temperature >= 0:
            body["temperature"] = self._config.temperature
        if self._config.max_tokens:
            body["max_tokens"] = self._config.max_tokens
        reply = await self._post("chat_completions", body)
        text = _path(reply, "response")
        if text is None:
            text = _path(reply, "detail", "choices", 0, "message", "content")
        if text is None:
            text = _path(reply, "choices", 0, "message", "content")
        if not isinstance(text, str):
            raise Fault("unusable answer", "the reply holds no text", sick=False)
        usage = _path(reply, "detail", "usage") or _path(reply, "usage") or {}
        return Reply(self._secrets.hide(text), None, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))

    async def draw(self, text: str, sources: Sequence[Pixels]) -> Reply:
        pngs = [await asyncio.to_thread(encode, pixels, self._config.image_side) for pixels in sources]
        body = {
            "prompt": text,
            "model": self._config.model,
            "image_urls": [data_uri(png) for png in pngs],
            "image_format": "base64",
        }
        reply = await self._post("txt2img/gemini/generate", body)
        try:
            return Reply(None, decode_base64(_path(reply, "data", "urls", 0)))
        except Unusable as error:
            raise Fault("unusable answer", str(error), sick=False) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, where: str, body: Mapping[str, Any]) -> Any:
        timestamp = int(self._clock())
        headers = {
            "X-AppID": self._app,
            "X-Source": self._config.source,
            "X-Timestamp": str(timestamp),
            "X-Authorization": sign(self._secret, self._config.source, timestamp),
        }
        try:
            answer = await self._client.post(f"{self._config.base_url.rstrip('/')}/{where}", json=body, headers=headers)
        except httpx2.TimeoutException:
            raise Fault("time-out") from None
        except httpx2.TransportError as error:
            raise Fault("connection", self._secrets.hide(str(error))[:200]) from None
        if not answer.is_success:
            text = self._secrets.hide(answer.text)
            raise outcome_of_status(answer.status_code, answer.headers, text, self._config.name)
        try:
            reply = answer.json()
        except ValueError:
            raise Fault("unusable answer", "the reply is no JSON", sick=False) from None
        code = _path(reply, "code")
        if code != 0:
            raise Fault(f"code {code}", self._secrets.hide(str(_path(reply, "msg")))[:200])
        return reply


def _path(value: Any, *steps: str | int) -> Any:
    """`value[step]...`, or None where there is no such thing."""
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _count(usage: Any, name: str) -> int:
    value = _path(usage, name)
    return value if isinstance(value, int) else 0
