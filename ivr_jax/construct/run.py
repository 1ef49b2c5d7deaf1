"""Construction of many samples, unattended and resumable: it may be killed at any moment.

What became of a sample is one of

    kept or surplus   a trajectory, recorded
    dropped           a verdict: the analyzer found why there is none, recorded
    pending           a service gave no answer; nothing is concluded, and the next run retries it
    quarantined       the sample itself cannot be used (an image that is missing, damaged or a bomb), with the reason

Recorded samples and answers of services are in the journal and are not repeated.  The
dataset is written at the end, from the journal alone and in the order of the input, so it does not depend on how
often, or where, the run was interrupted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ivr_jax.construct.escalation import Drawing, Drop, Outcome, Request, Rules, construct, prune
from ivr_jax.errors import UserError
from ivr_jax.interfaces import Analyzer, Generator, RootCause, ServiceDown, ServiceFailed
from ivr_jax.services.journal import Journal
from ivr_jax.trajectory import (
    Mode,
    Reflection,
    Round,
    Step,
    Trajectory,
    evaluation_from_json,
    evaluation_to_json,
    sample_from_json,
    sample_to_json,
)

T = TypeVar("T")
R = TypeVar("R")

# Samples that are done wait for those before them; so many times the concurrency may be in progress or waiting.
_WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sample of the input.

    Attributes:
      key: its name.
      request: changes when what is asked changes; a record of another request does not count.
      read: reads it; raises UserError when it cannot be used.
      from_files: whether it comes from a user's files: reading takes long enough to be done beside the event loop, and
        whatever a library raises for an odd file concerns this sample alone.
    """

    key: str
    request: str
    read: Callable[[], Request]
    from_files: bool = False

    def load(self) -> Request:
        """The request.  Raises UserError when it cannot be used."""
        try:
            return self.read()
        except UserError:
            raise
        except Exception as error:
            if not self.from_files:
                raise
            what = f"the files of {self.key!r} cannot be read: {type(error).__name__}: {error}."
            raise UserError(what, "Leave the sample out, or save its images anew.") from error


class State(enum.StrEnum):
    """How far a sample has come."""

    CONSTRUCTED = "constructed"
    DROPPED = "dropped"
    PENDING = "pending"
    QUARANTINED = "quarantined"


@dataclasses.dataclass(frozen=True)
class Status:
    """What became of a sample; everything else about it is in the journal.

    Attributes:
      key, request: which sample.
      state: how far it has come.
      mode: of its trajectory, when constructed.
      stage: what made it pass, when constructed: "first image", "reflection 1", ..., "steps".
      first_failed: whether its first image failed.
      reason: why it was dropped, is pending, or was quarantined; "" when constructed.
      recorded: whether that was known before this run.
    """

    key: str
    request: str
    state: State
    mode: Mode | None = None
    first_failed: bool = False
    reason: str = ""
    recorded: bool = False
    stage: str = ""


class Construction:
    """The escalation for many samples, recorded in a journal.

    Args:
      journal: what is known.
      analyzer, generator: the services.
      rules: thresholds and counts.
      concurrency: samples in progress at a time, at least 1.
      made_by: JSON values stored with every sample (services, versions of prompts).
      baseline: draws the first images that samples do not bring; None leaves them to `generator`.

    Attributes:
      down: the failure of a service that is down; set once, and then no further sample is started.
      stopped: whether the run was asked to stop.
    """

    def __init__(
        self,
        journal: Journal,
        analyzer: Analyzer,
        generator: Generator,
        rules: Rules,
        concurrency: int,
        made_by: Mapping[str, Any] | None = None,
        baseline: Generator | None = None,
    ):
        if concurrency < 1:
            raise UserError(f"the concurrency is {concurrency}.", "Give a whole number of at least 1.")
        self._journal, self._analyzer, self._generator, self._rules = journal, analyzer, generator, rules
        self._concurrency, self._made_by, self._baseline = concurrency, dict(made_by or {}), baseline
        self.down: ServiceDown | None = None
        self.stopped = False

    def stop(self) -> None:
        """Starts no further sample, and reads no further entry; what is in progress ends as its services let it."""
        self.stopped = True
        self.down = self.down or ServiceDown("the run was asked to stop.", "Give the same command again.")

    async def run(
        self,
        entries: AsyncIterable[Entry],
        quotas: Quotas,
        notice: Callable[[Status, Pass], None] = lambda status, found: None,
    ) -> Pass:
        """Constructs `entries` until they end or the quotas are full.  Once a service is down, the rest is pending.

        Args:
          entries: the input, read lazily.
          quotas: how many trajectories of each kind are wanted.
          notice: called with every sample's status, in the order of the input, and the counts so far.

        Raises:
          UserError: the run cannot continue: a key is refused, the disk is full, a setting is wrong.
        """
        found = Pass()
        entries = self._until_stopped(entries)
        statuses = in_order(entries, self._construct, self._concurrency, _WINDOW * self._concurrency)
        async with contextlib.aclosing(statuses) as stream:
            async for status in stream:
                found.add(status, quotas)
                notice(status, found)
                if quotas.full:
                    found.full = True
                    break
        return found

    async def _until_stopped(self, entries: AsyncIterable[Entry]) -> AsyncIterator[Entry]:
        async for entry in entries:
            if self.stopped:
                return
            yield entry

    async def _construct(self, entry: Entry) -> Status:
        record = self._journal.outcome(entry.key, entry.request)
        if record is not None:
            return dataclasses.replace(status_of(entry, record), recorded=True)
        if self.down is not None:
            return Status(entry.key, entry.request, State.PENDING, reason=self.down.what)
        try:
            request = await asyncio.to_thread(entry.load) if entry.from_files else entry.load()
        except UserError as error:
            return Status(entry.key, entry.request, State.QUARANTINED, reason=error.what)
        try:
            outcome = await construct(
                request.sample, request.images, request.first_image, self._analyzer, self._generator, self._rules,
                request.given, self._baseline,
            )
        except ServiceFailed as error:
            if isinstance(error, ServiceDown):
                self.down = self.down or error
            return Status(entry.key, entry.request, State.PENDING, reason=error.what)
        except Exception as error:
            error.add_note(f"while constructing sample {entry.key!r}")
            raise
        for pixels in outcome.images.values():
            await self._journal.add_image(pixels)
        record = outcome_to_json(outcome) | {"made_by": self._made_by}
        self._journal.record_outcome(entry.key, entry.request, record)
        return status_of(entry, record)


