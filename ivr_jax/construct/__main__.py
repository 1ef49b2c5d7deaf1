r"""Construct a dataset of trajectories: direct answers, reflections and multi-step answers, by the paper's escalation.

    python -m ivr_jax.construct --config=configs/micro_construct.py --workdir=runs/demo/construct \
        --config.baseline=runs/demo/base
    python -m ivr_jax.construct --config=configs/photographs_construct.py --workdir=runs/mine/construct \
        --config.samples=samples.json        your own images and prompts, judged and drawn by services; a .jsonl file
                                             holds visual_reflection_v1 records, whose images are judged anew
    python -m ivr_jax.construct --config=configs/micro_construct.py --workdir=runs/mine/construct \
        --config.released=FOLDER             imports a folder in the released layout instead

On several machines: a part each, in a workdir of its own, then merged:

    python -m ivr_jax.construct --config=... --workdir=runs/mine/part0 --shard=0/2
    python -m ivr_jax.construct --config=... --workdir=runs/mine/part1 --shard=1/2
    python -m ivr_jax.construct --config=... --workdir=runs/mine/all --merge=runs/mine/part0,runs/mine/part1

On a Ray cluster that sees WORKDIR, all of that by one command (docs/how-to/ray.md):

    python -m ivr_jax.construct --config=... --workdir=runs/mine/construct --engine=ray --shards=64

Every answer of a service and every finished sample is recorded in WORKDIR/journal at once: the command may be stopped
or killed at any time, and resumes when it is given again.  WORKDIR/dataset is written when no sample is pending;
WORKDIR/summary.json lists what became of each sample, and the calls and cost of each service.
"""

from __future__ import annotations

import asyncio
import collections
import math
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ivr_jax import cli, files
from ivr_jax.cloud.inputs import local
from ivr_jax.cloud.mirror import with_urls
from ivr_jax.cluster import engine as cluster
from ivr_jax.cluster.part import Part
from ivr_jax.config import check_least, claim_workdir, saved_config
from ivr_jax.construct.assemble import resized, write_dataset, write_folders, write_gallery, write_summary
from ivr_jax.construct.build_services import (
    ROLES,
    Services,
    build_services,
    rules_from_config,
    service_sections,
)
from ivr_jax.construct.inputs import source
from ivr_jax.construct.released import Problem, iter_released
from ivr_jax.construct.run import Construction, Pass, Quotas, Status
from ivr_jax.construct.shards import Shard, merge
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.services.config import CHANGEABLE
from ivr_jax.services.journal import Journal
from ivr_jax.services.limits import LimitsOf, ProcessLimits
from ivr_jax.services.service import Service
from ivr_jax.trajectory import Mode

_ANY_TIME = (  # settings that do not decide what is constructed
    "concurrency",
    "passes",
    "leave_pending",
    "folders",
    "gallery",
    "mesh",
    *(f"services.{role}.{name}" for role in ROLES for name in CHANGEABLE),
)
_UNTIL_DONE = ("tasks.limit", "quotas")  # and those that only decide when to stop
_BETWEEN_PARTS = ("shard", "samples", "image_root")  # and those in which the parts of one construction may differ
_PARTS, _COMPLETE = "parts", "complete.json"  # of a run on a cluster: its parts' workdirs, and their last file
PENDING = 3  # exit status: run again
_SHOWN_EVERY = 1.0  # seconds between two looks at the services, so that the bar moves while everyone waits


class StopRequest:
    """SIGTERM: answered at once; then no further sample is started, no question asked, and no image drawn.

    Calls in flight are paid for, so they are waited for and recorded.
    """

    def __init__(self) -> None:
        self.asked = False
        self._services: Sequence[Service] = ()
        self._construction: Construction | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def during(self, construction: Construction, services: Sequence[Service]) -> None:
        """What has to stop from now on; called by the event loop that they run in."""
        self._loop, self._construction, self._services = asyncio.get_running_loop(), construction, services
        if self.asked:
            self._stop()

    def _stop(self) -> None:
        self._construction.stop()
        for service in self._services:
            service.caller.stop()

    def _remember(self, *_: Any) -> None:
        self.asked = True
        # print is not re-entrant
        os.write(2, f"\nconstruct: asked to stop; {waited_for(self._services)}.\n".encode())
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    def __enter__(self) -> StopRequest:
        self._here = threading.current_thread() is threading.main_thread()
        self._previous = signal.signal(signal.SIGTERM, self._remember) if self._here else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._previous)


