"""The OpenAI protocol, served by GPT, by Qwen3-VL behind vLLM or SGLang, and by Gemini's compatible endpoint.

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

from ivr_jax.errors import UserError
from ivr_jax.services import http_client as http
from ivr_jax.services.caller import Fault, Rejected, Reply
from ivr_jax.services.config import Secrets, ServiceConfig
from ivr_jax.services.http_client import Picture, PictureEncoder
from ivr_jax.services.replies import Unusable

_NO_KEY = "none"  # what the client sends to a server without keys


class OpenAIClient:
    """See `HttpClient`.  The client's own retries are off: the caller's are the only ones.

    Args:
      config: the service.
      key: its API key, or "".
    """

    def __init__(self, config: ServiceConfig, key: str):
        self._config, self._secrets, self._pictures = config, Secrets([key]), PictureEncoder(config.image_side)
        self._proxy = http.proxy_note(config.base_url)
        limits = http.connection_limits(config.in_flight)
        self._client = openai.AsyncOpenAI(
            api_key=key or _NO_KEY,
            base_url=config.base_url,
            max_retries=0,
            timeout=config.timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, timeout=config.timeout, follow_redirects=False),
        )
        self._structured = config.structured
        self._limit = "max_tokens"  # what the server calls it

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        content = [{"type": "text", "text": text}, *await self._shown(pictures)]
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
        }
        if self._config.temperature >= 0:
            request["temperature"] = self._config.temperature
        return http.chat_reply(await self._complete(request, schema), self._config, self._secrets)

    async def _complete(self, request: Mapping[str, Any], schema: Mapping[str, Any]) -> Any:
        """The completion; what the server refuses is left out or renamed from then on, where that may be.

        With `structured="auto"` the schema is left out; `max_tokens` becomes `max_completion_tokens`.
        """
        form = self._structured  # as it is now: a question beside this one may change it
        limit = self._limit
        while True:
            body = {**request, **_response_format(form, schema)}
            if self._config.max_tokens:
                body[limit] = self._config.max_tokens
            try:
                completion = await self._post("/chat/completions", body)
            except Rejected as refused:
                if refused.parameter == limit == "max_tokens" and self._config.max_tokens:
                    limit = "max_completion_tokens"
                elif form == "auto" and refused.parameter in ("", "response_format"):
                    form = "none"
                else:
                    raise _refused_setting(self._config, refused, "structured") from None
            else:
                self._structured = form
                self._limit = limit
                return completion

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
        if refusal := http.field(completion, "choices", 0, "message", "refusal"):
            raise Rejected(f"refused: {self._secrets.hide(str(refusal))[:200]}")
        likeliest = http.field(completion, "choices", 0, "logprobs", "content", 0, "top_logprobs")
        tokens = [[http.field(token, "token"), http.field(token, "logprob")] for token in likeliest or ()]
        if not tokens or not all(_is_chance(*token) for token in tokens):
            raise Fault("unusable answer", "the reply holds no log-probabilities of its first token", sick=False)
        return Reply(self._secrets.hide(json.dumps(tokens)), None, *http.usage_of(completion))

    async def _shown(self, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
        """Each picture under its label."""
        content: list[dict[str, Any]] = []
        for picture in pictures:
            content.append({"type": "text", "text": f"{picture.label}:"})
            content.append({"type": "image_url", "image_url": {"url": await self._pictures.uri(picture)}})
        return content

    async def draw(self, text: str, sources: Sequence[Picture]) -> Reply:
        request: dict[str, Any] = {"model": self._config.model, "prompt": text, "n": 1}
        if self._config.size:
            request["size"] = self._config.size
        if self._config.image_reply:
            request["response_format"] = self._config.image_reply
        try:
            drawn = await self._draw(request, sources)
        except Rejected as refused:
            raise _refused_setting(self._config, refused, "image_reply") from None
        data = http.field(drawn, "data", 0)
        try:
            image = http.decode_base64(http.field(data, "b64_json") or http.field(data, "url"))
        except Unusable as error:
            raise Fault("unusable answer", str(error), sick=False) from None
        return Reply(None, image, *http.usage_of(drawn))

    async def _draw(self, request: Mapping[str, Any], sources: Sequence[Picture]) -> Any:
        if not sources:
            return await self._post("/images/generations", request)
        files = [
            (f"image_{i}.png", await self._pictures.png(picture), "image/png") for i, picture in enumerate(sources)
        ]
        with self._translated_errors():
            edit = self._client.images.with_raw_response.edit
            reply = await edit(image=files if len(files) > 1 else files[0], **request)
        return self._parsed(reply)

    async def close(self) -> None:
        await self._client.close()

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        with self._translated_errors():
            reply = await self._client.post(path, body=body, cast_to=httpx2.Response)
        return self._parsed(reply)

    def _parsed(self, reply: Any) -> Any:
        value = http.parsed(reply.content)
        http.check_no_error(value, reply.headers, self._secrets, self._config.name)
        return value

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Translates the client's exceptions; their own texts may quote the request, so they are not chained."""
        who = self._config.name
        try:
            yield
        except openai.APITimeoutError as error:
            origin = getattr(error.__cause__, "__cause__", None)  # the client calls refused connections time-outs too
            if isinstance(origin, aiohttp.ClientConnectionError) and not isinstance(origin, TimeoutError):
                raise Fault("connection", self._secrets.hide(str(origin))[:200] + self._proxy) from None
            raise Fault("time-out") from None
        except openai.APIStatusError as error:
            message, parameter = _complaint(error)
            message = self._secrets.hide(message)
            raise http.outcome_of_status(error.status_code, error.response.headers, message, who, parameter) from None
        except openai.APIConnectionError as error:
            raise Fault("connection", self._secrets.hide(str(error.__cause__ or error))[:200] + self._proxy) from None
        except openai.APIError as error:
            raise Fault("protocol", self._secrets.hide(str(error))[:200], sick=False) from None
        except (httpx2.HTTPError, aiohttp.ClientError) as error:  # a cut body, or no HTTP at all
            raise Fault("connection", self._secrets.hide(str(error))[:200] + self._proxy) from None