async def in_order(
    items: AsyncIterable[T], work: Callable[[T], Awaitable[R]], concurrency: int, window: int
) -> AsyncIterator[R]:
    """Yields `await work(item)` for every item, in the order of `items`; reading the next item blocks no result.

    Args:
      items: any number of them, read lazily.
      work: called for at most `concurrency` items at a time.
      window: at most so many items are in progress, or done and waiting for those before them.

    Raises:
      An exception of `items` or `work`, in its item's turn; it ends the rest.  When the consumer leaves early
      (`aclose`), what is in progress is cancelled.
    """
    gate = asyncio.Semaphore(concurrency)
    tasks: asyncio.Queue[asyncio.Future[R] | None] = asyncio.Queue(max(1, window - 2))  # and one at each end
    started: set[asyncio.Future[R]] = set()

    async def gated(item: T) -> R:
        async with gate:
            return await work(item)

    async def start(task: asyncio.Future[R]) -> None:
        started.add(task)
        await tasks.put(task)

    async def read() -> None:
        try:
            async for item in items:
                await start(asyncio.create_task(gated(item)))
        except Exception as error:
            failed: asyncio.Future[R] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            await start(failed)
        await tasks.put(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await tasks.get()) is not None:
            result = await task
            started.discard(task)
            yield result
    finally:
        unfinished: list[asyncio.Future] = [reader, *started]
        for waiting in unfinished:
            waiting.cancel()
        await asyncio.gather(reader, *started, return_exceptions=True)


