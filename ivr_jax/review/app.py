"""The web application of the review: one page and a small JSON interface, for this machine alone.

    GET  /<token>/                    the page (page.html, page.css, page.js)
    GET  /<token>/state               {reviewer, samples, verdicts ("a", "r" or "." a sample), latest}
    GET  /<token>/sample/<position>   what is shown of one sample, and the reviewer's own decision on it
    GET  /<token>/image/<name>        PNG
    POST /<token>/decide              {position, verdict, comment, request} -> {decision}
    POST /<token>/undo                {number} -> {undone, standing, latest}: takes that decision back, if it is the
                                      latest; `standing` is what then counts for that sample

A token names a reviewer, is made anew at every start, and is in the path of every address; there is no cookie, so no
other page can act in a reviewer's name.  Besides, a request must carry this server's own Host, and a POST its Origin
and JSON.  Texts of models and people leave this module as JSON alone, and the page puts them in place as text; its
Content-Security-Policy allows no script but its own file.  A reviewer never sees the other's decisions.
"""

from __future__ import annotations

import json
import secrets
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.review.decisions import Decision, Decisions
from ivr_jax.trajectory import AXES, Evaluation, Reflection, Round, Step, Trajectory

PAGE = Path(__file__).parent / "page"
_FILES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_MAX_BODY = 64 * 1024  # bytes


def new_tokens(reviewers: tuple[str, ...]) -> dict[str, str]:
    """A fresh secret for each reviewer: token -> name."""
    return {secrets.token_urlsafe(24): reviewer for reviewer in reviewers}


