"""A dataset of trajectories on disk: written once, as a whole or not at all, and read at random.

    DATASET/
      dataset.json             what is in it: format version, counts, provenance
      records.array_record     one record a trajectory: the JSON of `trajectory_to_json`, UTF-8
      images.array_record      every image once, as PNG
      images.json              their names in the order of images.array_record
      README.md, card.json     the card: what is in it, counted (`ivr_jax.data.card`)

Images are named by their content (`ivr_jax.images.image_name`), so a source that many samples share is stored once.
A writer works in a hidden directory beside DATASET and renames it when it is closed; an exception leaves nothing
behind, and what a killed process left is removed by the next writer.  Both ArrayRecord files hold one record a group,
which is what random access (Grain) wants; neither reading nor writing imports TensorFlow.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import functools
import hashlib
import io
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from ivr_jax import files
from ivr_jax.data import card
from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels, encode_png, image_name
from ivr_jax.trajectory import Trajectory, trajectory_from_json, trajectory_to_json

FORMAT = "ivr_jax.trajectories"
VERSION = 1
_MANIFEST, _RECORDS, _PIXELS, _NAMES = "dataset.json", "records.array_record", "images.array_record", "images.json"
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_REBUILD = "Build the dataset again, or restore it from a copy."


class TrajectoryWriter:
    """Writes a dataset directory; use it as a context manager.

    Args:
      path: the directory to make; one that exists must be empty.
      provenance: JSON values that say how the dataset came about (configuration, seeds, versions).

    Raises:
      UserError: `path` exists, cannot be made, or is being written by another process; the provenance is no JSON.
    """

    def __init__(self, path: str | os.PathLike, provenance: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.provenance = _json_copy(provenance or {})
        self._folder = files.NewFolder(path)
        self._partial = self._folder.partial
        self._records = array_record_module.ArrayRecordWriter(str(self._partial / _RECORDS), "group_size:1,zstd:3")
        self._pixels = array_record_module.ArrayRecordWriter(str(self._partial / _PIXELS), "group_size:1,uncompressed")
        self._names: dict[str, None] = {}
        self._keys: set[str] = set()
        self._counts: dict[str, collections.Counter[str]] = {
            kind: collections.Counter() for kind in ("mode", "category", "image_size")
        }
        self._card = card.CardCounts()
        self._content = hashlib.sha256()
        self._open = True

    def add(self, trajectory: Trajectory, images: Images) -> None:
        """Stores one trajectory, and those of its images (sources included) that are not stored yet.

        Args:
          trajectory: its sample's key must be new.
          images: uint8 [height, width, 3] by name, at least those of the trajectory; others are ignored.

        Raises:
          UserError: the key is taken, an image is missing or not what its name says, the facts are no JSON, or
            the disk is full (leave the context then: nothing stays).
        """
        if not self._open:
            raise ValueError("the writer is closed")
        key = trajectory.sample.key
        if key in self._keys:
            raise UserError(f"the key {key!r} occurs twice.", "Give every sample its own key.")
        record = _encode_record(trajectory)
        fresh = {}
        for name in dict.fromkeys((*trajectory.sample.sources, *trajectory.images)):
            if name not in self._names:
                fresh[name] = _checked(name, images, key)
        for name, pixels in fresh.items():
            self._wrote(self._pixels.write, encode_png(pixels))
            self._names[name] = None
            self._counts["image_size"][f"{pixels.shape[1]}x{pixels.shape[0]}"] += 1
        self._wrote(self._records.write, record)
        self._content.update(hashlib.sha256(record).digest())
        self._keys.add(key)
        self._counts["mode"][trajectory.mode.value] += 1
        self._counts["category"][trajectory.sample.category] += 1
        self._card.add(trajectory)

    def close(self) -> None:
        """Completes the dataset and puts it in its place.

        Raises:
          UserError: nothing was added (nothing is left then), the disk is full, or the place was taken meanwhile.
        """
        if not self._open:
            return
        try:
            if not self._keys:
                raise UserError(
                    f"no trajectory was added to {self.path}.",
                    "See the construction's counts for why samples were dropped.",
                )
            self._wrote(self._records.close)
            self._wrote(self._pixels.close)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "trajectories": len(self._keys),
                "images": len(self._names),
                "content_sha256": self._content.hexdigest(),
                **{f"by_{kind}": dict(sorted(counts.items())) for kind, counts in self._counts.items()},
                "provenance": self.provenance,
            }
            files.write_json(self._partial / _NAMES, list(self._names))
            card.write_files(self._partial, self._card, manifest)
            files.write_json(self._partial / _MANIFEST, manifest)
            self._folder.publish()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Ends writing and removes what was written, unless the dataset is already complete."""
        if self._open:
            self._open = False
            for writer in (self._records, self._pixels):
                with contextlib.suppress(RuntimeError):  # what a full disk has broken is removed all the same
                    writer.close()
            self._folder.abandon()

    def _wrote(self, act: Callable[..., None], *data: bytes) -> None:
        try:
            act(*data)
        except RuntimeError as error:
            raise UserError(
                f"cannot write {self._partial}: {_first_line(error)}.", "Make room on the disk, and run again."
            ) from error

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.abandon() if kind else self.close()


