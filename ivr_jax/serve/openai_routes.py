"""OpenAI's protocol: the model as an image generator, an image editor, and a chat partner that answers with images.

    GET  /v1/models, /v1/models/<name>
    POST /v1/images/generations    JSON: prompt, n, size, response_format, stream, partial_images
    POST /v1/images/edits          multipart: the same and image (one file or several)
    POST /v1/chat/completions      JSON: messages (texts and `image_url` with data: addresses), n, stream, ...

Fields of ours, which the `openai` client sends with `extra_body`: seed, mode, temperature, guidance, max_images,
aspect_ratio; the model `NAME:MODE` is NAME in that mode, for clients that cannot send fields.  A chat answer holds its
texts in `content`, and its images beside it in `images`, a list of `image_url` objects with data: addresses, in a
stream as `delta.images`.  The question is the last user message; where it has no image, the last image of an earlier
message is the reference, so that "now make it blue" edits what was drawn.  System messages do not reach the model: its
prompt template has no place for them.  Nothing is fetched from an address.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ivr_jax.errors import UserError
from ivr_jax.serve.guard import read_body, read_json
from ivr_jax.serve.jobs import AUTO, DONE, FAILED, AnswerRequest, ClientGone, Job, PartView, Snapshot
from ivr_jax.serve.models import ServedModel, named, part_text
from ivr_jax.serve.page_routes import Service, sampling_of
from ivr_jax.serve.partial_answer import IMAGE
from ivr_jax.serve.scheduler import Busy
from ivr_jax.serve.uploads import LONGEST_RATIO, decode_upload, from_data_url

_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
_COMMON = {"model", "n", "seed", "mode", "temperature", "guidance", "top_p", "max_images", "aspect_ratio", "stream",
           "user", "max_tokens", "max_completion_tokens"}  # fmt: skip
_IMAGES = _COMMON | {"prompt", "size", "response_format", "partial_images", "quality", "background", "output_format",
                     "moderation", "style", "input_fidelity", "output_compression"}  # fmt: skip
_CHAT = _COMMON | {"messages", "stream_options", "response_format", "stop", "presence_penalty", "frequency_penalty",
                   "logprobs", "top_logprobs", "metadata", "store", "modalities", "service_tier",
                   "parallel_tool_calls", "reasoning_effort"}  # fmt: skip


def routes(service: Service) -> list[Route]:
    """The endpoints under /v1."""
    started = int(time.time())

    def model_json(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "ivr_jax"}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_json(name) for name in service.models]})

    async def model(request: Request) -> Response:
        return JSONResponse(model_json(named(service.models, request.path_params["name"]).name))

    async def generate(request: Request) -> Response:
        body = await read_json(request, service.limits.body_bytes)
        return await _images(service, request, body, (), "image_generation")

    async def edit(request: Request) -> Response:
        body, files = await _form(request, service)
        limits = service.limits
        pixels = [
            await run_in_threadpool(decode_upload, data, limits, f"image {n}") for n, data in enumerate(files, 1)
        ]
        if not pixels:
            raise UserError("an edit needs an image.", "Send it in the field `image`.")
        return await _images(service, request, body, tuple(pixels), "image_edit")

    async def chat(request: Request) -> Response:
        body = await read_json(request, service.limits.body_bytes)
        _check_fields(body, _CHAT)
        prompt, pixels = await run_in_threadpool(_question, body.get("messages"), service)
        wanted = _requests(service, body, prompt, pixels)
        jobs = await _start(service, wanted)
        if body.get("stream"):
            options = body.get("stream_options") or {}
            stream = _chat_stream(service, jobs, wanted[0].model, bool(options.get("include_usage")))
            return _event_stream(stream)
        done = await _all_finished(service, request, jobs)
        choices = [
            {"index": i, "finish_reason": _finish(s), "logprobs": None, "message": _message(s)}
            for i, s in enumerate(done)
        ]
        return JSONResponse({"id": f"chatcmpl-{jobs[0].id}", "object": "chat.completion", "created": int(time.time()),
                             "model": wanted[0].model, "choices": choices, "usage": _usage(done)})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/images/generations", generate, methods=["POST"]),
        Route("/v1/images/edits", edit, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]


# -- requests ---------------------------------------------------------------------------------------------------------


def _requests(
    service: Service, body: Mapping[str, Any], prompt: str, pixels: tuple[np.ndarray, ...]
) -> list[AnswerRequest]:
    """One request an answer (`n`), with consecutive seeds.  Raises UserError naming the field at fault."""
    if len(pixels) > service.limits.references:
        raise UserError(f"{len(pixels)} images: at most {service.limits.references} are taken.", "Send fewer.")
    count = _number(body, "n", 1, int)
    if not 1 <= count <= service.limits.answers:
        raise UserError(f"n is {count}; 1 to {service.limits.answers} answers are given.", "Send several requests.")
    seed = _number(body, "seed", None, int)
    seed = int.from_bytes(np.random.default_rng().bytes(4), "little") if seed is None else seed
    model, mode = _model_and_mode(service, _text(body, "model", ""), _text(body, "mode", ""))
    request = AnswerRequest(
        model.name,
        prompt,
        pixels,
        _text(body, "aspect_ratio", "") or _aspect(_text(body, "size", "auto")),
        0,
        mode,
        sampling_of(
            _number(body, "temperature", 1.0, float), _number(body, "guidance", 1.0, float),
            _number(body, "top_p", 1.0, float),
        ),
        _number(body, "max_images", 0, int),
        _number(body, "max_completion_tokens", _number(body, "max_tokens", 0, int), int),
    )  # fmt: skip
    if not 0 <= seed < 2**32 or request.max_images < 0 or request.max_tokens < 0:
        raise UserError(f"the seed {seed} (or a cap) is out of range.", "Use 0 to 4294967295.")
    return [dataclasses.replace(request, seed=(seed + i) % 2**32) for i in range(count)]


def _model_and_mode(service: Service, name: str, mode: str) -> tuple[ServedModel, str]:
    """What `NAME`, or `NAME:MODE` for clients that cannot send the field `mode`, asks for."""
    model, colon, named_mode = name.rpartition(":")
    if colon and name not in service.models and model in service.models:
        if mode not in ("", named_mode):
            raise UserError(f"the model is {name!r} and the mode {mode!r}.", "Name one mode.")
        name, mode = model, named_mode
    return named(service.models, name), mode or AUTO


async def _start(service: Service, wanted: Sequence[AnswerRequest]) -> list[Job]:
    """Queues all of a call's answers, or none."""
    jobs: list[Job] = []
    try:
        for request in wanted:
            jobs.append(await service.start(request, keep=False))
    except (UserError, Busy):
        for job in jobs:
            service.scheduler.stop(job)
        raise
    return jobs


