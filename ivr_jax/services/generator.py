"""A `Generator` that asks an image service."""

from __future__ import annotations

from collections.abc import Sequence

from ivr_jax.images import Pixels
from ivr_jax.services.http_client import Picture
from ivr_jax.services.prompts import Prompts
from ivr_jax.services.service import Question, Service
from ivr_jax.trajectory import Reflection, Sample


class ServiceGenerator:
    """See `Generator`.  `generate` raises `ServiceFailed` when the service gives no usable image."""

    def __init__(self, service: Service, prompts: Prompts | None = None):
        self.service, self._prompts = service, prompts or Prompts()

    async def generate(
        self,
        sample: Sample,
        instruction: str,
        sources: Sequence[Pixels],
        reflection: Reflection | None = None,
        attempt: int = 0,
    ) -> Pixels:
        """See `Generator.generate`."""
        text = self._prompts.render(
            "draw",
            instruction=instruction,
            analysis=reflection.failure_analysis if reflection else "",
            plan=reflection.improvement_plan if reflection else "",
        )
        pictures = tuple(Picture(f"Source {i}", pixels) for i, pixels in enumerate(sources, 1))
        return await self.service.image(Question(text, pictures, attempt=attempt))

    async def close(self) -> None:
        """Ends the service's connections."""
        await self.service.client.close()
