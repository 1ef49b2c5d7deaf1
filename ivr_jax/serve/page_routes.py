"""The page and the interface it uses.

    GET  /, /a/<ids>                     the page; ids (one, or two joined by "+") are shown when it opens
    GET  /api/server                     models with their modes, limits
    POST /api/images                     one image file as the body -> {name, width, height}
    GET  /api/images/<name>              PNG
    POST /api/answers                    a request -> {id}; 429 with Retry-After when too many wait
    GET  /api/answers/<id>               the finished answer
    GET  /api/answers/<id>/events        server-sent events: `state`, `part` (changed parts only), then `over`
    POST /api/answers/<id>/stop          ends it; what is there stays
    GET  /api/answers/<id>/files/<name>  an image of a finished answer
    GET  /api/answers/<id>/folder.zip    the answer folder, as `python -m ivr_jax.generate` writes it

A request: {prompt, references: [names], model, mode, seed, aspect_ratio, temperature, guidance, max_images, max_tokens,
continue: {id, from, texts, verdicts, image}}.  With `continue` the answer `id` is taken up to and including part number
`from`, with the given fields of that part in place of its own, and the model continues from there.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ivr_jax.errors import UserError
from ivr_jax.images import encode_png
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.serve.archive import Archive, request_json, snapshot_json, view_json
from ivr_jax.serve.guard import read_body, read_json
from ivr_jax.serve.jobs import AUTO, AnswerRequest, Job, PartView
from ivr_jax.serve.limits import Limits
from ivr_jax.serve.models import ServedModel, named
from ivr_jax.serve.partial_answer import IMAGE, Part, PartialAnswer, encode_part, read_tokens
from ivr_jax.serve.scheduler import Scheduler
from ivr_jax.serve.uploads import Uploads, decode_upload

PAGE = Path(__file__).parent / "page"
FILES = {
    "page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript", "answer.js": "text/javascript",
    "favicon.svg": "image/svg+xml", "sign-in.html": "text/html", "sign-in.js": "text/javascript",
}  # fmt: skip
REMEMBERED = 64  # finished jobs whose last state is still in memory
_FIELDS: dict[str, Any] = {
    "prompt": str, "references": list, "model": str, "mode": str, "seed": int, "aspect_ratio": str,
    "temperature": (int, float), "guidance": (int, float), "max_images": int, "max_tokens": int, "continue": dict,
}  # fmt: skip


@dataclasses.dataclass
class Service:
    """What the routes share."""

    models: Mapping[str, ServedModel]
    scheduler: Scheduler
    uploads: Uploads
    archive: Archive
    limits: Limits
    jobs: OrderedDict[str, Job] = dataclasses.field(default_factory=OrderedDict)

    async def start(self, request: AnswerRequest, keep: bool = True) -> Job:
        """Checks and queues a request.  Raises UserError for a bad one, `Busy` when too many wait.

        Args:
          keep: whether the page may ask for it later by its id.
        """
        check_prompt(request.prompt, self.limits)
        model = self.models[request.model]
        model.grammar_of(request.mode)
        prepared = await run_in_threadpool(model.prepare, request)
        job = Job(request, prepared, asyncio.get_running_loop(), keep)
        self.scheduler.submit(job)
        if keep:
            self.jobs[job.id] = job
            over = [ident for ident, known in self.jobs.items() if known.snapshot.over]
            for old in over[:-REMEMBERED]:
                del self.jobs[old]
        return job


def check_prompt(prompt: str, limits: Limits) -> None:
    """Raises UserError for an empty or overlong prompt; control tokens are found by `check_user_text`."""
    if not prompt.strip():
        raise UserError("the prompt is empty.", 'Write what to draw, such as "Put a red circle at b2."')
    if len(prompt) > limits.prompt_characters:
        raise UserError(
            f"the prompt has {len(prompt)} characters; at most {limits.prompt_characters} are taken.", "Shorten it."
        )


def sampling_of(temperature: float, guidance: float = 1.0, top_p: float = 1.0) -> SamplingOptions:
    """Options in steps of 0.05 (guidance 0.25): each new set of options is a program of its own to compile."""
    if not (0 <= temperature <= 2 and 1 <= guidance <= 10 and 0 < top_p <= 1):
        raise UserError(
            f"temperature {temperature}, guidance {guidance} or top_p {top_p} is out of range.",
            "Temperature is 0 to 2, guidance 1 to 10, top_p above 0 and at most 1.",
        )
    steps = round(temperature * 20) / 20
    top_p = max(round(top_p * 20) / 20, 0.05)
    return SamplingOptions(
        temperature=steps, guidance=round(guidance * 4) / 4, text_top_p=top_p, image_top_p=top_p
    )


def routes(service: Service) -> list[Route]:
    """The page's routes."""

    def file(name: str):
        async def respond(request: Request) -> Response:
            return Response(
                (PAGE / name).read_bytes(), media_type=FILES[name], headers={"Cache-Control": "no-store"}
            )

        return respond

    async def about(request: Request) -> Response:
        models = [{"name": m.name, "modes": m.modes, "examples": m.examples} for m in service.models.values()]
        return _json({"models": models, "limits": dataclasses.asdict(service.limits)})

    async def upload(request: Request) -> Response:
        data = await read_body(request, service.limits.upload_bytes)
        pixels = await run_in_threadpool(decode_upload, data, service.limits)
        name = service.uploads.add(pixels)
        return _json({"name": name, "width": pixels.shape[1], "height": pixels.shape[0]})

    async def uploaded(request: Request) -> Response:
        pixels = service.uploads.get(request.path_params["name"])
        return _png(await run_in_threadpool(encode_png, pixels))

    async def ask(request: Request) -> Response:
        body = await read_json(request, service.limits.body_bytes)
        wanted = await run_in_threadpool(_wanted, service, body)
        return _json({"id": (await service.start(wanted)).id})

    async def answer(request: Request) -> Response:
        job = service.jobs.get(request.path_params["id"])
        if job is not None and not job.snapshot.over:
            return _json({"request": request_json(job.request), "running": True})
        record = await run_in_threadpool(service.archive.read, request.path_params["id"])
        return _json({name: value for name, value in record.items() if name != "tokens"})

    async def events(request: Request) -> Response:
        job = _job(service, request)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(job), media_type="text/event-stream", headers=headers)

    async def stop(request: Request) -> Response:
        await read_json(request, service.limits.body_bytes)
        service.scheduler.stop(_job(service, request))
        return _json({})

    async def image(request: Request) -> Response:
        ident, name = request.path_params["id"], request.path_params["name"]
        return _png(await run_in_threadpool(service.archive.file, ident, name))

    async def folder(request: Request) -> Response:
        ident = request.path_params["id"]
        data = await run_in_threadpool(service.archive.zipped, ident)
        headers = {"Content-Disposition": f'attachment; filename="answer-{ident}.zip"', "Cache-Control": "no-store"}
        return Response(data, media_type="application/zip", headers=headers)

    static = [Route(f"/{name}", file(name)) for name in FILES if not name.endswith(".html")]
    return [
        Route("/", file("page.html")),
        Route("/a/{ids}", file("page.html")),
        *static,
        Route("/api/server", about),
        Route("/api/images", upload, methods=["POST"]),
        Route("/api/images/{name}", uploaded),
        Route("/api/answers", ask, methods=["POST"]),
        Route("/api/answers/{id}", answer),
        Route("/api/answers/{id}/events", events),
        Route("/api/answers/{id}/stop", stop, methods=["POST"]),
        Route("/api/answers/{id}/files/{name}", image),
        Route("/api/answers/{id}/folder.zip", folder),
    ]


