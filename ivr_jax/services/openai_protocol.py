"""The OpenAI protocol, spoken by GPT, by Qwen3-VL behind vLLM or SGLang, and by Gemini's compatible endpoint.

Requests go through the `openai` client, over aiohttp; replies are read as they came: the client's typed models would
cost more than everything else in a call, and would not make a faulty reply any more usable.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import httpx2
import openai

from ivr_jax.services.caller import Fault, Rejected, Reply
from ivr_jax.services.config import Secrets, ServiceConfig
from ivr_jax.services.replies import Unusable
from ivr_jax.services.transport import (
    Picture,
    PictureEncoder,
    connection_limits,
    decode_base64,
    field,
    outcome_of_status,
    parsed,
    token_count,
)

_NO_KEY = "none"  # what the client sends to a server without keys


class OpenAITransport:
    """See `Transport`.  The client's own retries are off: the caller's are the only ones.

    Args:
      config: the service.
      key: its API key, or "".
    """

    def __init__(self, config: ServiceConfig, key: str):
        self._config, self._secrets, self._pictures = config, Secrets([key]), PictureEncoder(config.image_side)
        limits = connection_limits(config.in_flight)
        self._client = openai.AsyncOpenAI(
            api_key=key or _NO_KEY,
            base_url=config.base_url,
            max_retries=0,
            timeout=config.timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, timeout=config.timeout, follow_redirects=False),
        )
        self._structured = config.structured

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        content = [{"type": "text", "text": text}, *await self._shown(pictures)]
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
        }
        if self._config.temperature >= 0:
            request["temperature"] = self._config.temperature
        if self._config.max_tokens:
            request["max_tokens"] = self._config.max_tokens
        form = self._structured  # as it is now: a question beside this one may find out that no schema is taken
        try:
            completion = await self._complete(request, form, schema)
        except Rejected:
            if form != "auto":
                raise
            completion = await self._complete(request, "none", schema)  # when this works, the schema was the trouble
            self._structured = "none"
        message = _message(completion)
        if refusal := field(message, "refusal"):
            raise Rejected(f"refused: {self._secrets.hide(str(refusal))[:200]}")
        if field(completion, "choices", 0, "finish_reason") == "content_filter":
            raise Rejected("stopped by the content filter")
        answer = field(message, "content")
        if not isinstance(message, dict) or not isinstance(answer, str | None):
            raise Fault("unusable answer", "the reply is not of the protocol's shape", sick=False)
        return Reply(self._secrets.hide(answer or ""), None, *_usage(completion))

    async def first_token(self, text: str, pictures: Sequence[Picture], count: int) -> Reply:
        content = [*await self._shown(pictures), {"type": "text", "text": text}]
        request = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": count,
        }
        completion = await self._post("/chat/completions", request)
        if refusal := field(_message(completion), "refusal"):
            raise Rejected(f"refused: {self._secrets.hide(str(refusal))[:200]}")
        likeliest = field(completion, "choices", 0, "logprobs", "content", 0, "top_logprobs")
        tokens = [[field(token, "token"), field(token, "logprob")] for token in likeliest or ()]
        if not tokens or not all(_is_chance(*token) for token in tokens):
            raise Fault("unusable answer", "the reply holds no log-probabilities of its first token", sick=False)
        return Reply(self._secrets.hide(json.dumps(tokens)), None, *_usage(completion))

    async def _shown(self, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
        """Each picture under its label."""
        content: list[dict[str, Any]] = []
        for picture in pictures:
            content.append({"type": "text", "text": f"{picture.label}:"})
            content.append({"type": "image_url", "image_url": {"url": await self._pictures.uri(picture)}})
        return content

    async def _complete(self, request: Mapping[str, Any], structured: str, schema: Mapping[str, Any]) -> Any:
        formats = {
            "json_object": {"type": "json_object"},
            "json_schema": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            },
        }
        asked = formats.get("json_schema" if structured == "auto" else structured)
        return await self._post("/chat/completions", {**request, **({"response_format": asked} if asked else {})})

    async def draw(self, text: str, sources: Sequence[Picture]) -> Reply:
        request: dict[str, Any] = {"model": self._config.model, "prompt": text, "n": 1}
        if self._config.size:
            request["size"] = self._config.size
        if self._config.image_reply:
            request["response_format"] = self._config.image_reply
        if sources:
            files = [
                (f"image_{i}.png", await self._pictures.png(picture), "image/png") for i, picture in enumerate(sources)
            ]
            with self._speaking():
                edit = self._client.images.with_raw_response.edit
                reply = await edit(image=files if len(files) > 1 else files[0], **request)
            drawn = parsed(reply.content)
        else:
            drawn = await self._post("/images/generations", request)
        data = field(drawn, "data", 0)
        try:
            image = decode_base64(field(data, "b64_json") or field(data, "url"))
        except Unusable as error:
            raise Fault("unusable answer", str(error), sick=False) from None
        return Reply(None, image, *_usage(drawn))

    async def close(self) -> None:
        await self._client.close()

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        with self._speaking():
            reply = await self._client.post(path, body=body, cast_to=httpx2.Response)
        return parsed(reply.content)

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """Translates the client's exceptions; their own texts may quote the request, so they are not chained."""
        who = self._config.name
        try:
            yield
        except openai.APITimeoutError as error:
            origin = getattr(error.__cause__, "__cause__", None)  # the client calls refused connections time-outs too
            if isinstance(origin, aiohttp.ClientConnectionError) and not isinstance(origin, TimeoutError):
                raise Fault("connection", self._secrets.hide(str(origin))[:200]) from None
            raise Fault("time-out") from None
        except openai.APIStatusError as error:
            body = self._secrets.hide(_body_of(error))
            raise outcome_of_status(error.status_code, error.response.headers, body, who) from None
        except openai.APIConnectionError as error:
            raise Fault("connection", self._secrets.hide(str(error.__cause__ or error))[:200]) from None
        except openai.APIError as error:
            raise Fault("protocol", self._secrets.hide(str(error))[:200], sick=False) from None
        except (httpx2.HTTPError, aiohttp.ClientError) as error:  # a cut body, or no HTTP at all
            raise Fault("connection", self._secrets.hide(str(error))[:200]) from None


def _message(completion: Any) -> Any:
    """The first choice's message; some servers report an error with status 200, which is a fault like any other."""
    if field(completion, "error") and not field(completion, "choices"):
        raise Fault("error in a reply", "an error with status 200", sick=True)
    return field(completion, "choices", 0, "message")


def _is_chance(text: Any, log_probability: Any) -> bool:
    number = isinstance(log_probability, (int, float)) and not isinstance(log_probability, bool)
    return isinstance(text, str) and number and log_probability <= 1e-3


def _usage(reply: Any) -> tuple[int, int]:
    usage = field(reply, "usage")
    read = field(usage, "prompt_tokens") or field(usage, "input_tokens")
    written = field(usage, "completion_tokens") or field(usage, "output_tokens")
    return token_count(read), token_count(written)


def _body_of(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, Mapping):
        message = body.get("message") or (body.get("error") or {})
        return str(message.get("message", message) if isinstance(message, Mapping) else message)
    return error.response.text
