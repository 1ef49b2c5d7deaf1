"""A page that follows training runs while they run, on this machine alone.

    GET /                       the page
    GET /state.json             every run: curves, last step, age, alarms, newest gallery, what the judge took
    GET /gallery/<run>/<file>   a gallery of rollouts that an RL run has written

The page asks for /state.json every few seconds and draws again; nothing is reloaded, and nothing is written.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ivr_jax.errors import UserError
from ivr_jax.report.collect import CONFIG_FILE, METRICS_FILE, read_curves

PAGE = Path(__file__).parent / "live_page"
FILES = {"live.html": "text/html", "live.css": "text/css", "live.js": "text/javascript"}
GALLERY = "gallery"
POINTS = 400  # of one curve that the page gets: more are thinned out
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_GALLERY_FILE = re.compile(r"step_\d{1,12}\.html")


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Runs by name: each folder that holds metrics, or those of its subfolders that do.

    Raises UserError for a folder that is not there.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not there.", "Name the workdir of a run, or a folder of such.")
        inner = sorted(path.parent for path in folder.glob(f"*/{METRICS_FILE}"))
        for run in [folder] if (folder / METRICS_FILE).exists() else inner:
            name = run.name if len(folders) == 1 else f"{run.parent.name}/{run.name}"
            found[name if name not in found else str(run)] = run
    return found


def state(runs: Mapping[str, Path], now: float) -> list[dict[str, Any]]:
    """What the page shows of every run; one whose file cannot be read says so and disturbs no other."""
    return [_run_state(name, folder, now) for name, folder in runs.items()]


def _run_state(name: str, folder: Path, now: float) -> dict[str, Any]:
    metrics = folder / METRICS_FILE
    try:
        curves = read_curves(metrics)
        age = now - metrics.stat().st_mtime
    except (UserError, OSError) as error:
        return {"name": name, "error": str(error), "curves": {}, "alarms": []}
    points = {curve.name: list(zip(map(float, curve.steps), map(float, curve.values), strict=True)) for curve in curves}
    last = {metric: values[-1] for metric, values in points.items() if values}
    step = max((point[0] for point in last.values()), default=0)
    config = _config(folder)
    return {
        "name": name,
        "error": "",
        "stage": config.get("stage", ""),
        "step": step,
        "steps": config.get("steps"),
        "age": round(age, 1),
        "curves": {metric: _thinned(values) for metric, values in points.items()},
        "alarms": [m.removeprefix("alarm_") for m, (at, value) in last.items() if m.startswith("alarm_") and value],
        "judge": {m: value for m, (at, value) in last.items() if m.startswith("judge")},
        "gallery": _newest_gallery(folder),
    }


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` and the last one."""
    stride = -(-len(points) // POINTS) or 1
    return points[::stride] if (len(points) - 1) % stride == 0 else [*points[::stride], points[-1]]


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _newest_gallery(folder: Path) -> str | None:
    pages = sorted(path.name for path in (folder / GALLERY).glob("step_*.html") if _GALLERY_FILE.fullmatch(path.name))
    return pages[-1] if pages else None


def make_app(folders: Sequence[Path], port: int) -> Starlette:
    """The application; runs that begin later are found too."""
    hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "live.html")
        if name not in FILES:
            raise HTTPException(404)
        return Response((PAGE / name).read_bytes(), media_type=FILES[name])

    def current(request: Request) -> Response:
        return JSONResponse({"runs": state(find_runs(folders), time.time())})

    def gallery(request: Request) -> Response:
        run, file = find_runs(folders).get(request.path_params["run"]), request.path_params["file"]
        if run is None or not _GALLERY_FILE.fullmatch(file) or not (run / GALLERY / file).is_file():
            raise HTTPException(404)
        return Response((run / GALLERY / file).read_bytes(), media_type="text/html")

    async def guard(request: Request, call_next: Any) -> Response:
        if request.headers.get("host") not in hosts:
            return Response("wrong host", 421)
        response = await call_next(request)
        framed = request.url.path.startswith(f"/{GALLERY}/")  # a gallery has a policy of its own, and stands in a frame
        response.headers.update({k: v for k, v in _HEADERS.items() if not framed or k != "Content-Security-Policy"})
        return response

    routes = [
        Route("/", page),
        Route("/state.json", current),
        Route("/gallery/{run:path}/{file}", gallery),
        Route("/{name}", page),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(BaseHTTPMiddleware, dispatch=guard)
    return app


def serve(folders: Sequence[Path], port: int) -> None:
    """Serves the page on loopback until it is interrupted.  Raises UserError for a port in use, and without a run."""
    import uvicorn

    runs = find_runs(folders)
    if not runs:
        raise UserError(f"there is no {METRICS_FILE} in {', '.join(map(str, folders))}.", "Name the workdir of a run.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            raise UserError(f"port {port} cannot be used: {error.strerror}.", "Name another one: --port=….") from error
        port = listener.getsockname()[1]
        print(f"{len(runs)} runs: http://127.0.0.1:{port}/", flush=True)
        config = uvicorn.Config(make_app(folders, port), log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
