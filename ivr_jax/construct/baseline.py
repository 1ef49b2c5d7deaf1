"""`G1` by a checkpoint of our own: the model that is to be trained, drawing a batch at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax

from ivr_jax.checkpoints.system import System
from ivr_jax.construct.escalation import Request
from ivr_jax.construct.run import Entry
from ivr_jax.errors import UserError
from ivr_jax.images import fit, image_name
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import draw_first_images


def with_first_images(
    system: System,
    entries: Iterable[Entry],
    seed: int,
    batch: int,
    options: SamplingOptions,
    known: Callable[[Entry], bool] = lambda entry: False,
) -> Iterator[Entry]:
    """The same entries, with `G1` drawn by `system` for those that bring none.

    Args:
      system: the model; sources are fitted to its resolution for the drawing.
      entries: the input.
      seed: with an entry's place in the input, and its batch, it decides the drawing.
      batch: drawings at a time; images of different sizes are drawn apart.
      options: how to sample.
      known: whether an entry is recorded already; a batch of such entries is not drawn again.
    """
    key, remaining = jax.random.key(seed), iter(entries)
    for number in itertools.count():
        part = list(itertools.islice(remaining, batch))
        if not part:
            return
        if all(known(entry) for entry in part):
            yield from part
        else:
            yield from _drawn(system, part, jax.random.fold_in(key, number), batch, options)


def _drawn(
    system: System, part: list[Entry], key: jax.Array, batch: int, options: SamplingOptions
) -> Iterator[Entry]:
    requests: dict[int, Request] = {}
    square = (system.codec.config.resolution,) * 2  # what is drawn without a source
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, entry in enumerate(part):
        try:
            request = _fitted(system, entry.load())
        except UserError:
            continue  # it is quarantined when its turn comes
        requests[i] = request
        if request.first_image is None:
            sources = request.sample.sources
            groups.setdefault(request.images[sources[0]].shape[:2] if sources else square, []).append(i)
    firsts = {}
    for g, members in enumerate(groups.values()):
        filled = [requests[i] for i in (members * batch)[:batch]]
        group_key = jax.random.fold_in(key, batch + g) if g else key
        drawn = draw_first_images(system, [r.sample for r in filled], [r.images for r in filled], group_key, options)
        firsts |= dict(zip(members, drawn, strict=False))
    for i, entry in enumerate(part):
        yield _with_first(entry, firsts[i]) if i in firsts else entry


def _with_first(entry: Entry, first: object) -> Entry:
    return dataclasses.replace(entry, load=lambda: dataclasses.replace(entry.load(), first_image=first))


def _fitted(system: System, request: Request) -> Request:
    """The request over sources of the model's resolution."""
    codec = system.codec.config
    fitted = [fit(request.images[name], codec.resolution**2, codec.factor) for name in request.sample.sources]
    names = tuple(image_name(pixels) for pixels in fitted)
    return dataclasses.replace(
        request,
        sample=dataclasses.replace(request.sample, sources=names),
        images=dict(zip(names, fitted, strict=True)),
    )
