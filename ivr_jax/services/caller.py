"""Calls of one service: limits, time-outs, retries with jittered back-off, and a circuit breaker.

A question is asked up to `tries` times.  What went wrong decides what follows:

    Fault     time-out, lost connection, 429, 5xx, an unusable answer     asked again, not before `Retry-After`
    Rejected  400, 413, 422, a refusal of this very question              not asked again: ServiceFailed
    CutOff    the answer reached max_tokens                               not asked again at the same max_tokens
    UserError wrong key, no such model, no such address                   ends the run: it would fail for every question

After `breaker_failures` faults in a row the breaker opens: nobody calls, except for one probe every `breaker_rest`
seconds.  Without a fallback everyone waits for a probe that succeeds, up to `patience` seconds; then the service is
down (`ServiceDown`).  With a fallback nobody waits.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

try:
    import tenacity
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; remote services need it: pip install 'ivr_jax[services]'") from error

from ivr_jax.interfaces import ServiceDown, ServiceFailed
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.limits import Limits, ProcessLimits
from ivr_jax.services.replies import Unusable

R = TypeVar("R")
T = TypeVar("T")
RAISE_MAX_TOKENS = "Raise the service's max_tokens (0 sends no limit), or let the model think less; then run again."


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back: a text or an encoded image, and the tokens that the server counted (0 when it did not)."""

    text: str | None = None
    image: bytes | None = None
    tokens_in: int = 0
    tokens_out: int = 0


class Fault(Exception):
    """The service failed this time; asking again may help.

    Attributes:
      kind: a word or two for the summary ("time-out", "429", "unusable answer").
      retry_after: seconds that the server asks to wait, or None.
      sick: whether the breaker counts it as a failure of the service (an unusable answer is none).
    """

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None, sick: bool = True):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.retry_after, self.sick = kind, retry_after, sick


class Rejected(Exception):
    """The service will not answer this very question, however often it is asked.

    Attributes:
      parameter: the name of the request's parameter that it refuses, or "".
    """

    def __init__(self, detail: str, parameter: str = ""):
        super().__init__(detail)
        self.parameter = parameter


class CutOff(Rejected):
    """The answer reached the limit on its length; at the same limit it would again.

    Attributes:
      reply: what was paid for.
    """

    def __init__(self, detail: str, reply: Reply):
        super().__init__(detail)
        self.reply = reply


@dataclasses.dataclass
class Counts:
    """What one process asked of a service.

    Attributes:
      calls: made.
      answered: replies that were used.
      recorded: answers taken from the record.
      faults: by kind.
      in_flight: calls that wait for their reply now.
      waiting: questions that wait now before they are asked again.
      seconds: what calls took that have come back, all together.
    """

    calls: int = 0
    answered: int = 0
    recorded: int = 0
    in_flight: int = 0
    waiting: int = 0
    seconds: float = 0.0
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Breaker:
    """Closed while all is well; open after `failures` faults in a row; then one probe at a time, `rest` seconds apart.

    Args:
      failures, rest, patience: see `ServiceConfig`.
      waits: whether callers wait while it is open; otherwise they fail at once.
      clock: seconds, monotonic.
    """

    def __init__(self, failures: int, rest: float, patience: float, waits: bool = True,
                 clock: Callable[[], float] = time.monotonic):
        self._failures, self._rest, self._patience, self._waits, self._clock = failures, rest, patience, waits, clock
        self._in_a_row = 0
        self._opened: float | None = None
        self._next_probe = 0.0
        self._probing = False

    @property
    def open(self) -> bool:
        """Whether calls are held back."""
        return self._opened is not None

    async def enter(self) -> None:
        """Returns when a call may be made.  Raises ServiceDown when it has been open for too long, or nobody waits."""
        while self._opened is not None:
            now = self._clock()
            if not self._probing and now >= self._next_probe:
                self._probing = True
                return
            if not self._waits or now - self._opened > self._patience:
                raise ServiceDown("the service keeps failing.", "Run again when it answers; nothing recorded is lost.")
            await asyncio.sleep(min(0.5, max(0.001, self._next_probe - now)))

    def succeeded(self) -> None:
        """Notes a call that succeeded: the breaker closes."""
        self._in_a_row, self._opened, self._probing = 0, None, False

    def failed(self) -> None:
        """Notes a call that failed; after `failures` in a row the breaker opens."""
        self._in_a_row += 1
        self._probing = False
        if self._in_a_row >= self._failures:
            now = self._clock()
            self._opened = now if self._opened is None else self._opened
            self._next_probe = now + self._rest

    def gave_up(self) -> None:
        """A call ended without saying anything about the service (it was cancelled, or rejected)."""
        self._probing = False


