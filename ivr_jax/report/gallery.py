"""Answers round by round: from records to the values that the page's template shows.

A *section* is a row of answers under a heading ("Answers", "Training samples of SFT").  Answers to the same sample
are grouped, so that arms can be compared on one prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ivr_jax.images import data_uri
from ivr_jax.report.answers import EvaluatedAnswer, SegmentRecord
from ivr_jax.report.metrics import MODES, edits_of, mode_of
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Reflection, Round

LONGEST_TEXT = 1200  # characters of one text shown on the page; answers.jsonl holds the rest
LARGEST_SIDE = 320  # pixels; larger images are reduced for the page
PIXELATED_SIDE = 128  # pixels; up to this size an image is enlarged with hard pixels
_RESULTS = ("right", "wrong", "false_pass")  # a false pass is a wrong final image that the model passed
_REWARD_ORDER = ("total", "outcome", "format", "step", "reflection", "bonus")


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """An answer in a gallery section: under which arm, and where its images are (name -> uint8 [height, width, 3]).

    `mode` replaces the answer's own where that says nothing (interleaved answers, images of another model); `notes` are
    headings and texts shown below the answer, such as a judge's.
    """

    arm: str
    answer: EvaluatedAnswer
    images: Mapping[str, np.ndarray]
    mode: str = ""
    notes: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class GallerySection:
    """A heading, a sentence, and the answers below it."""

    title: str
    intro: str
    items: tuple[GalleryItem, ...]


def choose(
    arms: Mapping[str, tuple[Sequence[EvaluatedAnswer], Mapping[str, np.ndarray]]],
    prompts: int,
    seed: int,
) -> tuple[GalleryItem, ...]:
    """A fair choice of `prompts` samples, each with its answer of every arm.

    Samples are taken in turn from the strata (mode, right or wrong) of the *last* arm, so that rare kinds of answer
    are seen; within a stratum `seed` decides.  Samples that every arm answered come first.

    Args:
      arms: arm title -> (answers, images).
    """
    if not arms:
        return ()
    by_key = {arm: {answer.key: answer for answer in answers} for arm, (answers, _) in arms.items()}
    last = list(by_key.values())[-1]
    keys = list(last)
    np.random.default_rng(seed).shuffle(keys)
    keys.sort(key=lambda key: -sum(key in answers for answers in by_key.values()))
    strata: dict[tuple[str, bool | None], list[str]] = {}
    for key in keys:
        strata.setdefault((mode_of(last[key]), last[key].right), []).append(key)
    chosen: list[str] = []
    for turn in range(max(map(len, strata.values()), default=0)):
        chosen += [stratum[turn] for _, stratum in sorted(strata.items(), key=str) if turn < len(stratum)]
    return tuple(
        GalleryItem(arm, by_key[arm][key], images)
        for key in chosen[:prompts]
        for arm, (_, images) in arms.items()
        if key in by_key[arm]
    )


def section_view(section: GallerySection) -> dict[str, Any]:
    """What the template needs of a section: plain values, every text still unescaped."""
    groups: dict[str, dict[str, Any]] = {}
    for item in section.items:
        sample = item.answer.sample
        if sample.key not in groups:
            groups[sample.key] = {
                "prompt": _clip(sample.prompt),
                "key": sample.key,
                "split": item.answer.split,
                "category": sample.category.replace("_", " "),
                "edits": edits_of(item.answer),
                "explanation": _clip(sample.explanation),
                "sources": [_picture(name, item.images) for name in sample.sources],
                "answers": [],
            }
        groups[sample.key]["answers"].append(_answer_view(item))
    answers = [answer for group in groups.values() for answer in group["answers"]]
    longest = max((answer["tokens"] for answer in answers), default=0)
    for answer in answers:  # bars of one section share their scale
        answer["width"] = round(100 * answer["tokens"] / longest, 1) if longest else 0.0
    return {
        "title": section.title,
        "intro": section.intro,
        "groups": list(groups.values()),
        "count": len(answers),
        "arms": list(dict.fromkeys(answer["arm"] for answer in answers)),
        "modes": [mode for mode in MODES if any(answer["mode"] == mode for answer in answers)],
        "results": [result for result in _RESULTS if any(result in answer["results"] for answer in answers)],
    }


def _answer_view(item: GalleryItem) -> dict[str, Any]:
    answer = item.answer
    own = answer.own[-1] if answer.own else None
    results = {True: ["right"], False: ["wrong"], None: []}[answer.right]
    if answer.right is False and own is not None and own.passed:
        results = [*results, "false_pass"]
    total = sum(segment.tokens for segment in answer.segments)
    trained = sum(segment.tokens for segment in answer.segments if segment.loss)
    rewards = sorted(
        answer.rewards.items(),
        key=lambda pair: (_REWARD_ORDER.index(pair[0]) if pair[0] in _REWARD_ORDER else len(_REWARD_ORDER), pair[0]),
    )
    panels, before = _parsed(item) if answer.trajectory is not None else _unparsed(item)
    return {
        "arm": item.arm,
        "mode": item.mode or mode_of(answer),
        "notes": [(heading, _clip(text)) for heading, text in item.notes],
        "right": answer.right,
        "results": results,
        "error": _clip(answer.error),
        "garbled": list(answer.garbled),
        "rewards": [(name, f"{value:.2f}") for name, value in rewards],
        "panels": panels,
        "before": before,
        "tokens": total,
        "trained": trained,
        "segments": [_segment_view(segment, trained > 0) for segment in answer.segments],
    }


def _parsed(item: GalleryItem) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The panels of an answer that parsed: each round's image and the texts after it; none precedes the first."""
    context, rounds = _context_only(item.answer.segments), item.answer.trajectory.rounds
    panels = []
    for index, round_ in enumerate(rounds):
        texts = _cause_texts(rounds[index + 1], index + 2, context) if index + 1 < len(rounds) else []
        panels.append(_panel(item, index, texts, round_.evaluation, context))
    return panels, []


