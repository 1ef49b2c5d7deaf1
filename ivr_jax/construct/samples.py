"""The input of data construction: a JSON list of samples, as the released scripts take it.

[{"key": "sample_0001",                    names the sample and its output folder
  "src_path": "cat.png",                   or a list of paths, or null for text-to-image
  "edit_prompt": "Put a hat on the cat.",
  "edit_path": "mine.png",                 G1 by the user's own model, or null
  "edit_key": {"category": "addition"},    optional, free-form, copied through
  "explanation": "",                       optional facts for the knowledge axis
  "__comment": "keys that start with two underscores are comments"}]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.construct.escalation import Request
from ivr_jax.construct.released import check_storable
from ivr_jax.errors import UserError
from ivr_jax.images import image_name, load_image
from ivr_jax.protocol.markers import check_user_text
from ivr_jax.trajectory import Reflection, Sample, checked_key

_REQUIRED = {"key", "src_path", "edit_prompt", "edit_path"}
_OPTIONAL = {"edit_key", "explanation"}


@dataclasses.dataclass(frozen=True)
class GivenRound:
    """A reflection that a sample brings with it, and the path of the image drawn from it."""

    cause: Reflection
    image: Path


@dataclasses.dataclass(frozen=True)
class InputSample:
    """One entry of the list, its images not loaded yet.

    Attributes:
      key, prompt, explanation: texts; the key can name a folder.
      sources: paths of the references.
      candidate: path of a ready G1, or None.
      edit_key: any JSON value, or None.
      given: reflections and images that follow the candidate.
      facts: JSON values for `Sample.facts`.
    """

    key: str
    prompt: str
    sources: tuple[Path, ...] = ()
    candidate: Path | None = None
    edit_key: Any = None
    explanation: str = ""
    given: tuple[GivenRound, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Changes when the request does: its texts, and its files' paths, sizes and times."""
        stats = [_stat(path) for path in (*self.sources, self.candidate) if path is not None]
        texts = [self.prompt, self.explanation, self.edit_key, self.candidate is not None, stats]
        if self.given:
            texts += [[dataclasses.astuple(round_.cause), _stat(round_.image)] for round_ in self.given]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def load(self) -> Request:
        """Reads the images; UserError when one is missing, corrupt or too large."""
        pixels = [load_image(path) for path in self.sources]
        images = {image_name(p): p for p in pixels}
        category = self.edit_key.get("category") if isinstance(self.edit_key, dict) else None
        facts: dict[str, Any] = {**self.facts} if self.edit_key is None else {**self.facts, "edit_key": self.edit_key}
        if self.candidate is not None:
            facts["candidate"] = True
        sample = Sample(
            self.key,
            self.prompt,
            tuple(image_name(p) for p in pixels),
            self.explanation,
            category if isinstance(category, str) else "",
            facts,
        )
        first = load_image(self.candidate) if self.candidate else None
        return Request(sample, images, first, tuple((r.cause, load_image(r.image)) for r in self.given))


def _stat(path: Path) -> tuple[str, int, int]:
    """Path, size and time; zeros for a file that has gone since the list was checked: it is quarantined when read."""
    try:
        found = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), found.st_size, found.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """An entry that cannot be used: its key, or "entry N" where it has none, and why."""

    key: str
    reason: UserError


def sort_samples(
    file: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> tuple[list[InputSample], list[Quarantined]]:
    """Reads and checks a JSON list of samples; images are loaded later, sample by sample (`InputSample.load`).

    Bad entries are set aside, each with its reason: an unknown or missing field, a field of the wrong kind, a key that
    is taken (the first entry is used) or that cannot name a folder, an image file that does not exist.

    Args:
      file: the list.
      image_root: where relative image paths start; the directory of `file` when None.

    Raises:
      UserError: unreadable JSON, or no list.
    """
    path = Path(file)
    try:
        entries = files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"there is no list of samples {path}.", "Check the path: --config.samples=FILE.json.") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is not a list of samples.", "Put at least one object into a JSON list.")
    root = Path(image_root) if image_root is not None else path.parent
    named = ((f"entry {i}", entry) for i, entry in enumerate(entries))
    return sort_entries(path, named, lambda entry, where: _sample(entry, where, root))


def sort_entries(
    path: Path, entries: Iterable[tuple[str, Any]], read: Callable[[Any, str], InputSample]
) -> tuple[list[InputSample], list[Quarantined]]:
    """The samples that `read` makes of `entries`, and those that it refuses; of equal keys the first is used.

    Args:
      path: of the file, for errors.
      entries: (where in the file, content).
      read: takes an entry's content and, for errors, where it is.
    """
    samples: dict[str, InputSample] = {}
    quarantined = []
    for where, entry in entries:
        try:
            sample = read(entry, f"{path}, {where}")
            if sample.key in samples:
                raise UserError(f"{path}, {where}: the key {sample.key!r} is taken.", "Give each sample its own key.")
            samples[sample.key] = sample
        except UserError as error:
            quarantined.append(Quarantined(where, error))
    return list(samples.values()), quarantined


def _sample(entry: Any, where: str, root: Path) -> InputSample:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no object.", "Give every sample as a JSON object.")
    fields = {name: value for name, value in entry.items() if not name.startswith("__")}
    unknown, missing = sorted(set(fields) - _REQUIRED - _OPTIONAL), sorted(_REQUIRED - set(fields))
    if unknown:
        raise UserError(
            f"{where} has the unknown field {unknown[0]!r}.",
            "Remove it, or start it with two underscores to make it a comment.",
        )
    if missing:
        raise UserError(f"{where} lacks the field {missing[0]!r}.", "Add it (src_path and edit_path may be null).")
    for name, value in fields.items():
        check_storable(value, f"{where}: {name}")
    explanation = fields.get("explanation") or ""
    if not isinstance(explanation, str):
        raise UserError(f"{where}: explanation is {explanation!r}.", "Give a text.")
    if not isinstance(fields["edit_prompt"], str) or not fields["edit_prompt"].strip():
        raise UserError(f"{where}: edit_prompt is {fields['edit_prompt']!r}.", "Give a non-empty text.")
    for name in ("edit_prompt", "explanation"):
        check_user_text(fields.get(name) or "", f"{where}: {name} of the sample {fields['key']!r}")
    given = fields["src_path"]
    sources = [] if given is None else given if isinstance(given, list) else [given]
    candidate = fields["edit_path"]
    return InputSample(
        key=checked_key(fields["key"], where),
        prompt=fields["edit_prompt"],
        sources=tuple(_image_path(fields, "src_path", source, where, root) for source in sources),
        candidate=None if candidate is None else _image_path(fields, "edit_path", candidate, where, root),
        edit_key=fields.get("edit_key"),
        explanation=explanation,
    )


def _image_path(fields: Mapping[str, Any], field: str, value: Any, where: str, root: Path) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UserError(f"{where}: {field} is {fields[field]!r}.", "Give a path, or null.")
    path = files.written_path(root, value)
    if not files.is_file(path):
        raise UserError(
            f"{where}: the {field} {path} is no file.",
            "Correct the path; relative ones start at the list's own directory.",
        )
    return path