def waited_for(services: Sequence[Service]) -> str:
    """For what a run that was asked to stop still waits, and about how long, by what calls took so far."""
    counts = [service.caller.counts for service in services]
    in_flight = sum(count.in_flight for count in counts)
    if not in_flight:
        return "ending after what is being drawn or judged now"
    ended = [(count.seconds / (count.calls - count.in_flight)) for count in counts if count.calls > count.in_flight]
    about = f"about {max(ended):.0f} s" if ended else f"at most {max(s.config.timeout for s in services):.0f} s"
    return f"saving after {in_flight} calls in flight, {about}"


async def work(
    config: Any, journal: Journal, bar: tqdm, stop: StopRequest, limits: LimitsOf = ProcessLimits
) -> tuple[Pass, Services]:
    """Reads the input until nothing is pending, but at most `config.passes` times; `limits` grant services' calls."""
    drawing = ""  # what the baseline is doing

    def show_drawing(text: str) -> None:
        nonlocal drawing
        drawing = text

    inputs = source(config, journal, show_drawing, lambda: stop.asked)
    services = build_services(config, journal, limits)
    wanted = None if config.samples else Shard.parse(config.shard).share(config.quotas.to_dict())
    rules = rules_from_config(config.rules)
    bar.reset(total=inputs.count if wanted is None else sum(wanted.values()))
    found = Pass()

    def notice(status: Status, counts: Pass) -> None:
        nonlocal found
        found = counts
        done = found.seen if wanted is None else len(found.chosen)
        if status.recorded:
            bar.initial += done - bar.n  # what was known before says nothing about the rate
        bar.update(done - bar.n)
        show()

    def show(refresh: bool = False) -> None:
        parts = (progress_text(found), drawing, activity_text(services.remote))
        bar.set_postfix_str(" | ".join(filter(None, parts)), refresh=refresh)

    async def show_often() -> None:
        while True:
            await asyncio.sleep(_SHOWN_EVERY)
            show(refresh=True)

    display = asyncio.create_task(show_often())
    try:
        for _ in range(config.passes):
            construction = Construction(
                journal, services.analyzer, services.generator, rules, config.concurrency, services.made_by,
                services.baseline,
            )  # fmt: skip
            stop.during(construction, services.remote)
            bar.reset()
            bar.initial = 0
            found = await construction.run(inputs.entries(), Quotas(wanted), notice)
            if not found.pending or construction.down is not None:
                break
    finally:
        display.cancel()
        await services.close()
    found.quarantined = {**inputs.quarantined, **found.quarantined}
    return found, services


def progress_text(found: Pass) -> str:
    """Shares of the modes among constructed samples, and what became of the others: "direct 40%, ... | pending 2"."""
    constructed = max(1, found.modes.total())
    shares = [f"{mode.value.replace('_', '-')} {found.modes[mode.value] / constructed:.0%}" for mode in Mode]
    others = [f"{reason.replace('_', ' ')} {n}" for reason, n in found.drops.most_common()]
    others += [f"{name} {len(kind)}" for name, kind in
               (("pending", found.pending), ("quarantined", found.quarantined)) if kind]
    return " | ".join(filter(None, (", ".join(shares), ", ".join(others))))


def activity_text(services: Sequence[Service]) -> str:
    """What the services are doing: "1,702 calls, 64 in flight, 3 waiting, openai:gpt-4o is down: asked every 15 s"."""
    calls = sum(service.caller.counts.calls for service in services)
    states = {name: sum(getattr(service.caller.counts, name) for service in services)
              for name in ("in_flight", "waiting")}
    parts = [f"{calls:,} calls"] if calls else []
    parts += [f"{count} {name.replace('_', ' ')}" for name, count in states.items() if count]
    parts += [f"{service.name} fails: asked every {service.config.breaker_rest:g} s"
              for service in services if service.caller.breaker.open]
    return ", ".join(parts)


