r"""Serve a model: a page that shows answers while they are generated, and OpenAI's protocol.

    python -m ivr_jax.serve --checkpoint=runs/demo/rl
    python -m ivr_jax.serve --checkpoint=micro                        the small model that comes with the package
    python -m ivr_jax.serve --checkpoint=runs/demo/sft --checkpoint=runs/demo/rl --slots=32
    python -m ivr_jax.serve --checkpoint=runs/emu35 --text_tokenizer=Emu3.5-tokenizer \
        --image_tokenizer=runs/emu35_images --dtype=bfloat16 --mesh=tensor:4 --image_area=262144

Prints the address of the page; over SSH: `ssh -L 8322:127.0.0.1:8322 HOST`.  The server listens on this machine alone.
Another --host needs --token (or the environment variable IVR_SERVE_TOKEN, which does not show in the process list), and
a proxy that speaks TLS in front of it.  The page's answers are kept in --out.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import threading
import webbrowser
from pathlib import Path

from absl import flags

from ivr_jax import cli, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.cli import listen
from ivr_jax.cloud.objects import is_url
from ivr_jax.errors import UserError
from ivr_jax.models.image_codec import ImageCodec
from ivr_jax.sampling.engine import EngineOptions

TOKEN_VARIABLE = "IVR_SERVE_TOKEN"
SHORTEST_TOKEN = 16  # characters
CACHE_BYTES = 32 << 20  # of images and previews that the image tokenizer need not compute again
SHORT_CONTEXT = 1024  # tokens, up to which caches have their full width from the start


def add_flags(values: flags.FlagValues) -> None:
    def text(name: str, default: str | None, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def number(name: str, default: int, meaning: str, least: int = 0, most: int | None = None) -> None:
        flags.DEFINE_integer(name, default, meaning, least, most, flag_values=values)

    flags.DEFINE_multi_string(
        "checkpoint", [], "workdir of an sft or rl run or of an import, one of its checkpoints/<step> folders, or "
        "micro; NAME=PATH gives it a name of its own", flag_values=values,
    )  # fmt: skip
    text("text_tokenizer", None, "folder of the text tokenizer, if it was moved or the checkpoint imported")
    text("image_tokenizer", None, "workdir of the image tokenizer, if it was moved or the checkpoint imported")
    text("host", "127.0.0.1", "address to listen on; another than loopback needs a token")
    number("port", 8322, "0 takes a free one", 0, 65535)
    text("token", None, f"what callers must know; better in {TOKEN_VARIABLE}")
    text("out", "runs/answers", "folder for the page's answers")
    number("slots", 16, "answers in progress at a time", 1)
    number("waiting", 64, "requests that may wait; more are refused with 429", 1)
    number("image_area", 0, "pixels of an image, about; 0: the image tokenizer's resolution, squared")
    number("answer_length", 0, "most answer tokens; 0: what the prompt leaves of the context")
    number("text_cap", 0, "most tokens of one free text; 0: 96 with the micro tokenizer, else 512")
    text("dtype", None, "of weights and activations, such as bfloat16; as in the checkpoint by default")
    text("weight_dtype", "", "int8: hold the layers' kernels so; by default in --dtype")
    text("cache_dtype", "", "int8: hold keys and values so; by default in --dtype")
    flags.DEFINE_boolean("open", False, "open the page in this machine's browser", flag_values=values)
    text("mesh", None, "devices by axis, such as tensor:4 or fsdp:2,tensor:4; one device by default")


def checked_token(host: str, given: str | None) -> str:
    """The token, or "" on loopback without one.  Raises UserError for another address without one, or a short one."""
    token = given if given is not None else os.environ.get(TOKEN_VARIABLE, "")
    if token and len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"the token has {len(token)} characters.",
            f"Use {SHORTEST_TOKEN} or more: python -c 'import secrets; print(secrets.token_urlsafe())' makes some.",
        )
    if not token and not is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines, and no token was given.",
            f"Set {TOKEN_VARIABLE} (or --token), or listen on 127.0.0.1 and use an SSH tunnel.",
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checkpoints_of(given: list[str]) -> dict[str, str]:
    """Name -> path of each checkpoint flag.  Raises UserError for none, and for two of one name."""
    if not given:
        raise UserError("no model was named.", "Give --checkpoint=WORKDIR, or --checkpoint=micro.")
    found: dict[str, str] = {}
    for value in given:
        name, sign, path = ("", "", "") if is_url(value) else value.partition("=")
        path = path if sign else value
        name = name if sign else Path(value.rstrip("/")).name or value
        if name in found:
            raise UserError(f"two checkpoints are called {name!r}.", "Write --checkpoint=NAME=PATH.")
        found[name] = path
    return found


def main(call: cli.Call) -> None:
    try:
        import uvicorn

        from ivr_jax.serve.app import make_app
        from ivr_jax.serve.guard import allowed_hosts
        from ivr_jax.serve.limits import Limits
        from ivr_jax.serve.models import ServedModel
    except ImportError as error:
        raise UserError(f"{error.name} is not installed.", "pip install 'ivr_jax[serve]'") from error
    wanted = call.flags
    named, token = checkpoints_of(wanted.checkpoint), checked_token(wanted.host, wanted.token)
    out = cli.prepare_workdir(wanted.out, "out")
    mesh = sharding.parse_mesh(wanted.mesh) if wanted.mesh else None
    loading = systems.answering_options(
        mesh, wanted.dtype, weight_dtype=wanted.weight_dtype, cache_dtype=wanted.cache_dtype
    )
    with listen(wanted.host, wanted.port) as listener:
        models = {}
        for name, path in named.items():
            system = systems.load(path, wanted.image_tokenizer, text_tokenizer_path=wanted.text_tokenizer, mesh=mesh,
                                  **loading)  # fmt: skip
            # Previews come and go: a small cache, or memory would grow with every row that was ever shown.
            image_codec = ImageCodec(system.image_codec.config, system.image_codec.params, CACHE_BYTES)
            system = dataclasses.replace(system, image_codec=image_codec)
            models[name] = ServedModel(name, system, wanted.image_area, wanted.answer_length, wanted.text_cap)
        short = max(m.system.config.max_position_embeddings for m in models.values()) <= SHORT_CONTEXT
        options = EngineOptions(slots=wanted.slots, growth=1 if short else 2, shrink=False)
        port = listener.getsockname()[1]
        limits = Limits(waiting=wanted.waiting)
        app = make_app(models, out, allowed_hosts(port), token, limits, options, mesh, warm=True)
        shown = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
        print(f"models: {', '.join(models)}; answers in {out}; {wanted.slots} answers at a time")
        print(f"page: http://{shown}:{port}/   OpenAI's protocol: http://{shown}:{port}/v1", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2,
            limit_concurrency=1024, h11_max_incomplete_event_size=64 * 1024,
        )  # fmt: skip
        if wanted.open:
            threading.Timer(1.0, webbrowser.open, [f"http://{shown}:{port}/"]).start()
        uvicorn.Server(config).run(sockets=[listener])


def entry() -> None:
    cli.run(main, config=False, workdir=False, add_flags=add_flags,
            urls=("checkpoint", "image_tokenizer", "text_tokenizer"))


if __name__ == "__main__":
    entry()
