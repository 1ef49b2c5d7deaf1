"""Several processes as one RL run: each samples and judges answers to its own prompts, and all learn from all of them.

What is exchanged is small: tokens and their log-probabilities, what the answers say, and judgements.  Pixels stay with
the process that made them.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from ivr_jax import distributed
from ivr_jax.rewards.judge import Judged
from ivr_jax.rewards.judge_service import JudgeResult, JudgeUsage
from ivr_jax.sampling.batch import Samples, Usage
from ivr_jax.sampling.rollout import Answer, Rollout
from ivr_jax.trajectory import evaluation_from_json, evaluation_to_json, trajectory_from_json, trajectory_to_json


def global_rollout(mine: Rollout, pad: int) -> Rollout:
    """The rollout of all processes, in their order; answers of others come without their images and segments."""
    if jax.process_count() == 1:
        return mine
    arrays = {f"samples/{name}": x for name, x in mine.samples._asdict().items() if x is not None}
    arrays |= {"prompts/0": mine.prompts, "lengths/0": mine.prompt_lengths}
    for k, (prompts, lengths) in enumerate(mine.unconditional, start=1):
        arrays |= {f"prompts/{k}": prompts, f"lengths/{k}": lengths}
    parts = distributed.gather_arrays(arrays)
    trajectories = [None if answer is None else trajectory_to_json(answer.trajectory) for answer in mine.answers]
    usage = dataclasses.asdict(mine.usage)
    gathered = distributed.gather(
        {"trajectories": trajectories, "errors": mine.errors, "usage": usage, "seconds": mine.seconds}
    )
    answers: list[Answer | None] = []
    for process, theirs in enumerate(gathered):
        if process == jax.process_index():
            answers += mine.answers
        else:
            answers += [None if a is None else Answer(trajectory_from_json(a), {}, ()) for a in theirs["trajectories"]]

    def joined(name: str) -> np.ndarray:
        return _stacked([part[name] for part in parts], pad)

    usage = [theirs["usage"] for theirs in gathered]
    return Rollout(
        joined("prompts/0"), joined("lengths/0"),
        Samples(*(joined(key) if (key := f"samples/{name}") in arrays else None for name in Samples._fields)),
        tuple(answers), tuple(error for theirs in gathered for error in theirs["errors"]), mine.group_size,
        tuple((joined(f"prompts/{k + 1}"), joined(f"lengths/{k + 1}")) for k in range(len(mine.unconditional))),
        Usage(**{name: sum(one[name] for one in usage) for name in usage[0]}),
        max(theirs["seconds"] for theirs in gathered), mine.draft_length,
    )  # fmt: skip


def global_judge_result(mine: JudgeResult) -> JudgeResult:
    """The judgements of all processes, in their order, with their counts and costs added up."""
    if jax.process_count() == 1:
        return mine
    usage = {name: getattr(mine.usage, name) for name in ("calls", "missing", "seconds", "reasons")}
    gathered = distributed.gather(
        {"judged": [_to_json(one) for one in mine.judged], "usage": usage, "seconds": mine.seconds,
         "checks": mine.checks}
    )  # fmt: skip
    total, checks = JudgeUsage(), {}
    for theirs in gathered:
        for name in ("calls", "missing", "reasons"):
            getattr(total, name).update(collections.Counter(theirs["usage"][name]))
        total.seconds += theirs["usage"]["seconds"]
        for name, value in theirs["checks"].items():
            pair = tuple(value) if isinstance(value, list) else value
            before = checks.get(name)
            if before is not None:
                pair = tuple(map(sum, zip(before, pair, strict=True))) if isinstance(pair, tuple) else before + pair
            checks[name] = pair
    judged = [_from_json(one) for theirs in gathered for one in theirs["judged"]]
    return JudgeResult(judged, total, max(theirs["seconds"] for theirs in gathered), checks)


def _stacked(parts: list[np.ndarray], pad: int) -> np.ndarray:
    """Parts [n, T] (or [n, ...]) one under the other, shorter ones filled up on the right."""
    if parts[0].ndim != 2:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    filled = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=pad) for p in parts]
    return np.concatenate(filled)


def _to_json(judged: Judged) -> dict[str, Any]:
    fields = {field.name: getattr(judged, field.name) for field in dataclasses.fields(judged)}
    truth = [None if one is None else evaluation_to_json(one) for one in judged.truth]
    return fields | {"format": float(judged.format), "truth": truth}


def _from_json(value: dict[str, Any]) -> Judged:
    truth = tuple(None if one is None else evaluation_from_json(one) for one in value["truth"])
    scores = None if value["scores"] is None else tuple(value["scores"])
    return Judged(**{**value, "scores": scores, "truth": truth})
