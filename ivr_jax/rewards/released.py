"""Rewards of rollout records in the authors' released form, judged by a model that answers in text.

A record (JSON object) holds `instruction`, `source_images` [path], `explanation`, `assistant_text`
(`<think>...</think><image>...</image>...`), `intermediate_steps` [{`instruction`, `image`}], `final_image` (path or
null) and `reflections` [{`prev_image`, `text`, `next_image`}].  The judge is any `judge(prompt, images) -> str`; it is
asked once for every axis of the final image, every intermediate image and every complete reflection, each time for one
score from 1 to 5.

What is missing by nature counts as the released code has it: no final image 1 on every axis, a step without an image
1, an incomplete reflection 1.  What the judge failed to say is a *missing* judgement, and the record has no reward;
`worst_for_failures=True` is the released rule instead: an unreadable reply counts 1, and one out of range the nearest
end of the scale.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.rewards import functions
from ivr_jax.services import replies
from ivr_jax.trajectory import AXES

BEST, WORST = 5.0, 1.0
_ASKED = ("consistency", "instruction", "quality", "knowledge")  # the order of the released calls
_CRITERIA = {
    "instruction_score": "how completely the last image carries out the request",
    "consistency_score": "how well the last image keeps whatever the request does not ask to change",
    "quality_score": "how free the last image is of artefacts and broken shapes",
    "knowledge_score": "how well the last image agrees with physics, facts and common sense",
    "step_score": "how well the last image carries out this step, starting from the image or images before it",
    "reflection_score": "how truly the critique names the faults of the first image, and how far the second is better",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One question to the judge: under which key the score is expected, what is asked, the images (paths) in order."""

    key: str
    prompt: str
    images: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A record's reward.

    Attributes:
      total: None when a judgement is missing.
      components: final, step, format, reflection, each in [0, 1]; 0 for one that the record has nothing of, None for
        one that is missing.
      effective_weights: under the same names.
      missing: the keys of the judgements that failed.
    """

    total: float | None
    components: Mapping[str, float | None]
    effective_weights: Mapping[str, float]
    missing: tuple[str, ...] = ()


def calls(record: Mapping[str, Any]) -> tuple[Call, ...]:
    """The questions about a record, in the released order.  Raises UserError for a record that lacks a field."""
    try:
        request, facts = record["instruction"], record.get("explanation") or ""
        sources = tuple(record["source_images"])
        final = record["final_image"]
        found = [
            Call(f"{axis}_score", _question(f"{axis}_score", request, facts), (*sources, final))
            for axis in _ASKED
            if final
        ]
        before = sources
        for step in record["intermediate_steps"]:
            if step["image"]:
                found.append(
                    Call("step_score", _question("step_score", step["instruction"], ""), (*before, step["image"]))
                )
                before = (step["image"],)
        for reflection in record["reflections"]:
            if _complete(reflection):
                shown = (reflection["prev_image"], reflection["next_image"])
                text = f"{request}\nCritique of the first image: {reflection['text']}"
                found.append(Call("reflection_score", _question("reflection_score", text, facts), shown))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"a rollout record lacks a field, or has one of the wrong kind ({error}).", "Correct the record."
        ) from error
    return tuple(found)


def _question(key: str, request: str, facts: str) -> str:
    known = f"\nFacts that matter: {facts}" if facts else ""
    return (
        f"Request: {request}{known}\nRate from 1 (worst) to 5 (best) {_CRITERIA[key]}.\n"
        f'Answer with one JSON object: {{"{key}": a number from 1 to 5, "reasoning": "one sentence"}}'
    )


def _complete(reflection: Mapping[str, Any]) -> bool:
    return all(reflection.get(field) for field in ("prev_image", "text", "next_image"))


def read_score(reply: object, key: str) -> float | None:
    """The score from 1 to 5 under `key` in a judge's reply; None when the reply states none clearly."""
    try:
        return replies.read_score(reply, key) if isinstance(reply, str) else None
    except replies.Unusable:
        return None


def released_score(reply: object, key: str) -> float:
    """The score that the released code takes from a reply: 1 when it finds none, the nearest of 1 and 5 out of range.

    It reads the whole reply as JSON, or the first `{...}` in it, or `"key": number`.
    """
    score = _released_number(reply, key)
    return WORST if score is None or math.isnan(score) else min(max(score, WORST), BEST)


