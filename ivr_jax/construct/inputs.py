"""What is to be constructed: a list of samples, or the micro-world's tasks, with or without `G1` by a checkpoint."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ivr_jax.checkpoints import system as systems
from ivr_jax.config import as_dataclass
from ivr_jax.construct.baseline import with_first_images
from ivr_jax.construct.escalation import Request
from ivr_jax.construct.run import Entry
from ivr_jax.construct.samples import sort_samples
from ivr_jax.construct.shards import Shard
from ivr_jax.errors import UserError
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.journal import Journal
from ivr_jax.trajectory import sample_to_json
from ivr_jax.world.sampler import sample_task


def world_entries(tasks: Any, settings: str = "") -> Iterator[Entry]:
    """Requests of the micro-world, numbers of edits as weighted in `tasks.edits` (weight of 1, 2, ...).

    `settings` goes into what identifies a request.
    """
    schedule = [count for count, weight in enumerate(tasks.edits, 1) for _ in range(weight)]
    for index in range(tasks.limit):
        edits = schedule[index % len(schedule)] if schedule else None
        task = sample_task(tasks.level, tasks.seed, index, edits=edits)
        digest = hashlib.sha256(json.dumps(sample_to_json(task.sample), sort_keys=True).encode()).hexdigest()
        request = Request(task.sample, task.images)
        yield Entry(task.sample.key, f"{settings}-{digest}", functools.partial(_identity, request))


def _identity(request: Request) -> Request:
    return request


def settings_digest(config: Any) -> str:
    """Changes with the settings that decide what becomes of a sample: a record made under others does not count."""
    services = {role: as_dataclass(ServiceConfig, section).identity() for role, section in config.services.items()}
    names = ("seed", "baseline", "batch", "rules", "analyzer", "generator", "sampling", "prompts")
    decisive = {name: config.to_dict()[name] for name in names} | {"services": services}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def source(config: Any, journal: Journal) -> tuple[Callable[[], Iterable[Entry]], dict[str, str], int | None]:
    """How to read the input (again), which of its entries are quarantined and why, and how many are usable.

    All of it of the config's shard alone.
    """
    quarantined: dict[str, str] = {}
    settings, shard = settings_digest(config), Shard.parse(config.shard)
    if config.samples:
        samples, bad = sort_samples(config.samples, config.image_root or None)
        if not samples:
            raise UserError(f"{config.samples} holds no usable sample: {bad[0].reason.what}", bad[0].reason.remedy)
        quarantined = {entry.key: entry.reason.what for entry in bad if shard.holds(entry.key)}
        samples = [sample for sample in samples if shard.holds(sample.key)]

        def read() -> Iterable[Entry]:
            return (Entry(s.key, f"{settings}-{s.fingerprint}", s.load, from_files=True) for s in samples)

    else:
        samples = None

        def read() -> Iterable[Entry]:
            return (entry for entry in world_entries(config.tasks, settings) if shard.holds(entry.key))

    count = None if samples is None else len(samples)
    if config.baseline:
        system, options = systems.load(config.baseline), as_dataclass(SamplingOptions, config.sampling)

        def drawn() -> Iterator[Entry]:
            return with_first_images(
                system, read(), config.seed, config.batch, options,
                known=lambda entry: journal.outcome(entry.key, entry.request) is not None,
            )

        return drawn, quarantined, count
    return read, quarantined, count
