"""How large requests may be, how many may wait, and how long an answer may take."""

from __future__ import annotations

import dataclasses

from ivr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      upload_bytes: size of one uploaded file; body_bytes: of any other request body.
      upload_pixels: width x height of one uploaded image, read from its header before it is decompressed.
      references: images of one request.
      prompt_characters: length of a prompt or of an edited text.
      stored_images: uploaded images that are held in memory; the least recently used go first.
      waiting: requests that may wait for a slot; more are refused with 429.
      answers: answers of one request of the OpenAI endpoints (`n`).
      queue_seconds: longest wait for a slot; answer_seconds: longest time in a slot.
      unwatched_seconds: an answer of the page that nobody has watched for so long is stopped.
      kept_answers: finished answers of the page that stay on disk.
    """

    upload_bytes: int = 20 << 20
    body_bytes: int = 64 << 20
    upload_pixels: int = 40_000_000
    references: int = 4
    prompt_characters: int = 4000
    stored_images: int = 128
    waiting: int = 64
    answers: int = 4
    queue_seconds: float = 300.0
    answer_seconds: float = 600.0
    unwatched_seconds: float = 10.0
    kept_answers: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(f"the limit {field.name} is {getattr(self, field.name)}.", "It must be positive.")
