"""Packs a trained micro model, with where it comes from."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import ivr_jax
from ivr_jax.checkpoints import packed, store
from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.report.metrics import read_evaluation


def pack_model(source: str | None, target: str | None, figures: str | None, made_by: str) -> None:
    """Writes the packed folder `target` of the model trained in workdir `source`, and says what it holds.

    Args:
      figures: an evaluation's workdir; its overall figures go into the record.
      made_by: the command that trained the model.

    Raises UserError for a model of another text tokenizer, and for one that is too large for the package's own place.
    """
    if not source or not target:
        raise UserError("--pack and --pack_to belong together.", "Write --pack=WORKDIR --pack_to=FOLDER.")
    system = systems.load(source)
    if system.meta.get("text_tokenizer") != systems.MICRO:
        raise UserError(f"{source} has a text tokenizer of its own.", "Only models of the micro-world are packed.")
    images = {"kind": systems.IMAGE_TOKENIZER, "model": dataclasses.asdict(system.image_codec.config)}
    kept = {key: value for key, value in system.meta.items() if key not in ("image_tokenizer", "run")}
    networks = {systems.BACKBONE: (kept, system.params), systems.IMAGE_TOKENIZER: (images, system.image_codec.params)}
    folder = Path(target).expanduser()
    size = packed.write(folder, networks, origin_of(source, system.meta, figures, made_by))
    if size > packed.MAX_BYTES and folder.resolve() == packed.FOLDER.resolve():
        raise UserError(f"the packed model takes {size:,} bytes.", f"The package's own may take {packed.MAX_BYTES:,}.")
    print(f"{folder}: {size:,} bytes")


def origin_of(source: str, meta: dict[str, Any], figures: str | None, made_by: str) -> dict[str, Any]:
    """Where a model comes from: command, version and commit of the program, step, the run's config and figures."""
    run = _without_folders(meta.get("run", {}))
    return {
        "command": made_by,
        "version": ivr_jax.__version__,
        "commit": _commit(),
        "step": int(store.resolve(source).name),
        "seed": run.get("seed"),
        "data": run.get("data"),
        "config": run,
        "figures": read_evaluation(figures)["overall"] if figures else None,
    }


def _without_folders(value: Any) -> Any:
    """Paths of the machine that trained a model say nothing elsewhere: their last part stays."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _commit() -> str:
    """The commit of the program's source tree; "" where it is no git repository."""
    command = ["git", "-C", str(Path(ivr_jax.__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
