"""Finished answers of the page on disk: the answer folder that `generate` writes, and beside it what the page needs.

    OUT/<id>/answer.json, answer.html, source1.png, G1.png, ...    see `generate.answer_folder`
    OUT/<id>/page.json    request, state, parts (their images as file names), cost and tokens

An id is 16 random characters, so whoever was not given a permalink does not find an answer.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.files import write_file
from ivr_jax.generate.answer_folder import InterleavedAnswer, write_answer
from ivr_jax.images import load_image
from ivr_jax.sampling.rollout import Answer
from ivr_jax.serve.jobs import AnswerRequest, Job, PartView, Snapshot
from ivr_jax.serve.limits import Limits

PAGE_RECORD = "page.json"
ID = re.compile(r"[A-Za-z0-9_-]{16}")
_FILE = re.compile(r"(?:source|G|drawn)\d{1,2}\.png|final\.png")


class Archive:
    """Answers under `folder`; writing happens in a thread of its own, one after the other."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self._limits = folder, limits
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="archive")
        self._writing: dict[str, Future[None]] = {}

    def add(self, job: Job, last: Snapshot, answer: Answer | InterleavedAnswer) -> None:
        """Begins to write an answer that has ended."""
        self._writing[job.id] = self._writer.submit(self._write, job, last, answer)

    def close(self) -> None:
        """Waits until everything is written."""
        self._writer.shutdown(wait=True)

    def _write(self, job: Job, last: Snapshot, answer: Answer | InterleavedAnswer) -> None:
        try:
            folder = self.folder / job.id
            request = request_json(job.request)
            counts = {"reference_images": len(job.request.references), "given_tokens": len(job.request.prefix)}
            write_answer(folder, answer, {**request, **counts})
            parts = []
            for view in last.parts:
                record = view_json(view)
                if view.png is not None:
                    record["file"] = f"drawn{view.number}.png"
                    write_file(folder / record["file"], view.png)
                parts.append(record)
            page = {"request": request, **counts, **snapshot_json(last), "parts": parts, "tokens": list(last.tokens)}
            write_file(folder / PAGE_RECORD, json.dumps(page).encode())
            self._forget_old()
        finally:
            self._writing.pop(job.id, None)

    def _forget_old(self) -> None:
        """Removes the oldest answers beyond `Limits.kept_answers`; folders of other origin stay."""
        found = [path.parent for path in self.folder.glob(f"*/{PAGE_RECORD}") if ID.fullmatch(path.parent.name)]
        if len(found) <= self._limits.kept_answers:
            return
        for folder in sorted(found, key=lambda path: path.stat().st_mtime)[: -self._limits.kept_answers]:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, ident: str) -> Path:
        if not ID.fullmatch(ident):
            raise UserError("there is no such answer.", "Check the address.")
        writing = self._writing.get(ident)
        if writing is not None:
            writing.result(timeout=60)
        folder = self.folder / ident
        if not (folder / PAGE_RECORD).is_file():
            raise UserError("this answer is not here (any more).", "Ask again with the same prompt and seed.")
        return folder

    def read(self, ident: str) -> dict[str, Any]:
        """The record of an answer.  Raises UserError when it is not here."""
        return json.loads((self._folder(ident) / PAGE_RECORD).read_text())

    def file(self, ident: str, name: str) -> bytes:
        """One image of an answer."""
        folder = self._folder(ident)
        if not _FILE.fullmatch(name) or not (folder / name).is_file():
            raise UserError("this answer has no such file.", "Check the address.")
        return (folder / name).read_bytes()

    def image(self, ident: str, name: str) -> np.ndarray:
        """Pixels uint8 [height, width, 3] of an image of a stored answer."""
        self.file(ident, name)
        return load_image(self.folder / ident / name)

    def zipped(self, ident: str) -> bytes:
        """The answer folder as a ZIP file, without what only the page needs."""
        folder, buffer = self._folder(ident), io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(folder.iterdir()):
                if path.name != PAGE_RECORD and not path.name.startswith("drawn"):
                    archive.write(path, f"{ident}/{path.name}")
        return buffer.getvalue()


def request_json(request: AnswerRequest) -> dict[str, Any]:
    """A request as the page sends it, without its images."""
    return {
        "model": request.model, "prompt": request.prompt, "mode": request.mode, "seed": request.seed,
        "aspect_ratio": request.aspect_ratio, "temperature": request.sampling.temperature,
        "guidance": request.sampling.guidance, "max_images": request.max_images, "max_tokens": request.max_tokens,
    }  # fmt: skip


def view_json(view: PartView) -> dict[str, Any]:
    """A part without its image's bytes."""
    return {
        "number": view.number, "kind": view.kind, "round": view.round, "complete": view.complete,
        "texts": dict(view.texts), "verdicts": dict(view.verdicts), "rows": view.rows, "columns": view.columns,
        "drawn": view.drawn, "width": view.width, "height": view.height,
    }  # fmt: skip


def snapshot_json(snapshot: Snapshot) -> Mapping[str, Any]:
    """A state without its parts."""
    return {
        "state": snapshot.state, "position": snapshot.position, "error": snapshot.error, "mode": snapshot.mode,
        "grammar": snapshot.grammar, "finished": snapshot.finished, "cost": dataclasses.asdict(snapshot.cost),
    }  # fmt: skip
