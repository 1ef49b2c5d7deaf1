"""A model of our own as the generator: `G` for an instruction and its sources, from a training run's workdir."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Sequence

import jax

from ivr_jax.checkpoints.system import System
from ivr_jax.errors import UserError
from ivr_jax.images import Pixels, fit, fitted_size, image_name
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import draw_first_images
from ivr_jax.services.http_client import Picture
from ivr_jax.services.service import Question, Recorded, Records
from ivr_jax.trajectory import Reflection, Sample


class CheckpointGenerator:
    """See `Generator`.

    Drawings are made one at a time in a thread, each with a key of its own question, so that what is drawn does not
    depend on other samples, and their services are not kept waiting.  They are recorded like a service's answers.

    Args:
      system: the model.
      name: what the record calls it.
      options: how to sample.
      seed: with the question it decides the drawing.
      records: where drawings are kept; None keeps none.
      area: pixels of an image, about: sources are fitted to it and edited at that size, and what has no source is drawn
        at it; the image tokenizer's own when None.
      size: what has no source is drawn in the shape of "WIDTHxHEIGHT"; "" and "auto" mean a square.
    """

    def __init__(
        self,
        system: System,
        name: str,
        options: SamplingOptions,
        seed: int,
        records: Records | None,
        area: int | None = None,
        size: str = "",
    ):
        shape = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
        if size not in ("", "auto") and shape is None:
            raise UserError(f"the generator's size is {size!r}.", "Write WIDTHxHEIGHT, such as 768x512, or auto.")
        self._shape = (int(shape[2]), int(shape[1])) if shape else (1, 1)  # height, width
        self._system, self._name, self._options, self._seed, self._records = system, name, options, seed, records
        self._drawing = asyncio.Lock()
        self._area = area
        self._identity = {"kind": "checkpoint", "model": name, "seed": seed, "options": dataclasses.asdict(options)}
        if area is not None:
            self._identity["area"] = area
        if shape is not None:
            self._identity["size"] = size

    async def generate(
        self,
        sample: Sample,
        instruction: str,
        sources: Sequence[Pixels],
        reflection: Reflection | None = None,
        attempt: int = 0,
    ) -> Pixels:
        """See `Generator.generate`; a plan follows the instruction."""
        text = f"{instruction} {reflection.improvement_plan}" if reflection else instruction
        pictures = tuple(Picture(f"Source {i}", pixels) for i, pixels in enumerate(sources, 1))
        digest = Question(text, pictures, attempt=attempt).digest(self._identity)
        found = self._records.call(digest) if self._records else None
        pixels = self._records.image(found.image) if found and found.image else None
        if pixels is None:
            async with self._drawing:
                pixels = await asyncio.to_thread(self._draw, sample, text, sources, digest)
            if self._records:
                name = await self._records.add_image(pixels)
                self._records.record_call(digest, f"checkpoint:{self._name}", Recorded(None, name))
        return pixels

    async def close(self) -> None:
        """Nothing to end."""

    def _draw(self, sample: Sample, text: str, sources: Sequence[Pixels], digest: str) -> Pixels:
        config = self._system.image_codec.config
        area = self._area or config.resolution**2
        fitted = [fit(pixels, area, config.factor) for pixels in sources]
        names = tuple(image_name(pixels) for pixels in fitted)
        asked = dataclasses.replace(sample, prompt=text, sources=names)
        key = jax.random.fold_in(jax.random.key(self._seed), int(digest[:8], 16))
        images = dict(zip(names, fitted, strict=True))
        height, width = fitted[0].shape[:2] if fitted else fitted_size(*self._shape, area, config.factor)
        cells = (height // config.factor, width // config.factor)
        return draw_first_images(self._system, [asked], [images], key, self._options, size=cells)[0]