def _released_number(reply: object, key: str) -> float | None:
    if not isinstance(reply, str):
        return None
    block = re.search(r"\{.*?\}", reply, re.DOTALL)
    for text in (reply, block.group(0) if block else ""):
        try:
            value = json.loads(text)
            return float(value[key])
        except (ValueError, TypeError, KeyError, IndexError):
            continue
    said = re.search(rf'"?{re.escape(key)}"?\s*:\s*"?(-?\d+(?:\.\d+)?)', reply)
    return float(said.group(1)) if said else None


def format_score(text: str) -> float:
    """R_f in {0, 0.25, 0.5, 0.75, 1}: a quarter each for

    a think block; an image block; as many closing as opening tags of both kinds; a text that ends with `</image>` (and
    any white space) and has every `<image>` directly after a `</think>`.
    """
    thinks, images = "<think>.*?</think>", "<image>.*?</image>"
    balanced = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") for tag in ("think", "image"))
    led = re.search(r"(?<!</think>)<image>", text) is None
    marks = (
        re.search(thinks, text, re.DOTALL) is not None,
        re.search(images, text, re.DOTALL) is not None,
        balanced,
        text.rstrip().endswith("</image>") and led,
    )
    return sum(marks) / 4


def score_record(
    record: Mapping[str, Any],
    judge: Callable[[str, Sequence[str]], str],
    options: functions.RewardOptions = functions.RELEASED,
    worst_for_failures: bool = False,
) -> Scored:
    """Asks `judge` what `calls` lists, in that order, and combines the replies by `options`.

    A judge that raises an error has failed like one that answers nonsense.
    """
    scores: list[float | None] = []
    for call in calls(record):
        try:
            reply: object = judge(call.prompt, list(call.images))
        except Exception:  # whatever a user's judge may raise: the judgement is missing
            reply = None
        scores.append((released_score if worst_for_failures else read_score)(reply, call.key))
    return combine(record, scores, options)


def combine(
    record: Mapping[str, Any], scores: Sequence[float | None], options: functions.RewardOptions = functions.RELEASED
) -> Scored:
    """The reward of a record from the score (1-5) of each of its `calls`, None where the judgement is missing.

    Computed by `functions.total` in double precision.
    """
    asked, given = calls(record), iter(scores)
    if len(asked) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(asked)} questions")
    axes = {axis: next(given) if record["final_image"] else WORST for axis in _ASKED}
    final = [axes[axis] for axis in AXES]
    steps = [next(given) if step["image"] else WORST for step in record["intermediate_steps"]]
    reflections = [next(given) if _complete(item) else WORST for item in record["reflections"]]
    with jax.enable_x64(True):
        parts = functions.Components(
            np.array([[WORST] * len(AXES) if None in final else final]),
            np.array([format_score(record["assistant_text"])]),
            np.array([_mean(steps, options)]),
            np.array([bool(steps)]),
            np.array([_mean(reflections, options)]),
            np.array([bool(reflections)]),
        )
        outcome = functions.outcome(parts.scores, options)
        total = functions.total(
            outcome, parts.format, parts.step, parts.has_step, options, parts.reflection, parts.has_reflection
        )
        weights = functions.effective_weights(parts.has_step, parts.has_reflection, options)
    components = {
        "final": None if None in final else float(outcome[0]),
        "step": None if None in steps else float(parts.step[0]),
        "format": float(parts.format[0]),
        "reflection": None if None in reflections else float(parts.reflection[0]),
    }
    missing = tuple(call.key for call, score in zip(asked, scores, strict=True) if score is None)
    named = dict(zip(("final", "step", "format", "reflection"), map(float, weights[0]), strict=True))
    return Scored(None if missing else float(total[0]), components, named, missing)


def _mean(scores: Sequence[float | None], options: functions.RewardOptions) -> float:
    """Mean of what the scores count; 0 of none, and where one is missing (it is not used then)."""
    if not scores or None in scores:
        return 0.0
    return float(np.mean(functions.rescale(np.array(scores, np.float64), options.score_map)))
