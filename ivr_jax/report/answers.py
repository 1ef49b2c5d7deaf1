"""Records of a model's answers with their true evaluations, from which metrics and reports are computed.

On disk an evaluation is a folder:

    answers.jsonl          one JSON object a line, one line an answer
    images/<name>.png      every image that an answer names (drawn or source), stored once; the name is
                           percent-encoded, so that any image name is one plain file name

A name denotes the same image in all answers of a folder (see `ivr_jax.images.image_name`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.images import load_image, save_png
from ivr_jax.protocol import codec
from ivr_jax.trajectory import (
    Evaluation,
    Mode,
    Reflection,
    Sample,
    Step,
    Trajectory,
    evaluation_from_json,
    evaluation_to_json,
    sample_from_json,
    sample_to_json,
    trajectory_from_json,
    trajectory_to_json,
)

ANSWERS_FILE = "answers.jsonl"
IMAGES_FOLDER = "images"
_REMEDY = "Run the evaluation again, or remove the folder."


@dataclasses.dataclass(frozen=True)
class SegmentRecord:
    """A stretch of the token stream.

    Attributes:
      kind: what it is in the paper's notation and which one: "G1", "E1", "R1", "S2" ...; any other word is shown as is.
      text: the words it carries, "" for an image.
      image: the name of the image it carries, or None.
      tokens: its length in tokens.
      loss: whether its tokens carry loss; false means context only.
    """

    kind: str
    text: str
    image: str | None
    tokens: int
    loss: bool

    def __post_init__(self) -> None:
        _require(isinstance(self.kind, str) and bool(self.kind), "a segment needs a kind.")
        _require(isinstance(self.tokens, int) and self.tokens >= 0, f"segment {self.kind}: `tokens` must be 0 or more.")


@dataclasses.dataclass(frozen=True)
class EvaluatedAnswer:
    """One answer of a model to one sample (or a constructed one, when training samples are shown).

    Attributes:
      sample: the request.
      trajectory: the parsed answer, or None when the token stream did not parse.
      error: why it did not parse or is structurally invalid; "" when all is well.
      images: names of the images drawn, in order; those of the trajectory when there is one.
      truth: the analyzer's evaluation of each drawn image, in order (the last is the final image); None where the
        judge failed; empty when nothing was judged.
      exact: for each drawn image whether it equals the target; empty when no exact target is known.
      rewards: reward components by name (outcome, format, step, total, bonus ...); only those that are present.
      segments: the token stream in order.
      split: which part of the benchmark the sample belongs to, "suite/part" or a plain word.
      mode: how the request was answered; None when the answer is invalid.
      garbled: names of the segments ("S2", "R1", "E1") whose text is no sentence of the task's language; empty where
        the language is not known.
    """

    sample: Sample
    trajectory: Trajectory | None
    error: str = ""
    images: tuple[str, ...] = ()
    truth: tuple[Evaluation | None, ...] = ()
    exact: tuple[bool, ...] = ()
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    segments: tuple[SegmentRecord, ...] = ()
    split: str = ""
    mode: Mode | None = None
    garbled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"answer to {self.sample.key!r}"
        if self.trajectory is not None:
            _require(self.trajectory.sample == self.sample, f"{where}: its trajectory answers another sample.")
            _require(self.images == self.trajectory.images, f"{where}: `images` are not those of its trajectory.")
        if self.mode is not None:
            _require(
                self.trajectory is not None and self.mode == self.trajectory.mode,
                f"{where}: mode {self.mode.value} is not that of its trajectory.",
            )
        for name in ("truth", "exact"):
            count = len(getattr(self, name))
            _require(count in (0, len(self.images)), f"{where}: `{name}` holds {count}, for {len(self.images)} images.")
        for name, value in self.rewards.items():
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            _require(finite, f"{where}: reward {name!r} is {value!r}; leave a missing reward out.")

    @property
    def key(self) -> str:
        """The request's key."""
        return self.sample.key

    @property
    def own(self) -> tuple[Evaluation | None, ...]:
        """The model's own evaluation of each drawn image; None for each when the stream did not parse."""
        if self.trajectory is None:
            return (None,) * len(self.images)
        return tuple(r.evaluation for r in self.trajectory.rounds)

    @property
    def right(self) -> bool | None:
        """Whether the final image is right: equal to the target where one is known, else passed by the analyzer.

        No image is wrong; an image that nobody judged is None.
        """
        if not self.images:
            return False
        if self.exact:
            return self.exact[-1]
        return self.truth[-1].passed if self.truth and self.truth[-1] is not None else None

    @property
    def names(self) -> tuple[str, ...]:
        """Every image it needs: the sources, then the drawn ones."""
        return (*self.sample.sources, *self.images)