class Review:
    """What the handlers share: the dataset, the decisions, who holds which token, and where the server listens."""

    def __init__(self, dataset: TrajectoryDataset, decisions: Decisions, tokens: Mapping[str, str], port: int):
        self.dataset, self.decisions, self.tokens = dataset, decisions, dict(tokens)
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._reading = threading.Lock()

    def reviewer(self, token: str) -> str:
        """The holder of a token; 404 for an unknown one, as for any other address that leads nowhere."""
        found = [name for known, name in self.tokens.items() if secrets.compare_digest(known.encode(), token.encode())]
        if not found:
            raise HTTPException(404, "There is nothing here. Open the address that the command printed.")
        return found[0]

    def position(self, value: Any) -> int:
        """`value` as the position of a sample.  Raises HTTPException 404 for anything else."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.dataset):
            raise HTTPException(404, f"There is no sample {value!r}.")
        return value

    def state(self, reviewer: str) -> dict[str, Any]:
        """What the page starts from: one mark a sample, and the reviewer's latest decision."""
        marks = bytearray(b"." * len(self.dataset))
        for decision in self.decisions.standing(reviewer):
            marks[decision.position] = ord(decision.verdict[0])
        return {
            "reviewer": reviewer,
            "samples": len(self.dataset),
            "verdicts": marks.decode(),
            "latest": _decision_json(self.decisions.latest(reviewer)),
        }

    def sample(self, reviewer: str, position: int) -> dict[str, Any]:
        """One sample with the reviewer's decision, as the page shows it."""
        with self._reading:
            trajectory = self.dataset[position]
            names = (*trajectory.sample.sources, *trajectory.images)
            sizes = {name: _png_size(self.dataset.png(name)) for name in names}
        return {**sample_json(trajectory, sizes), "position": position,
                "decision": _decision_json(self.decisions.at(reviewer, position))}

    def png(self, name: str) -> bytes:
        """The PNG of an image of the dataset."""
        with self._reading:
            return self.dataset.png(name)

    def decide(self, reviewer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Records a decision.  Raises HTTPException 400 or 404 for a request that is none."""
        position = self.position(body.get("position"))
        fields = [body.get("verdict"), body.get("comment"), body.get("request")]
        if not all(isinstance(field, str) for field in fields) or not 8 <= len(fields[2]) <= 100:
            raise HTTPException(400, "A decision needs position, verdict, comment and request.")
        if any("\ud800" <= character <= "\udfff" for field in fields for character in field):
            raise HTTPException(400, "A text holds an unpaired surrogate.")
        verdict, comment, request = fields
        with self._reading:
            key = self.dataset[position].sample.key
        decision = self.decisions.decide(reviewer, position, key, verdict, comment.strip(), f"{reviewer}/{request}")
        return {"decision": _decision_json(decision)}

    def undo(self, reviewer: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Takes a decision back.  Raises HTTPException 400 for a request that names none."""
        number = body.get("number")
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 63:
            raise HTTPException(400, "Undoing needs the number of a decision.")
        undone = self.decisions.undo(reviewer, number)
        return {
            "undone": _decision_json(undone),
            "standing": _decision_json(self.decisions.at(reviewer, undone.position) if undone else None),
            "latest": _decision_json(self.decisions.latest(reviewer)),
        }


def sample_json(trajectory: Trajectory, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What the page shows of a trajectory; `sizes` maps image names to (width, height)."""

    def image(name: str) -> dict[str, Any]:
        return {"name": name, "width": sizes[name][0], "height": sizes[name][1]}

    sample = trajectory.sample
    return {
        "key": sample.key,
        "prompt": sample.prompt,
        "explanation": sample.explanation,
        "category": sample.category,
        "mode": trajectory.mode.value,
        "sources": [image(name) for name in sample.sources],
        "rounds": [{"image": image(r.image), **_round_json(r)} for r in trajectory.rounds],
    }


def _round_json(r: Round) -> dict[str, Any]:
    said = []
    if isinstance(r.cause, Reflection):
        said = [["Failure analysis", r.cause.failure_analysis], ["Improvement plan", r.cause.improvement_plan]]
    elif isinstance(r.cause, Step):
        said = [["Step", r.cause.instruction]]
    return {
        "kind": "first" if r.cause is None else type(r.cause).__name__.lower(),
        "said": said,
        "evaluation": _evaluation_json(r.evaluation),
        "step_evaluation": None if r.step_evaluation is None else _evaluation_json(r.step_evaluation),
    }


def _evaluation_json(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [{"axis": axis, "passed": verdict.passed, "score": verdict.score, "reason": verdict.reason}
            for axis, verdict in zip(AXES, evaluation.axes, strict=True)]


def _decision_json(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    return {"number": decision.number, "position": decision.position, "verdict": decision.verdict,
            "comment": decision.comment, "decided_at": decision.decided_at}


def _png_size(data: bytes) -> tuple[int, int]:
    return struct.unpack(">II", data[16:24])


def make_app(review: Review) -> Starlette:
    """The ASGI application."""

    def page(request: Request) -> Response:
        review.reviewer(request.path_params["token"])
        name = request.path_params.get("file", "page.html")
        if name not in _FILES:
            raise HTTPException(404, "There is nothing here.")
        return Response((PAGE / name).read_bytes(), media_type=_FILES[name], headers={"Cache-Control": "no-store"})

    def state(request: Request) -> Response:
        return _json(review.state(review.reviewer(request.path_params["token"])))

    def sample(request: Request) -> Response:
        reviewer = review.reviewer(request.path_params["token"])
        return _json(review.sample(reviewer, review.position(request.path_params["position"])))

    def image(request: Request) -> Response:
        review.reviewer(request.path_params["token"])
        headers = {"Cache-Control": "private, max-age=86400, immutable"}  # names are hashes of the content
        return Response(review.png(request.path_params["name"]), media_type="image/png", headers=headers)

    def posting(act: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            reviewer = review.reviewer(request.path_params["token"])
            return _json(await run_in_threadpool(act, reviewer, await _body(request, review.hosts)))

        return handle

    routes = [
        Route("/{token}/", page),
        Route("/{token}/state", state),
        Route("/{token}/sample/{position:int}", sample),
        Route("/{token}/image/{name}", image),
        Route("/{token}/decide", posting(review.decide), methods=["POST"]),
        Route("/{token}/undo", posting(review.undo), methods=["POST"]),
        Route("/{token}/{file}", page),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refused, UserError: _failed})
    app.router.redirect_slashes = False
    app.add_middleware(_Guard, hosts=review.hosts)
    return app


async def _body(request: Request, hosts: set[str]) -> Mapping[str, Any]:
    """The JSON object of a POST that this server's own page has sent."""
    if request.headers.get("origin") not in {f"http://{host}" for host in hosts}:
        raise HTTPException(403, "The request does not come from the review page.")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "Send JSON.")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY:
            raise HTTPException(413, "That is too long.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "Send a JSON object.")
    return body


class _Guard:
    """Turns away requests under another Host (DNS rebinding), and puts the safety headers on every answer."""

    def __init__(self, app: Any, hosts: set[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return await _json({"error": "Wrong host."}, 421)(scope, receive, send_guarded)
        await self.app(scope, receive, send_guarded)


def _json(value: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(value, status, headers={"Cache-Control": "no-store"})


def _refused(request: Request, error: HTTPException) -> Response:
    return _json({"error": error.detail}, error.status_code)


def _failed(request: Request, error: UserError) -> Response:
    return _json({"error": str(error)}, 409)
