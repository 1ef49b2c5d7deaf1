"""Who judges: a vision-language model behind a service, or an object detector; each with a recorded identity.

A judge answers a `Question` about pictures with an `Outcome`: a state and JSON values.  Whatever goes wrong with a call
is a state, never a score; only what makes every further call pointless (a wrong key, a service that is down) is raised.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import prompts
from ivr_jax.evaluate.benchmarks.detection import Detector
from ivr_jax.evaluate.benchmarks.interface import NOT_JUDGED, Benchmark, Item, Kind, Question, State
from ivr_jax.evaluate.benchmarks.suites.geneval import judge_objects, keep_boxes
from ivr_jax.evaluate.benchmarks.suites.geneval2 import first_token_value
from ivr_jax.interfaces import ServiceDown, ServiceFailed
from ivr_jax.services import replies
from ivr_jax.services.build import service_from_config
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.http_client import Picture
from ivr_jax.services.limits import LimitsOf, ProcessLimits
from ivr_jax.services.replies import Unusable
from ivr_jax.services.service import Question as ServiceQuestion
from ivr_jax.services.service import Records, Service
from ivr_jax.trajectory import AXES, sample_from_json
from ivr_jax.world.analyzer import WorldAnalyzer

TOP_TOKENS = 20  # likeliest first tokens that are asked for; the most that common servers give


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A state, its JSON values (None without any), and why there are none."""

    state: State
    value: Mapping[str, Any] | None = None
    detail: str = ""


class Judge(Protocol):
    """Attributes:
      form: what `Benchmark.questions` calls it: "chat", "detector" or "world"; "none" when there is no judge.
      identity: JSON values on which its verdicts depend; `name` is for people.
      in_flight: calls at a time.
    """

    @property
    def form(self) -> str:
        """"chat", "detector", "world" or "none": which questions it can answer."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its judgements depend on; stored with the run."""

    @property
    def in_flight(self) -> int:
        """Most questions at a time."""

    async def ask(self, item: Item, question: Question, pictures: Sequence[Picture]) -> Outcome:
        """Raises UserError when no other question would fare better."""

    async def close(self) -> None:
        """Ends all connections."""


def label(judge: Judge) -> str:
    """Name and a digest of the identity: what judgements are recorded under."""
    digest = hashlib.sha256(json.dumps(dict(judge.identity), sort_keys=True).encode()).hexdigest()
    return f"{judge.identity['name']}#{digest[:10]}"


class ChatJudge:
    """A vision-language model behind a service; see `Judge`.

    Args:
      benchmark: whose prompts are used.
      config: the service.
      records: where replies are kept, so that no question is paid for twice.
      version: of the model, as its provider names it; "" takes the model's name.
      own_prompts: a folder of templates that replace the installed ones.
      environment: where keys are looked up.
      limits: makes what grants the service's calls.
    """

    form = "chat"

    def __init__(
        self,
        benchmark: Benchmark,
        config: ServiceConfig,
        records: Records | None,
        version: str = "",
        own_prompts: Path | None = None,
        environment: Mapping[str, str] | None = None,
        limits: LimitsOf = ProcessLimits,
    ):
        self._benchmark, self._own = benchmark, own_prompts
        self.service: Service = service_from_config(config, records, False, environment, limits)
        self.in_flight = config.in_flight
        self.identity = {
            "name": config.name,
            "version": version or config.model,
            "settings": {k: v for k, v in config.identity().items() if k not in ("kind", "model")},
            "prompts": f"{benchmark.prompt_version}:{prompts.digest(benchmark, own_prompts)}",
        }

    async def ask(self, item: Item, question: Question, pictures: Sequence[Picture]) -> Outcome:
        text = prompts.render(question, self._own)
        if question.kind == Kind.PROBABILITY:
            asked = ServiceQuestion(text, tuple(pictures), top_tokens=TOP_TOKENS)
            return await self._outcome(asked, question, lambda reply: first_token_value(*_tokens(reply, question)))
        if question.kind != Kind.SCORES:
            raise UserError(f"a language model cannot answer a question of the kind {question.kind.value!r}.",
                            "Choose another judge.")
        asked = ServiceQuestion(text, tuple(pictures), schema_of(question))
        return await self._outcome(asked, question, lambda reply: read_scores(reply, question))

    async def _outcome(self, asked: ServiceQuestion, question: Question, read: Any) -> Outcome:
        """Asks, and turns failures into states.  The official parser reads the last reply, usable or not."""
        replies: list[str] = []

        def reading(reply: str) -> dict[str, Any]:
            replies.append(reply)
            return read(reply)

        try:
            value, state, detail = await self.service.text(asked, reading), State.OK, ""
        except ServiceDown:
            raise
        except ServiceFailed as error:
            state = {"rejected": State.REFUSED, "unusable answer": State.UNPARSABLE}.get(error.kind, State.TRANSPORT)
            value, detail = None, error.what
        strict = self._benchmark.read_strict(question, replies[-1]) if replies else None
        if strict is not None and (value is None or dict(strict) != value["scores"]):
            value = {**(value or {}), "strict": dict(strict)}
        return Outcome(state, value, detail)

    async def close(self) -> None:
        await self.service.client.close()


