"""The one datatype that every part of the stack speaks: a sample, and the trajectory that answers it.

Notation (paper, section 3): `G` an image, `E` its evaluation on four axes, `R` a reflection (failure analysis
and improvement plan), `S` an atomic sub-instruction.  A trajectory is a sequence of *rounds*; each round is one
image with what led to it and what was thought of it:

    direct       Round(None, G1, E1)
    reflection   Round(None, G1, E1)  Round(R1, G2, E2) ...  Round(R_{K-1}, G_K, E_K)
    multi-step   Round(None, G1, E1)  Round(S2, G2, E2) ...  Round(S_{N+1}, G_{N+1}, E_{N+1})

Everything here is immutable, validated on construction, and goes to and from plain JSON values.  Images are held
by *name*; an image store (any mapping from name to uint8 [height, width, 3]) holds the pixels.  No JAX in here.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Any

from ivr_jax.errors import UserError

AXES = ("instruction", "consistency", "quality", "knowledge")
MAX_REFLECTIONS = 3
MAX_STEPS = 5
TASKS = ("t2i", "x2i", "howto", "story", "explore", "vla")  # the task words of Emu3.5's prompt template

_KEY = re.compile(r"[^\x00-\x1f\x7f/\\\ud800-\udfff]+")
_LONGEST_KEY = 200  # bytes: file systems take 255

class Mode(enum.StrEnum):
    """How a request was answered (paper, table 1)."""

    DIRECT = "direct"
    REFLECTION = "reflection"
    MULTI_STEP = "multi_step"


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UserError(what, "Correct the record, or leave it out of the dataset.")


def _text(value: Any, where: str) -> str:
    _require(
        isinstance(value, str) and bool(value.strip(" \t\n\r\f\v")), f"{where} must be a non-empty text, not {value!r}."
    )
    return value


@dataclasses.dataclass(frozen=True)
class AxisVerdict:
    """One axis of an evaluation: did it pass, why, and the analyzer's score (1-5, or None)."""

    passed: bool
    reason: str
    score: float | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.passed, bool), f"a verdict must be true or false, not {self.passed!r}.")
        _text(self.reason, "the reason of a verdict")
        if self.score is not None:
            in_range = (
                isinstance(self.score, (int, float)) and not isinstance(self.score, bool) and 1 <= self.score <= 5
            )
            _require(in_range, f"a score must be a number from 1 to 5, not {self.score!r}.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`E`: the four axes, in the order of `AXES`, after an observation.

    Attributes:
      observation: what the evaluator notes of the image before any verdict, so that the verdicts can follow from it;
        "" for none.
    """

    instruction: AxisVerdict
    consistency: AxisVerdict
    quality: AxisVerdict
    knowledge: AxisVerdict
    observation: str = ""

    def __post_init__(self) -> None:
        if self.observation != "":
            _text(self.observation, "an observation")

    @property
    def axes(self) -> tuple[AxisVerdict, ...]:
        """The verdicts in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def passed(self) -> bool:
        """Whether all axes pass."""
        return all(axis.passed for axis in self.axes)

    @property
    def scores(self) -> tuple[float | None, ...]:
        """The scores in the order of `AXES`, None where there is none."""
        return tuple(axis.score for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Reflection:
    """`R`: what went wrong, and what to do about it."""

    failure_analysis: str
    improvement_plan: str

    def __post_init__(self) -> None:
        _text(self.failure_analysis, "a failure analysis")
        _text(self.improvement_plan, "an improvement plan")


@dataclasses.dataclass(frozen=True)
class Step:
    """`S`: one atomic sub-instruction."""

    instruction: str

    def __post_init__(self) -> None:
        _text(self.instruction, "a step's instruction")


@dataclasses.dataclass(frozen=True)
class Round:
    """One image: what led to it (None for `G1`), its name, its evaluation.

    `evaluation` judges the image against the *whole* request; while steps remain it fails, and the last one passes.
    `step_evaluation` is what construction thought of one step alone (kept for the record, never in tokens).
    """

    cause: Reflection | Step | None
    image: str
    evaluation: Evaluation
    step_evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        _text(self.image, "an image name")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A request: `prompt` with zero or more `sources` (image names).

    Attributes:
      key: unique, names the sample everywhere.
      prompt: what the user asks for.
      sources: names of the reference images; empty for text-to-image.
      explanation: facts for the knowledge axis, or "".
      category: one of the taxonomy's sub-categories, or "".
      facts: JSON values for an analyzer that knows more than the prompt says (the micro-world's target, say).
      task_word: one of `TASKS`, or "" for the usual one (`task`).
    """

    key: str
    prompt: str
    sources: tuple[str, ...] = ()
    explanation: str = ""
    category: str = ""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task_word: str = ""

    def __post_init__(self) -> None:
        _text(self.key, "a sample's key")
        _text(self.prompt, f"the prompt of sample {self.key!r}")
        _require(
            isinstance(self.sources, tuple) and all(isinstance(s, str) and s for s in self.sources),
            f"the sources of sample {self.key!r} must be a tuple of image names.",
        )
        _require(
            self.task_word in ("", *TASKS),
            f"the task of sample {self.key!r} must be one of {', '.join(TASKS)}, not {self.task_word!r}.",
        )

    @property
    def task(self) -> str:
        """The Emu3.5 task word of the prompt template: what was asked for, else x2i with references and t2i without."""
        return self.task_word or ("x2i" if self.sources else "t2i")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A sample and the rounds that answer it; the last image is the answer."""

    sample: Sample
    rounds: tuple[Round, ...]

    def __post_init__(self) -> None:
        where = f"trajectory {self.sample.key!r}"
        _require(len(self.rounds) >= 1, f"{where} has no image.")
        _require(self.rounds[0].cause is None, f"{where}: the first image has no cause.")
        kinds = {type(r.cause) for r in self.rounds[1:]}
        _require(
            kinds <= {Reflection} or kinds <= {Step},
            f"{where} mixes reflections and steps; failed reflection rounds are pruned before steps begin.",
        )
        limit = MAX_STEPS if kinds == {Step} else MAX_REFLECTIONS
        _require(
            len(self.rounds) - 1 <= limit,
            f"{where} has {len(self.rounds) - 1} rounds after the first; at most {limit}.",
        )

    @property
    def mode(self) -> Mode:
        """The mode: direct with one round, else what caused the second."""
        if len(self.rounds) == 1:
            return Mode.DIRECT
        return Mode.REFLECTION if isinstance(self.rounds[1].cause, Reflection) else Mode.MULTI_STEP

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the drawn images, in order."""
        return tuple(r.image for r in self.rounds)


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as plain JSON values."""
    axes = {axis: dataclasses.asdict(verdict) for axis, verdict in zip(AXES, evaluation.axes, strict=True)}
    # Records without an observation are as they were before there were any.
    return axes | ({"observation": evaluation.observation} if evaluation.observation else {})


def evaluation_from_json(value: Mapping[str, Any]) -> Evaluation:
    """The evaluation of `evaluation_to_json`.  Raises UserError for a record that is none."""
    axes = {axis: AxisVerdict(**_fields(value, axis, AxisVerdict)) for axis in AXES}
    return Evaluation(**axes, observation=value.get("observation", ""))


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """The sample as plain JSON values."""
    value = {**dataclasses.asdict(sample), "sources": list(sample.sources), "facts": dict(sample.facts)}
    if not sample.task_word:  # the usual case; records without one are as they always were
        del value["task_word"]
    return value


def sample_from_json(value: Mapping[str, Any]) -> Sample:
    """The sample of `sample_to_json`.  Raises UserError for a record that is none."""
    fields = dict(value)
    fields["sources"] = tuple(fields.get("sources", ()))
    return Sample(**_fields({"sample": fields}, "sample", Sample))


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Plain JSON values; `trajectory_from_json` is the exact inverse."""
    rounds = []
    for r in trajectory.rounds:
        record: dict[str, Any] = {"image": r.image, "evaluation": evaluation_to_json(r.evaluation)}
        if isinstance(r.cause, Reflection):
            record["reflection"] = dataclasses.asdict(r.cause)
        elif isinstance(r.cause, Step):
            record["step"] = dataclasses.asdict(r.cause)
        if r.step_evaluation is not None:
            record["step_evaluation"] = evaluation_to_json(r.step_evaluation)
        rounds.append(record)
    return {"sample": sample_to_json(trajectory.sample), "rounds": rounds}


def trajectory_from_json(value: Mapping[str, Any]) -> Trajectory:
    """Raises UserError naming the field when `value` is not what `trajectory_to_json` writes."""
    _require(
        isinstance(value, Mapping) and {"sample", "rounds"} <= set(value),
        "a trajectory record needs `sample` and `rounds`.",
    )
    rounds = []
    for record in value["rounds"]:
        known = {"image", "evaluation", "reflection", "step", "step_evaluation"}
        _require(
            isinstance(record, Mapping) and set(record) <= known,
            f"a round has unknown fields: {sorted(set(record) - known)}.",
        )
        _require({"image", "evaluation"} <= set(record), "a round needs `image` and `evaluation`.")
        cause: Reflection | Step | None = None
        if "reflection" in record:
            cause = Reflection(**_fields(record, "reflection", Reflection))
        elif "step" in record:
            cause = Step(**_fields(record, "step", Step))
        step_evaluation = evaluation_from_json(record["step_evaluation"]) if "step_evaluation" in record else None
        rounds.append(Round(cause, record["image"], evaluation_from_json(record["evaluation"]), step_evaluation))
    return Trajectory(sample_from_json(value["sample"]), tuple(rounds))


def _fields(value: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """`value[name]` as keyword arguments of the dataclass `kind`, checked for missing and unknown fields."""
    inner = value.get(name)
    _require(isinstance(inner, Mapping), f"`{name}` is missing or not an object.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = set(inner) - set(fields)
    _require(not unknown, f"`{name}` has unknown fields: {sorted(unknown)}.")
    required = {
        f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    _require(required <= set(inner), f"`{name}` lacks {sorted(required - set(inner))}.")
    return dict(inner)


def checked_key(key: Any, where: str) -> str:
    """`key`, if it can name a folder inside another one.

    Raises:
      UserError: it is no text, empty, longer than 200 bytes of UTF-8, `.` or `..`-like, or holds a slash, a backslash,
        a control character or an unpaired surrogate.
    """
    named = isinstance(key, str) and _KEY.fullmatch(key) and not key.startswith(".") and key == key.strip()
    if not named or len(key.encode()) > _LONGEST_KEY:
        shown = repr(key)
        raise UserError(
            f"{where}: the key {shown if len(shown) <= 100 else shown[:100] + ' ...'} cannot name a folder.",
            "Use up to 200 printable characters (bytes of UTF-8) without slashes, not starting with a dot.",
        )
    return key
