"""Many samples at once: order, concurrency, lazy reading, and what stands in nobody's way."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import struct
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from ivr_jax.construct.escalation import Request, Rules
from ivr_jax.construct.run import Construction, Entry, Pass, Quotas, State, Status, in_order
from ivr_jax.errors import UserError
from ivr_jax.interfaces import RootCause
from ivr_jax.services.journal import Journal
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Sample

G1 = np.full((2, 2, 3), 100, np.uint8)


class Uneven:
    """Both services: passes even samples at once and drops odd ones as ambiguous; early samples take longest."""

    def __init__(self):
        self.running = self.most = 0

    async def evaluate(self, sample, images, image):
        number = int(sample.key)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001 * (7 - number % 7))
        self.running -= 1
        return Evaluation(*(AxisVerdict(number % 2 == 0, "seen") for _ in AXES))

    async def root_cause(self, sample, images, attempts):
        return RootCause.AMBIGUOUS_PROMPT


async def entries(count: int, taken: Callable[[], object] = lambda: None) -> AsyncIterator[Entry]:
    for i in range(count):
        taken()
        yield Entry(f"{i}", "", lambda i=i: Request(Sample(f"{i}", "do it"), {}, G1))


def run(path, services, items, quotas: Quotas | None = None, notice=lambda status, found: None, concurrency=4) -> Pass:
    with Journal(path) as journal:
        construction = Construction(journal, services, services, Rules(max_reflections=0), concurrency)
        return asyncio.run(construction.run(items, quotas or Quotas(None), notice))


def test_many_samples_keep_their_order_obey_the_concurrency_and_are_counted(tmp_path):
    services, seen = Uneven(), []
    found = run(tmp_path, services, entries(20), notice=lambda status, counts: seen.append((status.key, counts.seen)))
    assert seen == [(f"{i}", i + 1) for i in range(20)] and services.most == 4
    assert [key for key, _ in found.finished] == [f"{i}" for i in range(20)]
    assert found.modes == {"direct": 10} and found.drops == {"ambiguous_prompt": 10}


def test_the_input_is_read_lazily_and_no_further_than_the_quotas_need(tmp_path):
    taken = itertools.count()
    quotas = Quotas({"direct": 1, "reflection": 0, "multi_step": 0, "evaluation": 0})
    found = run(tmp_path, Uneven(), entries(1000, taken=lambda: next(taken)), quotas, concurrency=2)
    assert found.full and [key for key, _, _ in found.chosen] == ["0"]
    assert next(taken) <= 16 * 2 + 1


def test_an_exception_that_is_no_failed_call_ends_the_run_and_names_the_sample(tmp_path):
    class Broken(Uneven):
        async def evaluate(self, sample, images, image):
            if sample.key == "3":
                raise ConnectionError("gone")
            return await super().evaluate(sample, images, image)

    with pytest.raises(ConnectionError) as caught:
        run(tmp_path, Broken(), entries(8), concurrency=2)
    assert any("'3'" in note for note in caught.value.__notes__)


def test_an_input_that_breaks_ends_the_run_after_what_came_before(tmp_path):
    async def broken():
        async for entry in entries(3):
            yield entry
        raise UserError("the list is gone.")

    seen: list[Status] = []
    with pytest.raises(UserError):
        run(tmp_path, Uneven(), broken(), notice=lambda status, found: seen.append(status))
    assert [status.state for status in seen] == [State.CONSTRUCTED, State.DROPPED, State.CONSTRUCTED]


def test_a_concurrency_of_zero_is_refused(tmp_path):
    with pytest.raises(UserError):
        run(tmp_path, Uneven(), entries(1), concurrency=0)


def test_results_do_not_wait_for_the_next_item():
    """A slow input (a model that draws first images, say) holds up neither the work in progress nor its results."""

    async def slow(both: asyncio.Event):
        yield 0
        yield 1
        await asyncio.wait_for(both.wait(), 30)
        yield 2

    async def work(item):
        await asyncio.sleep(0.01)
        return item

    async def collected():
        results, both = [], asyncio.Event()
        async for item in in_order(slow(both), work, 4, 16):
            results.append(item)
            if len(results) == 2:  # only then does the third item come
                both.set()
        return results

    assert asyncio.run(collected()) == [0, 1, 2]


def test_whatever_a_library_raises_for_a_user_s_file_quarantines_one_sample(tmp_path):
    def odd():
        raise struct.error("ushort format requires 0 <= number <= 65535")

    async def mixed():
        async for entry in entries(3):
            yield dataclasses.replace(entry, read=odd, from_files=True) if entry.key == "1" else entry

    found = run(tmp_path, Uneven(), mixed())
    assert found.seen == 3 and list(found.quarantined) == ["1"] and "ushort" in found.quarantined["1"]
    with pytest.raises(struct.error):  # in the micro-world's own tasks it is a bug
        run(tmp_path / "other", Uneven(), each([Entry("0", "", odd)]))


async def each(items):
    for item in items:
        yield item
