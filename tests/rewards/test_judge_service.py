"""The judge of a run: limits, deadlines, counts and checks, with analyzers that misbehave."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
from answer_tokens import evaluation, trajectory

from ivr_jax.errors import UserError
from ivr_jax.interfaces import ServiceFailed
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.rewards.judge import INVALID
from ivr_jax.rewards.judge_service import Check, JudgeOptions, JudgeService, same
from ivr_jax.trajectory import Reflection

ANSWER = trajectory([Reflection("why", "how")], [False, True])


def images(mark: int) -> dict[str, np.ndarray]:
    return {f"G{k}": np.full((2, 2, 3), mark, np.uint8) for k in (1, 2)}


class Analyzer:
    """Scores the instruction by the first pixel; 200 and more are faults: 200 fails, 201 hangs, 202 says nothing."""

    def __init__(self, scores=None):
        self.running = self.most = 0
        self.scores = iter(scores) if scores else None

    async def evaluate(self, sample, images, image):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            mark = int(image[0, 0, 0])
            if mark == 200:
                raise ServiceFailed("no answer.", "")
            if mark == 201:
                await asyncio.sleep(60)
            score = next(self.scores) if self.scores else None if mark == 202 else float(mark)
            return dataclasses.replace(
                evaluation(True), **{a: dataclasses.replace(evaluation(True).instruction, score=score)
                                     for a in ("instruction", "consistency", "quality", "knowledge")}
            )  # fmt: skip
        finally:
            self.running -= 1

    async def judge_reasoning(self, sample, images, kind, text, previous):
        return {"why": 1.0, "how": 0.5}[text]


def test_faults_are_missing_and_counted_and_nothing_waits_for_a_call_that_hangs():
    judge = JudgeService(same(Analyzer()), JudgeOptions(deadline=2.0))
    answers = [(ANSWER, images(mark)) for mark in (5, 200, 201, 202, 3)] + [None]
    clock = time.perf_counter()
    result = judge.submit(answers, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]).result()
    assert time.perf_counter() - clock < 30
    assert [j.present for j in result.judged] == [True, False, False, False, True, True]
    assert result.judged[0].scores == (5.0,) * 4 and result.judged[0].step == 0.75
    assert result.judged[4].format == 0.0 and result.judged[5] is INVALID
    usage = result.usage
    assert usage.calls == {"outcome": 5, "reasoning": 4} and usage.missing == {"outcome": 3}
    metrics = usage.metrics()
    assert metrics["judge_calls"] == 9 and metrics["judge_missing"] == (3.0, 9.0)
    assert metrics["judge_call_seconds"][1] == 9 and 1.0 <= metrics["judge_call_seconds_p95"] < 30
    assert any("deadline" in reason for reason in usage.reasons)
    again = judge.submit(answers[:1]).result()
    assert again.usage.calls == {"outcome": 1, "reasoning": 2}  # counted anew


def test_no_more_calls_run_at_a_time_than_allowed():
    analyzer = Analyzer()
    judge = JudgeService(same(analyzer), JudgeOptions(concurrency=3))
    judge.submit([(ANSWER, images(4))] * 10, [1.0] * 10).result()
    assert analyzer.most == 3


def test_submissions_are_judged_one_after_another_and_counted_each_for_itself():
    """Two at once: each tells of its own calls, faults and spending."""
    spent = {"judge_cost": 0.0}

    class Paid(Analyzer):
        async def evaluate(self, sample, images, image):
            evaluated = await super().evaluate(sample, images, image)
            spent["judge_cost"] += 1.0
            return evaluated

    judge = JudgeService(same(Paid()), totals=(lambda: dict(spent),))
    first = judge.submit([(ANSWER, images(5))] * 2 + [(ANSWER, images(200))])
    second = judge.submit([(ANSWER, images(3))])
    assert first.result().usage.calls == {"outcome": 3, "reasoning": 4} and first.result().usage.missing.total() == 1
    assert second.result().usage.calls == {"outcome": 1, "reasoning": 2} and not second.result().usage.missing
    assert [done.result().checks["judge_cost"] for done in (first, second)] == [2.0, 1.0]


def test_connections_are_closed_once_each_on_the_loop_that_used_them():
    class Connected(Analyzer):
        loops, closed = set(), 0

        async def evaluate(self, *args):
            self.loops.add(asyncio.get_running_loop())
            return await super().evaluate(*args)

        async def close(self):
            self.closed += 1
            self.loops.add(asyncio.get_running_loop())

    analyzer = Connected()
    judge = JudgeService(same(analyzer))
    judge.submit([(ANSWER, images(5))]).result()
    judge.close()
    assert analyzer.closed == 1 and len(analyzer.loops) == 1


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"deadline": -1.0}])
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        JudgeOptions(**wrong)


def test_each_part_has_its_own_judge():
    outcome, reasoning = Analyzer(), Analyzer()
    reasoning.evaluate = None
    outcome.judge_reasoning = None
    judge = JudgeService({"outcome": outcome, "step": outcome, "reasoning": reasoning})
    assert judge.submit([(ANSWER, images(4))]).result().judged[0].step == 0.75
    with pytest.raises(UserError):
        JudgeService({"outcome": outcome})


def test_another_error_is_raised_to_whoever_waits():
    judge = JudgeService(same(Analyzer()))
    odd = trajectory([Reflection("unheard of", "how")], [False, True])
    with pytest.raises(KeyError):
        judge.submit([(odd, images(5))]).result()


def test_variance_comes_of_repeated_calls_and_the_held_out_judge_is_compared():
    """Scores 1 and 5 of one image: R_o 0.2 and 1.0, variance 0.32; the held-out judge says 0.8 where ours says 1."""
    check = Check(Analyzer([1.0, 5.0] * 4), repeats=2, held_out=Analyzer([4.0] * 4), answers=2)
    judge = JudgeService(same(Analyzer()), JudgeOptions(RewardOptions(step_reward_evals="all"), check=check))
    answers = [(ANSWER, images(5))] * 4 + [None]
    assert judge.submit(answers).result().checks == {}
    result = judge.submit(answers, checked=True).result()
    assert result.checks["judge_variance"] == pytest.approx((0.64, 2.0))
    assert result.checks["held_out_outcome"] == pytest.approx((1.6, 2.0))
    assert result.checks["held_out_gap"] == pytest.approx((0.4, 2.0))
    assert result.usage.calls == {"outcome": 8, "reasoning": 8}  # the checks are not among them