class Caller:
    """Calls one service within the limits of its config.

    Args:
      config: limits and prices.
      has_fallback: whether another service is asked when this one fails.
      limits: grants calls; those of the config for this process by default.
    """

    def __init__(
        self, config: ServiceConfig, has_fallback: bool = False, limits: Limits | None = None
    ):
        self.config, self.counts = config, Counts()
        self.breaker = Breaker(config.breaker_failures, config.breaker_rest, config.patience, waits=not has_fallback)
        self._limits = limits or ProcessLimits(config)
        self._stopped = asyncio.Event()
        self._random = random.Random()

    async def call(self, ask: Callable[[str], Awaitable[R]], read: Callable[[R], T], tokens: int = 0) -> T:
        """Asks until `read` can use a reply (a `Reply`, or what `ask` made of one), and returns what it read.

        Args:
          ask: makes one call; its argument is what was wrong with the last answer, or "".
          read: turns a reply into a value; raises Unusable when it cannot.
          tokens: an estimate for the token limit.

        Raises:
          ServiceFailed: no usable answer after `tries` calls, or the question was rejected.
          ServiceDown: the breaker is open, and stays so.
        """
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.config.tries),
            wait=self._wait,
            retry=tenacity.retry_if_exception(self._worth_retrying),
            sleep=self._sleep,
            reraise=True,
        )
        complaint = ""
        try:
            async for attempt in retrying:
                with attempt:
                    try:
                        return await self._once(ask, read, tokens, complaint)
                    except Fault as fault:
                        self.counts.faults[fault.kind] += 1
                        complaint = "" if fault.sick else str(fault)
                        raise
        except Fault as fault:
            what = f"{self.config.name} gave no usable answer ({fault})."
            raise ServiceFailed(what, "Run again later.", fault.kind) from None
        except CutOff as error:
            self.counts.faults["cut off"] += 1
            raise ServiceFailed(f"{self.config.name}: {error}.", RAISE_MAX_TOKENS, "cut off") from None
        except Rejected as error:
            self.counts.faults["rejected"] += 1
            what = f"{self.config.name} rejects a question ({error})."
            raise ServiceFailed(what, "Look at the sample.", "rejected") from None
        except ServiceDown as error:
            raise ServiceDown(f"{self.config.name}: {error.what}", error.remedy) from None
        raise AssertionError("tenacity ends with a value or an exception")

    async def _once(
        self, ask: Callable[[str], Awaitable[R]], read: Callable[[R], T], tokens: int, complaint: str
    ) -> T:
        async with self._slot(tokens):
            self.counts.calls += 1
            self.counts.in_flight += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(self.config.timeout):
                    reply = await ask(complaint)
            except TimeoutError:
                self.breaker.failed()
                raise Fault("time-out", f"no answer within {self.config.timeout:g} s") from None
            except Fault as fault:
                if fault.sick:
                    self.breaker.failed()
                else:
                    self.breaker.succeeded()
                raise
            except Rejected:
                self.breaker.succeeded()
                raise
            except BaseException:
                self.breaker.gave_up()
                raise
            finally:
                self.counts.in_flight -= 1
                self.counts.seconds += time.monotonic() - began
            self.breaker.succeeded()
        try:
            value = read(reply)
        except Unusable as error:
            raise Fault("unusable answer", str(error), sick=False) from None
        self.counts.answered += 1
        return value

    @contextlib.asynccontextmanager
    async def _slot(self, tokens: int) -> AsyncIterator[None]:
        """The right to make one call, under every limit; the breaker is asked last, right before the call."""
        async with contextlib.AsyncExitStack() as stack:
            await self._unless_stopped(stack.enter_async_context(self._limits.call(tokens)))
            if self.breaker.open:
                await self._unless_stopped(self.breaker.enter())
            if self._stopped.is_set():
                raise _stopped()
            yield

    async def _sleep(self, seconds: float) -> None:
        self.counts.waiting += 1
        try:
            await self._unless_stopped(asyncio.sleep(seconds))
        finally:
            self.counts.waiting -= 1

    def stop(self) -> None:
        """From now on no call is made: questions fail with ServiceDown.  Calls in flight are completed."""
        self._stopped.set()

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Waits, but not on after `stop`.  Raises ServiceDown then."""
        waited, stopped = asyncio.ensure_future(waiting), asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((waited, stopped), return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.is_set():
                raise _stopped()
            waited.result()
        finally:
            waited.cancel()
            stopped.cancel()

    def _worth_retrying(self, error: BaseException) -> bool:
        return isinstance(error, Fault) and (error.retry_after or 0) <= self.config.longest_wait

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Full jitter over a doubling back-off, but never before the server's Retry-After."""
        fault = state.outcome.exception() if state.outcome else None
        longest = min(self.config.longest_wait, self.config.first_wait * 2 ** (state.attempt_number - 1))
        asked = (fault.retry_after or 0.0) if isinstance(fault, Fault) else 0.0
        return asked + self._random.uniform(0.0, longest)


def _stopped() -> ServiceDown:
    return ServiceDown("no more questions: the run was asked to stop.", "Give the same command again.")
