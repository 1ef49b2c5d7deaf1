r"""The record of judgements: `judgements.jsonl`, appended to as they come, one JSON object a line.

    {"item": "chemistry/12", "sample": 0, "metric": "quality", "judge": "…", "state": "ok", "value": {…}, "image": "…",
     "detail": ""}

A process that is killed while it writes leaves at most half a line at the
end, which the next one removes; a later line replaces an earlier one with the same item, sample, metric and judge.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.interface import Judgement, State

FILE = "judgements.jsonl"
_REMEDY = "Remove the damaged line: what it said is asked again."


def to_json(judgement: Judgement) -> dict[str, Any]:
    """The judgement as one record of `judgements.jsonl`."""
    return {**dataclasses.asdict(judgement), "state": judgement.state.value}


def from_json(value: Any) -> Judgement:
    """Raises UserError when `value` is not what `to_json` writes."""
    names = {field.name for field in dataclasses.fields(Judgement)}
    if not isinstance(value, Mapping) or set(value) != names:
        raise UserError(f"a judgement needs exactly the fields {', '.join(sorted(names))}.", _REMEDY)
    try:
        judgement = Judgement(**{**value, "state": State(value["state"])})
    except ValueError:
        raise UserError(f"a judgement has the state {value['state']!r}.", _REMEDY) from None
    if judgement.state == State.OK and not isinstance(judgement.value, Mapping):
        raise UserError(f"the judgement of {judgement.item!r} is ok and has no value.", _REMEDY)
    return judgement


def read(folder: Path) -> dict[tuple[str, int, str, str], Judgement]:
    """The last judgement for each item, sample, metric and judge; a cut last line is left out."""
    path = folder / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).", "Check the disk.") from None
    found: dict[tuple[str, int, str, str], Judgement] = {}
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last end of line is no whole line
        if not line.strip():
            continue
        try:
            judgement = from_json(json.loads(line))
        except (UserError, ValueError) as error:
            what = error.what if isinstance(error, UserError) else f"not JSON ({error})."
            raise UserError(f"{path}, line {number}: {what}", _REMEDY) from None
        found[(*judgement.address, judgement.judge)] = judgement
    return found


class Writer:
    """Appends judgements; use it as a context manager.  One process writes a file at a time.

    Raises:
      UserError: the file is in use, or the disk is full.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        with files.writing(self.path):
            self._file = open(self.path, "ab", buffering=0)
            try:
                self._lock = files.Lock(self.path)
            except UserError:
                self._file.close()
                raise
            _cut_half_line(self.path)

    def add(self, judgement: Judgement) -> None:
        """Writes one judgement, whole and at once."""
        line = json.dumps(to_json(judgement), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            os.truncate(self.path, size)
            raise UserError(f"{self.path} cannot be written ({error}).",
                            "Make room on the disk, and give the same command again.") from None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.close()


def _cut_half_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)