def status_of(entry: Entry, record: Mapping[str, Any]) -> Status:
    """The status of a recorded sample."""
    first = evaluation_from_json(record["history"][0]["evaluation"])
    if record["drop"] is not None:
        return Status(entry.key, entry.request, State.DROPPED, None, not first.passed, record["drop"])
    causes = [drawing["cause"] for drawing in record["history"][1:]]
    steps = any("instruction" in cause for cause in causes)
    mode = Mode.MULTI_STEP if steps else Mode.REFLECTION if causes else Mode.DIRECT
    stage = "steps" if steps else f"reflection {len(causes)}" if causes else "first image"
    return Status(entry.key, entry.request, State.CONSTRUCTED, mode, not first.passed, stage=stage)


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Plain JSON values of an outcome, without its pixels; `outcome_from_json` is the inverse."""
    history = [
        {
            "cause": None if d.cause is None else dataclasses.asdict(d.cause),
            "image": d.image,
            "evaluation": None if d.evaluation is None else evaluation_to_json(d.evaluation),
            "step_evaluation": None if d.step_evaluation is None else evaluation_to_json(d.step_evaluation),
        }
        for d in outcome.history
    ]
    return {
        "sample": sample_to_json(outcome.sample),
        "history": history,
        "drop": None if outcome.drop is None else outcome.drop.value,
        "root_cause": None if outcome.root_cause is None else outcome.root_cause.value,
        "plan": list(outcome.plan),
    }


def outcome_from_json(record: Mapping[str, Any], journal: Journal) -> Outcome:
    """The outcome that was recorded, its images read from the journal.

    What made it (`made_by`), where known, becomes a fact of the sample.  Raises UserError when an image is gone.
    """
    sample = sample_from_json(record["sample"])
    if record.get("made_by"):
        sample = dataclasses.replace(sample, facts={**sample.facts, "made_by": record["made_by"]})
    history = tuple(_drawing(value) for value in record["history"])
    images = {}
    for name in dict.fromkeys((*sample.sources, *(drawing.image for drawing in history))):
        pixels = journal.image(name)
        if pixels is None:
            raise UserError(f"{journal.path}: the image {name} of sample {sample.key!r} is gone or damaged.",
                            "Restore the folder, or remove it to construct the samples again.")
        images[name] = pixels
    drop = None if record["drop"] is None else Drop(record["drop"])
    cause = None if record["root_cause"] is None else RootCause(record["root_cause"])
    trajectory = None if drop else Trajectory(sample, prune(history))
    return Outcome(sample, trajectory, drop, history, images, cause, tuple(record["plan"]))


def _drawing(value: Mapping[str, Any]) -> Drawing:
    cause = value["cause"]
    if cause is not None:
        cause = Step(**cause) if "instruction" in cause else Reflection(**cause)
    judged = (value["evaluation"], value["step_evaluation"])
    return Drawing(cause, value["image"], *(None if v is None else evaluation_from_json(v) for v in judged))


EVALUATION_ONLY = "evaluation"  # a failed G1 with its evaluation: trains evaluation, never drawing


class Quotas:
    """How many trajectories of each kind are wanted; None wants them all."""

    def __init__(self, wanted: Mapping[str, int] | None):
        self.wanted = None if wanted is None else dict(wanted)
        self.counts: collections.Counter[str] = collections.Counter()
        self.surplus: collections.Counter[str] = collections.Counter()

    @property
    def full(self) -> bool:
        """Whether every kind has its number."""
        return self.wanted is not None and all(self.counts[kind] >= number for kind, number in self.wanted.items())

    def choose(self, status: Status) -> str | None:
        """As what a finished sample is kept: a mode, or `EVALUATION_ONLY`; None when nobody wants it."""
        wanted = self.wanted
        if wanted is not None and status.first_failed and self.counts[EVALUATION_ONLY] < wanted[EVALUATION_ONLY]:
            self.counts[EVALUATION_ONLY] += 1
            return EVALUATION_ONLY
        if status.mode is None:
            return None
        kind = status.mode.value
        kept = wanted is None or self.counts[kind] < wanted[kind]
        (self.counts if kept else self.surplus)[kind] += 1
        return kind if kept else None


def trajectory_of(outcome: Outcome, kind: str) -> Trajectory:
    """What is stored of an outcome that was chosen as `kind`."""
    if kind != EVALUATION_ONLY:
        return outcome.trajectory
    first = outcome.history[0]
    return Trajectory(outcome.sample, (Round(None, first.image, first.evaluation),))


@dataclasses.dataclass
class Pass:
    """What one reading of the input found.

    Attributes:
      chosen: (key, request, kind) of the trajectories to keep, in order.
      finished: (key, request) of every sample with an outcome, in order.
      modes, drops, stages: counts of finished samples; `stages` by what made them pass.
      pending, quarantined: key -> reason.
      recorded: how many samples were finished before.
      full: whether the quotas were filled.
    """

    chosen: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    finished: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    modes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    drops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    stages: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    pending: dict[str, str] = dataclasses.field(default_factory=dict)
    quarantined: dict[str, str] = dataclasses.field(default_factory=dict)
    recorded: int = 0
    full: bool = False

    def add(self, status: Status, quotas: Quotas) -> None:
        """Counts a sample, and chooses it when a quota wants it."""
        if status.state is State.PENDING:
            self.pending[status.key] = status.reason
        elif status.state is State.QUARANTINED:
            self.quarantined[status.key] = status.reason
        else:
            self.finished.append((status.key, status.request))
            counts = self.drops if status.mode is None else self.modes
            counts[status.reason or status.mode.value] += 1
            self.stages.update([status.stage] if status.stage else [])
            self.recorded += status.recorded
            kind = quotas.choose(status)
            if kind is not None:
                self.chosen.append((status.key, status.request, kind))

    @property
    def seen(self) -> int:
        """How many samples were read."""
        return len(self.finished) + len(self.pending) + len(self.quarantined)


def outcomes(journal: Journal, finished: Sequence[tuple[str, str]]) -> Iterable[Outcome]:
    """The recorded outcomes of (key, request), one at a time."""
    for key, request in finished:
        yield outcome_from_json(journal.outcome(key, request), journal)