def _job(service: Service, request: Request) -> Job:
    job = service.jobs.get(request.path_params["id"])
    if job is None:
        raise HTTPException(404, "This answer is not on its way (any more).")
    return job


async def _events(job: Job) -> AsyncIterator[bytes]:
    """The parts of an answer as they change.  A reader that comes again gets all of them first."""
    sent: dict[int, PartView] = {}
    async for snapshot in job.watch():
        if snapshot is None:
            yield b": alive\n\n"
            continue
        for view in snapshot.parts:
            if sent.get(view.number) is not view:
                sent[view.number] = view
                yield _event("part", {**view_json(view), "uri": _uri(view.png)})
        for number in [n for n in sent if n >= len(snapshot.parts)]:
            del sent[number]
        yield _event("over" if snapshot.over else "state", {**snapshot_json(snapshot), "parts": len(snapshot.parts)})


def _event(name: str, value: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _uri(png: bytes | None) -> str:
    return "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode()


# -- requests ---------------------------------------------------------------------------------------------------------


def _wanted(service: Service, body: Mapping[str, Any]) -> AnswerRequest:
    """The request that a body describes.  Raises UserError naming the field at fault."""
    for name, value in body.items():
        if name not in _FIELDS:
            raise UserError(f"a request has no field {name!r}.", f"Its fields are {', '.join(_FIELDS)}.")
        if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
            raise UserError(f"the field {name!r} is {str(value)[:80]!r}.", "Send the right type.")
    names = body.get("references", [])
    if not all(isinstance(name, str) for name in names):
        raise UserError("the field 'references' must be a list of image names.", "Upload the images first.")
    seed = body.get("seed", 0)
    if not 0 <= seed < 2**32 or not all(0 <= body.get(name, 0) < 2**31 for name in ("max_images", "max_tokens")):
        raise UserError(f"the seed {seed} (or a cap) is out of range.", "Use 0 to 4294967295.")
    model = named(service.models, body.get("model", ""))
    request = AnswerRequest(
        model.name,
        body.get("prompt", ""),
        service.uploads.take(names),
        body.get("aspect_ratio", AUTO),
        seed,
        body.get("mode", AUTO),
        sampling_of(body.get("temperature", 1.0), body.get("guidance", 1.0)),
        body.get("max_images", 0),
        body.get("max_tokens", 0),
    )
    return _continued(service, model, request, body["continue"]) if "continue" in body else request


def _continued(
    service: Service, model: ServedModel, request: AnswerRequest, wanted: Mapping[str, Any]
) -> AnswerRequest:
    """The request with the tokens of an earlier answer as its prefix, up to an edited part."""
    ident, number = wanted.get("id"), wanted.get("from")
    if not isinstance(ident, str) or not isinstance(number, int) or isinstance(number, bool):
        raise UserError("`continue` needs the id of an answer and the number of a part.", "Send both.")
    record = service.archive.read(ident)
    before = record["request"]
    if before["model"] != model.name:
        raise UserError("the answer is another model's.", f"Continue it with {before['model']}.")
    sources = tuple(
        service.archive.image(ident, f"source{i}.png") for i in range(1, record["reference_images"] + 1)
    )
    request = dataclasses.replace(
        request, prompt=before["prompt"], references=sources, aspect_ratio=before["aspect_ratio"]
    )
    tokens = record["tokens"]
    parts = _partial_answer(model, request, record["grammar"], tokens).parts()
    if not 0 <= number < len(parts):
        raise UserError(f"the answer has no part {number}.", f"It has {len(parts)}.")
    part = parts[number]
    edits = {name: wanted[name] for name in ("texts", "verdicts", "image") if name in wanted}
    prefix = tokens[: part.end]
    if edits:
        edited = _edited(service, model, part, edits)
        prefix = tokens[: part.start] + encode_part(model.system.tokenizer, edited, part.round)
    if _partial_answer(model, request, model.grammar_of(request.mode), prefix).ended:
        raise UserError("the answer ends there: nothing can follow.", "Continue from an earlier part.")
    return dataclasses.replace(request, prefix=tuple(prefix))


def _partial_answer(model: ServedModel, request: AnswerRequest, grammar: str, tokens: list[int]) -> PartialAnswer:
    """The tokens of an answer, read.  Raises UserError where they leave the grammar."""
    size = model.prepare(request).size
    partial = PartialAnswer(model.grammar, model.grammar.initial(grammar, *(np.full(1, side) for side in size)))
    read_tokens(model.grammar.tables, [partial], [tokens])
    partial.parts()
    return partial


def _edited(service: Service, model: ServedModel, part: Part, edits: Mapping[str, Any]) -> Part:
    """A part with a user's texts, verdicts or image in place of the model's."""
    if part.kind == IMAGE:
        if set(edits) != {"image"} or part.codes is None:
            raise UserError("an image is edited by replacing it.", "Upload an image, and name it.")
        rows, columns = part.codes.shape
        return dataclasses.replace(part, codes=model.codes_of(service.uploads.get(str(edits["image"])), rows, columns))
    texts, verdicts = edits.get("texts", {}), edits.get("verdicts", {})
    if "image" in edits or not isinstance(texts, dict) or not isinstance(verdicts, dict):
        raise UserError("a text is edited by `texts` and `verdicts`.", "Send objects.")
    if not set(texts) <= set(part.texts) or not set(verdicts) <= set(part.verdicts):
        raise UserError("an edit names a field that this part does not have.", f"Its fields: {', '.join(part.texts)}.")
    if not part.complete:
        raise UserError("this part was not finished.", "Edit an earlier one, or continue without an edit.")
    for text in texts.values():
        check_prompt(str(text), service.limits)
        longest, count = int(model.grammar.tables.text_cap), len(model.system.tokenizer.encode(str(text).strip()))
        if count > longest:
            raise UserError(f"a text has {count} tokens; the model writes at most {longest}.", "Shorten it.")
    verdicts = {axis: bool(passed) for axis, passed in verdicts.items()}
    return dataclasses.replace(
        part, texts={**part.texts, **{k: str(v).strip() for k, v in texts.items()}},
        verdicts={**part.verdicts, **verdicts},
    )  # fmt: skip


def _json(value: Any) -> JSONResponse:
    return JSONResponse(value, headers={"Cache-Control": "no-store"})


def _png(data: bytes) -> Response:
    return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})
