"""Records on disk: every answer of a service, every finished sample, every image.

    JOURNAL/journal.sqlite    calls     hash of the question -> the answer (text, or an image's name), tokens, cost
                              outcomes  sample key -> what became of it, as JSON
                              images    name -> PNG, for small images
    JOURNAL/images/ab/ab….png           larger images

Each entry is written atomically and at once (SQLite's write-ahead log; images under a temporary name, then renamed),
so a process that is killed loses only the calls in flight.  One process writes; it holds a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.images import Pixels, encode_png, image_name, save_png
from ivr_jax.services.service import Recorded

_SCHEMA = """
create table if not exists calls (digest text primary key, service text, text text, image text,
                                  tokens_in integer, tokens_out integer, cost real, cut_off integer) without rowid;
create table if not exists outcomes (key text primary key, request text, record text) without rowid;
create table if not exists images (name text primary key, png blob) without rowid;
"""
_LARGE = 1 << 15  # bytes of PNG from which an image is a file of its own
_MANY_PIXELS = 1 << 16  # from which an image is encoded in a thread
_VERSION = 2
_TO_VERSION_2 = "alter table calls add column cut_off integer"


class Journal:
    """See the module; use it as a context manager, or `close` it.

    Args:
      path: its folder, made when missing.

    Raises:
      UserError: it cannot be written, another process writes it, or it is no journal.  Every method raises UserError
        when the disk is full or the file damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        with files.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        self._lock = files.Lock(self.path / "lock")
        self._file = self.path / "journal.sqlite"
        self._database: sqlite3.Connection | None = None
        try:
            with self._guarded():
                self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._database = sqlite3.connect(self._file, isolation_level=None)
        self._database.execute("pragma journal_mode=wal")
        self._database.execute("pragma synchronous=normal")
        version = self._database.execute("pragma user_version").fetchone()[0]
        if version not in (0, 1, _VERSION):
            raise UserError(f"{self._file} has version {version}.", "Use the program that wrote it.")
        self._database.executescript(_SCHEMA)
        columns = [column[1] for column in self._database.execute("pragma table_info(calls)")]
        if "cut_off" not in columns:
            self._database.execute(_TO_VERSION_2)
        self._database.execute(f"pragma user_version={_VERSION}")

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether the journal `path` has records; True when that cannot be read (another process uses it, say)."""
        if not (path / "journal.sqlite").exists():
            return False
        try:
            with Journal(path) as journal:
                query = "select exists(select 1 from calls) or exists(select 1 from outcomes)"
                return bool(journal._row(query)[0])
        except UserError:
            return True

    # -- calls --

    def call(self, digest: str) -> Recorded | None:
        """The recorded answer to a question, or None."""
        row = self._row("select text, image, tokens_in, tokens_out, cost, cut_off from calls where digest=?", digest)
        return Recorded(*row) if row else None

    def record_call(self, digest: str, service: str, answer: Recorded) -> None:
        """Keeps an answer; an earlier one to the same question is replaced."""
        values = (digest, service, *dataclasses.astuple(answer))
        self._write("insert or replace into calls values (?, ?, ?, ?, ?, ?, ?, ?)", *values)

    def usage(self) -> dict[str, dict[str, float]]:
        """By service: recorded answers, their tokens and their cost, over all runs."""
        query = "select service, count(*), sum(tokens_in), sum(tokens_out), sum(cost) from calls group by service"
        names = ("answers", "tokens_in", "tokens_out", "cost")
        with self._guarded():
            rows = self._database.execute(f"{query} order by service").fetchall()
        return {service: dict(zip(names, counts, strict=True)) for service, *counts in rows}

    # -- outcomes --

    def outcome(self, key: str, request: str) -> dict[str, Any] | None:
        """What became of the sample `key`, if it was asked for by the same `request`."""
        row = self._row("select request, record from outcomes where key=?", key)
        return json.loads(row[1]) if row and row[0] == request else None

    def record_outcome(self, key: str, request: str, record: Mapping[str, Any]) -> None:
        """Keeps the end of a sample; its images must have been added before."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self._write("insert or replace into outcomes values (?, ?, ?)", key, request, text)

    # -- images --

    async def add_image(self, pixels: Pixels) -> str:
        """Keeps uint8 [height, width, 3] and returns its name; large images are encoded beside the event loop."""
        small = pixels.shape[0] * pixels.shape[1] < _MANY_PIXELS
        name = image_name(pixels) if small else await asyncio.to_thread(image_name, pixels)
        if self._row("select 1 from images where name=?", name) or self._image_file(name).exists():
            return name
        png = encode_png(pixels) if small else b""
        if small and len(png) < _LARGE:
            self._write("insert or ignore into images values (?, ?)", name, png)
        else:
            await asyncio.to_thread(save_png, self._image_file(name), pixels)
        return name

    def image(self, name: str) -> Pixels | None:
        """The pixels of an image; None when it is not there, or not what its name says."""
        row = self._row("select png from images where name=?", name)
        try:
            file = io.BytesIO(row[0]) if row else self._image_file(name)
            with Image.open(file, formats=("PNG",)) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            return None
        return pixels if image_name(pixels) == name else None

    def _image_file(self, name: str) -> Path:
        return self.path / "images" / name[:2] / f"{name}.png"

    # -- other journals --

    def take(self, other: Journal) -> None:
        """Copies what `other` knows and this journal does not."""
        with self._guarded():
            for file in sorted((other.path / "images").glob("*/*.png")):
                target = self._image_file(file.stem)
                if not target.exists():
                    files.write_file(target, file.read_bytes())
            self._database.execute("attach ? as other", (str(other._file),))
            try:
                for table in ("images", "calls", "outcomes"):  # an outcome comes after everything that it rests on
                    self._database.execute(f"insert or ignore into main.{table} select * from other.{table}")
            finally:
                self._database.execute("detach other")

    # -- the database --

    def close(self) -> None:
        """Ends writing and frees the lock."""
        with contextlib.suppress(sqlite3.Error):
            if self._database is not None:
                self._database.close()
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _row(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        with self._guarded():
            return self._database.execute(query, values).fetchone()

    def _write(self, statement: str, *values: Any) -> None:
        with self._guarded():
            self._database.execute(statement, values)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            remedy = "Make room on the disk, and run again: what is recorded stays."
            if isinstance(error, sqlite3.DatabaseError) and "full" not in str(error):
                remedy = "Check the disk; if the file is damaged, restore it, or remove it to start again."
            raise UserError(f"{self._file}: {error}.", remedy) from error
