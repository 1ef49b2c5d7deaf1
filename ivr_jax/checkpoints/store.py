"""Orbax checkpoints: `<workdir>/checkpoints/<step>/` with state, data iterator and metadata.

`meta` says what the parameters are (kind, model config, vocabulary, the run's config), so that a checkpoint can be
used without the config file that made it.  Only committed steps are ever seen: Orbax writes under a temporary name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ivr_jax.cloud import inputs, mirror
from ivr_jax.cloud.objects import Objects, explained, is_url
from ivr_jax.config import renamed
from ivr_jax.errors import UserError
from ivr_jax.heartbeat import announced
from ivr_jax.models import lora

FOLDER = "checkpoints"
_COMMITTED = "commit_success.txt"  # Orbax writes it last into a step in Google Cloud Storage


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the step it was taken at, state pytree, data iterator state and metadata."""

    step: int
    state: Any
    data: Any
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores one run.

    Args:
      keep: newest steps that stay (0 keeps all).
      staging_gib: most host memory that arrays may take on their way from the devices to the disk (0: no bound). With
        a bound `save` returns later, when the last arrays have found room.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2, staging_gib: int = 0):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep or None, create=True, enable_async_checkpointing=True)
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=staging_gib or None),
            "data": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._workdir, self._folder = pathlib.Path(workdir).absolute(), folder_of(workdir)
        with self._explained():
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, data: Any, meta: dict[str, Any]) -> None:
        """Starts an asynchronous save; `state` may be donated to the next step as soon as this returns.

        On an accelerator Orbax has copied the state to the host by then; on the CPU the host's view is the buffer
        itself, so it is copied here.
        """
        copied = mirror.mirror_of(self._workdir)
        if copied is not None:
            copied.check()
            _copy_before(copied)
        if jax.default_backend() == "cpu":
            state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave({"state": data}), meta=ocp.args.JsonSave(meta)
        )
        with self._explained():
            self._manager.save(step, args=args)
        if copied is not None and not is_url(self._folder):
            copied.push_once_there(self._workdir / FOLDER / str(step))

    def latest(self) -> int | None:
        """The newest committed step."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> Restored | None:
        """The newest committed step, placed like `like` (arrays or ShapeDtypeStructs), or None.

        The mesh and the number of devices may be others than those that it was saved on.
        """
        step = self.latest()
        if step is None:
            return None
        wanted = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        args = ocp.args.Composite(
            state=wanted, data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        with self._explained():
            found = self._manager.restore(step, args=args)
        return Restored(step, found.state, found.data["state"], _current(found.meta))

    def wait(self) -> None:
        """Returns when every started save is committed."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writes in progress, and ends.  Raises UserError when one fails."""
        with self._explained():
            self._manager.close()

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        """Errors of the bucket that checkpoints are written to are the user's."""
        url = str(self._folder)
        return explained(url, Exception) if is_url(url) else contextlib.nullcontext()


def _copy_before(copied: mirror.Mirror) -> None:
    """Copies the log before the checkpoint, so that no line up to the step is missing where a run resumes."""
    try:
        copied.push()
    except mirror.TakenOver:
        raise
    except UserError as error:  # what the checkpoint itself cannot do without, it will say
        logging.warning("%s", error)


def written_directly(url: str) -> tuple[str, ...]:
    """The folder of checkpoints, where Orbax writes to the bucket itself: not in s3://, which it does not know."""
    return (FOLDER,) if url.startswith("gs://") else ()


def folder_of(workdir: str | os.PathLike) -> pathlib.Path:
    """Where the checkpoints of a run are: in its workdir, or in the bucket that this is the local folder of."""
    url = mirror.url_of(workdir)
    if url is not None and written_directly(url):
        return _epath(url) / FOLDER
    return pathlib.Path(workdir).absolute() / FOLDER


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """A run's workdir (its newest step), or one `checkpoints/<step>` folder -> that step's folder.

    Of a run in a bucket: a path of `epath` where Orbax reads it there, else a local copy of the step.
    """
    if not str(path):
        raise UserError("no checkpoint was named.", "Name a workdir of ivr_jax.train.")
    if is_url(path):
        return _resolve_url(str(path).rstrip("/"))
    path = pathlib.Path(path)
    if path.is_dir() and (path / "meta").is_dir() and (path / "state").is_dir():
        return path
    folder = path / FOLDER
    steps = (
        sorted((int(p.name), p) for p in folder.iterdir() if p.name.isdigit() and (p / "meta").is_dir())
        if folder.is_dir()
        else []
    )
    if not steps:
        raise UserError(
            f"no checkpoint in {str(path)!r}.",
            "Name a workdir of ivr_jax.train, or one of its checkpoints/<step> folders.",
        )
    return steps[-1][1]


def _resolve_url(url: str) -> pathlib.Path:
    """`resolve` in a bucket: in gs:// a step is read where it is, shard by shard; from s3:// it is copied."""
    direct = bool(written_directly(url))
    copied = inputs.listed(url)
    by_manifest = any(entry.size >= 0 for entry in copied.values())
    step = _newest_step(copied, marked=direct and not by_manifest)
    if step is None and direct:  # what Orbax wrote there itself is in no manifest
        step = _newest_step(Objects(url).names(), marked=True)
    if step is None:
        raise UserError(f"no checkpoint in {url!r}.",
                        "Name a workdir of ivr_jax.train, or one of its checkpoints/<step> folders.")
    place = f"{url}/{step}".rstrip("/")
    return _epath(place) if direct else inputs.local(place)


