"""What a command reads from a bucket: a local copy, made once for each state of it.

A folder that was written by a mirror is read by its manifest, also a subfolder of it (`gs://bucket/run/dataset`): one
state as a whole, each file checked against its SHA-256.  Folders and files that other tools put there are read as they
are listed.  Copies are kept in `cache_folder()`; they may be deleted at any time when no command runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ivr_jax import files
from ivr_jax.cloud import manifest
from ivr_jax.cloud.objects import SIDE, Changed, Objects, is_url
from ivr_jax.errors import UserError

CACHE_VARIABLE = "IVR_JAX_BUCKETS"
_TRIES = 3  # at a folder that is written while it is read
_WAIT = 3600.0  # seconds for another process that makes the same copy


def cache_folder() -> Path:
    """Where local copies are: `$IVR_JAX_BUCKETS`, by default ~/.cache/ivr_jax/buckets."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/ivr_jax/buckets").expanduser().absolute()


def local(path: str | os.PathLike[str], without: str = "") -> Path:
    """A path of this machine: `path` itself, or a copy of the folder or file in a bucket.

    Args:
      without: name of subfolders, at any depth, that are not copied.

    Raises:
      UserError: it is not there, or the bucket cannot be read.  For a local path nothing is looked up.
    """
    if not is_url(path):
        return _expanded(path)
    url = str(path).rstrip("/")
    for _ in range(_TRIES):
        try:
            return _copied(url, without)
        except Changed:  # written while it was read
            continue
    raise UserError(f"{url} changes while it is read.", "Wait until it is written.")


def local_list(path: str | os.PathLike[str]) -> Path:
    """A file that names others beside it: `path` itself, or a copy of it with its whole folder."""
    if not is_url(path):
        return _expanded(path)
    folder, _, name = str(path).rpartition("/")
    file = local(folder) / name
    if not file.is_file():
        raise UserError(f"{path} is not there.", "Check the path.")
    return file


def _expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder for `~`; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def listed(url: str) -> Mapping[str, manifest.Entry]:
    """The files of a folder in a bucket, by their paths in it; none when there is nothing."""
    return _listing(url.rstrip("/"))[1]


def _copied(url: str, without: str) -> Path:
    objects, entries, single = _source(url)
    if without:
        entries = {path: entry for path, entry in entries.items() if without not in path.split("/")[:-1]}
    identity = json.dumps([url, sorted((path, entry.sha256) for path, entry in entries.items())])
    name = url.rpartition("/")[2]
    folder = cache_folder() / "read" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    until = time.monotonic() + _WAIT
    while not folder.is_dir():
        try:
            with files.NewFolder(folder) as partial:
                fetch(objects, entries, partial if single else partial / name)
        except UserError:
            if not files.partial_folder(folder).exists() or time.monotonic() > until:
                raise
            time.sleep(0.5)  # another process makes it
    return folder / name


def _source(url: str) -> tuple[Objects, Mapping[str, manifest.Entry], bool]:
    """Where the files of a URL are, which, and whether it is a single file.  Raises UserError when there is nothing."""
    objects, entries = _listing(url)
    if entries:
        return objects, entries, False
    parent, _, name = url.rpartition("/")
    if parent.count("/") >= 2:
        objects, entries = _listing(parent, only=name)
        if name in entries:
            return objects, {name: entries[name]}, True
    raise UserError(f"{url} is not there.", "Check the path; what a killed command had not finished does not count.")


def _listing(url: str, only: str | None = None) -> tuple[Objects, dict[str, manifest.Entry]]:
    """The files under a URL by the nearest manifest above them, else by the bucket's own listing."""
    root = url
    while True:
        objects = Objects(root)
        found = manifest.read(objects)
        if found is not None:
            inside = url[len(root) + 1 :]
            prefix = f"{inside}/" if inside else ""
            return objects, {p.removeprefix(prefix): e for p, e in found.files.items() if p.startswith(prefix)}
        root = root.rpartition("/")[0]
        if root.count("/") < 2:
            break
    objects = Objects(url)
    names = [n for n in objects.names(only or "") if only in (None, n) and not n.endswith("/") and SIDE not in n]
    generations = objects.generations(names)
    return objects, {name: manifest.Entry(-1, generations[name].hex(), name) for name in names}


def fetch(objects: Objects, entries: Mapping[str, manifest.Entry], folder: Path) -> None:
    """Writes the entries' files into `folder`.  Raises Changed when one was replaced meanwhile."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    objects.download((entry.object, entry.size, folder / path) for path, entry in entries.items())
    for path, entry in entries.items():
        if entry.size >= 0 and manifest.sha256(folder / path) != entry.sha256:
            raise Changed(f"{objects.url}/{entry.object}")
