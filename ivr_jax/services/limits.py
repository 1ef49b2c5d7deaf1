"""How many calls of a service may be made at a time and a minute."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

try:
    from aiolimiter import AsyncLimiter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; remote services need it: pip install 'ivr_jax[services]'") from error

from ivr_jax.services.config import ServiceConfig


class Limits(Protocol):
    """Grants calls of one service."""

    def call(self, tokens: int) -> contextlib.AbstractAsyncContextManager[None]:
        """The right to make one call, until the context ends; waits for it.  `tokens`: an estimate of what it takes."""


LimitsOf = Callable[[ServiceConfig], Limits]


class ProcessLimits:
    """The limits of `config` for the calls of this process alone; see `Limits`."""

    def __init__(self, config: ServiceConfig):
        self.gate = asyncio.Semaphore(config.in_flight)
        self._requests = _limiter(config.requests_per_minute)
        self._tokens = _limiter(config.tokens_per_minute)

    @contextlib.asynccontextmanager
    async def call(self, tokens: int) -> AsyncIterator[None]:
        async with self.gate:
            await self.rates(tokens)
            yield

    async def rates(self, tokens: int) -> None:
        """Returns when the requests and tokens of a minute allow one more call."""
        if self._requests:
            await self._requests.acquire()
        if self._tokens and tokens:
            await self._tokens.acquire(min(tokens, self._tokens.max_rate))


def _limiter(per_minute: float) -> AsyncLimiter | None:
    """At most `per_minute` a minute, in bursts of at most a second's worth (or one)."""
    if not per_minute:
        return None
    return AsyncLimiter(max(1.0, per_minute / 60), 60 * max(1.0, per_minute / 60) / per_minute)
