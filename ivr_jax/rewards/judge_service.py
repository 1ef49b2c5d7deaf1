"""The judge of a run: who judges what, how many at a time and for how long, and what it cost.

Calls run on an event loop of their own in a background thread, so that a rollout can be drawn while the last one is
judged.  A `Panel` joins the analyzers of the components into one; whatever goes wrong with a call, from a time-out to
a score out of range, ends as a missing judgement and in the counts, never as a score.
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

from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels
from ivr_jax.interfaces import Analyzer, ServiceFailed
from ivr_jax.rewards.functions import PAPER, RewardOptions, outcome
from ivr_jax.rewards.judge import Judged, in_range, judge_answers
from ivr_jax.trajectory import Evaluation, Sample, Trajectory

T = TypeVar("T")
PARTS = ("outcome", "step", "reasoning")


@dataclasses.dataclass
class Usage:
    """What a panel was asked: calls and missing judgements by part, and the seconds that each call took."""

    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    missing: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def metrics(self) -> dict[str, Any]:
        """Scalars and (sum, denominator) pairs, for the log."""
        found: dict[str, Any] = {
            "judge_calls": float(self.calls.total()),
            "judge_missing": (float(self.missing.total()), float(self.calls.total())),
        }
        if self.seconds:
            found["judge_call_seconds"] = (float(np.sum(self.seconds)), float(len(self.seconds)))
            found["judge_call_seconds_p95"] = float(np.quantile(self.seconds, 0.95))
        return found


class Panel:
    """The analyzers of the parts as one `Analyzer`, for judging only.

    Args:
      analyzers: part -> analyzer: "outcome" evaluates images, "step" evaluates one step's image, "reasoning" rates
        texts.
      concurrency: most calls at a time.
      deadline: seconds for one judgement, its retries included; 0 waits as long as it takes.
    """

    def __init__(self, analyzers: Mapping[str, Analyzer], concurrency: int = 64, deadline: float = 0.0):
        if set(analyzers) != set(PARTS):
            raise UserError("the judge is not fully described.", f"Name analyzers for {', '.join(PARTS)}.")
        if concurrency < 1 or deadline < 0:
            raise UserError(f"a judge with {concurrency} calls at a time and a deadline of {deadline} s cannot work.",
                            "Set judge.concurrency to 1 or more, judge.deadline to 0 (none) or more seconds.")
        self._analyzers, self._deadline = dict(analyzers), deadline
        self._slots = asyncio.Semaphore(concurrency)
        self.usage = Usage()

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
        async with self._slots:
            self.usage.calls[part] += 1
            clock = time.perf_counter()
            try:
                async with asyncio.timeout(self._deadline or None):
                    found = await ask(self._analyzers[part])
                if not _usable(found):
                    raise ServiceFailed(f"the judge of {part} gave no number in range.", "Scores are 1-5, ratings 0-1.")
                return found
            except TimeoutError:
                self._missed(part, "deadline")
                raise ServiceFailed(f"the judge of {part} took more than {self._deadline:g} s.", "Ask again.") from None
            except ServiceFailed as error:
                self._missed(part, error.what)
                raise
            finally:
                self.usage.seconds.append(time.perf_counter() - clock)

    def _missed(self, part: str, reason: str) -> None:
        self.usage.missing[part] += 1
        self.usage.reasons[reason[:120]] += 1


def _usable(found: Any) -> bool:
    """Whether a judgement is all there: four scores from 1 to 5, or a rating from 0 to 1."""
    if isinstance(found, Evaluation):
        return all(in_range(score, 1, 5) for score in found.scores)
    return in_range(found, 0, 1)


def same(analyzer: Analyzer) -> dict[str, Analyzer]:
    """One analyzer for all parts."""
    return dict.fromkeys(PARTS, analyzer)


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
class Verdicts:
    """What came of one submission: an answer's components each, what it took, and further metrics (checks, cost)."""

    judged: list[Judged]
    usage: Usage
    seconds: float
    checks: dict[str, Any]


