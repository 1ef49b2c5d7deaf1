"""Construction in the micro-world: exact services, faulty drawings, all three modes, into a stored dataset."""

from __future__ import annotations

import asyncio
import collections
import functools
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from ivr_jax.construct.__main__ import progress_text
from ivr_jax.construct.assemble import write_dataset
from ivr_jax.construct.escalation import Request, Rules
from ivr_jax.construct.released import iter_released, write_trajectory
from ivr_jax.construct.run import Construction, Entry, Pass, Quotas, Status
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.services.journal import Journal
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Sample
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.generator import WorldGenerator
from ivr_jax.world.sampler import sample_task

ANALYZER = WorldAnalyzer()


def entries(level: int, count: int, fault_rate: float) -> Iterator[Entry]:
    """Tasks with first images by a drawer that spoils `fault_rate` of them."""
    base = WorldGenerator(fault_rate, seed=1)
    for index in range(count):
        task = sample_task(level, seed=0, index=index)
        sources = [task.images[name] for name in task.sample.sources]
        first = base.generate_sync(task.sample, task.sample.prompt, sources)
        yield Entry(task.sample.key, "", functools.partial(Request, task.sample, task.images, first))


def build(path: Path, level: int, count: int, rules: Rules, repair_faults: float) -> Pass:
    """The whole command's work: through a journal into a dataset."""
    with Journal(path.with_name(f"{path.name}.journal")) as journal:
        construction = Construction(journal, ANALYZER, WorldGenerator(repair_faults, seed=2), rules, concurrency=4)
        found = asyncio.run(construction.run(each(entries(level, count, 0.8)), Quotas(None)))
        write_dataset(path, journal, found, {"level": level})
    return found


async def each(items):
    for item in items:
        yield item


@pytest.mark.parametrize("level", [0, 1])
def test_every_stored_answer_is_exact_and_every_image_before_it_is_not(tmp_path, level):
    found = build(tmp_path / "data", level, 60, Rules(max_reflections=1), 0.5)
    assert set(found.modes) == {mode.value for mode in Mode}
    assert found.modes.total() + found.drops.total() == found.seen == 60
    dataset = TrajectoryDataset(tmp_path / "data")
    assert len(dataset) == found.modes.total()
    assert dataset.manifest["by_mode"] == dict(found.modes)
    for trajectory in dataset:
        images = dataset.images(trajectory)
        exact = [ANALYZER.is_exact(trajectory.sample, images[name]) for name in trajectory.images]
        assert exact == [False] * (len(exact) - 1) + [True]
        assert [r.evaluation.passed for r in trajectory.rounds] == exact


def test_construction_repeats_itself_byte_for_byte(tmp_path):
    for name in ("a", "b"):
        build(tmp_path / name, 0, 20, Rules(), 0.3)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_skipping_reflection_sends_every_failed_complex_request_to_steps(tmp_path):
    found = build(tmp_path / "data", 0, 40, Rules(max_reflections=0), 0.0)
    trajectories = list(TrajectoryDataset(tmp_path / "data"))
    assert found.modes["reflection"] == 0 and found.modes["multi_step"] >= 10
    causes = collections.Counter(type(r.cause) for t in trajectories for r in t.rounds)
    assert causes[Reflection] == 0


def test_micro_world_trajectories_survive_the_released_folders_but_for_their_facts(tmp_path):
    build(tmp_path / "data", 0, 12, Rules(max_reflections=1), 0.3)
    dataset = TrajectoryDataset(tmp_path / "data")
    for trajectory in dataset:
        write_trajectory(tmp_path / "success", trajectory, dataset.images(trajectory))
    back = {found.trajectory.sample.key: found.trajectory for found in iter_released(tmp_path / "success")}
    assert {key: t.rounds for key, t in back.items()} == {t.sample.key: t.rounds for t in dataset}


class Content:
    """Services to which everything is right at once."""

    async def evaluate(self, *_) -> Evaluation:
        return Evaluation(*(AxisVerdict(True, "fine", 5) for _ in AXES))


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """Images are held for the samples on the way, and a few hundred bytes for each that is done."""
    read, ahead, sizes, concurrency = 0, [], {}, 4

    def entry(index: int) -> Entry:
        pixels = np.full((64, 64, 3), index % 251, np.uint8)
        pixels[0, 0] = list(index.to_bytes(3))
        request = Request(Sample(f"{index}", "Do it."), {}, pixels)
        return Entry(f"{index}", f"request {index}", lambda: request)

    async def counted() -> AsyncIterator[Entry]:
        nonlocal read
        for read in range(1, 1601):
            yield entry(read)

    def notice(status: Status, found: Pass) -> None:
        ahead.append(read - found.seen)
        if found.seen in (400, 1600):
            gc.collect()
            sizes[found.seen] = tracemalloc.get_traced_memory()[0]

    with Journal(tmp_path) as journal:
        construction = Construction(journal, Content(), Content(), Rules(), concurrency)
        tracemalloc.start()
        try:
            found = asyncio.run(construction.run(counted(), Quotas(None), notice))
        finally:
            tracemalloc.stop()
    assert found.modes["direct"] == 1600 and max(ahead) <= 16 * concurrency
    assert sizes[1600] - sizes[400] < 1200 * 1000, "an image takes 12,288 bytes"


def test_the_progress_bar_tells_shares_and_reasons():
    found = Pass()
    assert progress_text(found) == "direct 0%, reflection 0%, multi-step 0%"
    found.modes.update(direct=1, multi_step=3)
    found.drops.update(step_failed=2, ambiguous_prompt=5)
    found.pending["a"] = found.quarantined["b"] = "why"
    assert progress_text(found) == (
        "direct 25%, reflection 0%, multi-step 75% | ambiguous prompt 5, step failed 2, pending 1, quarantined 1"
    )