def _newest_step(names: Iterable[str], marked: bool) -> str | None:
    """Of the objects of a run or of one step: "checkpoints/<step>", "" for the step itself, None without a whole one.

    `marked`: a step counts only with Orbax's mark, which is written last.
    """
    every = set(names)

    def is_complete(step: str) -> bool:
        parts = all(any(name.startswith(f"{step}{part}/") for name in every) for part in ("meta", "state"))
        return parts and (not marked or f"{step}{_COMMITTED}" in every)

    if is_complete(""):
        return ""
    found = {match[0] for name in every if (match := re.match(rf"{FOLDER}/\d+/", name))}
    whole = sorted((step for step in found if is_complete(step)), key=lambda step: int(step.split("/")[1]))
    return whole[-1].rstrip("/") if whole else None


def _epath(url: str) -> pathlib.Path:
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"checkpoints in {url} need gcsfs.", "pip install 'ivr_jax[buckets]'.")
    return epath.Path(url)


def name_of(path: str | os.PathLike) -> str:
    """What a record calls the checkpoint at `path`: its step's folder, or in a bucket its URL and what it holds."""
    folder = resolve(path)
    return f"{str(path).rstrip('/')} ({folder.parent.name}/{folder.name})" if is_url(path) else str(folder)


def has_any(workdir: pathlib.Path) -> bool:
    """Whether a run has saved a step: until then its folder of checkpoints is empty, or holds a part of the first."""
    folder = folder_of(workdir)
    return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """Metadata of the checkpoint at `path` (see `resolve`)."""
    folder = step_folder(path)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return _current(checkpointer.restore(folder / "meta"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {str(folder)!r} is damaged ({type(error).__name__}).",
            "Use another step, or copy it again.",
        ) from error


def step_folder(path: str | os.PathLike) -> pathlib.Path:
    """`resolve`, as an absolute path."""
    folder = resolve(path)
    return folder if is_url(folder) else folder.absolute()


def _current(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata with the names of this version: those of the model's fields and of the run's config."""
    if isinstance(meta.get("model"), dict):
        meta = {**meta, **renamed({"model": meta["model"]})}
    if isinstance(meta.get("run"), dict):
        meta = {**meta, "run": renamed(meta["run"])}
    return meta


def read_params(
    path: str | os.PathLike, kind: str, like: Any, padded: Sequence[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """Parameters alone, with the shardings and dtypes of `like`, and the metadata.

    Arrays named in `padded` may be larger or smaller than stored: zeros are added at the end of their axes, or what is
    there left out.

    Optimiser state is never read; adapters (LoRA) are merged into the kernels that they adapt, and the metadata then
    does not speak of them.

    Raises UserError when the checkpoint is of another kind, or of other shapes than `like`.
    """
    folder = step_folder(path)
    meta = read_meta(folder)
    if meta.get("kind") != kind:
        raise UserError(
            f"{str(folder)!r} holds a checkpoint of kind {meta.get('kind')!r}, not {kind!r}.",
            "Name the run of the right stage.",
        )
    wanted = jax.tree.map(_abstract, like)
    if "lora" in meta:
        wanted = lora.abstract_sharded(wanted, lora.LoraOptions(**meta["lora"]))
    tree = {"params": wanted}
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
        for name in set(padded) & restore_args["params"].keys():
            restore_args["params"][name] = dataclasses.replace(restore_args["params"][name], strict=False)
        handler = ocp.PyTreeCheckpointHandler(
            restore_concurrent_gb=_gigabytes_at_once(wanted, meta)  # it is only multiplied
        )
        silent = jax.process_index() > 0
        reading = contextlib.nullcontext() if silent else announced(f"reading the parameters of {folder}")
        with ocp.Checkpointer(handler) as checkpointer, reading:
            found = checkpointer.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(item=tree, restore_args=restore_args, partial_restore=True),
            )
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"the parameters of {str(folder)!r} do not fit: {str(error).splitlines()[0][:200]}",
            "The checkpoint is damaged, or was made with another model config.",
        ) from error
    if "lora" not in meta:
        return found["params"], meta
    return lora.merge(found["params"]), {key: value for key, value in meta.items() if key != "lora"}


def _gigabytes_at_once(wanted: Any, meta: dict[str, Any]) -> float:
    """How much is read at a time: as little as Orbax accepts for certain, a little more than the largest array.

    Without a bound all arrays are read at once, and are in the host's memory beside what the devices hold.
    """
    itemsize = jnp.dtype(meta.get("model", {}).get("param_dtype", "float32")).itemsize  # as stored
    largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(wanted)) * itemsize
    return max(0.25, 1.1 * largest / 1e9)


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place: by default the first device here, for the devices of the run that saved may be gone."""
    placed = getattr(value, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed)
