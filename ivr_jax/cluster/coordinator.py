"""What the parts of a command share, in one process (a Ray actor): limits of services, and how far each part is."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # needs the extra `services`
    from ivr_jax.services.config import ServiceConfig
    from ivr_jax.services.limits import ProcessLimits

SILENCE = 15.0  # seconds without a report after which the calls of an attempt no longer count


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      done, total: items of all parts that have reported; a total of 0 is unknown.
      reported: parts that have reported a total.
      attempts: by part, how often it was begun.
      running: attempts that have reported within the last `SILENCE` seconds and not ended.
    """

    done: int
    total: int
    reported: int
    attempts: dict[int, int]
    running: int


@dataclasses.dataclass
class _Attempt:
    """One process that works, or worked, on a part."""

    part: int
    seen: float
    ended: bool = False


class Coordinator:
    """See the module.  All methods run on one event loop.

    Args:
      clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._attempts: dict[str, _Attempt] = {}
        self._current: dict[int, str] = {}  # the latest attempt at each part
        self._begun: collections.Counter[int] = collections.Counter()
        self._counts: dict[int, tuple[int, int]] = {}
        self._limits: dict[ServiceConfig, ProcessLimits] = {}
        self._permits: dict[str, tuple[ServiceConfig, str]] = {}  # a call that was granted: its service, its attempt
        self._withdrawn: set[str] = set()

    async def report(self, part: int, attempt: str, done: int, total: int, ended: bool = False) -> None:
        """`attempt` is alive, and has done so many items; the first report of an attempt replaces earlier ones."""
        if attempt not in self._attempts:
            earlier = self._current.get(part)
            self._attempts[attempt], self._current[part] = _Attempt(part, self._clock()), attempt
            self._begun[part] += 1
            if earlier is not None:
                self._free(earlier)
        known = self._attempts[attempt]
        known.seen, known.ended = self._clock(), ended
        if self._current[part] == attempt:
            self._counts[part] = done, total
        if ended:
            self._free(attempt)

    async def progress(self) -> Progress:
        """Also frees the calls of attempts that have fallen silent: their machine is lost."""
        silent = [name for name in self._attempts if not self._is_alive(name)]
        for name in silent:
            self._free(name)
        counts = self._counts.values()
        return Progress(
            sum(done for done, _ in counts),
            sum(total for _, total in counts),
            sum(total > 0 for _, total in counts),
            dict(self._begun),
            len(self._attempts) - len(silent),
        )

    async def acquire(self, permit: str, attempt: str, config: ServiceConfig, tokens: int) -> None:
        """Returns when a call of the service `config` may be made; `release(permit)` ends or withdraws it."""
        limits = self._of(config)
        await limits.gate.acquire()
        if permit in self._withdrawn or not self._is_alive(attempt):
            self._withdrawn.discard(permit)
            limits.gate.release()
            return
        self._permits[permit] = config, attempt
        await limits.rates(tokens)

    async def release(self, permit: str) -> None:
        """The call has ended, or is no longer wanted."""
        granted = self._permits.pop(permit, None)
        if granted is None:
            self._withdrawn.add(permit)
        else:
            self._of(granted[0]).gate.release()

    def _of(self, config: ServiceConfig) -> ProcessLimits:
        from ivr_jax.services.limits import ProcessLimits

        return self._limits.setdefault(config, ProcessLimits(config))

    def _is_alive(self, attempt: str) -> bool:
        known = self._attempts.get(attempt)
        return known is not None and not known.ended and self._clock() - known.seen <= SILENCE

    def _free(self, attempt: str) -> None:
        for permit in [permit for permit, (_, holder) in self._permits.items() if holder == attempt]:
            config, _ = self._permits.pop(permit)
            self._of(config).gate.release()


class SharedLimits:
    """The limits of `config` for the calls of all parts together; see `Limits`.

    Args:
      coordinator: handle of the actor.
      attempt: who asks.
    """

    def __init__(self, coordinator: Any, attempt: str, config: ServiceConfig):
        self._coordinator, self._attempt, self._config = coordinator, attempt, config
        self._gate = asyncio.Semaphore(config.in_flight)  # so that no more wait at the coordinator than it may grant
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def call(self, tokens: int) -> AsyncIterator[None]:
        permit = f"{self._attempt}-{id(self)}-{next(self._numbers)}"
        async with self._gate:
            try:
                await self._coordinator.acquire.remote(permit, self._attempt, self._config, tokens)
                yield
            finally:
                self._coordinator.release.remote(permit)