def make_answer(
    trajectory: Trajectory,
    segments: Sequence[codec.Segment] = (),
    *,
    error: str = "",
    truth: Sequence[Evaluation | None] = (),
    exact: Sequence[bool] = (),
    rewards: Mapping[str, float] | None = None,
    split: str = "",
    trained: bool = False,
    garbled: Sequence[str] = (),
) -> EvaluatedAnswer:
    """The record of an answer that parsed.

    Args:
      segments: of its token stream, as the codec gives them; each is stored with the text or image that it carries.
      error: why it is structurally invalid; its mode is None then.
      truth: evaluations of its last images, in order; earlier images are unjudged.
      exact: for each image whether it equals the target; empty when no target is known.
      trained: it is a training sample, so that the segments' loss is shown; an answer of a model trains nothing.
    """
    unjudged = len(trajectory.images) - len(truth) if truth else 0
    return EvaluatedAnswer(
        sample=trajectory.sample,
        trajectory=trajectory,
        error=error,
        images=trajectory.images,
        truth=(*[None] * unjudged, *truth),
        exact=tuple(map(bool, exact)),
        rewards=dict(rewards or {}),
        segments=tuple(_segment(trajectory, segment, trained) for segment in segments),
        split=split,
        mode=None if error else trajectory.mode,
        garbled=tuple(garbled),
    )


def _segment(trajectory: Trajectory, segment: codec.Segment, trained: bool) -> SegmentRecord:
    """A segment of the codec with the text or image that it carries."""
    round_ = trajectory.rounds[segment.round - 1]
    cause, text = round_.cause, ""
    if segment.part == "S" and isinstance(cause, Step):
        text = cause.instruction
    elif segment.part == "R" and isinstance(cause, Reflection):
        text = f"{cause.failure_analysis} {cause.improvement_plan}"
    elif segment.part == "E":
        verdicts = [f"{'pass' if axis.passed else 'fail'}: {axis.reason}" for axis in round_.evaluation.axes]
        said = round_.evaluation.observation
        text = "; ".join([said, *verdicts] if said else verdicts)
    image = round_.image if segment.part == "G" else None
    return SegmentRecord(segment.name, text, image, segment.end - segment.start, trained and segment.loss)


