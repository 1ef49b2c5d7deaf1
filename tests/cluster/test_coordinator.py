"""What the parts of a run share: calls of a service, of which those of a lost machine become free again."""

from __future__ import annotations

import asyncio

import pytest
from openai_service import service_config

from ivr_jax.cluster.coordinator import SILENCE, Coordinator, Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def granted(coordinator: Coordinator, permit: str, attempt: str, in_flight: int) -> asyncio.Task[None]:
    config = service_config("http://host/v1", in_flight=in_flight)
    return asyncio.get_running_loop().create_task(coordinator.acquire(permit, attempt, config, 0))


async def ends(task: asyncio.Task[None]) -> bool:
    """Whether the task ends before it has to wait for something."""
    for _ in range(20):
        await asyncio.sleep(0)
    return task.done()


def test_parts_share_the_calls_of_a_service_and_give_them_back():
    async def run() -> None:
        coordinator = Coordinator()
        for part in range(3):
            await coordinator.report(part, f"attempt {part}", 0, 4)
        calls = [granted(coordinator, f"call {part}", f"attempt {part}", 2) for part in range(3)]
        assert [await ends(call) for call in calls] == [True, True, False]
        await coordinator.release("call 0")
        assert await ends(calls[2])

    asyncio.run(run())


@pytest.mark.parametrize("lost_by", ["silence", "a new attempt", "its end"])
def test_calls_of_a_lost_attempt_are_free_again(lost_by):
    async def run() -> None:
        clock = Clock()
        coordinator = Coordinator(clock)
        await coordinator.report(0, "first", 0, 4)
        assert await ends(granted(coordinator, "held", "first", 1))
        await coordinator.report(1, "other", 0, 4)
        waiting = granted(coordinator, "waits", "other", 1)
        assert not await ends(waiting)
        if lost_by == "silence":
            clock.now = SILENCE + 1
            await coordinator.report(1, "other", 0, 4)
            await coordinator.progress()
        elif lost_by == "its end":
            await coordinator.report(0, "first", 4, 4, ended=True)
        else:
            await coordinator.report(0, "second", 0, 4)
        assert await ends(waiting)
        await coordinator.release("held")  # by a machine that was only slow: frees nothing twice
        assert not await ends(granted(coordinator, "third", "other", 1))

    asyncio.run(run())


def test_a_call_that_is_withdrawn_while_it_waits_takes_no_place():
    async def run() -> None:
        coordinator = Coordinator()
        await coordinator.report(0, "one", 0, 4)
        await ends(granted(coordinator, "held", "one", 1))
        waiting = granted(coordinator, "waits", "one", 1)
        assert not await ends(waiting)
        await coordinator.release("waits")
        await coordinator.release("held")
        assert await ends(waiting) and await ends(granted(coordinator, "next", "one", 1))

    asyncio.run(run())


def test_progress_counts_each_part_once_however_often_it_was_begun():
    async def run() -> Progress:
        coordinator = Coordinator()
        await coordinator.report(0, "first", 3, 4)
        await coordinator.report(1, "other", 1, 5)
        await coordinator.report(0, "second", 2, 4)
        await coordinator.report(0, "first", 4, 4)  # a machine that was taken for lost
        await coordinator.report(1, "other", 5, 5, ended=True)
        return await coordinator.progress()

    assert asyncio.run(run()) == Progress(done=7, total=9, reported=2, attempts={0: 2, 1: 1}, running=2)
