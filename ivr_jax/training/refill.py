"""New answers in place of those that the judge failed to judge (`grpo.refill`), so that their groups stay whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ivr_jax.rewards.judge_service import JudgeResult, JudgeUsage
from ivr_jax.sampling.batch import Samples, Usage
from ivr_jax.sampling.rollout import Rollout


def refill(
    rollout: Rollout,
    judge_result: JudgeResult,
    rounds: int,
    answer: Callable[[Sequence[int], int], Rollout],
    judge: Callable[[Rollout], JudgeResult],
) -> tuple[Rollout, JudgeResult, int]:
    """Asks anew, at most `rounds` times, where a judgement is missing.

    Args:
      answer: one new answer to the prompt of each of the numbered answers, by the policy that gave the others, and of
        the same length at most; the second argument is the round, from 1.
      judge: judges these.

    Returns:
      The rollout and the result of its judge, with as many answers as before, and how many of them are new.
    """
    replaced: set[int] = set()
    for number in range(1, rounds + 1):
        missing = [i for i, judged in enumerate(judge_result.judged) if not judged.present]
        if not missing:
            break
        new = answer(missing, number)
        rollout, judge_result = _with_answers(rollout, missing, new), _with_result(judge_result, missing, judge(new))
        replaced.update(missing)
    return rollout, judge_result, len(replaced)


def _with_answers(rollout: Rollout, numbers: Sequence[int], new: Rollout) -> Rollout:
    """`rollout` with the answers `numbers` replaced by those of `new`, in order; the cost adds up."""
    fields = {}
    for name, old in rollout.samples._asdict().items():
        if old is not None:
            fields[name] = old.copy()
            fields[name][list(numbers)] = getattr(new.samples, name)
    answers, errors = list(rollout.answers), list(rollout.errors)
    for place, answer, error in zip(numbers, new.answers, new.errors, strict=True):
        answers[place], errors[place] = answer, error
    usage = {
        field.name: getattr(rollout.usage, field.name) + getattr(new.usage, field.name)
        for field in dataclasses.fields(Usage)
    }
    return dataclasses.replace(
        rollout, samples=Samples(**fields), answers=tuple(answers), errors=tuple(errors), usage=Usage(**usage),
        seconds=rollout.seconds + new.seconds,
    )  # fmt: skip


def _with_result(judge_result: JudgeResult, numbers: Sequence[int], new: JudgeResult) -> JudgeResult:
    judged = list(judge_result.judged)
    for place, one in zip(numbers, new.judged, strict=True):
        judged[place] = one
    usage = JudgeUsage(**{
        field.name: getattr(judge_result.usage, field.name) + getattr(new.usage, field.name)
        for field in dataclasses.fields(JudgeUsage)
    })  # fmt: skip
    spent = {name: judge_result.checks.get(name, 0.0) + value for name, value in new.checks.items()}
    return JudgeResult(judged, usage, judge_result.seconds + new.seconds, {**judge_result.checks, **spent})
