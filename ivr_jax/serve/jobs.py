"""One request on its way through the server, as seen from two sides.

The engine thread writes (`Job.publish`), the event loop of the web server reads and waits (`Job.watch`).  Between them
is one immutable `Snapshot`, replaced as a whole: a slow reader misses states in between and nothing else, and nothing
queues up for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from ivr_jax.sampling.logits_processors import SamplingOptions

QUEUED, RUNNING, DONE, STOPPED, FAILED = "queued", "running", "done", "stopped", "failed"
OVER = (DONE, STOPPED, FAILED)
AUTO = "auto"  # the model decides how it answers


@dataclasses.dataclass(frozen=True)
class AnswerRequest:
    """What is asked for.

    Attributes:
      model: name of a loaded model; prompt: the question.
      references: pixels uint8 [height, width, 3], in order, as they were uploaded.
      mode: `AUTO`, a mode that is forced, or "interleaved".
      max_images, max_tokens: where the answer stops; 0 leaves it to mode and context.
      prefix: answer tokens that are given, for an answer that is continued.
    """

    model: str
    prompt: str
    references: tuple[np.ndarray, ...] = ()
    aspect_ratio: str = AUTO
    seed: int = 0
    mode: str = AUTO
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    max_images: int = 0
    max_tokens: int = 0
    prefix: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an answer took: complete `images`, `tokens` drawn, `calls` of the model while it was in a slot, `seconds` in
    the slot, and `waited` seconds in the queue."""

    images: int = 0
    tokens: int = 0
    calls: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class PartView:
    """A part of an answer as it is shown; see `partial_answer.Part`.

    Attributes:
      number: its place in the answer.
      rows, columns, drawn: of an image, its size in cells and how many of them the picture shows.
      width, height, png: of an image, its picture; None before it has one.
    """

    number: int
    kind: str
    round: int
    complete: bool
    texts: Mapping[str, str]
    verdicts: Mapping[str, bool]
    rows: int = 0
    columns: int = 0
    drawn: int = 0
    width: int = 0
    height: int = 0
    png: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """State of a job.

    Attributes:
      position: how many wait before it, while it is queued.
      parts: views; one that says nothing new is the same object as before.
      grammar: the grammar that the answer follows; mode: how it was answered, once that is known.
      finished: the answer came to its own end; tokens: the answer so far.
    """

    state: str = QUEUED
    position: int = 0
    parts: tuple[PartView, ...] = ()
    cost: Cost = Cost()
    error: str = ""
    grammar: str = ""
    mode: str = ""
    finished: bool = False
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0

    @property
    def over(self) -> bool:
        """Whether the answer has ended, in whatever way."""
        return self.state in OVER


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


class Job:
    """A request with its state.

    Args:
      prepared: the request as its model takes it (`models.PreparedRequest`).
      loop: the event loop of those who watch.
      kept: whether the page may come back for it, so that it goes to the archive.
    """

    def __init__(self, request: AnswerRequest, prepared: Any, loop: asyncio.AbstractEventLoop, kept: bool = False):
        self.id = secrets.token_urlsafe(12)
        self.request, self.prepared, self.kept = request, prepared, kept
        self.created = time.monotonic()
        self.watchers = 0
        self.unwatched_since = self.created
        self._loop = loop
        self._snapshot = Snapshot()
        self._lock = threading.Lock()
        self._events: set[asyncio.Event] = set()

    @property
    def snapshot(self) -> Snapshot:
        """The answer as it is now."""
        return self._snapshot

    def unwatched(self, now: float) -> float:
        """Seconds since the last watcher left; 0 while there is one."""
        return 0.0 if self.watchers else now - self.unwatched_since

    def publish(self, **changes: Any) -> None:
        """Replaces fields of the snapshot and wakes who waits; from any thread.  A job that is over stays as it is."""
        with self._lock:
            if self._snapshot.over:
                return
            self._snapshot = dataclasses.replace(self._snapshot, **changes)
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: nobody watches any more
            pass

    def _wake(self) -> None:
        for event in self._events:
            event.set()

    async def watch(self, alive: float = 2.0) -> AsyncIterator[Snapshot | None]:
        """Every new snapshot, the present one first, to the last; None after `alive` seconds without one."""
        event = asyncio.Event()
        self._events.add(event)
        self.watchers += 1
        try:
            while True:
                event.clear()
                snapshot = self._snapshot
                yield snapshot
                if snapshot.over:
                    return
                while not event.is_set():
                    try:
                        await asyncio.wait_for(event.wait(), alive)
                    except TimeoutError:
                        yield None
        finally:
            self._events.discard(event)
            self.watchers -= 1
            self.unwatched_since = time.monotonic()

    async def finished(self, gone: Callable[[], Awaitable[bool]]) -> Snapshot:
        """Waits for the end.  Raises `ClientGone` once `gone()`, asked twice a second, says so."""
        last = self._snapshot
        async for snapshot in self.watch(0.5):
            last = snapshot or last
            if not last.over and await gone():
                raise ClientGone
        return last