def _number(body: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, str):  # a form has nothing else
        try:
            return kind(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise UserError(f"the field {name!r} is {str(body.get(name))[:40]!r}.", "It takes a number.")
    return kind(value)


def _text(body: Mapping[str, Any], name: str, default: str) -> str:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise UserError(f"the field {name!r} is {str(value)[:40]!r}.", "It takes a text.")
    return value


def _aspect(size: str) -> str:
    """WIDTHxHEIGHT as an aspect ratio: the area is the model's own."""
    if size == "auto":
        return AUTO
    match = _SIZE.fullmatch(size)
    if not match:
        raise UserError(f"the size {size!r} is not understood.", "Write WIDTHxHEIGHT, or auto.")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise UserError(f"the size {size!r} is too long and narrow.", "Ask for a shape nearer to a square.")
    return f"{width}:{height}"


def _check_fields(body: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(body) - known)
    if unknown:
        raise UserError(f"the field {unknown[0]!r} is not supported.", f"Supported: {', '.join(sorted(known))}.")


async def _form(request: Request, service: Service) -> tuple[dict[str, Any], list[bytes]]:
    """Fields and image files of a multipart body; files stay in memory, within the limits."""
    limits = service.limits
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UserError("an edit is sent as multipart/form-data.", "Use the openai client's images.edit.")
    body = await read_body(request, min(limits.body_bytes, limits.references * limits.upload_bytes + (1 << 20)))

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, whole(), max_files=16, max_fields=64)
    parser.spool_max_size = limits.body_bytes  # nothing on disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise UserError(f"the form cannot be read ({error.message}).", "Send multipart/form-data.") from None
    fields, files = {}, []
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields[name] = value
        elif name in ("image", "image[]"):
            files.append(await value.read())
        else:
            raise UserError(f"the field {name!r} is not supported.", "Leave it out.")
    return fields, files


