"""The paired verdict test: does a model's verdict depend on the image it judges, or on the prompt alone?

Agreement with the truth cannot tell: wrong images follow hard prompts, so a verdict that only reads the prompt
agrees with the truth more often than chance.  Here one prompt keeps its place in the answer, and the image changes:

    own      the image that the model drew there
    exact    the image that the prompt asks for
    fault    the exact image with one wrong cell
    masked   no information: every code is 0

    sight         mean over prompts whose own image is wrong of P(pass | exact) - P(pass | own)
    sight_fault   mean over all prompts of P(pass | exact) - P(pass | fault)

A verdict that does not depend on the image has 0 in both, whatever the prompts; a perfect one has 1.  P(pass) is the
probability that all four axes pass (`verdicts`).

    RESULT = {"overall": SUMMARY, "by_edits" | "by_kind" | "by_round" | "by_mode" | "by_category": {group: SUMMARY}}

    SUMMARY = {
      "cases": how many prompts (or rounds of answers), "own_wrong": of them with a wrong own image,
      "pass_exact", "pass_fault", "pass_masked", "pass_own_right", "pass_own_wrong": mean P(pass | that image),
      "pass_exact_own_wrong": mean P(pass | exact) where the own image is wrong,
      "sight", "sight_fault": see above,
      "accuracy": share of own images on which the verdict (P >= .5) is right,
      "accuracy_masked": the same of the verdicts on masked images,
      "accuracy_constant": the same of the best constant verdict for each number of edits and round,
      "read_right": share of own images for which the observation names the wanted content of every place,
      "drawn_right": share of own images that are exact, over the same cases as `read_right`}

Every figure is an estimate with its 95% interval (`ivr_jax.report.intervals`).  `overall`, `by_edits`, `by_kind` and
`by_category` count first images alone, one a prompt; `by_round` and `by_mode` count every round that was scored, and
`by_mode` goes by what led to the image.  A prompt of several kinds of edit counts in each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ivr_jax.checkpoints.system import System
from ivr_jax.evaluate.verdicts import JudgedImage, Scorer, Verdict
from ivr_jax.protocol import codec
from ivr_jax.report.intervals import Estimate, mean, share
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.trajectory import Mode, Reflection, Round
from ivr_jax.world import judgement, language
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.draws import random_object
from ivr_jax.world.levels import level_of
from ivr_jax.world.render import random_wobble, render_edit
from ivr_jax.world.sampler import Task

OWN, EXACT, FAULT, MASKED = "own", "exact", "fault", "masked"
FIRST_ONLY = ("by_edits", "by_kind", "by_category")
GROUPINGS = (*FIRST_ONLY, "by_round", "by_mode")
EMPTIED = 0.3  # share of faults that empty the cell, where it holds something


@dataclasses.dataclass(frozen=True)
class Case:
    """One place of an answer where an image is judged.

    Attributes:
      context: int [T] tokens before the image.
      images: variant (`OWN` ...) -> int [rows, columns] codes; a variant may be missing.
      own_right: whether the own image is exact.
      groups: grouping -> the groups that it counts in.
      first: it is the first image of its answer.
      reads: whether an observation names the wanted content of every place; None for one that cannot be read.
    """

    context: np.ndarray
    images: Mapping[str, np.ndarray]
    own_right: bool
    groups: Mapping[str, tuple[str, ...]]
    first: bool = True
    reads: Callable[[str], bool | None] = lambda observation: None


def paired_test(cases: Sequence[Case], score: Scorer, seed: int = 0) -> dict[str, Any]:
    """The module's RESULT.

    Args:
      score: gives P(pass) of images in their places; a model's is `verdicts.VerdictScorer`.
      seed: of the bootstrap intervals.
    """
    wanted = [(number, variant) for number, case in enumerate(cases) for variant in case.images]
    verdicts = score([JudgedImage(cases[i].context, cases[i].images[variant]) for i, variant in wanted])
    scored: list[dict[str, Verdict]] = [{} for _ in cases]
    for (number, variant), verdict in zip(wanted, verdicts, strict=True):
        scored[number][variant] = verdict
    pairs = list(zip(cases, scored, strict=True))
    first = [pair for pair in pairs if pair[0].first]
    result: dict[str, Any] = {"overall": _summary(first, seed)}
    for grouping in GROUPINGS:
        groups: dict[str, list] = {}
        for pair in first if grouping in FIRST_ONLY else pairs:
            for group in pair[0].groups.get(grouping, ()):
                groups.setdefault(group, []).append(pair)
        result[grouping] = {group: _summary(groups[group], seed) for group in sorted(groups)}
    return result


def _summary(pairs: Sequence[tuple[Case, Mapping[str, Verdict]]], seed: int) -> dict[str, Any]:
    def passes(variant: str, own_right: bool | None = None) -> Estimate:
        chosen = [v[variant].passes for c, v in pairs if variant in v and own_right in (None, c.own_right)]
        return mean(chosen, seed, f"{variant}/{own_right}")

    def difference(other: str, own_right: bool | None = None) -> Estimate:
        chosen = [(c, v) for c, v in pairs if {EXACT, other} <= set(v) and own_right in (None, c.own_right)]
        return mean([v[EXACT].passes - v[other].passes for _, v in chosen], seed, f"sight/{other}")

    def accuracy(variant: str) -> Estimate:
        return share([(v[variant].passes >= 0.5) == c.own_right for c, v in pairs if {OWN, variant} <= set(v)])

    own = [c for c, v in pairs if OWN in v]
    read = [(c, c.reads(v[OWN].observation)) for c, v in pairs if OWN in v]
    read = [(c, right) for c, right in read if right is not None]
    return {
        "cases": len(pairs),
        "own_wrong": sum(not c.own_right for c in own),
        "pass_exact": passes(EXACT),
        "pass_fault": passes(FAULT),
        "pass_masked": passes(MASKED),
        "pass_own_right": passes(OWN, True),
        "pass_own_wrong": passes(OWN, False),
        "pass_exact_own_wrong": passes(EXACT, False),
        "sight": difference(OWN, False),
        "sight_fault": difference(FAULT),
        "accuracy": accuracy(OWN),
        "accuracy_masked": accuracy(MASKED),
        "accuracy_constant": share(_constant(own)),
        "read_right": share([right for _, right in read]),
        "drawn_right": share([c.own_right for c, _ in read]),
    }


def _constant(cases: Sequence[Case]) -> list[bool]:
    """Whether the best constant verdict of its class (number of edits and round) is right, case by case."""
    classes = [(case.groups.get("by_edits"), case.groups.get("by_round")) for case in cases]
    counts = Counter((class_, case.own_right) for class_, case in zip(classes, cases, strict=True))
    best = {class_: counts[class_, True] >= counts[class_, False] for class_ in classes}
    return [best[class_] == case.own_right for class_, case in zip(classes, cases, strict=True)]


# -- cases of the micro-world ------------------------------------------------------------------------------------------


def world_cases(
    system: System,
    tasks: Sequence[Task],
    rollout: Rollout,
    rows: Sequence[int],
    seed: int,
    reads: Callable[[Task, str], bool | None],
) -> list[Case]:
    """Every round of answers `rows` of `rollout`, which holds one answer to each of `tasks`; those that parsed.

    Args:
      seed: chooses the wrong cells.
      reads: whether an observation names the wanted content of every place of a task's target.
    """
    tokenizer = system.tokenizer
    rows = [row for row in rows if rollout.answers[row] is not None]
    exact = system.image_codec.encode([tasks[row].target_image for row in rows])
    faults = system.image_codec.encode([one_wrong_cell(tasks[row], seed, row) for row in rows])
    cases = []
    for row, exact_codes, fault_codes in zip(rows, exact, faults, strict=True):
        task, answer = tasks[row], rollout.answers[row]
        prompt, tokens = rollout.prompt(row), rollout.answer_tokens(row)
        right = WorldAnalyzer().exact_all(
            [task.sample] * len(answer.trajectory.images), [answer.images[name] for name in answer.trajectory.images]
        )
        for segment in (segment for segment in answer.segments if segment.part == "G"):
            own = codec.decode_image(tokenizer, tokens[segment.start : segment.end])
            variants = {OWN: own, EXACT: exact_codes, FAULT: fault_codes}
            if segment.round == 1:
                variants[MASKED] = np.zeros_like(own)
            cases.append(
                Case(
                    context=np.concatenate([prompt, tokens[: segment.start]]).astype(np.int32),
                    images={name: np.asarray(codes, np.int32) for name, codes in variants.items()},
                    own_right=bool(right[segment.round - 1]),
                    groups=_groups(task, segment.round, answer.trajectory.rounds[segment.round - 1]),
                    first=segment.round == 1,
                    reads=lambda observation, task=task: reads(task, observation),
                )
            )
    return cases


def reads_request(task: Task, observation: str) -> bool | None:
    """Whether an observation names the wanted content of every place of the target; None where there is none."""
    if not observation:
        return None
    found = language.parse_observation(observation)
    if found is None:
        return False
    wanted = tuple(content for content, _, _ in found.places)
    return wanted[: len(task.target.cells)] == tuple(map(judgement.value_words, task.target.cells))


def _groups(task: Task, number: int, round_: Round) -> dict[str, tuple[str, ...]]:
    cause = Mode.REFLECTION.value if isinstance(round_.cause, Reflection) else Mode.MULTI_STEP.value
    return {
        "by_edits": (str(len(task.edits)),),
        "by_kind": tuple(dict.fromkeys(edit.kind for edit in task.edits)),
        "by_category": (task.sample.category,),
        "by_round": (str(number),),
        "by_mode": ("first image" if round_.cause is None else cause,),
    }


def one_wrong_cell(task: Task, seed: int, index: int) -> np.ndarray:
    """The target image with one cell, any of them, that holds something else: uint8 [height, width, 3]."""
    rng = np.random.default_rng([seed, index])
    level = task.facts.level
    place = int(rng.integers(len(task.target.cells)))
    choices = [None] if rng.random() < EMPTIED else []
    choices += [random_object(rng, level_of(level), whole=True) for _ in range(8)]
    content = next(choice for choice in choices if choice != task.target.cells[place])
    faulty = task.target.with_values({place: content})
    return render_edit(task.target, task.target_image, faulty, level, random_wobble(rng, level))
