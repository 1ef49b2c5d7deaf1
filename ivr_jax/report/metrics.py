"""From answers to figures: what was right, how many images it took, and whether the model knows when it is right.

`evaluate(answers)` gives plain JSON (kept as `evaluation.json`), in which every figure is an estimate of
`ivr_jax.report.intervals`: `{"value", "low", "high", "n"}` with a 95% interval.

    {"schema": "ivr_jax.evaluation/1", "confidence": 0.95, "seed": int, "about": {anything the caller adds},
     "overall": SUMMARY,
     "by_split" | "by_suite" | "by_edits" | "by_mode" | "by_category": {group: SUMMARY}}

    SUMMARY = {
      "answers": how many,
      "exact": share whose final image equals the target,
      "right": share whose final image is right (equal to the target where known, else passed by the analyzer),
      "first_exact": the same as `exact` of the model's own first image (the baseline "own first image"),
      "gain": exact minus first_exact, answer by answer,
      "axes": {axis: mean score of the final image, 1-5},
      "outcome": R_o, the mean of the four axes over 5,
      "images": images drawn an answer,
      "tokens": tokens an answer,
      "modes": {"direct" | "reflection" | "multi_step" | "invalid": share},
      "valid": share of structurally valid answers,
      "rewards": {component: mean over the answers in which it is present},
      "calibration": {"images": CALIBRATION, "final": CALIBRATION}}

    CALIBRATION = {
      "pass_given_right": P(the model passes its image | the analyzer passes it),
      "pass_given_wrong": P(the model passes its image | the analyzer does not),
      "right_given_pass": P(the analyzer passes the image | the model does),
      "accuracy": share of agreement,
      "axes": {axis: share of agreement on that axis},
      "counts": {"right_passed", "right_failed", "wrong_passed", "wrong_failed"}}

Rules.  No image drawn is the model's fault: not exact, and 0 on every axis (so R_o 0).  A judge's failure is not: a
missing truth or score is left out, and `n` says over how many the figure stands.  Answers without a known target
are left out of `exact`.  `by_suite` groups splits by what stands before their "/"; `by_edits` takes
`sample.facts["edits"]` (a count) and leaves out samples that have none, and benchmark splits (those with a "/" in
their name): their edits are not of the training mixture's kinds, so a comparison by number would mislead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.report.answers import Answer, replace_file
from ivr_jax.report.intervals import CONFIDENCE, Estimate, mean, share
from ivr_jax.trajectory import AXES, Evaluation, Mode

EVALUATION_FILE = "evaluation.json"
SCHEMA = "ivr_jax.evaluation/1"
INVALID = "invalid"
MODES = (*(mode.value for mode in Mode), INVALID)


def evaluate(answers: Sequence[Answer], seed: int = 0, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every figure over `answers`, as the module says.

    Args:
      answers: of one model, in any order.
      seed: of the bootstrap; the same answers and seed give the same result.
      about: JSON values kept with the result (checkpoint, temperature, benchmark, date ...).

    Raises:
      UserError: when there is no answer.
    """
    if not answers:
        raise UserError("There is no answer to evaluate.", "Evaluate on at least one prompt.")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "confidence": CONFIDENCE,
        "seed": seed,
        "about": dict(about or {}),
        "overall": _summary(answers, seed),
    }
    for grouping, group_of in _GROUPINGS.items():
        groups: dict[str, list[Answer]] = {}
        for answer in answers:
            group = group_of(answer)
            if group:
                groups.setdefault(group, []).append(answer)
        result[grouping] = {group: _summary(groups[group], seed) for group in sorted(groups, key=_natural)}
    return result


def write_evaluation(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes `evaluation.json` into `folder` (made when missing), in one move."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        replace_file(Path(folder) / EVALUATION_FILE, text.encode())
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error}.", "Choose a folder you can write to.") from None


def read_evaluation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `evaluation.json`.  Raises UserError when it is missing or of another schema."""
    path = Path(folder) / EVALUATION_FILE
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}.", "Run the evaluation again.") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(f"{path} is not an evaluation of schema {SCHEMA}.", "Run the evaluation again.")
    return result


def edits_of(answer: Answer) -> int | None:
    """How many edits the request holds, as the micro-world's samples say; None when unknown."""
    edits = answer.sample.facts.get("edits")
    return edits if isinstance(edits, int) and not isinstance(edits, bool) else None


def mode_of(answer: Answer) -> str:
    """ "direct", "reflection", "multi_step" or "invalid"."""
    return INVALID if answer.mode is None else answer.mode.value


