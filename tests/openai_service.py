"""A service that speaks the OpenAI protocol (and the released gateway's) on loopback, with scripted latency and faults.

It is a real HTTP server; what it answers depends on the question alone, so that runs can be compared.  Every request
has a *destiny*, taken from a hash of its words: it succeeds at once, after some reflections, step by step, or never.
Drawn images are edited sources whose corner pixel tells the judge how far things have come.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, ImageFilter, ImageOps
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ivr_jax.images import image_name
from ivr_jax.services.config import ServiceConfig

MIXED_FAULTS = (
    "429", "429 later", "500", "503", "hang", "cut", "prose", "seven", "nan", "half", "empty", "html", "no choices"
)
_CORNER = (251, 17)  # red and green of a drawn image's corner; blue is the state
_STEP = 10  # the state after step i is _STEP + i


@dataclasses.dataclass
class Behaviour:
    """How the service answers; may be changed while it runs.

    Attributes:
      latency: seconds before every answer.
      fault_rate, faults: the share of calls that go wrong, and how.
      hang: seconds for which a hanging call hangs.
      held_after: once so many calls have been answered in all, further calls wait until this is None.
      key: the key that calls must carry, if any; `echo_key` repeats it in every error and reason.
      schema: whether `response_format` is understood (otherwise it is refused with 400).
      answer: replaces the text of every chat answer.
      status: answers every call with this status.
      raw: answers every call with this body, and `status`; `headers` are added.
      refuses: parameters of a chat request that are refused with 400.
    """

    latency: float = 0.0
    fault_rate: float = 0.0
    faults: tuple[str, ...] = MIXED_FAULTS
    hang: float = 1.0
    held_after: int | None = None
    key: str = ""
    echo_key: bool = False
    schema: bool = True
    answer: str | None = None
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    seed: int = 0


@dataclasses.dataclass
class Log:
    """What happened: questions answered properly (by id, how often), faults given, most calls at a time."""

    answered: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    bodies: list[Any] = dataclasses.field(default_factory=list)
    keep: bool = False
    in_flight: int = 0
    most_in_flight: int = 0

    def more(self, count: int) -> Callable[[], bool]:
        """A question: have at least `count` more questions been answered since now?"""
        wanted = sum(self.answered.values()) + count
        return lambda: sum(self.answered.copy().values()) >= wanted


class OpenAIService:
    """The service's application; `serving` runs it."""

    def __init__(self, behaviour: Behaviour | None = None):
        self.behaviour, self.log = behaviour or Behaviour(), Log()
        self._random = random.Random(self.behaviour.seed)
        self.url = ""
        routes = [
            Route("/v1/chat/completions", self._wrapped(self.chat), methods=["POST"]),
            Route("/v1/images/generations", self._wrapped(self.images), methods=["POST"]),
            Route("/v1/images/edits", self._wrapped(self.images), methods=["POST"]),
            Route("/gateway/chat_completions", self._wrapped(self.gateway_chat), methods=["POST"]),
            Route("/gateway/txt2img/gemini/generate", self._wrapped(self.gateway_draw), methods=["POST"]),
        ]
        self.application = Starlette(routes=routes)

    def _wrapped(self, answer):
        async def endpoint(request: Request) -> Response:
            log, behaviour = self.log, self.behaviour
            log.in_flight += 1
            log.most_in_flight = max(log.most_in_flight, log.in_flight)
            try:
                body = await request.body()
                if log.keep:
                    log.headers.append(dict(request.headers))
                if behaviour.latency:
                    await asyncio.sleep(behaviour.latency)
                while behaviour.held_after is not None and sum(log.answered.values()) >= behaviour.held_after:
                    await asyncio.sleep(0.01)
                if behaviour.key and request.headers.get("authorization") != f"Bearer {behaviour.key}":
                    return _error(401, f"no such key: {request.headers.get('authorization')}")
                if behaviour.raw is not None:
                    return Response(behaviour.raw, behaviour.status, behaviour.headers)
                if behaviour.status != 200:
                    return _error(behaviour.status, f"as told, {behaviour.key if behaviour.echo_key else ''}")
                fault = None
                if self._random.random() < behaviour.fault_rate:
                    fault = self._random.choice(behaviour.faults)
                    log.faults[fault] += 1
                    response = await self._faulty(fault)
                    if response is not None:
                        return response
                question, response = answer(body, request.headers.get("content-type", ""), fault)
                if fault is None:
                    log.answered[question] += 1
                return response
            finally:
                log.in_flight -= 1

        return endpoint

    async def _faulty(self, fault: str) -> Response | None:
        """The response of a fault below the protocol; None for one of its content."""
        if fault == "429":
            return _error(429, "slow down", {"retry-after": "0"})
        if fault == "429 later":
            return _error(429, "slow down", {"retry-after-ms": "60"})
        if fault in ("500", "503"):
            return Response("<html><body>Bad day</body></html>", int(fault), media_type="text/html")
        if fault == "hang":
            await asyncio.sleep(self.behaviour.hang)
            return _error(500, "too late")
        if fault == "cut":

            async def half() -> Any:
                yield b'{"choices": [{"mess'
                raise ConnectionResetError

            return StreamingResponse(half(), media_type="application/json", headers={"content-length": "500"})
        if fault == "html":
            return Response("<!doctype html><title>Login</title>", media_type="text/html")
        if fault == "no choices":
            return JSONResponse({"id": "x", "object": "chat.completion", "choices": []})
        return None

    # -- the OpenAI protocol --

    def chat(self, body: bytes, content_type: str, fault: str | None) -> tuple[str, Response]:
        asked = json.loads(body)
        if self.log.keep:
            self.log.bodies.append(asked)
        if asked.get("response_format") and not self.behaviour.schema:
            return "", _error(400, "response_format is not supported")
        refused = [name for name in self.behaviour.refuses if name in asked]
        if refused:
            what = f"Unsupported parameter: '{refused[0]}' is not supported with this model."
            return "", JSONResponse({"error": {"message": what, "param": refused[0], "code": "unsupported"}}, 400)
        question, text = self._said(asked["messages"][0]["content"], fault)
        message = {"role": "assistant", "content": text}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
        }
        return question, JSONResponse(reply)

    def images(self, body: bytes, content_type: str, fault: str | None) -> tuple[str, Response]:
        if content_type.startswith("multipart/"):
            text, files = _multipart(body, content_type)
        else:
            text, files = json.loads(body)["prompt"], []
        if self.log.keep:
            self.log.bodies.append((text, len(files)))
        pixels = draw(text, [_decode(file) for file in files])
        data = {"b64_json": _sent(pixels, fault)}
        usage = {"input_tokens": 500, "output_tokens": 4000, "total_tokens": 4500}
        return image_name(pixels), JSONResponse({"created": 0, "data": [data], "usage": usage})

    # -- the gateway --

    def gateway_chat(self, body: bytes, content_type: str, fault: str | None) -> tuple[str, Response]:
        question, text = self._said(json.loads(body)["messages"][0]["content"], fault)
        return question, JSONResponse({"code": 0, "msg": "ok", "response": text})

    def gateway_draw(self, body: bytes, content_type: str, fault: str | None) -> tuple[str, Response]:
        asked = json.loads(body)
        pixels = draw(asked["prompt"], [_decode(_from_uri(uri)) for uri in asked["image_urls"]])
        return image_name(pixels), JSONResponse({"code": 0, "data": {"urls": [_sent(pixels, fault)]}})

    def _said(self, content: list[dict[str, Any]], fault: str | None) -> tuple[str, str]:
        text = max((part["text"] for part in content if part["type"] == "text"), key=len)
        text = text.partition("\n\nYour last answer could not be used")[0]
        uris = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        question = hashlib.sha256("\0".join([text, *uris]).encode()).hexdigest()[:16]
        proper = json.dumps(judge(text, [_decode(_from_uri(uri)) for uri in uris[-1:]], question))
        if self.behaviour.echo_key:
            proper = proper.replace(question, f"{question} {self.behaviour.key}")
        if self.behaviour.answer is not None:
            return question, self.behaviour.answer
        return question, {
            None: proper,
            "prose": "I would rather not put a number on art.",
            "seven": re.sub(r'"score": \d', '"score": 7', proper).replace("_plan", "_plans"),
            "nan": re.sub(r'"score": \d', '"score": NaN', proper).replace('"steps"', '"step"'),
            "half": proper[: len(proper) // 2],
            "empty": "",
        }.get(fault, "")


def service_config(url: str, **settings: object) -> ServiceConfig:
    """The settings of a service that gives up soon."""
    return ServiceConfig(
        **{
            "kind": "openai",
            "base_url": url,
            "model": "test-model",
            "key_variable": "TEST_KEY",
            "app_variable": "",
            "source": "tests",
            "checkpoint": "",
            "temperature": -1.0,
            "max_tokens": 0,
            "structured": "auto",
            "image_side": 512,
            "size": "auto",
            "image_reply": "",
            "in_flight": 16,
            "requests_per_minute": 0,
            "tokens_per_minute": 0,
            "image_tokens": 100,
            "timeout": 5.0,
            "tries": 4,
            "first_wait": 0.001,
            "longest_wait": 1.0,
            "breaker_failures": 1000,
            "breaker_rest": 0.05,
            "patience": 0.2,
            "price_in": 2.0,
            "price_out": 10.0,
            "price_image": 0.04,
        }
        | settings
    )


@contextlib.contextmanager
def serving(service: OpenAIService) -> Iterator[str]:
    """Runs the service on a free port of loopback, in a thread; the URL of its OpenAI protocol."""
    server = uvicorn.Server(uvicorn.Config(service.application, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the test service did not start")
        threading.Event().wait(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    service.url = f"http://127.0.0.1:{port}"
    try:
        yield f"{service.url}/v1"
    finally:
        server.force_exit = server.should_exit = True
        thread.join(10)


# -- the judge --


def destiny(request: str) -> tuple[str, int]:
    """How a request ends, and a small number that varies the way there."""
    if found := re.search(r"\[(\w+)(?: (\d))?\]", request):
        return found.group(1), int(found.group(2) or 2)
    value = hashlib.sha256(request.encode()).digest()
    kinds = (*["direct"] * 2, *["reflection"] * 3, *["multi"] * 3, "ambiguous", "stuck")
    return kinds[value[0] % len(kinds)], 1 + value[1] % 3


def judge(text: str, last: list[np.ndarray], question: str) -> dict[str, Any]:
    """The proper answer to a prompt of `ivr_jax.services.prompts`; reasons carry the question's id."""
    request = re.search(r"(?:Request|for context only): (.*?)\)?\n", text + "\n").group(1)
    kind, number = destiny(request)
    state = _state(last[-1]) if last else 0
    if '"steps"' in text:
        steps = [f"Step {i} of {number + 1} for {request}. All else stays as it is." for i in range(1, number + 2)]
        return {"steps": steps, "reason": question}
    if '"cause"' in text:
        return {"reason": question, "cause": "ambiguous_prompt" if kind == "ambiguous" else "prompt_too_complex"}
    if '"improvement_plan"' in text:
        return {
            "failure_analysis": f"Too little changed ({question}).",
            "improvement_plan": f"Carry it out in full, try {min(state, 9) + 1} ({question}).",
        }
    if "checks a single step" in text or "check a single step" in text:
        good = 2 if kind == "stuck" else 5
        return {axis: {"reason": f"Seen, {question}.", "score": good if axis == "instruction" else 4}
                for axis in ("instruction", "consistency", "quality", "knowledge")}
    needed = {"direct": 0, "reflection": number, "multi": _STEP + number + 1}.get(kind, 99)
    if kind == "reflection" and state >= _STEP:
        state = 0
    score = 5 if state >= needed else 2 if "was the request carried out" in text else 4
    return {"reason": f"Looked at, {question}.", "score": score}


def _state(pixels: np.ndarray) -> int:
    red, green, blue = (int(x) for x in pixels[0, 0])
    return blue if (red, green) == _CORNER else 0


# -- the artist --


def draw(text: str, sources: list[np.ndarray]) -> np.ndarray:
    """Sources side by side, edited as some words of the text say; a failed first try leaves them as they are."""
    step, again = re.match(r"Step (\d) of", text), re.search(r"try (\d)", text)
    state = _STEP + int(step.group(1)) if step else int(again.group(1)) if again else 0
    height = sources[0].shape[0] if sources else 48
    scaled = [ImageOps.contain(Image.fromarray(s), (10_000, height)) for s in sources] or [_blank(text, height)]
    canvas = Image.new("RGB", (sum(image.width for image in scaled), height))
    left = 0
    for image in scaled:
        canvas.paste(image, (left, 0))
        left += image.width
    if state or destiny(text.splitlines()[0])[0] == "direct":
        canvas = _edited(canvas, text.lower())
    else:
        canvas = canvas.filter(ImageFilter.GaussianBlur(1))
    digest = hashlib.sha256(text.encode()).digest()
    pixels = np.array(canvas)
    pixels[0, 0] = (*_CORNER, state)
    pixels[0, 1] = tuple(digest[:3])
    return pixels


def _edited(picture: Image.Image, text: str) -> Image.Image:
    operations = {
        "grey": lambda p: ImageOps.grayscale(p).convert("RGB"),
        "mirror": ImageOps.mirror,
        "dusk": lambda p: p.point(lambda v: v // 2),
        "negative": ImageOps.invert,
        "poster": lambda p: ImageOps.posterize(p, 2),
        "warm": lambda p: Image.merge("RGB", [c.point(lambda v, k=k: min(255, v * k // 100))
                                              for c, k in zip(p.split(), (115, 100, 80), strict=True)]),
    }
    for word, operation in operations.items():
        if word in text:
            picture = operation(picture)
    return picture


def _blank(text: str, size: int) -> Image.Image:
    return Image.new("RGB", (size, size), tuple(hashlib.sha256(text.encode()).digest()[:3]))


# -- the wire --


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "scripted"}}, status, headers)


def _sent(pixels: np.ndarray, fault: str | None) -> str:
    """What an image answer holds: the image, or, after a fault, something else."""
    broken = {"half": "iVBORw0KGgo", "prose": "no image today", "empty": "", "nan": "!!!", "seven": "AAAA"}
    return broken[fault] if fault else base64.b64encode(_encode(pixels)).decode()


def _multipart(body: bytes, content_type: str) -> tuple[str, list[bytes]]:
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    text, files = "", []
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="([^"]*)"', head).group(1)
        if name == b"prompt":
            text = data.removesuffix(b"\r\n").decode()
        elif name in (b"image", b"image[]"):
            files.append(data.removesuffix(b"\r\n"))
    return text, files


def _from_uri(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def _decode(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
