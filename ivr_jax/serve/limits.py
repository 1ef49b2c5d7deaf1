"""How large requests may be, how many may wait, and how long an answer may take."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from ivr_jax.config import Positive, Range, Section


@dataclasses.dataclass(frozen=True)
class Limits(Section, name="limits"):
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

    upload_bytes: Positive = 20 << 20
    body_bytes: Positive = 64 << 20
    upload_pixels: Positive = 40_000_000
    references: Positive = 4
    prompt_characters: Positive = 4000
    stored_images: Positive = 128
    waiting: Positive = 64
    answers: Positive = 4
    queue_seconds: Annotated[float, Range(above=0)] = 300.0
    answer_seconds: Annotated[float, Range(above=0)] = 600.0
    unwatched_seconds: Annotated[float, Range(above=0)] = 10.0
    kept_answers: Positive = 1000