class TrajectorySource(abc.ABC):
    """Stored trajectories, read at random; a source for Grain (`len`, `[i]`, picklable).

    A kind of storage defines `__len__`, `image_names`, `_record` and `_png`; its class takes the path alone.

    Attributes:
      path: where it is.  Files are opened at the first access, once a process.
    """

    path: Path

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def image_names(self) -> tuple[str, ...]:
        """Names of all images, in stored order."""

    @abc.abstractmethod
    def _record(self, index: int) -> bytes:
        """The JSON of `trajectory_to_json`; RuntimeError when it cannot be read."""

    @abc.abstractmethod
    def _png(self, position: int) -> bytes:
        """The file of an image, by its place in `image_names`; RuntimeError when it cannot be read."""

    def __getitem__(self, index: int) -> Trajectory:
        """The trajectory at `index` (from the end when negative).

        Raises:
          IndexError: there is none.
          UserError: its record is corrupt.
        """
        i = operator.index(index)
        i += len(self) if i < 0 else 0
        if not 0 <= i < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        try:
            return trajectory_from_json(json.loads(self._record(i)))
        except (RuntimeError, ValueError, TypeError, UserError) as error:  # RecursionError is a RuntimeError
            raise UserError(f"record {i} of {self.path} is corrupt: {_first_line(error)}", _REBUILD) from error

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def image(self, name: str) -> Pixels:
        """The pixels of one image, uint8 [height, width, 3].

        Raises:
          UserError: it is not in the dataset, or corrupt.
        """
        try:
            return np.array(Image.open(io.BytesIO(self.png(name)), formats=("PNG",)))
        except OSError as error:
            raise UserError(f"image {name!r} of {self.path} is corrupt: {_first_line(error)}", _REBUILD) from error

    def png(self, name: str) -> bytes:
        """The stored file of one image; UserError as in `image`."""
        position = self._positions.get(name)
        if position is None:
            raise UserError(f"{self.path} has no image {name!r}.", _REBUILD)
        try:
            return self._png(position)
        except RuntimeError as error:
            raise UserError(f"image {name!r} of {self.path} is corrupt: {_first_line(error)}", _REBUILD) from error

    def images(self, trajectory: Trajectory) -> dict[str, Pixels]:
        """The pixels of a trajectory's sources and drawn images, by name."""
        return {name: self.image(name) for name in dict.fromkeys((*trajectory.sample.sources, *trajectory.images))}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]  # each kind of dataset is opened from its path alone

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal characters that change when the content does: the records in order, which name the images by
        their hashes.
        """
        return self._content_hash()

    def _content_hash(self) -> str:
        content = hashlib.sha256()
        for trajectory in self:
            content.update(hashlib.sha256(_encode_record(trajectory)).digest())
        return content.hexdigest()[:16]

    @functools.cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.image_names)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


class TrajectoryDataset(TrajectorySource):
    """A dataset directory, as `TrajectoryWriter` writes it.

    Raises:
      UserError: there is no dataset, it is empty, or its version is not ours.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = self._read_manifest()

    def __len__(self) -> int:
        return self.manifest["trajectories"]

    @functools.cached_property
    def image_names(self) -> tuple[str, ...]:
        names = _read_json(self.path / _NAMES)
        if not isinstance(names, list) or len(names) != self.manifest.get("images"):
            raise UserError(f"{self.path / _NAMES} does not list the images of the dataset.", _REBUILD)
        return tuple(names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """As the writer stored it; for a dataset of an older version all records are read."""
        stored = self.manifest.get("content_sha256")
        return self._content_hash() if stored is None else stored[:16]

    @functools.cached_property
    def _records(self) -> array_record_module.ArrayRecordReader:
        return self._open(_RECORDS, len(self))

    @functools.cached_property
    def _pixels(self) -> array_record_module.ArrayRecordReader:
        return self._open(_PIXELS, len(self.image_names))

    def _record(self, index: int) -> bytes:
        return self._records.read([index])[0]

    def _png(self, position: int) -> bytes:
        return self._pixels.read([position])[0]

    def _read_manifest(self) -> dict[str, Any]:
        file = self.path / _MANIFEST
        if not file.is_file():
            raise UserError(
                f"{self.path} holds no dataset: {_MANIFEST} is missing.",
                "Build it with `python -m ivr_jax.construct`, or correct the path.",
            )
        manifest = _read_json(file)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
            raise UserError(
                f"{file} is not a {FORMAT} dataset of version {VERSION}.", "Build it with this version of the program."
            )
        count = manifest.get("trajectories")
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{file} does not say how many trajectories there are.", _REBUILD)
        if count == 0:
            raise UserError(f"the dataset {self.path} is empty.", "Construct at least one trajectory.")
        return manifest

    def _open(self, file: str, count: int) -> array_record_module.ArrayRecordReader:
        path = self.path / file
        if not path.is_file():
            raise UserError(f"{path} is missing.", _REBUILD)
        reader = array_record_module.ArrayRecordReader(str(path), _RANDOM_ACCESS)
        if not reader.ok() or reader.num_records() != count:
            raise UserError(f"{path} is corrupt: {reader.num_records()} readable records instead of {count}.", _REBUILD)
        return reader


def write_card(path: str | os.PathLike) -> Path:
    """Counts the dataset at `path` anew, writes its card beside it, and returns the card's file.

    Raises:
      UserError: there is no dataset, a record is corrupt, or the folder cannot be written.
    """
    dataset, counts = TrajectoryDataset(path), card.CardCounts()
    for trajectory in dataset:
        counts.add(trajectory)
    card.write_files(dataset.path, counts, dataset.manifest)
    return dataset.path / card.CARD


def _checked(name: str, images: Images, key: str) -> Pixels:
    """The image `name`, if it is there and what its name says."""
    if name not in images:
        raise UserError(
            f"image {name!r} of trajectory {key!r} was not given.", "Pass the sources and every drawn image."
        )
    pixels = images[name]
    if image_name(pixels) != name:
        raise UserError(
            f"image {name!r} of trajectory {key!r} holds other pixels than its name says.",
            "Name images with `image_name`.",
        )
    return pixels


def _encode_record(trajectory: Trajectory) -> bytes:
    try:
        return json.dumps(trajectory_to_json(trajectory), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"trajectory {trajectory.sample.key!r} is no JSON: {error}.", "Keep only JSON values in its facts."
        ) from error


def _json_copy(provenance: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(provenance)))
    except (TypeError, ValueError) as error:
        raise UserError(f"the provenance of a dataset is no JSON: {error}.", "Pass plain values.") from error


def _read_json(path: Path) -> Any:
    try:
        return files.read_json(path, _REBUILD)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.", _REBUILD) from None


def _first_line(error: Exception) -> str:
    return f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
