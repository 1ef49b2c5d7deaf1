"""Scores over HTTP, for trainers in any language.

    GET  /healthz     {"status": "ok", "presets": [...], "limits": {...}}
    POST /v1/score    {"preset": "released", "rollouts": [rollout, ...]}
                      -> {"preset": ..., "scores": [{"id", "total", "components", "effective_weights", "bonus",
                          "missing", "error"}, ...]}

Images of rollouts are data URIs, or paths below the folder that is served.  A total of null comes with `missing`
(judgements that failed: ask again later) or `error` (the rollout itself is at fault).  Statuses: 400 no such JSON, 401
no token, 413 too large, 415 no JSON, 421 wrong host, 429 too many rollouts in progress (with `Retry-After`), 502 the
judge cannot be asked.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from ivr_jax import files
from ivr_jax.config import Positive, Section
from ivr_jax.errors import UserError
from ivr_jax.score.scoring import Scorer, named_scores


@dataclasses.dataclass(frozen=True)
class Limits(Section, name="limits"):
    """What one caller may ask for.

    Attributes:
      batch: rollouts in one request.
      body_mb: size of one request, in MB.
      pending: rollouts in progress, of all requests together.
    """

    batch: Positive
    body_mb: Positive
    pending: Positive


class ScoreApp:
    """The handlers; `make_app` gives the ASGI application.

    Args:
      scorers: by name of the preset.
      limits: see `Limits`.
      token: what callers must send as `Authorization: Bearer TOKEN`; "" for none.
      hosts: values of Host that are answered without a token (against DNS rebinding); None answers all.
    """

    def __init__(self, scorers: Mapping[str, Scorer], limits: Limits, token: str, hosts: frozenset[str] | None):
        self._scorers, self._limits, self._token, self._hosts = dict(scorers), limits, token, hosts
        self._pending = 0

    async def health(self, request: Request) -> JSONResponse:
        """GET /healthz."""
        limits = dataclasses.asdict(self._limits)
        return JSONResponse({"status": "ok", "presets": sorted(self._scorers), "limits": limits})

    async def score(self, request: Request) -> JSONResponse:
        """POST /v1/score."""
        self._check_caller(request)
        body = await self._body(request)
        preset, rollouts = body.get("preset"), body.get("rollouts")
        if preset not in self._scorers:
            raise HTTPException(400, f"preset must be one of {', '.join(sorted(self._scorers))}.")
        if not isinstance(rollouts, list) or not rollouts:
            raise HTTPException(400, "rollouts must be a list of at least one rollout.")
        if len(rollouts) > self._limits.batch:
            raise HTTPException(413, f"{len(rollouts)} rollouts; at most {self._limits.batch} in one request.")
        if self._pending + len(rollouts) > self._limits.pending:
            raise HTTPException(429, "Too many rollouts are in progress.", {"Retry-After": "5"})
        self._pending += len(rollouts)
        try:
            results = await self._scorers[preset].score_all(rollouts)
        except UserError as error:
            raise HTTPException(502, str(error)) from error
        finally:
            self._pending -= len(rollouts)
        return JSONResponse({"preset": preset, "scores": named_scores(rollouts, results)})

    def _check_caller(self, request: Request) -> None:
        if self._token:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            known = secrets.compare_digest(given.strip().encode(), self._token.encode())
            if scheme.lower() != "bearer" or not known:
                raise HTTPException(401, "Send the token: Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"})
        elif self._hosts is not None and request.headers.get("host", "") not in self._hosts:
            raise HTTPException(421, "Wrong host.")
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") or "origin" in request.headers:
            raise HTTPException(403, "Pages of browsers are not answered.")

    async def _body(self, request: Request) -> Mapping[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Send JSON (Content-Type: application/json).")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self._limits.body_mb << 20:
                raise HTTPException(413, f"The request is larger than {self._limits.body_mb} MB.")
        try:
            body = json.loads(bytes(data), parse_constant=_no_constant, object_pairs_hook=files.unique_keys)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise HTTPException(400, "Send a JSON object.")
        return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def make_app(handlers: ScoreApp) -> Starlette:
    """The ASGI application."""
    routes = [Route("/healthz", handlers.health), Route("/v1/score", handlers.score, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: _error})


def _error(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
