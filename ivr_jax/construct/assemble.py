"""From the journal to the dataset, the released folders, a gallery and a summary."""

from __future__ import annotations

import collections
import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.construct.released import write_outcome
from ivr_jax.construct.run import Pass, outcome_from_json, outcomes, trajectory_of
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import Images, fit, image_name
from ivr_jax.report.answers import make_answer
from ivr_jax.report.gallery import GalleryItem, GallerySection
from ivr_jax.report.pages import write_report
from ivr_jax.services.journal import Journal
from ivr_jax.services.service import Service
from ivr_jax.trajectory import Mode, Trajectory

_IN_GALLERY = 8  # trajectories of each mode


def write_dataset(
    target: Path, journal: Journal, found: Pass, provenance: Mapping[str, Any], area: int = 0, multiple: int = 1
) -> None:
    """Writes what `found` chose as the dataset `target`, atomically.

    Args:
      area, multiple: images are fitted to about so many pixels, sides in these multiples; an area of 0 leaves them.
    """
    with TrajectoryWriter(target, provenance) as writer:
        for key, request, kind in found.chosen:
            outcome = outcome_from_json(journal.outcome(key, request), journal)
            trajectory, images = trajectory_of(outcome, kind), outcome.images
            writer.add(*(resized(trajectory, images, area, multiple) if area else (trajectory, images)))


def resized(trajectory: Trajectory, images: Images, area: int, multiple: int) -> tuple[Trajectory, Images]:
    """The same trajectory over images fitted to `area` pixels, sides multiples of `multiple`."""
    fitted = {name: fit(images[name], area, multiple) for name in (*trajectory.sample.sources, *trajectory.images)}
    names = {name: image_name(pixels) for name, pixels in fitted.items()}
    sample = dataclasses.replace(trajectory.sample, sources=tuple(names[name] for name in trajectory.sample.sources))
    rounds = tuple(dataclasses.replace(r, image=names[r.image]) for r in trajectory.rounds)
    return Trajectory(sample, rounds), {names[name]: pixels for name, pixels in fitted.items()}


def write_folders(target: Path, journal: Journal, found: Pass) -> None:
    """Every finished sample as the released scripts leave it: `target/success/KEY` and `target/fail/KEY`."""
    shutil.rmtree(target, ignore_errors=True)  # what an interrupted run had written of it
    try:
        for outcome in outcomes(journal, found.finished):
            write_outcome(target / "success", target / "fail", outcome)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.", "Make room, and run again.") from error


def write_gallery(page: Path, dataset: TrajectoryDataset) -> Path:
    """The first trajectories of each mode as one self-contained HTML page; returns its path."""
    counts = dataset.manifest["provenance"]["counts"]
    sections: dict[Mode, list[GalleryItem]] = {mode: [] for mode in Mode}
    for trajectory in dataset:
        section = sections[trajectory.mode]
        if len(section) < _IN_GALLERY:
            answer = make_answer(trajectory, truth=[round_.evaluation for round_ in trajectory.rounds])
            section.append(GalleryItem("constructed", answer, dataset.images(trajectory)))
        if all(len(section) == _IN_GALLERY for section in sections.values()):
            break
    gallery = []
    for mode, items in sections.items():
        if items:
            title = mode.value.replace("_", " ").capitalize()
            gallery.append(GallerySection(title, f"{counts['yield'].get(mode.value, 0)} samples.", tuple(items)))
    counted = []
    for title, key in (("Passed at", "passed at"), ("Dropped", "drops")):
        named = [f"{name.replace('_', ' ')} {number}" for name, number in counts.get(key, {}).items()]
        counted.append(f"{title}: {', '.join(named) or 'none'}.")
    notes = [f"{counts['requests']} samples.", *counted]
    return write_report(page, "Constructed trajectories", [], {}, gallery, [], notes)[0]


def write_summary(path: Path, found: Pass, journal: Journal, services: Sequence[Service]) -> dict[str, Any]:
    """Writes and returns what happened: samples by what became of them, services by what they were asked and cost."""
    summary = {
        "samples": found.seen,
        "finished_before": found.recorded,
        "constructed": dict(sorted(found.modes.items())),
        "dropped": dict(sorted(found.drops.items())),
        "pending": found.pending,
        "quarantined": found.quarantined,
        "services": journal.usage(),
        "this_run": _this_run(services),
    }
    files.write_json(path, summary)
    return summary


def _this_run(services: Sequence[Service]) -> dict[str, dict[str, Any]]:
    """What this process asked, by service; services of one name (a fallback that is the same model, say) together."""
    counted: dict[str, dict[str, Any]] = {}
    for service in services:
        counts = service.caller.counts
        row = counted.setdefault(service.name, {"calls": 0, "answered": 0, "from_record": 0, "faults": {}})
        row["calls"] += counts.calls
        row["answered"] += counts.answered
        row["from_record"] += counts.recorded
        row["faults"] = dict(sorted((collections.Counter(row["faults"]) + counts.faults).items()))
    return counted
