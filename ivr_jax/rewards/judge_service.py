"""The judge of a run: who judges what, how many at a time and for how long, and what it cost.

Calls run on an event loop of their own in a background thread, so that a rollout can be sampled while the last one is
judged.  `JudgeService` takes submissions one after another; whatever goes wrong with a call, from a time-out to a score
out of range, ends as a missing judgement and in the counts, never as a score.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ivr_jax.config import NotNegative, Positive, Section
from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels
from ivr_jax.interfaces import Analyzer, ServiceFailed
from ivr_jax.rewards.functions import PAPER, RewardOptions, outcome
from ivr_jax.rewards.judge import Judged, in_range, judge_answers
from ivr_jax.trajectory import Evaluation, Sample, Trajectory

T = TypeVar("T")
PARTS = ("outcome", "step", "reasoning")


@dataclasses.dataclass
class JudgeUsage:
    """What a submission asked: calls and missing judgements by part, and the seconds that each call took."""

    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def metrics(self) -> dict[str, Any]:
        """Scalars and (sum, denominator) pairs, for the log."""
        metrics: dict[str, Any] = {
            "judge_calls": float(self.calls.total()),
            "judge_missing": (float(self.missing.total()), float(self.calls.total())),
        }
        if self.seconds:
            metrics["judge_call_seconds"] = (float(np.sum(self.seconds)), float(len(self.seconds)))
            metrics["judge_call_seconds_p95"] = float(np.quantile(self.seconds, 0.95))
        return metrics


@dataclasses.dataclass(frozen=True)
class Check:
    """Checks of the judge, made on a few answers now and then.

    Attributes:
      again: an analyzer that answers afresh each time (no record of earlier answers), asked `repeats` times.
      repeats: calls for one image; below 2 nothing is repeated.
      held_out: an analyzer that never decides a reward; None without.
      answers: how many answers are checked each time.
    """

    again: Analyzer
    repeats: int = 0
    held_out: Analyzer | None = None
    answers: int = 8


@dataclasses.dataclass(frozen=True)
class JudgeOptions(Section, name="judge"):
    """How a rollout is judged.

    Attributes:
      reward: decides what has to be judged.
      every_image: evaluate all images, not only those that a reward needs.
      concurrency: most calls at a time.
      deadline: seconds for one judgement, its retries included; 0: no bound.
      check: what to check when a submission asks for it.
    """

    reward: RewardOptions = PAPER
    every_image: bool = False
    concurrency: Positive = 64
    deadline: NotNegative = 0.0
    check: Check | None = None


@dataclasses.dataclass(frozen=True)
class JudgeResult:
    """The result of one submission: an answer's components each, the cost, and further metrics (checks, spending)."""

    judged: list[Judged]
    usage: JudgeUsage
    seconds: float
    checks: dict[str, Any]


def same(analyzer: Analyzer) -> dict[str, Analyzer]:
    """One analyzer for all parts."""
    return dict.fromkeys(PARTS, analyzer)