def _unparsed(item: GalleryItem) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The panels of an answer that did not parse: its images in order with whatever was written after each.

    Returns also what was written before the first image.
    """
    context, panels = _context_only(item.answer.segments), []
    before: list[dict[str, Any]] = []
    for segment in item.answer.segments:
        if segment.image in item.answer.images[len(panels) :]:
            panels.append(_panel(item, len(panels), [], None, context))
        elif segment.text.strip():
            text = _said(segment.kind, segment.kind, segment.text, context)
            (panels[-1]["texts"] if panels else before).append(text)
    panels += [_panel(item, index, [], None, context) for index in range(len(panels), len(item.answer.images))]
    return panels, before


def _cause_texts(round_: Round, number: int, context: set[str]) -> list[dict[str, Any]]:
    """What led to round `number`, 2 or later."""
    if isinstance(round_.cause, Reflection):
        kind = f"R{number - 1}"
        return [
            _said(kind, "What went wrong", round_.cause.failure_analysis, context),
            _said(kind, "What to do", round_.cause.improvement_plan, context),
        ]
    return [_said(f"S{number}", f"Next, step {number}", round_.cause.instruction, context)]


def _said(kind: str, heading: str, text: str, context: set[str]) -> dict[str, Any]:
    return {"colour": _colour(kind), "heading": heading, "text": _clip(text), "context": kind in context}


def _colour(kind: str) -> str:
    """The style of a segment: its letter in the paper's notation, or "other"."""
    return kind[0] if kind[0] in "GERS" and kind[1:].isdecimal() else "other"


def _panel(
    item: GalleryItem,
    index: int,
    texts: list[dict[str, Any]],
    own: Evaluation | None,
    context: set[str],
) -> dict[str, Any]:
    answer = item.answer
    truth = answer.truth[index] if answer.truth else None
    return {
        "label": f"G{index + 1}",
        "texts": texts,
        "picture": _picture(answer.images[index], item.images),
        "context": f"G{index + 1}" in context,
        "verdict_context": f"E{index + 1}" in context,
        "exact": answer.exact[index] if answer.exact else None,
        "own": None if own is None else own.passed,
        "truth": None if truth is None else truth.passed,
        "observation": "" if own is None else _clip(own.observation),
        "verdicts": [_verdict(axis, own, truth) for axis in AXES] if own is not None or truth is not None else [],
    }


def _verdict(axis: str, own: Evaluation | None, truth: Evaluation | None) -> dict[str, Any]:
    """One axis: what the model thinks, what is true, and whether the two differ."""
    ours, theirs = getattr(own, axis, None), getattr(truth, axis, None)
    score = None if theirs is None or theirs.score is None else f"{theirs.score:g}"
    return {
        "axis": axis,
        "score": score,
        "own": ours and {"passed": ours.passed, "reason": _clip(ours.reason)},
        "truth": theirs and {"passed": theirs.passed, "reason": _clip(theirs.reason)},
        "why": _failures(ours, theirs),
        "differ": ours is not None and theirs is not None and ours.passed != theirs.passed,
    }


def _failures(own: AxisVerdict | None, truth: AxisVerdict | None) -> list[tuple[str, str]]:
    """The reasons against an axis, by who gives them; one entry when both give the same."""
    said = [
        (who, _clip(verdict.reason))
        for who, verdict in (("answer", own), ("truth", truth))
        if verdict is not None and not verdict.passed
    ]
    return [("both", said[0][1])] if len(said) == 2 and said[0][1] == said[1][1] else said


def _segment_view(segment: SegmentRecord, any_loss: bool) -> dict[str, Any]:
    carried = ("carries loss" if segment.loss else "context only") if any_loss else "no loss here"
    return {
        "kind": segment.kind,
        "tokens": segment.tokens,
        "colour": _colour(segment.kind),
        "context": any_loss and not segment.loss,
        "title": f"{segment.kind}: {segment.tokens} tokens, {carried}",
    }


def _context_only(segments: Sequence[SegmentRecord]) -> set[str]:
    """The kinds that carry no loss, when others do; empty when none does (an evaluation trains on nothing)."""
    if not any(segment.loss for segment in segments):
        return set()
    return {segment.kind for segment in segments if not segment.loss}


def _clip(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} \u2026 ({len(text) - LONGEST_TEXT} more characters)"


def _picture(name: str, images: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """An image as a data URI; `uri` is None when it is not among `images`."""
    if name not in images:
        return {"name": name, "uri": None, "size": "not stored"}
    picture = Image.fromarray(images[name])
    size, smooth = f"{picture.width} \u00d7 {picture.height}", max(picture.size) > PIXELATED_SIDE
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)  # never enlarges
    return {"name": name, "uri": data_uri(np.asarray(picture)), "size": size, "smooth": smooth}