def _question(messages: Any, service: Service) -> tuple[str, tuple[np.ndarray, ...]]:
    """Text and images of the last user message; see the module's text for earlier images."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise UserError("`messages` must be a list of messages.", "Send at least one of the user.")
    last = messages[-1]
    if last.get("role") != "user":
        raise UserError("the last message must be the user's.", "Put the question last.")
    text, urls = _content(last)
    if not urls:
        earlier = [url for message in messages[:-1] for url in _content(message)[1]]
        urls = earlier[-1:]
    if len(urls) > service.limits.references:
        raise UserError(f"{len(urls)} images: at most {service.limits.references} are taken.", "Send fewer.")
    return text, tuple(from_data_url(url, service.limits, f"image {n}") for n, url in enumerate(urls, 1))


def _content(message: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Text and image addresses of a message, those that an answer of ours holds in `images` included."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    texts, urls = [], []
    for part in [*parts, *(message.get("images") or [])]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), Mapping):
            urls.append(str(part["image_url"].get("url", "")))
        else:
            raise UserError(f"a message part of type {kind!r} is not supported.", "Send text and image_url parts.")
    return "\n".join(texts), urls


# -- images -----------------------------------------------------------------------------------------------------------


async def _images(
    service: Service, request: Request, body: Mapping[str, Any], pixels: tuple[np.ndarray, ...], kind: str
) -> Response:
    _check_fields(body, _IMAGES)
    form = _text(body, "response_format", "b64_json")
    if form not in ("b64_json", "url"):
        raise UserError(f"the response_format {form!r} is not supported.", "Use b64_json or url.")
    wanted = _requests(service, body, _text(body, "prompt", ""), pixels)
    streams = body.get("stream") in (True, "true")
    jobs = await _start(service, wanted)
    if streams:
        return _event_stream(_image_stream(service, jobs[0], kind, _number(body, "partial_images", 0, int)))
    done = await _all_finished(service, request, jobs)
    data = []
    for snapshot in done:
        png = _last_image(snapshot)
        encoded = base64.b64encode(png).decode()
        data.append({"b64_json": encoded} if form == "b64_json" else {"url": f"data:image/png;base64,{encoded}"})
    usage = _usage(done)
    return JSONResponse({"created": int(time.time()), "data": data, "usage": {
        "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }})  # fmt: skip


def _last_image(snapshot: Snapshot) -> bytes:
    """The final image of an answer.  Raises UserError when none was drawn to its end."""
    drawn = [view for view in snapshot.parts if view.kind == IMAGE and view.complete and view.png]
    if not drawn:
        raise UserError("the answer holds no image.", snapshot.error or "Raise max_tokens, or try another seed.")
    return drawn[-1].png


async def _image_stream(service: Service, job: Job, kind: str, partials: int) -> AsyncIterator[bytes]:
    """Events of a streamed image: previews with more and more rows, at most `partials` of them, then the image."""
    sent, rows = 0, (-1, 0)
    last = job.snapshot
    try:
        async for snapshot in job.watch():
            if snapshot is None:
                yield b": alive\n\n"
                continue
            last = snapshot
            image = next((v for v in reversed(snapshot.parts) if v.kind == IMAGE and v.png), None)
            if image is not None and sent < partials and not snapshot.over and (image.number, image.drawn) > rows:
                rows = image.number, image.drawn
                yield _typed(f"{kind}.partial_image", b64_json=_b64(image.png), partial_image_index=sent)
                sent += 1
        if last.state != DONE:
            yield _data({"error": {"message": last.error or "The answer was stopped.", "type": "server_error"}})
            return
        usage = _usage([last])
        yield _typed(f"{kind}.completed", b64_json=_b64(_last_image(last)), usage={
            "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
        })  # fmt: skip
    except UserError as error:
        yield _data({"error": {"message": str(error), "type": "invalid_request_error"}})
    finally:
        service.scheduler.stop(job)


def _typed(kind: str, **fields: Any) -> bytes:
    value = {"type": kind, "created_at": int(time.time()), "output_format": "png", "size": "auto", **fields}
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n".encode()


# -- chat -------------------------------------------------------------------------------------------------------------


def _message(snapshot: Snapshot) -> dict[str, Any]:
    texts = ["\n".join(part_text(view)) for view in snapshot.parts if view.kind != IMAGE]
    images = [_image_url(view) for view in snapshot.parts if view.kind == IMAGE and view.complete and view.png]
    return {"role": "assistant", "content": "\n\n".join(texts), "refusal": None, "images": images}


def _image_url(view: PartView) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_b64(view.png)}"}, "index": view.number}


def _finish(snapshot: Snapshot) -> str:
    return "stop" if snapshot.finished else "length"


async def _chat_stream(service: Service, jobs: Sequence[Job], model: str, usage: bool) -> AsyncIterator[bytes]:
    """Chunks of one or several answers as their parts are completed, images among them."""
    head = {"id": f"chatcmpl-{jobs[0].id}", "object": "chat.completion.chunk", "created": int(time.time()),
            "model": model}  # fmt: skip
    queue: asyncio.Queue[tuple[int, Snapshot | None]] = asyncio.Queue(maxsize=8)

    async def follow(index: int, job: Job) -> None:
        async for snapshot in job.watch():
            await queue.put((index, snapshot))

    tasks = [asyncio.create_task(follow(i, job)) for i, job in enumerate(jobs)]
    sent = [0] * len(jobs)
    last: dict[int, Snapshot] = {}
    try:
        for index in range(len(jobs)):
            yield _data({**head, "choices": [_choice(index, {"role": "assistant", "content": ""})]})
        while len(last) < len(jobs):
            index, snapshot = await queue.get()
            if snapshot is None:
                yield b": alive\n\n"
                continue
            whole = snapshot.parts if snapshot.over else [view for view in snapshot.parts if view.complete]
            for view in whole[sent[index] :]:
                delta = _delta(view)
                if delta:
                    yield _data({**head, "choices": [_choice(index, delta)]})
            sent[index] = max(sent[index], len(whole))
            if snapshot.over:
                last[index] = snapshot
                if snapshot.state == FAILED:
                    yield _data({"error": {"message": snapshot.error, "type": "server_error"}})
                yield _data({**head, "choices": [_choice(index, {}, _finish(snapshot))]})
        if usage:
            done = [last[i] for i in range(len(jobs))]
            yield _data({**head, "choices": [], "usage": _usage(done)})
        yield b"data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for job in jobs:
            service.scheduler.stop(job)


def _delta(view: PartView) -> dict[str, Any]:
    if view.kind == IMAGE:
        return {"images": [_image_url(view)]} if view.complete and view.png else {}
    text = "\n".join(part_text(view))
    return {"content": f"{text}\n\n"} if text else {}


def _choice(index: int, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": finish}


# -- both -------------------------------------------------------------------------------------------------------------


async def _all_finished(service: Service, request: Request, jobs: Sequence[Job]) -> list[Snapshot]:
    """Waits for all at once, for what nobody watches is stopped; a client that goes away stops them.  Raises UserError
    when one has failed."""
    waiting = [asyncio.create_task(job.finished(request.is_disconnected)) for job in jobs]
    try:
        done = await asyncio.gather(*waiting)
    except (ClientGone, asyncio.CancelledError):
        for task, job in zip(waiting, jobs, strict=True):
            task.cancel()
            service.scheduler.stop(job)
        raise ClientDisconnect from None
    failed = [snapshot for snapshot in done if snapshot.state == FAILED]
    if failed:
        raise UserError(failed[0].error, "")
    return done


def _usage(done: Sequence[Snapshot]) -> dict[str, int]:
    read = done[0].prompt_tokens
    written = sum(snapshot.cost.tokens for snapshot in done)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _b64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _data(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _event_stream(stream: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