class JudgeService:
    """Judges rollouts in the background, one submission after another.

    Args:
      analyzers: part -> analyzer: "outcome" evaluates images, "step" evaluates one step's image, "reasoning" rates
        texts (`same(analyzer)` for one that does it all).
      totals: functions that say what the services have spent so far, as running totals by name.
    """

    def __init__(
        self,
        analyzers: Mapping[str, Analyzer],
        options: JudgeOptions | None = None,
        totals: Sequence[Callable[[], Mapping[str, float]]] = (),
    ):
        if set(analyzers) != set(PARTS):
            raise UserError("the judge is not fully described.", f"Name analyzers for {', '.join(PARTS)}.")
        self._analyzers, self._options, self._totals = dict(analyzers), options or JudgeOptions(), tuple(totals)
        self._calls = asyncio.Semaphore(self._options.concurrency)
        self._submission = asyncio.Lock()

    def submit(
        self,
        answers: Sequence[tuple[Trajectory, Images] | None],
        format_rewards: Sequence[float] | None = None,
        checked: bool = False,
    ) -> concurrent.futures.Future[JudgeResult]:
        """Starts judging as soon as earlier submissions have ended.

        The future raises errors that are not failures of the judge.
        """
        return _in_background(self._judge(answers, format_rewards, checked))

    def close(self) -> None:
        """Closes the connections of the analyzers that hold some."""
        check = self._options.check
        analyzers = [*self._analyzers.values(), *((check.again, check.held_out) if check else ())]
        unique = {id(a): a for a in analyzers if hasattr(a, "close")}

        async def close_all() -> None:
            for analyzer in unique.values():
                await analyzer.close()

        if unique:
            _in_background(close_all()).result()

    def _analyzer(self, analyzers: Mapping[str, Analyzer], usage: JudgeUsage | None = None) -> _LimitedAnalyzer:
        """`analyzers` as one, under the service's limits."""
        return _LimitedAnalyzer(analyzers, self._calls, self._options.deadline, usage or JudgeUsage())

    async def _judge(self, answers: Any, format_rewards: Any, checked: bool) -> JudgeResult:
        options, usage = self._options, JudgeUsage()
        async with self._submission:  # spending can only be told of one at a time
            clock, before = time.perf_counter(), self._spent()
            analyzer = self._analyzer(self._analyzers, usage)
            judged = await judge_answers(analyzer, answers, options.every_image, options.reward, format_rewards)
            seconds = time.perf_counter() - clock
            checks = await self._checks(options.check, answers, judged) if checked and options.check else {}
            spent = {name: total - before[name] for name, total in self._spent().items()}
        return JudgeResult(judged, usage, seconds, checks | spent)

    def _spent(self) -> dict[str, float]:
        spent: collections.Counter[str] = collections.Counter()
        for totals in self._totals:
            spent.update(totals())
        return dict(spent)

    async def _checks(self, check: Check, answers: Any, judged: Sequence[Judged]) -> dict[str, Any]:
        """How much repeated judgements vary, and how far a held-out judge is from the one that decides."""
        chosen = [(a, j) for a, j in zip(answers, judged, strict=True) if a is not None and j.scores is not None]
        chosen = chosen[:: max(1, len(chosen) // check.answers)][: check.answers]
        metrics: dict[str, Any] = {}
        if check.repeats > 1:
            again = self._analyzer(same(check.again))
            variances = []
            for answer, _ in chosen:
                calls = [self._outcome(again, *answer) for _ in range(check.repeats)]
                values = [value for value in await asyncio.gather(*calls) if value is not None]
                if len(values) > 1:
                    variances.append(float(np.var(values, ddof=1)))
            metrics["judge_variance"] = (sum(variances), float(len(variances)))
        if check.held_out is not None:
            held_out = self._analyzer(same(check.held_out))
            theirs = await asyncio.gather(*(self._outcome(held_out, *answer) for answer, _ in chosen))
            ours = [float(outcome(np.asarray(j.scores), self._options.reward)) for _, j in chosen]
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
            metrics["held_out_outcome"] = (sum(b for _, b in pairs), float(len(pairs)))
            metrics["held_out_gap"] = (sum(a - b for a, b in pairs), float(len(pairs)))
        return metrics

    async def _outcome(self, analyzer: Analyzer, trajectory: Trajectory, images: Images) -> float | None:
        """R_o of the final image by another analyzer; None when it fails."""
        reward = dataclasses.replace(self._options.reward, step_reward_evals="none")
        direct = Trajectory(trajectory.sample, (dataclasses.replace(trajectory.rounds[-1], cause=None),))
        [judged] = await judge_answers(analyzer, [(direct, images)], options=reward)
        return None if judged.scores is None else float(outcome(np.asarray(judged.scores), reward))


class _LimitedAnalyzer:
    """The analyzers of the parts as one `Analyzer`, with a bound on calls at a time and on seconds, and with counts."""

    def __init__(
        self, analyzers: Mapping[str, Analyzer], calls: asyncio.Semaphore, deadline: float, usage: JudgeUsage
    ):
        self._analyzers, self._calls, self._deadline, self._usage = analyzers, calls, deadline, usage

    async def evaluate(self, sample: Sample, images: Images, image: Pixels) -> Evaluation:
        return await self._ask("outcome", lambda judge: judge.evaluate(sample, images, image))

    async def evaluate_step(
        self, sample: Sample, images: Images, instruction: str, previous: Sequence[Pixels], image: Pixels
    ) -> Evaluation:
        return await self._ask("step", lambda judge: judge.evaluate_step(sample, images, instruction, previous, image))

    async def judge_reasoning(
        self, sample: Sample, images: Images, kind: str, text: str, previous: Sequence[Pixels]
    ) -> float:
        return await self._ask("reasoning", lambda judge: judge.judge_reasoning(sample, images, kind, text, previous))

    async def _ask(self, part: str, ask: Callable[[Analyzer], Awaitable[T]]) -> T:
        async with self._calls:
            self._usage.calls[part] += 1
            clock = time.perf_counter()
            try:
                async with asyncio.timeout(self._deadline or None):
                    answer = await ask(self._analyzers[part])
                if not _usable(answer):
                    raise ServiceFailed(f"the judge of {part} gave no number in range.", "Scores are 1-5, ratings 0-1.")
                return answer
            except TimeoutError:
                self._count_missing(part, "deadline")
                raise ServiceFailed(f"the judge of {part} took more than {self._deadline:g} s.", "Ask again.") from None
            except ServiceFailed as error:
                self._count_missing(part, error.what)
                raise
            finally:
                self._usage.seconds.append(time.perf_counter() - clock)

    def _count_missing(self, part: str, reason: str) -> None:
        self._usage.missing[part] += 1
        self._usage.reasons[reason[:120]] += 1


def _usable(answer: Any) -> bool:
    """Whether a judgement is complete: four scores from 1 to 5, or a rating from 0 to 1."""
    if isinstance(answer, Evaluation):
        return all(in_range(score, 1, 5) for score in answer.scores)
    return in_range(answer, 0, 1)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of the background thread; clients keep their connections on it between submissions."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judge", daemon=True).start()
    return loop


def _in_background(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    return asyncio.run_coroutine_threadsafe(work, _loop())