class NoJudge:
    """Stands for a judge where none is named: it is asked nothing; see `Judge`."""

    form = "none"
    in_flight = 1
    identity = {"name": NOT_JUDGED, "version": "", "settings": {}, "prompts": ""}

    async def ask(self, item: Item, question: Question, pictures: Sequence[Picture]) -> Outcome:
        raise UserError("no judge was named.", "Add --config.judge.model=NAME.")

    async def close(self) -> None:
        pass


class DetectorJudge:
    """An object detector with a classifier of colours; see `Judge`.

    Args:
      detector: what finds boxes and colours.
    """

    form = "detector"
    in_flight = 4  # the next images are read while one is looked at

    def __init__(self, detector: Detector):
        self._detector, self._turn = detector, asyncio.Lock()
        self.identity = {"name": detector.name, "version": detector.version, "settings": dict(detector.settings),
                         "prompts": ""}  # fmt: skip

    async def ask(self, item: Item, question: Question, pictures: Sequence[Picture]) -> Outcome:
        if question.kind != Kind.DETECTION:
            raise UserError(f"a detector cannot answer a question of the kind {question.kind.value!r}.",
                            "Choose another judge.")
        async with self._turn:
            return await asyncio.to_thread(self._look, question.data, pictures[-1].pixels)

    def _look(self, metadata: Mapping[str, Any], pixels: Any) -> Outcome:
        names = [entry["class"] for part in ("include", "exclude") for entry in metadata.get(part, [])]
        found = self._detector.detect(pixels, list(dict.fromkeys(names)))
        kept = keep_boxes(found, metadata["tag"])
        colors: dict[str, list[str]] = {}

        def color_of(name: str, number: int) -> str:
            if name not in colors:
                colors[name] = self._detector.colors(pixels, name, kept[name])
            return colors[name][number]

        correct, reason = judge_objects(metadata, kept, color_of)
        details = {name: [[float(x) for x in box[:5]] for box in boxes] for name, boxes in kept.items()}
        value = {"scores": {"correct": int(correct)}, "reasoning": reason, "details": details, "colors": colors}
        return Outcome(State.OK, value)

    async def close(self) -> None:
        pass


class WorldJudge:
    """The micro-world's exact analyzer; see `Judge`."""

    form = "world"
    in_flight = 1
    identity = {"name": "micro-world analyzer", "version": "1", "settings": {}, "prompts": ""}

    def __init__(self) -> None:
        self._analyzer = WorldAnalyzer()

    async def ask(self, item: Item, question: Question, pictures: Sequence[Picture]) -> Outcome:
        if question.kind != Kind.WORLD:
            raise UserError(f"the micro-world cannot answer a question of the kind {question.kind.value!r}.",
                            "Choose another judge.")
        sample, pixels = sample_from_json(question.data), pictures[-1].pixels
        images = {picture.label: picture.pixels for picture in pictures[:-1]}
        evaluation = self._analyzer.evaluate_sync(sample, images, pixels)
        scores: dict[str, float] = {"exact": int(self._analyzer.is_exact(sample, pixels))}
        scores |= dict(zip(AXES, map(float, evaluation.scores), strict=True))
        reasons = [verdict.reason for verdict in evaluation.axes if not verdict.passed]
        return Outcome(State.OK, {"scores": scores, "reasoning": " ".join(reasons)})

    async def close(self) -> None:
        pass


def schema_of(question: Question) -> dict[str, Any]:
    """JSON schema of a reply with scores."""
    score = {"type": "integer", "minimum": question.low, "maximum": question.high}
    properties = {"reasoning": {"type": "string"}, **{name: score for name in question.scores}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def read_scores(text: str, question: Question) -> dict[str, Any]:
    """The scores, whole numbers, and the reasoning of a reply.

    Raises:
      Unusable: see `replies.read_scores`; a score that is no whole number.
    """
    scores = replies.read_scores(text, question.scores, question.low, question.high)
    for name, score in scores.items():
        if score != int(score):
            raise Unusable(f"{name} is {score:g}, no whole number")
    value = replies.read_object(text, question.scores)
    reasoning = next((value[key] for key in ("reasoning", "reason") if isinstance(value.get(key), str)), "")
    return {"scores": {name: int(score) for name, score in scores.items()}, "reasoning": reasoning}


def _tokens(reply: str, question: Question) -> tuple[list[tuple[str, float]], Sequence[str]]:
    return [(text, chance) for text, chance in json.loads(reply)], question.accepted