class Judge:
    """Judges rollouts in the background.

    Args:
      analyzers: part -> analyzer (`same(analyzer)` for one that does it all).
      options: decide what has to be judged.
      every_image: evaluate all images, not only those that a reward needs.
      concurrency, deadline: see `Panel`.
      check: what to check when a submission asks for it.
      totals: functions that say what the services have taken so far, as running totals by name.
    """

    def __init__(
        self,
        analyzers: Mapping[str, Analyzer],
        options: RewardOptions = PAPER,
        every_image: bool = False,
        concurrency: int = 64,
        deadline: float = 0.0,
        check: Check | None = None,
        totals: Sequence[Callable[[], Mapping[str, float]]] = (),
    ):
        self._panel = Panel(analyzers, concurrency, deadline)
        self._options, self._every_image, self._check, self._totals = options, every_image, check, tuple(totals)
        held_out = check.held_out if check else None
        self._held_out = Panel(same(held_out), concurrency, deadline) if held_out is not None else None
        self._again = Panel(same(check.again), concurrency, deadline) if check and check.repeats > 1 else None

    def submit(
        self,
        answers: Sequence[tuple[Trajectory, Images] | None],
        format_rewards: Sequence[float] | None = None,
        checked: bool = False,
    ) -> concurrent.futures.Future[Verdicts]:
        """Starts judging; one submission at a time.  The future raises what is no failure of the judge."""
        return _in_background(self._verdicts(answers, format_rewards, checked))

    async def _verdicts(self, answers: Any, format_rewards: Any, checked: bool) -> Verdicts:
        clock, before = time.perf_counter(), self._spent()
        self._panel.usage = Usage()
        judged = await judge_answers(self._panel, answers, self._every_image, self._options, format_rewards)
        usage, seconds = self._panel.usage, time.perf_counter() - clock
        checks = await self._checks(answers, judged) if checked and self._check else {}
        spent = {name: total - before[name] for name, total in self._spent().items()}
        return Verdicts(judged, usage, seconds, checks | spent)

    def _spent(self) -> dict[str, float]:
        spent: collections.Counter[str] = collections.Counter()
        for totals in self._totals:
            spent.update(totals())
        return dict(spent)

    async def _checks(self, answers: Any, judged: Sequence[Judged]) -> dict[str, Any]:
        chosen = [(a, j) for a, j in zip(answers, judged, strict=True) if a is not None and j.scores is not None]
        chosen = chosen[:: max(1, len(chosen) // self._check.answers)][: self._check.answers]
        found: dict[str, Any] = {}
        if self._again is not None:
            spreads = []
            for answer, _ in chosen:
                calls = [self._outcome(self._again, *answer) for _ in range(self._check.repeats)]
                values = [value for value in await asyncio.gather(*calls) if value is not None]
                if len(values) > 1:
                    spreads.append(float(np.var(values, ddof=1)))
            found["judge_variance"] = (sum(spreads), float(len(spreads)))
        if self._held_out is not None:
            others = await asyncio.gather(*(self._outcome(self._held_out, *answer) for answer, _ in chosen))
            ours = [float(outcome(np.asarray(j.scores), self._options)) for _, j in chosen]
            pairs = [(a, b) for a, b in zip(ours, others, strict=True) if b is not None]
            found["held_out_outcome"] = (sum(b for _, b in pairs), float(len(pairs)))
            found["held_out_gap"] = (sum(a - b for a, b in pairs), float(len(pairs)))
        return found

    async def _outcome(self, panel: Panel, trajectory: Trajectory, images: Images) -> float | None:
        """R_o of the final image by another panel; None when it fails."""
        only = dataclasses.replace(self._options, step_reward_evals="none")
        direct = Trajectory(trajectory.sample, (dataclasses.replace(trajectory.rounds[-1], cause=None),))
        [judged] = await judge_answers(panel, [(direct, images)], options=only)
        return None if judged.scores is None else float(outcome(np.asarray(judged.scores), self._options))


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of the background thread; clients keep their connections on it between submissions."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judge", daemon=True).start()
    return loop


def _in_background(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    return asyncio.run_coroutine_threadsafe(work, _loop())