def main(call: cli.Call) -> int | None:
    config, workdir, engine = call.config, call.workdir, cluster.from_call(call)
    target = workdir / "dataset"
    check_least(config, ("batch", "concurrency", "image_area", "image_multiple", "passes"))
    check_least(config.quotas, config.quotas, 0)
    service_sections(config)  # before the config is saved: what is refused may hold a key
    config.shard = call.flags.shard or config.shard
    if Shard.parse(config.shard).count > 1 and (config.released or call.flags.merge):
        raise UserError("a shard is a part of a construction.", "Leave out --shard to merge or to import.")
    if engine is not None and (config.shard or config.released or call.flags.merge):
        raise UserError("--engine=ray makes its own shards, merges them, and imports nothing.",
                        "Leave out --shard, --merge and config.released.")
    complete = (target / "dataset.json").exists()
    begun = complete or (saved_config(workdir) is not None and Journal.begun(workdir / "journal"))
    claim_workdir(workdir, config, resuming=begun, ignore=_ANY_TIME if complete else (*_ANY_TIME, *_UNTIL_DONE))
    if complete:
        print(with_urls(f"construct: {target} is complete, {len(TrajectoryDataset(target))} trajectories"))
        _show(config, workdir)
        return None
    if config.released:
        print(with_urls(f"construct: {target}: {in_words(import_released(config, target))}"))
        return None
    if engine is not None:
        _on_cluster(call, engine, begun)
    parts = [str(part) for part in sorted(workdir.glob(f"{_PARTS}/*")) if saved_config(part) is not None]
    with (
        Journal(workdir / "journal") as journal,
        tqdm(desc="construct", unit="sample", mininterval=1.0) as bar,
        StopRequest() as stop,
    ):
        merge(journal, [*call.flags.merge, *parts], config, (*_ANY_TIME, *_UNTIL_DONE, *_BETWEEN_PARTS))
        found, services = asyncio.run(work(config, journal, bar, stop))
        bar.close()
        write_summary(workdir / "summary.json", found, journal, services.remote)
        if stop.asked:
            print(f"construct: stopped; {len(found.finished)} samples are finished. Give the same command to resume.")
            return PENDING
        if found.pending and not config.leave_pending:
            return _report_pending(workdir, found)
        if not config.samples and not found.full:
            raise UserError(
                f"{found.seen} requests gave {dict(found.modes)}; the quotas are {config.quotas.to_dict()}.",
                "Raise tasks.limit, or lower the quotas that the generator cannot fill.",
            )
        if Shard.parse(config.shard).count > 1:
            print(f"construct: shard {config.shard} is complete: {progress_text(found)}")
            return None
        counts = _deliver(config, workdir, journal, found)
    shutil.rmtree(workdir / _PARTS, ignore_errors=True)  # its journals are merged
    _show(config, workdir)
    if not services.remote:
        shutil.rmtree(workdir / "journal")  # of no use beside the dataset: nothing in it was paid for
    print(with_urls(f"construct: {target}: {in_words(counts)}"))
    return None


def _on_cluster(call: cli.Call, engine: cluster.Engine, begun: bool) -> None:
    """Constructs the parts that are not complete, each in a folder of its own below WORKDIR/parts."""
    config, workdir = call.config, call.workdir
    known = {int(folder.name.partition("-of-")[2]) for folder in workdir.glob(f"{_PARTS}/*-of-*")}
    if known - {engine.parts}:
        raise UserError(f"{workdir} was begun with --shards={min(known - {engine.parts})}.",
                        "Give the same number, or name another --workdir.")
    if begun and not known:
        raise UserError(f"{workdir} was begun without --engine=ray, and its parts would not know what it has paid for.",
                        "Finish it without, or name another --workdir.")
    open_ = [i for i in range(engine.parts) if not _is_complete(part_folder(workdir, i, engine.parts), config)]
    with tqdm(desc="construct", unit="sample") as bar:
        engine.run("ivr_jax.construct.__main__:run_part", call.argv, workdir, bar, open_)


def run_part(argv: Sequence[str], part: Part) -> None:
    """Constructs one part of a run with `--engine=ray`, and leaves its journal for `merge`."""
    call = cli.parse(argv, config=True, add_flags=add_flags)
    config, folder = call.config, cli.prepare_workdir(part_folder(call.workdir, part.index, part.count))
    config.shard = f"{part.index}/{part.count}"
    begun = saved_config(folder) is not None and Journal.begun(folder / "journal")
    with Journal(folder / "journal") as journal:
        claim_workdir(folder, config, resuming=begun, ignore=(*_ANY_TIME, *_UNTIL_DONE))
        found, _ = asyncio.run(work(config, journal, part.bar, StopRequest(), part.limits))
    if not found.pending:
        files.write_json(folder / _COMPLETE, _until(config))


def part_folder(workdir: Path, index: int, count: int) -> Path:
    """The folder of part `index` of `count` of a construction on a cluster."""
    return workdir / _PARTS / f"{index:05d}-of-{count:05d}"


def _until(config: Any) -> dict[str, Any]:
    """The settings that decide when a part is complete."""
    return {"limit": config.tasks.limit, "quotas": config.quotas.to_dict()}


