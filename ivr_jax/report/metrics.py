"""Figures of a set of answers: correctness, images per answer, and calibration of the model's own verdicts.

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
      "repaired": of the answers that reflect on a wrong first image, the share whose second image is exact,
      "garbled": share of steps, critiques and observations that are no sentence of the task's language,
      "rewards": {component: mean over the answers in which it is present},
      "calibration": {"images": CALIBRATION, "final": CALIBRATION}}

    CALIBRATION = {
      "pass_given_right": P(the model passes its image | the analyzer passes it),
      "pass_given_wrong": P(the model passes its image | the analyzer does not),
      "right_given_pass": P(the analyzer passes the image | the model does),
      "accuracy": share of agreement,
      "axes": {axis: share of agreement on that axis},
      "counts": {"right_passed", "right_failed", "wrong_passed", "wrong_failed"},
      "blind": {"pass_given_right", "pass_given_wrong", "accuracy"}}: what a rule that sees the prompt alone reaches

Blind rules.  A class is a number of edits (or a category) and a round.  `blind` holds P(pass | right) and
P(pass | wrong) of a rule that passes in each class as often as the model does, whatever the image, and the agreement of
the best constant verdict of each class.  A model is only known to look at its images where it differs from these; the
paired test (`ivr_jax.evaluate.paired`) measures that directly.

Rules.  No image drawn is the model's fault: not exact, and 0 on every axis (so R_o 0).  A judge's failure is not: a
missing truth or score is left out, and `n` counts the observations of a figure.  Answers without a known target
are left out of `exact`.  `by_suite` groups splits by the part before their "/"; `by_edits` takes
`sample.facts["edits"]` (a count) and leaves out samples that have none, and benchmark splits (those with a "/" in
their name): their edits are not of the training mixture's kinds, so a comparison by number would mislead.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.report.answers import EvaluatedAnswer, replace_file
from ivr_jax.report.intervals import CONFIDENCE, NOTHING, Estimate, mean, share
from ivr_jax.trajectory import AXES, Evaluation, Mode, Reflection

EVALUATION_FILE = "evaluation.json"
SCHEMA = "ivr_jax.evaluation/1"
INVALID = "invalid"
MODES = (*(mode.value for mode in Mode), INVALID)


def evaluate(
    answers: Sequence[EvaluatedAnswer], seed: int = 0, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
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
        groups: dict[str, list[EvaluatedAnswer]] = {}
        for answer in answers:
            group = group_of(answer)
            if group:
                groups.setdefault(group, []).append(answer)
        result[grouping] = {group: _summary(groups[group], seed) for group in sorted(groups, key=_natural)}
    return result


def write_evaluation(folder: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes `evaluation.json` into `folder` (made when missing), atomically."""
    replace_file(Path(folder) / EVALUATION_FILE, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def read_evaluation(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `evaluation.json`.  Raises UserError when it is missing or of another schema."""
    return files.read_json_object(Path(folder) / EVALUATION_FILE, "Run the evaluation again.", SCHEMA)


def edits_of(answer: EvaluatedAnswer) -> int | None:
    """How many edits the request holds, as the micro-world's samples say; None when unknown."""
    edits = answer.sample.facts.get("edits")
    return edits if isinstance(edits, int) and not isinstance(edits, bool) else None


def mode_of(answer: EvaluatedAnswer) -> str:
    """ "direct", "reflection", "multi_step" or "invalid"."""
    return INVALID if answer.mode is None else answer.mode.value


def is_valid(answer: EvaluatedAnswer) -> bool:
    """Structurally valid: the format reward says so where it is present, else a mode was recognised."""
    return answer.mode is not None and answer.rewards.get("format", 1.0) >= 1.0


def _group_edits(answer: EvaluatedAnswer) -> str:
    edits = edits_of(answer)
    return "" if edits is None or "/" in answer.split else str(edits)


_GROUPINGS: dict[str, Callable[[EvaluatedAnswer], str]] = {
    "by_split": lambda answer: answer.split,
    "by_suite": lambda answer: answer.split.partition("/")[0] if "/" in answer.split else "",
    "by_edits": _group_edits,
    "by_mode": mode_of,
    "by_category": lambda answer: answer.sample.category,
}


def _natural(group: str) -> tuple[bool, int, str]:
    """Sort key: numbers by size, then words alphabetically."""
    return (not group.isdecimal(), int(group) if group.isdecimal() else 0, group)


def _summary(answers: Sequence[EvaluatedAnswer], seed: int) -> dict[str, Any]:
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
        "repaired": share([answer.exact[1] for answer in answers if _reflects_on_wrong(answer)]),
        "garbled": share([garbled for answer in answers for garbled in _texts(answer)]),
        "rewards": {name: mean(values, seed, f"rewards/{name}") for name, values in rewards.items()},
        "calibration": {
            # Without truths there are no pairs, however many images were drawn.
            "images": _calibration([judged for a in answers for judged in _judged(a)]),
            "final": _calibration([_judged(a)[-1] for a in answers if a.own and a.truth]),
        },
    }


def _exact(answer: EvaluatedAnswer, index: int) -> bool | None:
    if not answer.images:
        return False
    return answer.exact[index] if answer.exact else None


def _score(answer: EvaluatedAnswer, axis: str) -> float | None:
    if not answer.images:
        return 0.0
    truth = answer.truth[-1] if answer.truth else None
    return None if truth is None else getattr(truth, axis).score


def _outcome(answer: EvaluatedAnswer) -> float | None:
    scores = [_score(answer, axis) for axis in AXES]
    return None if None in scores else sum(scores) / len(AXES) / 5


def _reflects_on_wrong(answer: EvaluatedAnswer) -> bool:
    """Whether the first image is not exact and the second one follows a critique of it."""
    rounds = () if answer.trajectory is None else answer.trajectory.rounds
    return len(rounds) > 1 and isinstance(rounds[1].cause, Reflection) and bool(answer.exact) and not answer.exact[0]


def _texts(answer: EvaluatedAnswer) -> list[bool]:
    """For every step, critique and observation of an answer whether it is garbled."""
    names = []
    for number, round_ in enumerate(() if answer.trajectory is None else answer.trajectory.rounds, 1):
        if round_.cause is not None:
            names.append(f"R{number - 1}" if isinstance(round_.cause, Reflection) else f"S{number}")
        if round_.evaluation.observation:
            names.append(f"E{number}")
    return [name in answer.garbled for name in names]


class _Judged(NamedTuple):
    """One image: the class of its prompt and round, the model's evaluation, and the analyzer's."""

    group: tuple[Any, ...]
    own: Evaluation | None
    truth: Evaluation | None


def _judged(answer: EvaluatedAnswer) -> list[_Judged]:
    edits = edits_of(answer)
    kind = answer.sample.category if edits is None else edits
    pairs = zip(answer.own, answer.truth, strict=True) if answer.truth else ()
    return [_Judged((kind, number), own, truth) for number, (own, truth) in enumerate(pairs)]


def _calibration(judged: Sequence[_Judged]) -> dict[str, Any]:
    """Agreement of evaluations with the analyzer's; images that lack one of the two are left out."""
    complete = [one for one in judged if one.own is not None and one.truth is not None]
    whole = [(one.own, one.truth) for one in complete]
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
        "blind": _blind([one.group for one in complete], verdicts),
    }


def _blind(groups: Sequence[Any], verdicts: Sequence[tuple[bool, bool]]) -> dict[str, Estimate]:
    """The figures of rules that see the class of the prompt alone, from (passed, right) image by image."""
    counts = Counter(zip(groups, verdicts, strict=True))
    rates, constant = {}, 0
    for group in set(groups):
        passed_right, failed_right, passed_wrong, failed_wrong = (
            counts[group, pair] for pair in ((True, True), (False, True), (True, False), (False, False))
        )
        right, wrong = passed_right + failed_right, passed_wrong + failed_wrong
        rates[group] = (passed_right + passed_wrong) / (right + wrong)
        constant += max(right, wrong)
    expected = {
        name: [rates[group] for group, (_, right) in zip(groups, verdicts, strict=True) if right is truth]
        for name, truth in (("pass_given_right", True), ("pass_given_wrong", False))
    }
    means = {name: math.fsum(values) / len(values) if values else None for name, values in expected.items()}
    result = {name: {**NOTHING, "value": means[name], "n": len(values)} for name, values in expected.items()}
    accuracy = constant / len(verdicts) if verdicts else None
    return result | {"accuracy": {**NOTHING, "value": accuracy, "n": len(verdicts)}}
