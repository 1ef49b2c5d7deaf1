"""The OpenAI protocol, spoken by GPT, by Qwen3-VL behind vLLM or SGLang, and by Gemini's compatible endpoint."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import openai

from ivr_jax.construct.interfaces import Pixels
from ivr_jax.construct.services.caller import Fault, Rejected, Reply
from ivr_jax.construct.services.config import Secrets, ServiceConfig
from ivr_jax.construct.services.replies import Unusable
from ivr_jax.construct.services.transport import Picture, data_uri, decode_base64, encode, outcome_of_status

_NO_KEY = "none"  # what the client sends to a server without keys


class OpenAITransport:
    """See `Transport`.  The client's own retries are off: the caller's are the only ones.

    Args:
      config: the service.
      key: its API key, or "".
    """

    def __init__(self, config: ServiceConfig, key: str):
        self._config, self._secrets = config, Secrets([key])
        self._client = openai.AsyncOpenAI(
            api_key=key or _NO_KEY, base_url=config.base_url, max_retries=0, timeout=config.timeout
        )
        self._structured = config.structured

    async def chat(self, text: str, pictures: Sequence[Picture], schema: Mapping[str, Any]) -> Reply:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for picture in pictures:
            png = await asyncio.to_thread(picture.encoded, self._config.image_side)
            content.append({"type": "text", "text": f"{picture.label}:"})
            content.append({"type": "image_url", "image_url": {"url": data_uri(png)}})
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
            completion = await self._create(request, form, schema)
        except Rejected:
            if form != "auto":
                raise
            completion = await self._create(request, "none", schema)  # when this works, the schema was the trouble
            self._structured = "none"
        with self._reading():
            choice = completion.choices[0]
            if getattr(choice.message, "refusal", None):
                raise Rejected(f"refused: {self._secrets.hide(str(choice.message.refusal))[:200]}")
            if choice.finish_reason == "content_filter":
                raise Rejected("stopped by the content filter")
            text = choice.message.content
            if text is not None and not isinstance(text, str):
                raise Unusable("the answer is no text")
            return Reply(self._secrets.hide(text or ""), None, *_usage(completion))

    async def _create(self, request: Mapping[str, Any], structured: str, schema: Mapping[str, Any]) -> Any:
        formats = {
            "json_object": {"type": "json_object"},
            "json_schema": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            },
        }
        asked = formats.get("json_schema" if structured == "auto" else structured)
        with self._speaking():
            extra = {"response_format": asked} if asked else {}
            return await self._client.chat.completions.create(**request, **extra)

    async def draw(self, text: str, sources: Sequence[Pixels]) -> Reply:
        request: dict[str, Any] = {"model": self._config.model, "prompt": text, "n": 1}
        if self._config.size:
            request["size"] = self._config.size
        if self._config.image_reply:
            request["response_format"] = self._config.image_reply
        pngs = [await asyncio.to_thread(encode, pixels, self._config.image_side) for pixels in sources]
        files = [(f"image_{i}.png", png, "image/png") for i, png in enumerate(pngs)]
        with self._speaking():
            if files:
                drawn = await self._client.images.edit(image=files if len(files) > 1 else files[0], **request)
            else:
                drawn = await self._client.images.generate(**request)
        with self._reading():
            image = decode_base64(drawn.data[0].b64_json or drawn.data[0].url)
            return Reply(None, image, *_usage(drawn))

    async def close(self) -> None:
        await self._client.close()

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """Translates the client's exceptions; their own texts may quote the request, so they are not chained."""
        who = self._config.name
        try:
            yield
        except openai.APITimeoutError:
            raise Fault("time-out") from None
        except openai.APIStatusError as error:
            body = self._secrets.hide(_body_of(error))
            raise outcome_of_status(error.status_code, error.response.headers, body, who) from None
        except openai.APIConnectionError as error:
            raise Fault("connection", self._secrets.hide(str(error.__cause__ or error))[:200]) from None
        except openai.APIError as error:
            raise Fault("protocol", self._secrets.hide(str(error))[:200], sick=False) from None
        except (ValueError, TypeError, AttributeError) as error:  # a body that is no JSON, or no object
            raise Fault("unusable answer", f"{type(error).__name__} in the client", sick=False) from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """A reply of another shape than the protocol's (a web page with status 200, say) is an unusable answer."""
        try:
            yield
        except Unusable as error:
            raise Fault("unusable answer", str(error), sick=False) from None
        except (AttributeError, IndexError, KeyError, TypeError):
            raise Fault("unusable answer", "the reply is not of the protocol's shape", sick=False) from None


def _usage(reply: Any) -> tuple[int, int]:
    usage = getattr(reply, "usage", None)
    read = getattr(usage, "prompt_tokens", None) or getattr(usage, "input_tokens", None) or 0
    written = getattr(usage, "completion_tokens", None) or getattr(usage, "output_tokens", None) or 0
    return (read if isinstance(read, int) else 0), (written if isinstance(written, int) else 0)


def _body_of(error: openai.APIStatusError) -> str:
    body = error.body
    if isinstance(body, Mapping):
        message = body.get("message") or (body.get("error") or {})
        return str(message.get("message", message) if isinstance(message, Mapping) else message)
    return error.response.text
