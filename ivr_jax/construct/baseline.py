"""`G1` by a checkpoint of our own, the model that is to be trained: drawn in batches, beside the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import jax

from ivr_jax.checkpoints.system import System
from ivr_jax.construct.escalation import Request
from ivr_jax.construct.run import Entry
from ivr_jax.errors import UserError
from ivr_jax.images import Pixels, fit, image_name
from ivr_jax.sampling.batch import Usage
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import draw_first_images

_HELD = 2 << 20  # bytes of a request's images up to which they are held in memory until the sample's turn comes


class _Stopped(Exception):
    """The run was asked to stop while images were being drawn."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """How a model draws first images.

    A batch is drawn as a whole, by whichever part of a construction it falls to, and by the same programs, so a drawing
    does not depend on the number of parts.

    Attributes:
      system: the model; its image tokenizer keeps no results, as batches would depend on earlier ones.
      options: how to sample.
      seed: with a sample's place in the input it decides the drawing.
      batch: samples that are read, and at most drawn, at a time.
      area: pixels of an image, about, sides in multiples of the image tokenizer's factor: sources are fitted to it, and
        what has no source is drawn as a square of it.
    """

    system: System
    options: SamplingOptions
    seed: int
    batch: int
    area: int

    async def with_first_images(
        self,
        entries: Iterable[Entry],
        known: Callable[[Entry], bool] = lambda entry: False,
        progress: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
        holds: Callable[[int], bool] = lambda number: True,
    ) -> AsyncIterator[Entry]:
        """The same entries, with `G1` for those that bring none.  Drawing happens in a thread.

        Args:
          entries: the whole input, read a batch at a time.
          known: whether an entry is recorded already; a batch of such entries is not drawn again.
          progress: called with how many images of the batch are drawn.
          stopped: whether nothing more is to be drawn: what is being drawn is given up, and entries come without a
            first image then.
          holds: whether the batch of this number, from 0, is wanted; the entries of others are left out.
        """
        key, remaining = jax.random.key(self.seed), iter(entries)
        for number in itertools.count():
            part = list(itertools.islice(remaining, self.batch))
            if not part:
                return
            if not holds(number):
                continue
            if not stopped() and not all(known(entry) for entry in part):
                part = await asyncio.to_thread(self._drawn, part, jax.random.fold_in(key, number), progress, stopped)
            for entry in part:
                yield entry

    def _drawn(
        self, part: list[Entry], key: jax.Array, progress: Callable[[str], None], stopped: Callable[[], bool]
    ) -> list[Entry]:
        """`part` with its first images; an entry that cannot be read stays as it is, and is quarantined in its turn."""
        requests: dict[int, Request] = {}
        fitted: dict[int, Request] = {}
        groups: dict[tuple[int, ...], list[int]] = {}  # size of the sources, or () without, -> positions in `part`
        for i, entry in enumerate(part):
            try:
                requests[i] = entry.load()
            except UserError:
                continue
            if requests[i].first_image is None:
                fitted[i] = self._fitted(requests[i])
                sources = fitted[i].sample.sources
                groups.setdefault(fitted[i].images[sources[0]].shape[:2] if sources else (), []).append(i)
        firsts: dict[int, Pixels] = {}
        for g, members in enumerate(groups.values()):
            if stopped():
                return part
            drawn = f"first images {len(firsts)} of {len(fitted)}"
            progress(drawn)

            def show(usage: Usage, drawn: str = drawn) -> None:
                if stopped():
                    raise _Stopped
                progress(f"{drawn}, {usage.tokens} tokens")

            group_key = jax.random.fold_in(key, self.batch + g) if g else key
            try:
                firsts |= dict(zip(members, self._draw([fitted[i] for i in members], group_key, show), strict=True))
            except _Stopped:
                return part
        progress("")
        return [
            _loaded(entry, requests[i], firsts.get(i, requests[i].first_image)) if i in requests else entry
            for i, entry in enumerate(part)
        ]

    def _draw(
        self, requests: Sequence[Request], key: jax.Array, on_usage: Callable[[Usage], None]
    ) -> list[Pixels]:
        """First images of requests of one size, in a batch of the next power of two: few shapes are compiled."""
        rows = min(self.batch, 1 << (len(requests) - 1).bit_length())
        filled = [requests[i % len(requests)] for i in range(rows)]
        samples, images = [r.sample for r in filled], [r.images for r in filled]
        system = dataclasses.replace(self.system, area=self.area)
        return draw_first_images(system, samples, images, key, self.options, on_usage=on_usage)[: len(requests)]

    def _fitted(self, request: Request) -> Request:
        """The request over sources of the size that the model draws."""
        factor = self.system.image_codec.config.factor
        fitted = [fit(request.images[name], self.area, factor) for name in request.sample.sources]
        names = tuple(image_name(pixels) for pixels in fitted)
        return dataclasses.replace(
            request,
            sample=dataclasses.replace(request.sample, sources=names),
            images=dict(zip(names, fitted, strict=True)),
        )


def _loaded(entry: Entry, request: Request, first: Pixels) -> Entry:
    """`entry` that brings its first image; its files are read once, unless they are too large to be held meanwhile."""
    if sum(pixels.nbytes for pixels in request.images.values()) <= _HELD:
        ready = dataclasses.replace(request, first_image=first)
        return dataclasses.replace(entry, read=lambda: ready, from_files=False)
    return dataclasses.replace(entry, read=lambda: dataclasses.replace(entry.load(), first_image=first))
