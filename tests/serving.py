"""The server as its clients meet it: a tiny model behind a real uvicorn on a real loopback socket."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jax
import numpy as np
import tiny_model
import uvicorn
from PIL import Image

from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.serve.__main__ import listen
from ivr_jax.serve.app import make_app
from ivr_jax.serve.guard import allowed_hosts
from ivr_jax.serve.limits import Limits
from ivr_jax.serve.models import ServedModel

PROMPT = "Put a red circle"


def tiny(name: str = "tiny", seed: int = 0, imported: bool = False) -> ServedModel:
    """A model of random weights whose images are 2 x 2 cells of 16 pixels, and whose texts are short.

    One that was imported answers with texts and images in any order.
    """
    meta = {"text_tokenizer": "micro"} | ({} if imported else {"vocabulary": "tiny"})
    system = dataclasses.replace(tiny_model.system(tiny_model.noisy_params(seed=seed)), meta=meta)
    return ServedModel(name, system, text_cap=3)


@dataclasses.dataclass(frozen=True)
class Running:
    """A server: its address, application and process-wide parts."""

    url: str
    app: Any

    @property
    def model(self) -> ServedModel:
        """The first of its models."""
        return next(iter(self.app.state.service.models.values()))

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=120, **options)

    def metric(self, name: str) -> float:
        """A figure of /metrics, 0 before it was first counted."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def idle(self, seconds: float = 60) -> None:
        """Waits until no answer is in a slot or in the queue; fails when that never comes."""
        deadline = time.monotonic() + seconds
        while self.metric("ivr_slots_in_use") or self.metric("ivr_waiting"):
            assert time.monotonic() < deadline, "a slot is still in use"
            time.sleep(0.05)


@contextlib.contextmanager
def serving(
    out: Path, *models: ServedModel, token: str = "", slots: int = 4, limits: Limits | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Running]:
    """Serves the models (one tiny one by default) until the block ends."""
    named = {model.name: model for model in models or (tiny(),)}
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        options = EngineOptions(slots=slots, growth=1, shrink=False)
        app = make_app(named, out, allowed_hosts(port), token, limits, options, mesh)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Running(f"http://127.0.0.1:{port}", app)
        finally:
            server.should_exit = True
            thread.join(timeout=60)
    assert not thread.is_alive()


def png(height: int = 32, width: int = 32, grey: int = 10) -> bytes:
    """A PNG file of one grey."""
    return encoded(Image.fromarray(np.full((height, width, 3), grey, np.uint8)), "PNG")


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
