"""A loaded model that answers requests: what `python -m ivr_jax.generate` and `ivr_jax.generate_answer` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.generate import requests as requests_lib
from ivr_jax.generate.answer_folder import InterleavedAnswer
from ivr_jax.generate.requests import Prepared, Request
from ivr_jax.images import Pixels
from ivr_jax.protocol import interleaved
from ivr_jax.protocol.grammar import INTERLEAVED, Grammar, GrammarOptions
from ivr_jax.sampling.batch import RolloutOptions, Usage
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import Answer, Rollout, roll_out
from ivr_jax.trajectory import MAX_REFLECTIONS, MAX_STEPS, Mode

MODES = tuple(mode.value for mode in Mode)


@dataclasses.dataclass(frozen=True)
class Answering:
    """A loaded model and how it shall answer; `about` is recorded with every answer."""

    system: systems.System
    grammar: Grammar
    sampling: SamplingOptions
    area: int
    length: int
    about: dict[str, Any]

    def answer(
        self, request: Request, watch: Callable[[Usage], None] | None = None
    ) -> tuple[Answer | InterleavedAnswer, int]:
        """The answer and its number of tokens.  Raises UserError when it does not come to an end.

        `watch`: called with what it has cost so far while it is drawn.
        """
        prepared = requests_lib.prepare(request, self.system, self.area)
        rollout = roll_out(
            self.system,
            self.grammar,
            [prepared.sample],
            [prepared.images],
            jax.random.key(request.seed),
            RolloutOptions(
                requests_lib.room(prepared, self.system, self.length, self.area),
                self.sampling,
                EngineOptions(growth=1),  # one answer: one program to compile
                size=prepared.size,
            ),
            on_usage=watch,
        )
        tokens = int(rollout.samples.lengths[0])
        if not np.isfinite(rollout.samples.log_probs).all():
            raise UserError(
                "the model's scores are not numbers: its weights hold NaN or infinity.",
                "Use another step of the run, or convert the weights again.",
            )
        if self.grammar.options.modes == (INTERLEAVED,):
            return self._interleaved(prepared, rollout), tokens
        if rollout.answers[0] is None:
            raise UserError(
                f"the answer to {request.key!r} did not come to an end: {rollout.errors[0]}",
                "Raise --answer_length, or try another --seed.",
            )
        return rollout.answers[0], tokens

    def _interleaved(self, prepared: Prepared, rollout: Rollout) -> InterleavedAnswer:
        parts, finished = interleaved.parse_interleaved(self.system.tokenizer, rollout.answer_tokens(0))
        drawn = self.system.codec.decode([part.codes for part in parts if part.codes is not None])
        return InterleavedAnswer(prepared.sample, parts, tuple(drawn), finished, prepared.images)

    def about_request(self, request: Request) -> dict[str, Any]:
        return {**self.about, **dataclasses.asdict(request), "images": list(request.images)}


def make_answering(
    system: systems.System,
    sampling: SamplingOptions,
    modes: Sequence[str] = (),
    *,
    image_area: int = 0,
    answer_length: int = 0,
    text_cap: int = 0,
    about: dict[str, Any] | None = None,
) -> Answering:
    """A loaded model with the settings of its answers.

    Args:
      modes: of `MODES` or "interleaved"; by default all modes of a model that was trained on trajectories, else
        interleaved texts and images.
      image_area: pixels of an image, approximately; 0: the image tokenizer's resolution, squared.
      answer_length: most answer tokens; 0: enough for five images.
      text_cap: most tokens of one free text; 0: 64 with the micro tokenizer, else 512.
      about: settings that are recorded with every answer.
    """
    trained_here = "vocabulary" in system.meta
    modes = tuple(dict.fromkeys(modes)) or (MODES if trained_here else (INTERLEAVED,))
    cap = text_cap or (64 if system.meta.get("text_tokenizer") == systems.MICRO else 512)
    options = GrammarOptions(modes=modes, max_reflections=MAX_REFLECTIONS, max_steps=MAX_STEPS, text_cap=cap)
    recorded = {"modes": list(modes), "text_cap": cap, "image_area": image_area, "answer_length": answer_length}
    grammar = Grammar(system.tokenizer, options)
    return Answering(system, grammar, sampling, image_area, answer_length, {**(about or {}), **recorded})


def generate_answer(
    model: systems.System,
    prompt: str,
    images: Sequence[str | Pixels] = (),
    *,
    modes: Sequence[str] = (),
    seed: int = 0,
    sampling: SamplingOptions | None = None,
    image_area: int = 0,
) -> Answer | InterleavedAnswer:
    """One answer to a prompt.

    Args:
      model: see `ivr_jax.load_model`.
      images: references in order, as paths or uint8 [height, width, 3].
      modes: "direct", "reflection", "multi_step" (the model chooses among those given; default all), or "interleaved".
      seed: the same seed gives the same answer.
      sampling: temperature, guidance, top-k and top-p; by default temperature 1.
      image_area: see `make_answering`.

    Returns:
      An `Answer` with `trajectory` (rounds of image, evaluation and their cause) and `images` (pixels by name); an
      `InterleavedAnswer` in mode "interleaved".

    Raises:
      UserError: an empty prompt, an unreadable image, a request longer than the context, an unfinished answer.
    """
    answering = make_answering(model, sampling or SamplingOptions(), modes, image_area=image_area)
    request = Request("request", prompt, tuple(images), seed=seed)
    requests_lib.check(request)
    return answering.answer(request)[0]
