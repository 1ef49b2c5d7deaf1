"""Who may call, and what every response carries.

* Without a token the server listens on loopback only, and a request must name it by a loopback host (else a page of
  another site could reach it by DNS rebinding).
* With a token every request carries it as `Authorization: Bearer TOKEN`, or the cookie that the sign-in page sets.
  The cookie holds a value made at start, not the token, and is HttpOnly and SameSite=Strict.
* A request that changes something and comes from a browser must come from this server's own page: its `Origin`, and
  `Sec-Fetch-Site` where it is sent, are checked.  There are no CORS headers, so no other page can read an answer.
* Bodies are counted while they are read; nothing is written to a path made of a user's text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ivr_jax.serve.telemetry import Telemetry

COOKIE = "ivr_session"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATHS = ("/healthz", "/sign-in", "/page.css", "/sign-in.js", "/favicon.svg")  # without a token too
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Guard:
    """ASGI middleware; see the module's text.

    Args:
      token: what callers must know; "" for none (loopback only).
      port: where the server listens, for the check of Host and Origin; None leaves Host alone (tests in process).
    """

    def __init__(self, app: Any, token: str, session: str, hosts: frozenset[str], telemetry: Telemetry):
        self.app, self._token, self._session, self._hosts = app, token, session, hosts
        self._telemetry = telemetry

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
                route = getattr(scope.get("route"), "path", "other")
                self._telemetry.requests.labels(route, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not self._token and (len(request.headers.getlist("host")) != 1 or host not in self._hosts):
            return error_response(421, "Wrong host: open the address that the command printed.")
        if request.method not in ("GET", "HEAD"):
            origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
            own = {f"http://{host}", f"https://{host}"}
            if (origin is not None and origin not in own) or site not in ("none", "same-origin"):
                return error_response(403, "The request comes from another site's page.")
        if not self._token or request.url.path in OPEN_PATHS or self._knows(request):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return Response(status_code=303, headers={"Location": "/sign-in", "Cache-Control": "no-store"})
        return error_response(
            401, "This server asks for its token (Authorization: Bearer TOKEN).", {"WWW-Authenticate": "Bearer"}
        )

    def _knows(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), self._token):
            return True
        return same(request.cookies.get(COOKIE, ""), self._session)


def same(given: str, known: str) -> bool:
    """Compares in constant time."""
    return secrets.compare_digest(given.encode(), known.encode())


def allowed_hosts(port: int) -> frozenset[str]:
    """Values of Host that name a loopback server on `port`."""
    return frozenset(f"{name}:{port}" for name in LOOPBACK) | (frozenset(LOOPBACK) if port == 80 else frozenset())


async def read_body(request: Request, most: int) -> bytes:
    """The body.  Raises 413 once it is longer than `most` bytes, without reading on."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise HTTPException(413, f"The request is larger than {most >> 20} MB.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise HTTPException(413, f"The request is larger than {most >> 20} MB.")
    return bytes(data)


async def read_json(request: Request, most: int) -> Mapping[str, Any]:
    """The JSON object of a body.  Raises 415 for another type, 400 for what is no object."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send JSON (Content-Type: application/json).")
    try:
        body = json.loads(await read_body(request, most))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise HTTPException(400, "Send a JSON object.")
    return body


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
    """An error in OpenAI's shape, which the page reads too."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    body = {"error": {"message": message, "type": kind, "param": None, "code": None, **more}}
    return JSONResponse(body, status, {"Cache-Control": "no-store", **(headers or {})})
