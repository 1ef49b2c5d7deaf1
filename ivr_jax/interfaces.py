"""The two services of data construction: the analyzer judges, the generator draws.

The exact micro-world (`ivr_jax.world`), a vision-language model behind an HTTP service, and a checkpoint of our own
implement the same two protocols, so they are interchangeable in construction, rewards and evaluation.  Calls are
coroutines because real services are slow; the micro-world's return at once.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol

from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels
from ivr_jax.trajectory import Evaluation, Reflection, Sample


class ServiceFailed(UserError):
    """A service gave no usable answer, after every retry: nothing is known, so nothing may be concluded.

    In construction the sample stays pending; in rewards the component is missing.

    Attributes:
      kind: what went wrong, in a word or two: "rejected" (the service will not answer this), "unusable answer" (it
        answered something else), or the last fault of the connection ("time-out", "503").
    """

    def __init__(self, what: str, remedy: str = "", kind: str = ""):
        super().__init__(what, remedy)
        self.kind = kind


class ServiceDown(ServiceFailed):
    """A service has failed for so long that asking again now is pointless: the run should stop and be resumed."""


class RootCause(enum.StrEnum):
    """Why reflection did not repair an image (paper, section on data construction)."""

    PROMPT_TOO_COMPLEX = "prompt_too_complex"
    AMBIGUOUS_PROMPT = "ambiguous_prompt"
    GENERATOR_LIMIT = "generator_limit"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One rejected drawing, as the analyzer sees it when it looks for the root cause."""

    image: Pixels
    evaluation: Evaluation
    reflection: Reflection | None


class Analyzer(Protocol):
    """Judges images and reasoning.  `images` holds the sample's sources by name."""

    async def evaluate(self, sample: Sample, images: Images, image: Pixels) -> Evaluation:
        """Scores `image` (any size, any content) as an answer to the whole request: four axes, 1-5, with reasons."""

    async def evaluate_step(
        self, sample: Sample, images: Images, instruction: str, previous: Sequence[Pixels], image: Pixels
    ) -> Evaluation:
        """Scores `image` as the result of applying `instruction` alone to `previous` (last result, or sources)."""

    async def reflect(self, sample: Sample, images: Images, image: Pixels, evaluation: Evaluation) -> Reflection:
        """What is wrong with the rejected `image`, and how to draw it again."""

    async def root_cause(self, sample: Sample, images: Images, attempts: Sequence[Attempt]) -> RootCause:
        """Why all `attempts` failed."""

    async def decompose(self, sample: Sample, images: Images) -> tuple[str, ...]:
        """2-5 atomic sub-instructions, in the order in which to apply them."""

    async def judge_reasoning(
        self, sample: Sample, images: Images, kind: str, text: str, previous: Sequence[Pixels]
    ) -> float:
        """Logical validity in [0, 1] of one intermediate text.

        `kind` is "failure_analysis", "improvement_plan" or "step"; `previous` holds the images drawn so far, oldest
        first.
        """


class Generator(Protocol):
    """Draws images."""

    async def generate(
        self,
        sample: Sample,
        instruction: str,
        sources: Sequence[Pixels],
        reflection: Reflection | None = None,
        attempt: int = 0,
    ) -> Pixels:
        """Applies `instruction` (the whole prompt, or one step) to `sources`; `reflection` says what to fix.

        `attempt` distinguishes repeated calls, so that a deterministic generator can answer differently.
        """
