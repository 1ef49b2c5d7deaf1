"""What a folder in a bucket holds: the object `.ivr_jax/manifest.json`, written last.

    {"version": 1, "files": {"metrics.jsonl": {"size": 120, "sha256": "…", "object": "metrics.jsonl"}, …}}

A file whose content changes is first written as a new object, `.ivr_jax/new/SHA256`, which the next manifest names;
then it gets its own name, and a second manifest says so.  So a manifest never names an object that was overwritten:
whoever reads by it sees one state as a whole.  Objects that it does not name do not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ivr_jax.cloud.lease import TakenOver
from ivr_jax.cloud.objects import SIDE, Objects
from ivr_jax.errors import UserError

NAME = f"{SIDE}/manifest.json"
NEW = f"{SIDE}/new/"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file: bytes, SHA-256 of its content in hexadecimal, and the object that holds it now."""

    size: int
    sha256: str
    object: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a folder by their paths in it, and the generation of the manifest's object."""

    files: Mapping[str, Entry]
    generation: bytes


def read(objects: Objects) -> Manifest | None:
    """The manifest under a URL; None without one.  Raises UserError when it is damaged."""
    content, generation = objects.read(NAME)
    if content is None:
        return None
    try:
        value = json.loads(content)
        if value["version"] != _VERSION:
            raise ValueError(f"version {value['version']}")
        files = {path: Entry(**entry) for path, entry in value["files"].items()}
        if any(_leaves_the_folder(path) for path in files):
            raise ValueError("paths outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{objects.url}/{NAME} cannot be read ({error}).",
                        "It was written by another version, or is damaged; restore it.") from error
    return Manifest(files, generation)


def _leaves_the_folder(path: str) -> bool:
    return path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/"))


def absent(objects: Objects) -> bytes:
    """The generation that `write` expects where there is no manifest yet."""
    return objects.read(NAME)[1]


def write(objects: Objects, files: Mapping[str, Entry], expected: bytes) -> Manifest:
    """Replaces the manifest of generation `expected`.  Raises TakenOver when another process wrote one meanwhile."""
    value = {"version": _VERSION, "files": {path: dataclasses.asdict(files[path]) for path in sorted(files)}}
    generation = objects.write(NAME, json.dumps(value, indent=0).encode(), expected=expected)
    if generation is None:
        raise TakenOver(f"another process has written to {objects.url}.", "Stop one of the two; nothing was replaced.")
    return Manifest(dict(files), generation)


def sha256(file: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
