"""An `Analyzer` that asks a vision-language model, one prompt a judgement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels
from ivr_jax.interfaces import Attempt, RootCause
from ivr_jax.services.http_client import Picture
from ivr_jax.services.prompts import Prompts
from ivr_jax.services.replies import (
    Unusable,
    as_choice,
    as_score,
    as_text,
    as_texts,
    check_scale,
    read_object,
    read_scored,
)
from ivr_jax.services.service import Question, Service, first_answer
from ivr_jax.thresholds import WHOLE_REQUEST, Thresholds
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Reflection, Sample

T = TypeVar("T")
_TEXT: dict[str, Any] = {"type": "string"}
KINDS = ("failure_analysis", "improvement_plan", "step")


def _object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema in the strict form: all properties required, no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_SCORED = _object(reason=_TEXT, score={"type": "integer", "enum": [1, 2, 3, 4, 5]})
_STEP = _object(**{axis: _SCORED for axis in AXES})
_REFLECTION = _object(failure_analysis=_TEXT, improvement_plan=_TEXT)
_CAUSE = _object(reason=_TEXT, cause={"type": "string", "enum": [cause.value for cause in RootCause]})
_STEPS = _object(steps={"type": "array", "items": _TEXT})


class ServiceAnalyzer:
    """See `Analyzer`.

    Args:
      services: asked in this order: the analyzer, then its fallbacks.
      thresholds: turn scores into verdicts (the escalation's own rules, where given, do so again).
      prompts: what is asked; the package's own when None.

    Every method raises `ServiceFailed` when no service gives a usable answer.
    """

    def __init__(
        self, services: Sequence[Service], thresholds: Thresholds = WHOLE_REQUEST, prompts: Prompts | None = None
    ):
        if not services:
            raise UserError("an analyzer needs at least one service.", "Name one.")
        self.services, self.thresholds, self._prompts = tuple(services), thresholds, prompts or Prompts()

    async def evaluate(self, sample: Sample, images: Images, image: Pixels) -> Evaluation:
        """See `Analyzer.evaluate`: one question an axis, asked at the same time."""
        pictures = (*_sources(sample, images), Picture("Result", image))
        answers = await asyncio.gather(
            *(
                self._ask(f"evaluate_{axis}", pictures, _SCORED, read_scored, **_about(sample, axis == "knowledge"))
                for axis in AXES
            )
        )
        verdicts = (AxisVerdict(True, reason, score) for score, reason in answers)
        return self.thresholds.judge(Evaluation(*verdicts))

    async def evaluate_step(
        self, sample: Sample, images: Images, instruction: str, previous: Sequence[Pixels], image: Pixels
    ) -> Evaluation:
        """See `Analyzer.evaluate_step`: one question for all axes."""
        pictures = (*_numbered("Before", previous), Picture("After", image))
        evaluation = await self._ask(
            "evaluate_step",
            pictures,
            _STEP,
            _read_step,
            prompt=sample.prompt,
            instruction=instruction,
            sources=len(previous),
        )
        return self.thresholds.judge(evaluation)

    async def reflect(self, sample: Sample, images: Images, image: Pixels, evaluation: Evaluation) -> Reflection:
        """See `Analyzer.reflect`."""
        pictures = (*_sources(sample, images), Picture("Rejected result", image))
        verdicts = list(zip(AXES, evaluation.axes, strict=True))
        return await self._ask("reflect", pictures, _REFLECTION, _read_reflection, **_about(sample), verdicts=verdicts)

    async def root_cause(self, sample: Sample, images: Images, attempts: Sequence[Attempt]) -> RootCause:
        """See `Analyzer.root_cause`."""
        pictures = (*_sources(sample, images), *_numbered("Attempt", [attempt.image for attempt in attempts]))
        seen = [
            {"reflection": a.reflection, "verdicts": list(zip(AXES, a.evaluation.axes, strict=True))} for a in attempts
        ]
        return await self._ask("root_cause", pictures, _CAUSE, _read_cause, **_about(sample, False), attempts=seen)

    async def decompose(self, sample: Sample, images: Images) -> tuple[str, ...]:
        """See `Analyzer.decompose`; how many steps are too many is for the escalation to say."""
        return await self._ask("decompose", _sources(sample, images), _STEPS, _read_steps, **_about(sample))

    async def judge_reasoning(
        self, sample: Sample, images: Images, kind: str, text: str, previous: Sequence[Pixels]
    ) -> float:
        """See `Analyzer.judge_reasoning`: a score s from 1 to 5 becomes (s - 1) / 4."""
        if kind not in KINDS:
            raise UserError(f"unknown kind of reasoning {kind!r}.", f"Use one of: {', '.join(KINDS)}.")
        pictures = (*_sources(sample, images), *_numbered("Drawing", previous))
        score, _ = await self._ask(
            "judge_reasoning",
            pictures,
            _SCORED,
            read_scored,
            **_about(sample),
            kind=kind,
            text=text,
            drawn=len(previous),
        )
        return (score - 1) / 4

    async def close(self) -> None:
        """Ends the services' connections."""
        for service in self.services:
            await service.client.close()

    async def _ask(
        self,
        prompt_name: str,
        pictures: Sequence[Picture],
        schema: Mapping[str, Any],
        read: Callable[[str], T],
        **values: Any,
    ) -> T:
        question = Question(self._prompts.render(prompt_name, **values), tuple(pictures), schema)
        return await first_answer(self.services, question, read)


def _about(sample: Sample, explained: bool = True) -> dict[str, Any]:
    """The values of the request in a prompt."""
    known = {"prompt": sample.prompt, "sources": len(sample.sources)}
    return known | {"explanation": sample.explanation} if explained else known


def _sources(sample: Sample, images: Images) -> tuple[Picture, ...]:
    return _numbered("Source", [images[name] for name in sample.sources])


def _numbered(label: str, images: Sequence[Pixels]) -> tuple[Picture, ...]:
    if len(images) == 1:
        return (Picture(label, images[0]),)
    return tuple(Picture(f"{label} {i}", pixels) for i, pixels in enumerate(images, 1))


def _read_step(text: str) -> Evaluation:
    value, verdicts = read_object(text, AXES), []
    check_scale(value)
    for axis in AXES:
        given = value[axis]
        if not isinstance(given, Mapping) or "score" not in given:
            raise Unusable(f"the answer gives no score for {axis}")
        check_scale(given)
        reason = as_text(given.get("reason"), f"reason for {axis}")
        verdicts.append(AxisVerdict(True, reason, as_score(given["score"])))
    return Evaluation(*verdicts)


def _read_reflection(text: str) -> Reflection:
    value = read_object(text, ("failure_analysis", "improvement_plan"))
    return Reflection(*(as_text(value[key], key.replace("_", " ")) for key in ("failure_analysis", "improvement_plan")))


def _read_cause(text: str) -> RootCause:
    value = read_object(text, ("cause",))
    return RootCause(as_choice(value["cause"], [cause.value for cause in RootCause], "cause"))


def _read_steps(text: str) -> tuple[str, ...]:
    return as_texts(read_object(text, ("steps",))["steps"], "steps")