class StoredImages(Mapping[str, np.ndarray]):
    """The images beside `answers.jsonl`: name -> uint8 [height, width, 3], read when asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._folder / file_name(name)
        if not path.is_file():
            raise KeyError(name)
        return load_image(path)

    def __iter__(self) -> Iterator[str]:
        return (urllib.parse.unquote(path.stem) for path in sorted(self._folder.glob("*.png")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def file_name(name: str) -> str:
    """The file name of image `name`: percent-encoded, so that no name leaves the folder or meets another."""
    encoded = urllib.parse.quote(name, safe="") + ".png"
    _require(len(encoded) <= 240, f"the image name {name[:60]!r}... is too long for a file name.")
    return encoded


def answer_to_json(answer: EvaluatedAnswer) -> dict[str, Any]:
    """Plain JSON values; `answer_from_json` is the exact inverse."""
    trajectory = answer.trajectory
    return {
        "sample": sample_to_json(answer.sample),
        "rounds": None if trajectory is None else trajectory_to_json(trajectory)["rounds"],
        "error": answer.error,
        "images": list(answer.images),
        "truth": [None if truth is None else evaluation_to_json(truth) for truth in answer.truth],
        "exact": [bool(exact) for exact in answer.exact],
        "rewards": {name: float(value) for name, value in answer.rewards.items()},
        "segments": [dataclasses.asdict(segment) for segment in answer.segments],
        "split": answer.split,
        "mode": None if answer.mode is None else answer.mode.value,
        "garbled": list(answer.garbled),
    }


def answer_from_json(value: Mapping[str, Any]) -> EvaluatedAnswer:
    """Raises UserError naming the fault when `value` is not what `answer_to_json` writes."""
    known = {f.name for f in dataclasses.fields(EvaluatedAnswer)} - {"trajectory"} | {"rounds"}
    complete = isinstance(value, Mapping) and set(value) | {"garbled"} == known  # older records lack it
    _require(complete, f"an answer record needs exactly {sorted(known)}.")
    try:
        rounds, mode = value["rounds"], value["mode"]
        return EvaluatedAnswer(
            sample=sample_from_json(value["sample"]),
            trajectory=None if rounds is None else trajectory_from_json({"sample": value["sample"], "rounds": rounds}),
            error=value["error"],
            images=tuple(value["images"]),
            truth=tuple(None if truth is None else evaluation_from_json(truth) for truth in value["truth"]),
            exact=tuple(value["exact"]),
            rewards=dict(value["rewards"]),
            segments=tuple(SegmentRecord(**segment) for segment in value["segments"]),
            split=value["split"],
            mode=None if mode is None else Mode(mode),
            garbled=tuple(value.get("garbled", ())),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"an answer record is malformed: {error}.", _REMEDY) from None


def write_answers(
    folder: str | os.PathLike[str], answers: Sequence[EvaluatedAnswer], images: Mapping[str, np.ndarray]
) -> None:
    """Writes `answers.jsonl` and `images/` into `folder` (made when missing), replacing what was there.

    Images (uint8 [height, width, 3]) go first and every file is put in place atomically, so that a killed run
    leaves either the old answers or the new ones, never half a file.  Raises UserError for an image that is missing
    or not uint8 [height, width, 3], and for a folder that cannot be written.
    """
    folder = Path(folder)
    names = list(dict.fromkeys(name for answer in answers for name in answer.names))
    folded = [file_name(name).casefold() for name in names]
    _require(len(set(folded)) == len(folded), "two image names differ in upper and lower case only.")
    try:
        (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
        for name in names:
            _require(name in images, f"the image {name!r} of an answer is not among the images given.")
            save_png(folder / IMAGES_FOLDER / file_name(name), images[name])
        lines = "".join(json.dumps(answer_to_json(answer)) + "\n" for answer in answers)
        replace_file(folder / ANSWERS_FILE, lines.encode())
    except OSError as error:
        raise UserError(f"Cannot write answers into {folder}: {error}.", "Choose a folder you can write to.") from None


def read_answers(folder: str | os.PathLike[str]) -> tuple[EvaluatedAnswer, ...]:
    """Reads `answers.jsonl`.  Raises UserError with file and line for anything that is not an answer."""
    answers = []
    for where, value in files.read_json_lines(Path(folder) / ANSWERS_FILE, _REMEDY):
        try:
            answers.append(answer_from_json(value))
        except UserError as error:
            raise UserError(f"{where}: {error.what}", _REMEDY) from None
    return tuple(answers)


def read_images(folder: str | os.PathLike[str]) -> StoredImages:
    """The images that `write_answers` stored in `folder`, read lazily."""
    return StoredImages(Path(folder) / IMAGES_FOLDER)


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path` atomically; leaves the file alone when it already holds the same bytes."""
    if path.is_file() and path.read_bytes() == data:
        return
    files.write_file(path, data)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UserError(what, _REMEDY)
