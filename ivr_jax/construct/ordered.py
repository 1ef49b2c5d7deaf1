"""Many coroutines at once, their results in order."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

from ivr_jax.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


async def in_order(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], concurrency: int, window: int
) -> AsyncIterator[R]:
    """Yields `await work(item)` for every item, in the order of `items`, which is read lazily.

    Args:
      items: any number of them.
      work: called for at most `concurrency` items at a time.
      concurrency: at least 1.
      window: at most so many items are on the way, or done and waiting for those before them.

    Raises:
      UserError: `concurrency` is below 1.  An exception of `work` is raised in its item's turn and ends the rest; when
        the consumer leaves early (`aclose`), what is on its way is cancelled.
    """
    if concurrency < 1:
        raise UserError(f"the concurrency is {concurrency}.", "Give a whole number from 1 up.")
    gate = asyncio.Semaphore(concurrency)

    async def gated(item: T) -> R:
        async with gate:
            return await work(item)

    tasks: collections.deque[asyncio.Task[R]] = collections.deque()
    try:
        for item in items:
            tasks.append(asyncio.create_task(gated(item)))
            await asyncio.sleep(0)
            while tasks and (len(tasks) >= window or tasks[0].done()):
                yield await tasks.popleft()
        while tasks:
            yield await tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
