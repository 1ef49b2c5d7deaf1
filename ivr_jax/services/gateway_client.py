"""The gateway that the released scripts call, for those who have access to one.

    POST BASE/chat_completions          {"model", "messages", "temperature", "max_tokens"}
                                        -> {"code": 0, "response": text}  or  {"code": 0, "detail": chat completion}
    POST BASE/txt2img/gemini/generate   {"model", "prompt", "image_urls": [data URI, ...], "image_format": "base64"}
                                        -> {"code": 0, "data": {"urls": [base64]}}

Every request carries X-AppID, X-Source, X-Timestamp (seconds) and X-Authorization, which is the hexadecimal
HMAC-SHA256 of "x-timestamp: T\\nx-source: S" under the secret.  A code other than 0 is an error of the gateway.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from ivr_jax.errors import UserError
from ivr_jax.services import http_client as http
from ivr_jax.services.caller import Fault, Reply
from ivr_jax.services.config import Secrets, ServiceConfig
from ivr_jax.services.http_client import Picture, PictureEncoder
from ivr_jax.services.replies import Unusable


def sign(secret: str, source: str, timestamp: int) -> str:
    """The value of X-Authorization."""
    text = f"x-timestamp: {timestamp}\nx-source: {source}"
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


class GatewayClient:
    """See `HttpClient`.

    Args:
      config: the service.
      app, secret: the application's id and secret.
    """

    def __init__(self, config: ServiceConfig, app: str, secret: str):
        self._config, self._app, self._secret = config, app, secret
        self._secrets, self._pictures = Secrets([secret, app]), PictureEncoder(config.image_side)
        self._proxy = http.proxy_note(config.base_url)
        try:
            self._client = httpx2.AsyncClient(timeout=config.timeout, limits=http.connection_limits(config.in_flight))
        except (ImportError, ValueError) as error:  # of a proxy for other addresses, too
            reason = str(error).partition(".")[0]
            raise UserError(f"a proxy that the environment names cannot be used: {reason}.",
                            "Correct or unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY.") from error

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        content: list[dict[str, Any]] = []
        for picture in pictures:
            content.append({"type": "text", "text": f"{picture.label}:"})
            uri = await self._pictures.uri(picture)
            content.append({"type": "image_url", "image_url": {"url": uri, "detail": "auto"}})
        content.append({"type": "text", "text": text})
        body: dict[str, Any] = {"model": self._config.model, "messages": [{"role": "user", "content": content}]}
        if self._config.temperature >= 0:
            body["temperature"] = self._config.temperature
        if self._config.max_tokens:
            body["max_tokens"] = self._config.max_tokens
        reply = await self._post("chat_completions", body)
        text = http.field(reply, "response")
        completion = http.field(reply, "detail") or reply
        if isinstance(text, str) and text and not http.field(completion, "choices"):
            return Reply(self._secrets.hide(text), None, *http.usage_of(completion))
        http.check_no_error(completion, {}, self._secrets, self._config.name)
        return http.chat_reply(completion, self._config, self._secrets)

    async def first_token(self, text: str, pictures: Sequence[Picture], count: int) -> Reply:
        raise UserError("the gateway gives no log-probabilities of tokens.", 'Use a service of the kind "openai".')

    async def draw(self, text: str, sources: Sequence[Picture]) -> Reply:
        body = {
            "prompt": text,
            "model": self._config.model,
            "image_urls": [await self._pictures.uri(picture) for picture in sources],
            "image_format": "base64",
        }
        reply = await self._post("txt2img/gemini/generate", body)
        try:
            return Reply(None, http.decode_base64(http.field(reply, "data", "urls", 0)))
        except Unusable as error:
            raise Fault("unusable answer", str(error), sick=False) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, where: str, body: Mapping[str, Any]) -> Any:
        timestamp = int(time.time())
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
        except httpx2.HTTPError as error:
            raise Fault("connection", self._secrets.hide(str(error))[:200] + self._proxy) from None
        if not answer.is_success:
            text = self._secrets.hide(answer.text)
            raise http.outcome_of_status(answer.status_code, answer.headers, text, self._config.name)
        reply = http.parsed(answer.content)
        code = http.field(reply, "code")
        if code != 0:
            message = self._secrets.hide(str(http.field(reply, "msg")))
            if isinstance(code, int) and 400 <= code < 600:
                raise http.outcome_of_status(code, answer.headers, message, self._config.name)
            raise Fault(f"code {code}", message[:200])
        return reply
