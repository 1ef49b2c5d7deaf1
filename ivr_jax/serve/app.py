"""The whole server as one ASGI application."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import jax
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ivr_jax.errors import UserError
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.serve import openai_routes, page_routes
from ivr_jax.serve.archive import Archive
from ivr_jax.serve.guard import COOKIE, Guard, error_response, read_json, same
from ivr_jax.serve.limits import Limits
from ivr_jax.serve.models import ServedModel
from ivr_jax.serve.page_routes import PAGE, Service
from ivr_jax.serve.scheduler import Busy, Scheduler
from ivr_jax.serve.telemetry import CONTENT_TYPE, Telemetry
from ivr_jax.serve.uploads import Uploads


def make_app(
    models: Mapping[str, ServedModel],
    out: Path,
    hosts: frozenset[str],
    token: str = "",
    limits: Limits | None = None,
    options: EngineOptions | None = None,
    mesh: jax.sharding.Mesh | None = None,
    warm: bool = False,
) -> Starlette:
    """The application; its engine thread runs between startup and shutdown.

    Args:
      models: by name; the first is the usual one.
      out: folder for the page's finished answers.
      hosts: values of the Host header that are served without a token.
      token: what callers must know; "" for none.
      options: of the rollout engine.
      mesh: where the models' parameters are; None: one device.
      warm: compile the usual program before the first request.
    """
    limits, telemetry = limits or Limits(), Telemetry()
    archive = Archive(out, limits)
    scheduler = Scheduler(models, limits, telemetry, options or EngineOptions(), archive.add, mesh, warm)
    service = Service(models, scheduler, Uploads(limits), archive, limits)
    session = secrets.token_urlsafe(24)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.close()
        archive.close()

    def health(request: Request) -> Response:
        alive = scheduler.alive
        body = {"status": "ok" if alive else "engine thread has ended", "models": list(models)}
        return JSONResponse(body, 200 if alive else 503, {"Cache-Control": "no-store"})

    def metrics(request: Request) -> Response:
        return Response(telemetry.text(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    async def sign_in(request: Request) -> Response:
        if request.method == "GET":
            return Response((PAGE / "sign-in.html").read_bytes(), media_type="text/html")
        body = await read_json(request, 4096)
        if not token or not same(str(body.get("token", "")), token):
            raise HTTPException(401, "That is not the server's token.")
        response = JSONResponse({})
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict", secure=request.url.scheme == "https")
        return response

    routes = [
        Route("/healthz", health),
        Route("/metrics", metrics),
        Route("/sign-in", sign_in, methods=["GET", "POST"]),
        *page_routes.routes(service),
        *openai_routes.routes(service),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, UserError: _bad_request, Busy: _busy, ClientDisconnect: _gone}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.add_middleware(Guard, token=token, session=session, hosts=hosts, telemetry=telemetry)
    app.state.scheduler, app.state.service = scheduler, service
    return app


def _refused(request: Request, error: HTTPException) -> Response:
    return error_response(error.status_code, error.detail, error.headers)


def _bad_request(request: Request, error: UserError) -> Response:
    return error_response(400, str(error))


def _busy(request: Request, error: Busy) -> Response:
    return error_response(429, str(error), {"Retry-After": str(error.retry_after)})


def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it