def _response_format(structured: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    if structured == "none":
        return {}
    if structured == "json_object":
        return {"response_format": {"type": "json_object"}}
    described = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def _refused_setting(config: ServiceConfig, refused: Rejected, response_format: str) -> Exception:
    """`refused`, or a UserError that names the setting which the server does not take: no other question fares better.

    Args:
      response_format: the setting behind the request's parameter of this name.
    """
    remedies = {
        "temperature": ("temperature", "Set its temperature=-1, which sends none."),
        "max_tokens": ("max_tokens", "Set its max_tokens to what the model takes; 0 sends none."),
        "max_completion_tokens": ("max_tokens", "Set its max_tokens to what the model takes; 0 sends none."),
        "size": ("size", 'Set its size to one that the model draws; "" sends none.'),
        "response_format": (response_format, f'Set its {response_format} to what the server takes; "none" for '
                            'structured and "" for image_reply send none.'),
    }
    if refused.parameter not in remedies:
        return refused
    key, remedy = remedies[refused.parameter]
    return UserError(f"{config.name} does not take the `{key}` that is set ({refused}).", remedy)


def _is_chance(text: Any, log_probability: Any) -> bool:
    number = isinstance(log_probability, (int, float)) and not isinstance(log_probability, bool)
    return isinstance(text, str) and number and log_probability <= 1e-3


def _complaint(error: openai.APIStatusError) -> tuple[str, str]:
    """What the server says is wrong, and the parameter that it names, or ""."""
    body = error.body[0] if isinstance(error.body, list) and error.body else error.body  # Gemini sends a list
    body = http.field(body, "error") or body
    if not isinstance(body, Mapping):
        return (body if isinstance(body, str) and body else error.response.text), ""
    message = http.field(body, "message") or body
    message = message if isinstance(message, str) else json.dumps(message, default=str)
    return message, str(http.field(body, "param") or "")