def _is_complete(folder: Path, config: Any) -> bool:
    file = folder / _COMPLETE
    return file.exists() and files.read_json(file) == _until(config)


def in_words(counts: Mapping[str, Any]) -> str:
    """Counts, and counts of counts, as a line: "requests 12; kept direct 3, reflection 1; drops none"."""

    def value(count: Any) -> str:
        if not isinstance(count, Mapping):
            return str(count)
        return ", ".join(f"{name} {number}" for name, number in count.items()) or "none"

    return "; ".join(f"{name.replace('_', ' ')} {value(count)}" for name, count in counts.items())


def _deliver(config: Any, workdir: Path, journal: Journal, found: Pass) -> dict[str, Any]:
    """Writes the folders and the dataset; returns the counts that go into the provenance."""
    counts: dict[str, Any] = {
        "requests": found.seen,
        "passed at": dict(sorted(found.stages.items())),
        "yield": dict(sorted(found.modes.items())),
        "drops": dict(sorted(found.drops.items())),
        "pending": len(found.pending),
        "quarantined": len(found.quarantined),
        "kept": dict(sorted(collections.Counter(kind for _, _, kind in found.chosen).items())),
    }
    if config.folders:
        write_folders(workdir / "folders", journal, found)
    if not found.chosen:
        raise UserError(
            f"none of {found.seen} samples gave a trajectory: "
            f"{in_words({'dropped': counts['drops'], 'quarantined': counts['quarantined']})}.",
            f"Look at their images in {workdir / 'folders' / 'fail'}." if config.folders else
            "Give the same command with --config.folders=True, which shows their images.",
        )
    area = config.image_area if config.samples else 0
    settings = config.to_dict()
    for role in ROLES:
        for name in CHANGEABLE:
            del settings["services"][role][name]
    for name in ("concurrency", "passes", "leave_pending", "folders", "gallery", "shard", "mesh"):
        del settings[name]
    write_dataset(
        workdir / "dataset", journal, found, {"config": settings, "counts": counts}, area, config.image_multiple
    )
    return counts


def _show(config: Any, workdir: Path) -> None:
    """Writes the gallery of a finished dataset, unless it is there already or nobody wants it."""
    page = workdir / "gallery.html"
    if config.gallery and not config.released and not page.exists():
        print(with_urls(f"construct: gallery: {write_gallery(page, TrajectoryDataset(workdir / 'dataset'))}"))


def _report_pending(workdir: Path, found: Pass) -> int:
    key, reason = next(iter(found.pending.items()))
    print(f"construct: {len(found.finished)} samples are finished, {len(found.quarantined)} quarantined, "
          f"{len(found.pending)} pending ({key}: {reason} ...)")
    print(with_urls(f"construct: {workdir / 'summary.json'} lists them.  Give the same command again to retry them, or "
                    "add --config.leave_pending=True to write the dataset without them."))
    return PENDING


def import_released(config: Any, target: Any) -> dict[str, Any]:
    """A folder in the released layout as a dataset, its images resized to about `config.image_area` pixels each."""
    imported = left_out = 0
    largest = (0, 0)  # height and width of the largest image that was resized
    with TrajectoryWriter(target, {"released": str(config.released)}) as writer:
        root = local(config.image_root) if config.image_root else None
        for found in iter_released(local(config.released), image_root=root):
            if isinstance(found, Problem):
                print(f"left out: {found}")
                left_out += 1
            else:
                trajectory, images = resized(*found, config.image_area, config.image_multiple)
                changed = [pixels.shape[:2] for name, pixels in found.images.items() if name not in images]
                largest = max(largest, *changed, key=math.prod) if changed else largest
                writer.add(trajectory, images)
                imported += 1
        if not imported:
            raise UserError(f"{config.released!r} holds no usable sample.", "See the reasons above.")
    if any(largest):
        print(f"construct: images are resized to about {config.image_area} pixels, the largest from {largest[1]} x "
              f"{largest[0]}; --config.image_area={math.prod(largest)} keeps their size")
    return {"imported": imported, "left_out": left_out}


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("shard", "", "i/n: construct only part i (from 0) of n, for --merge", flag_values=values)
    flags.DEFINE_list("merge", [], "workdirs of shards whose journals are taken over first", flag_values=values)
    cluster.add_flags(values)


def entry() -> None:
    cli.run(main, config=True, add_flags=add_flags, reads=("merge",))


if __name__ == "__main__":
    entry()