def is_valid(answer: Answer) -> bool:
    """Structurally valid: the format reward says so where it is present, else a mode was recognised."""
    return answer.mode is not None and answer.rewards.get("format", 1.0) >= 1.0


def _group_edits(answer: Answer) -> str:
    edits = edits_of(answer)
    return "" if edits is None or "/" in answer.split else str(edits)


_GROUPINGS: dict[str, Callable[[Answer], str]] = {
    "by_split": lambda answer: answer.split,
    "by_suite": lambda answer: answer.split.partition("/")[0] if "/" in answer.split else "",
    "by_edits": _group_edits,
    "by_mode": mode_of,
    "by_category": lambda answer: answer.sample.category,
}


def _natural(group: str) -> tuple[bool, int, str]:
    """Numbers by size, then words by letter; modes are few and stand where their letters put them."""
    return (not group.isdecimal(), int(group) if group.isdecimal() else 0, group)


def _summary(answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    exact = [_exact(answer, -1) for answer in answers]
    first = [_exact(answer, 0) for answer in answers]
    target_known = any(answer.exact for answer in answers)
    known = [(e, f) for e, f in zip(exact, first, strict=True) if e is not None and f is not None and target_known]
    scores = {axis: [s for answer in answers if (s := _score(answer, axis)) is not None] for axis in AXES}
    outcomes = [o for answer in answers if (o := _outcome(answer)) is not None]
    components = dict.fromkeys(name for answer in answers for name in answer.rewards)
    rewards = {name: [a.rewards[name] for a in answers if name in a.rewards] for name in components}
    return {
        "answers": len(answers),
        "exact": share([e for e, _ in known]),
        "right": share([answer.right for answer in answers if answer.right is not None]),
        "first_exact": share([f for _, f in known]),
        "gain": mean([float(e) - float(f) for e, f in known], seed, "gain"),
        "axes": {axis: mean(values, seed, f"axes/{axis}") for axis, values in scores.items()},
        "outcome": mean(outcomes, seed, "outcome"),
        "images": mean([len(answer.images) for answer in answers], seed, "images"),
        "tokens": mean([sum(s.tokens for s in a.segments) for a in answers if a.segments], seed, "tokens"),
        "modes": {mode: share([mode_of(answer) == mode for answer in answers]) for mode in MODES},
        "valid": share([is_valid(answer) for answer in answers]),
        "rewards": {name: mean(values, seed, f"rewards/{name}") for name, values in rewards.items()},
        "calibration": {
            # Without truths there are no pairs, however many images were drawn.
            "images": _calibration([pair for a in answers for pair in zip(a.own, a.truth, strict=True)]),
            "final": _calibration([(a.own[-1], a.truth[-1]) for a in answers if a.own and a.truth]),
        },
    }


def _exact(answer: Answer, index: int) -> bool | None:
    if not answer.images:
        return False
    return answer.exact[index] if answer.exact else None


def _score(answer: Answer, axis: str) -> float | None:
    if not answer.images:
        return 0.0
    truth = answer.truth[-1] if answer.truth else None
    return None if truth is None else getattr(truth, axis).score


def _outcome(answer: Answer) -> float | None:
    scores = [_score(answer, axis) for axis in AXES]
    return None if None in scores else sum(scores) / len(AXES) / 5


def _calibration(pairs: Sequence[tuple[Evaluation | None, Evaluation | None]]) -> dict[str, Any]:
    """`pairs` of (the model's own evaluation, the analyzer's) of one image each; incomplete pairs are left out."""
    whole = [(own, truth) for own, truth in pairs if own is not None and truth is not None]
    verdicts = [(own.passed, truth.passed) for own, truth in whole]

    def given(condition: int, value: bool, outcome: int) -> Estimate:
        return share([pair[outcome] for pair in verdicts if pair[condition] is value])

    return {
        "pass_given_right": given(1, True, 0),
        "pass_given_wrong": given(1, False, 0),
        "right_given_pass": given(0, True, 1),
        "accuracy": share([own == truth for own, truth in verdicts]),
        "axes": {
            axis: share([getattr(own, axis).passed == getattr(truth, axis).passed for own, truth in whole])
            for axis in AXES
        },
        "counts": {
            "right_passed": verdicts.count((True, True)),
            "right_failed": verdicts.count((False, True)),
            "wrong_passed": verdicts.count((True, False)),
            "wrong_failed": verdicts.count((False, False)),
        },
    }
