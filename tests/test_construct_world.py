"""Construction in the micro-world: exact services, faulty drawings, all three modes, into a stored dataset."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator

import pytest

from ivr_jax.construct.escalation import Request, Rules, Tally, construct_stream
from ivr_jax.construct.released import iter_released, write_trajectory
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.trajectory import Mode, Reflection
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.generator import WorldGenerator
from ivr_jax.world.sampler import sample_task

ANALYZER = WorldAnalyzer()


def requests(level: int, count: int, fault_rate: float) -> Iterator[Request]:
    """Tasks with first images by a drawer that spoils `fault_rate` of them."""
    base = WorldGenerator(fault_rate, seed=1)
    for index in range(count):
        task = sample_task(level, seed=0, index=index)
        sources = [task.images[name] for name in task.sample.sources]
        yield Request(task.sample, task.images, base.generate_sync(task.sample, task.sample.prompt, sources))


async def build(path, level: int, count: int, rules: Rules, repair_faults: float) -> Tally:
    tally = Tally()
    repairer = WorldGenerator(repair_faults, seed=2)
    with TrajectoryWriter(path, {"level": level}) as writer:
        async for outcome in construct_stream(requests(level, count, 0.8), ANALYZER, repairer, rules, concurrency=4):
            tally.add(outcome)
            if outcome.trajectory:
                writer.add(outcome.trajectory, outcome.images)
    return tally


@pytest.mark.parametrize("level", [0, 1])
def test_every_stored_answer_is_exact_and_every_image_before_it_is_not(tmp_path, level):
    tally = asyncio.run(build(tmp_path / "data", level, 60, Rules(max_reflections=1), 0.5))
    assert set(tally.modes) == set(Mode) and tally.done == 60
    dataset = TrajectoryDataset(tmp_path / "data")
    assert len(dataset) == tally.constructed
    assert dataset.manifest["by_mode"] == {mode.value: count for mode, count in tally.modes.items()}
    for trajectory in dataset:
        images = dataset.images(trajectory)
        exact = [ANALYZER.is_exact(trajectory.sample, images[name]) for name in trajectory.images]
        assert exact == [False] * (len(exact) - 1) + [True]
        assert [r.evaluation.passed for r in trajectory.rounds] == exact


def test_construction_repeats_itself_byte_for_byte(tmp_path):
    for name in ("a", "b"):
        asyncio.run(build(tmp_path / name, 0, 20, Rules(), 0.3))
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_skipping_reflection_sends_every_failed_complex_request_to_steps(tmp_path):
    tally = asyncio.run(build(tmp_path / "data", 0, 40, Rules(max_reflections=0), 0.0))
    trajectories = list(TrajectoryDataset(tmp_path / "data"))
    assert tally.modes[Mode.REFLECTION] == 0 and tally.modes[Mode.MULTI_STEP] >= 10
    causes = collections.Counter(type(r.cause) for t in trajectories for r in t.rounds)
    assert causes[Reflection] == 0


def test_micro_world_trajectories_survive_the_released_folders_but_for_their_facts(tmp_path):
    asyncio.run(build(tmp_path / "data", 0, 12, Rules(max_reflections=1), 0.3))
    dataset = TrajectoryDataset(tmp_path / "data")
    for trajectory in dataset:
        write_trajectory(tmp_path / "success", trajectory, dataset.images(trajectory))
    back = {found.trajectory.sample.key: found.trajectory for found in iter_released(tmp_path / "success")}
    assert {key: t.rounds for key, t in back.items()} == {t.sample.key: t.rounds for t in dataset}
