"""Construct a dataset of trajectories: direct answers, reflections and multi-step answers, by the paper's escalation.

    python -m ivr_jax.construct --config=configs/micro_construct.py --workdir=runs/demo/construct \
        --config.baseline=runs/demo/base
    python -m ivr_jax.construct --config=configs/micro_construct.py --workdir=runs/mine/construct \
        --config.released=FOLDER                 imports a folder in the released layout instead

Requests are drawn until every quota is full; the dataset stands in WORKDIR/dataset, with counts and reasons of
dropping in WORKDIR/dataset/dataset.json.  A finished dataset is left as it is.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ivr_jax import cli
from ivr_jax import system as systems
from ivr_jax.config import as_dataclass, check_positive, claim_workdir
from ivr_jax.construct.baseline import with_first_images
from ivr_jax.construct.escalation import Outcome, Request, Rules, Tally, construct_stream
from ivr_jax.construct.interfaces import Images
from ivr_jax.construct.released import read_released
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import fit, image_name
from ivr_jax.sampling.chain import SamplingOptions
from ivr_jax.trajectory import Round, Sample, Trajectory
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.generator import WorldGenerator
from ivr_jax.world.sampler import sample_task

EVALUATION_ONLY = "evaluation"  # a failed G1 with its evaluation: trains evaluation, never drawing


def requests(config: Any) -> Iterator[tuple[Sample, Images]]:
    """Endless requests of the micro-world, numbers of edits as weighted in `tasks.edits` (weight of 1, 2, ...)."""
    schedule = [count for count, weight in enumerate(config.edits, 1) for _ in range(weight)]
    for index in range(config.limit):
        edits = schedule[index % len(schedule)] if schedule else None
        task = sample_task(config.level, config.seed, index, edits=edits)
        yield task.sample, task.images


class Quotas:
    """How many trajectories of each kind are still wanted."""

    def __init__(self, wanted: dict[str, int]):
        self.wanted, self.counts, self.surplus = dict(wanted), collections.Counter(), collections.Counter()

    @property
    def full(self) -> bool:
        return all(self.counts[kind] >= number for kind, number in self.wanted.items())

    def choose(self, outcome: Outcome) -> Trajectory | None:
        """The trajectory to keep of an outcome, if any quota wants it."""
        first = outcome.history[0]
        if not first.evaluation.passed and self.counts[EVALUATION_ONLY] < self.wanted[EVALUATION_ONLY]:
            self.counts[EVALUATION_ONLY] += 1
            return Trajectory(outcome.sample, (Round(None, first.image, first.evaluation),))
        if outcome.trajectory is None:
            return None
        kind = outcome.trajectory.mode.value
        kept = self.counts[kind] < self.wanted[kind]
        (self.counts if kept else self.surplus)[kind] += 1
        return outcome.trajectory if kept else None


async def fill(config: Any, stream: Iterator[Request], writer: TrajectoryWriter) -> dict[str, Any]:
    """Runs the escalation until the quotas are full; returns what goes into the provenance."""
    quotas, tally, drawn = Quotas(config.quotas.to_dict()), Tally(), 0
    analyzer = WorldAnalyzer(threshold=config.analyzer.threshold)
    generator = WorldGenerator(**config.generator)
    outcomes = construct_stream(
        stream, analyzer, generator, as_dataclass(Rules, config.rules), concurrency=config.concurrency
    )
    with tqdm(total=sum(quotas.wanted.values()), desc="construct", unit="sample", mininterval=1.0) as bar:
        async for outcome in outcomes:
            drawn += 1
            tally.add(outcome)
            trajectory = quotas.choose(outcome)
            if trajectory is not None:
                names = {*trajectory.sample.sources, *trajectory.images}
                writer.add(trajectory, {name: outcome.images[name] for name in names})
                bar.update()
                bar.set_postfix(dict(quotas.counts), refresh=False)
            if quotas.full:
                break
        await outcomes.aclose()
    if not quotas.full:
        raise UserError(
            f"{drawn} requests gave {dict(quotas.counts)}; the quotas are {quotas.wanted}.",
            "Raise tasks.limit, or lower the quotas that the generator cannot fill.",
        )
    return {
        "requests": drawn,
        "kept": dict(quotas.counts),
        "surplus": dict(quotas.surplus),
        "yield": {mode.value: n for mode, n in tally.modes.items()},
        "drops": {drop.value: n for drop, n in tally.drops.items()},
    }


def main(call: cli.Call) -> None:
    config, workdir = call.config, call.workdir
    target = workdir / "dataset"
    check_positive(config, ("batch", "concurrency", "image_area", "image_multiple"))
    claim_workdir(workdir, config, resuming=(target / "dataset.json").exists())
    if (target / "dataset.json").exists():
        dataset = TrajectoryDataset(target)
        print(f"construct: {target} is complete, {len(dataset)} trajectories")
        return
    if config.released:
        counts = import_released(config, target)
    else:
        pairs = requests(config.tasks)
        if config.baseline:
            system = systems.load(config.baseline)
            stream = with_first_images(
                system, pairs, config.seed, config.batch, as_dataclass(SamplingOptions, config.sampling)
            )
        else:
            stream = itertools.starmap(Request, pairs)
        with TrajectoryWriter(target, {"config": config.to_dict()}) as writer:
            counts = asyncio.run(fill(config, stream, writer))
            writer.provenance["counts"] = counts
    print(f"construct: {target}: {counts}")


def import_released(config: Any, target: Any) -> dict[str, Any]:
    """A folder in the released layout as a dataset, its images resized to about `config.image_area` pixels each."""
    trajectories, problems = read_released(config.released)
    for problem in problems:
        print(f"left out: {problem.path}: {problem}")
    if not trajectories:
        raise UserError(f"{config.released!r} holds no usable sample.", "See the reasons above.")
    with TrajectoryWriter(target, {"released": str(config.released)}) as writer:
        for trajectory, images in trajectories:
            writer.add(*resized(trajectory, images, config.image_area, config.image_multiple))
    return {"imported": len(trajectories), "left_out": len(problems)}


def resized(trajectory: Trajectory, images: Images, area: int, multiple: int) -> tuple[Trajectory, Images]:
    """The same trajectory over images fitted to `area` pixels, sides multiples of `multiple`."""
    fitted = {name: fit(images[name], area, multiple) for name in (*trajectory.sample.sources, *trajectory.images)}
    names = {name: image_name(pixels) for name, pixels in fitted.items()}
    sample = dataclasses.replace(trajectory.sample, sources=tuple(names[name] for name in trajectory.sample.sources))
    rounds = tuple(dataclasses.replace(r, image=names[r.image]) for r in trajectory.rounds)
    return Trajectory(sample, rounds), {names[name]: pixels for name, pixels in fitted.items()}


def entry() -> None:
    cli.run(main, config=True)


if __name__ == "__main__":
    entry()
