"""What is to be constructed: a list of samples, or the micro-world's tasks, with or without `G1` by a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from ivr_jax.cloud import inputs
from ivr_jax.config import as_dataclass
from ivr_jax.construct.baseline import Baseline
from ivr_jax.construct.build_services import load_system
from ivr_jax.construct.escalation import Request
from ivr_jax.construct.run import Entry
from ivr_jax.construct.samples import sort_samples
from ivr_jax.construct.shards import Shard
from ivr_jax.construct.visual_reflection import read_visual_reflection
from ivr_jax.errors import UserError
from ivr_jax.models.image_codec import ImageCodec
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
        yield Entry(task.sample.key, f"{settings}-{digest}", functools.partial(Request, task.sample, task.images))


def settings_digest(config: Any) -> str:
    """Changes with the settings that decide what becomes of a sample: a record made under others does not count."""
    services = {role: as_dataclass(ServiceConfig, section).identity() for role, section in config.services.items()}
    names = ("seed", "baseline", "image_tokenizer", "text_tokenizer", "batch", "image_area", "rules", "analyzer",
             "generator", "sampling", "prompts")
    decisive = {name: config.to_dict()[name] for name in names} | {"services": services}
    for name in ("dtype", "weight_dtype", "cache_dtype"):
        if config.rollout[name]:
            decisive[name] = config.rollout[name]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Source:
    """The input of the config's shard.

    Attributes:
      entries: reads it; may be called again.
      quarantined: key -> reason, of the entries of a list that cannot be used.
      count: how many entries are usable; None when nobody knows.
    """

    entries: Callable[[], AsyncIterator[Entry]]
    quarantined: dict[str, str]
    count: int | None


def source(
    config: Any,
    journal: Journal,
    progress: Callable[[str], None] = lambda text: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Source:
    """The input that a config names, with first images by its baseline, if it names one.

    Args:
      journal: what is recorded needs no first image.
      progress: called with what is being drawn while the baseline draws.
      stopped: whether the baseline is to draw nothing more.

    Raises:
      UserError: the list holds no usable sample, or the baseline cannot be loaded.
    """
    quarantined: dict[str, str] = {}
    count = None
    settings, shard = settings_digest(config), Shard.parse(config.shard)
    if config.samples:
        is_lines = str(config.samples).endswith(".jsonl")
        root = inputs.local(config.image_root) if config.image_root else None
        file = inputs.local_list(config.samples)
        samples, bad = read_visual_reflection(file, root) if is_lines else sort_samples(file, root)
        if not samples:
            reason = bad[0].reason if bad else UserError("it is empty.")
            raise UserError(f"{config.samples} holds no usable sample: {reason.what}", reason.remedy)
        quarantined = {entry.key: entry.reason.what for entry in bad if shard.holds(entry.key)}
        if config.baseline:
            count = sum(shard.holds_batch(number // config.batch) for number in range(len(samples)))
        else:
            count = sum(shard.holds(sample.key) for sample in samples)

    def read() -> Iterator[Entry]:
        if config.samples:
            return (Entry(s.key, f"{settings}-{s.fingerprint}", s.load, from_files=True) for s in samples)
        return world_entries(config.tasks, settings)

    if not config.baseline:
        return Source(lambda: _each(entry for entry in read() if shard.holds(entry.key)), quarantined, count)
    system = load_system(config, config.baseline)
    codec = system.image_codec
    codec = ImageCodec(codec.config, codec.params, cache_bytes=0)
    system = dataclasses.replace(system, image_codec=codec)
    area = config.image_area if config.samples else codec.config.resolution**2
    baseline = Baseline(system, as_dataclass(SamplingOptions, config.sampling), config.seed, config.batch, area)

    def is_known(entry: Entry) -> bool:
        return journal.outcome(entry.key, entry.request) is not None

    def drawn() -> AsyncIterator[Entry]:
        return baseline.with_first_images(read(), is_known, progress, stopped, shard.holds_batch)

    return Source(drawn, quarantined, count)


async def _each(entries: Iterator[Entry]) -> AsyncIterator[Entry]:
    for entry in entries:
        yield entry
