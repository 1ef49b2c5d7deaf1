"""A loaded model that answers requests: what `python -m ivr_jax.generate` and `ivr_jax.generate_answer` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.generate.answer_folder import InterleavedAnswer
from ivr_jax.images import Pixels
from ivr_jax.protocol import interleaved
from ivr_jax.protocol.codec import decode_image
from ivr_jax.protocol.grammar import FREE, INTERLEAVED, Grammar, GrammarOptions
from ivr_jax.protocol.interleaved import Part
from ivr_jax.sampling import requests as requests_lib
from ivr_jax.sampling.batch import RolloutOptions, Usage
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.requests import Prepared, Request
from ivr_jax.sampling.rollout import Answer, roll_out, sample_drafts
from ivr_jax.trajectory import MAX_REFLECTIONS, MAX_STEPS, Mode

MODES = tuple(mode.value for mode in Mode)
IMAGE = "image"  # one image and nothing else


@dataclasses.dataclass(frozen=True)
class Answering:
    """A loaded model and how it shall answer; `about` is recorded with every answer."""

    system: systems.System
    grammar: Grammar
    sampling: SamplingOptions
    area: int
    length: int
    about: dict[str, Any]
    one_image: bool = False

    def answer(
        self, request: Request, watch: Callable[[Usage], None] | None = None
    ) -> tuple[Answer | InterleavedAnswer, int]:
        """The answer and its number of tokens.  Raises UserError when it does not come to an end.

        `watch`: called with what it has cost so far while it is drawn.
        """
        prepared = requests_lib.prepare(request, self.system, self.area)
        length = requests_lib.room(prepared, self.system, self.length, self.area)
        # one answer: one program to compile
        options = RolloutOptions(length, self.sampling, EngineOptions(growth=1), size=prepared.size)
        key = jax.random.key(request.seed)
        if self.one_image:
            return self._image(prepared, key, options)
        with self.system.on_mesh():
            rollout = roll_out(
                self.system, self.grammar, [prepared.sample], [prepared.images], key, options, on_usage=watch
            )
        tokens = rollout.answer_tokens(0)
        _check_scores(rollout.samples.log_probs)
        if self.grammar.options.modes == (INTERLEAVED,):
            return self._interleaved(prepared, tokens, length), len(tokens)
        if rollout.answers[0] is None:
            what = f"the answer to {request.key!r} did not come to an end: {rollout.errors[0]}"
            raise self._cut(tokens, length) or UserError(what, "Raise --answer_length, or try another --seed.")
        return rollout.answers[0], len(tokens)

    def _image(self, prepared: Prepared, key: jax.Array, options: RolloutOptions) -> tuple[InterleavedAnswer, int]:
        """One image and nothing else."""
        if prepared.size == FREE:
            raise UserError("the size of one image alone must be known.", "Give --aspect_ratio=WIDTH:HEIGHT.")
        with self.system.on_mesh():
            drafts = sample_drafts(self.system, self.grammar, [prepared.sample], [prepared.images], key, options)
        _check_scores(drafts.log_probs)
        tokens = drafts.tokens[0]
        part = Part(interleaved.IMAGE, "", decode_image(self.system.tokenizer, tokens), 0, len(tokens))
        drawn = self.system.image_codec.decode([part.codes])
        return InterleavedAnswer(prepared.sample, (part,), tuple(drawn), True, prepared.images), len(tokens)

    def _interleaved(self, prepared: Prepared, tokens: np.ndarray, length: int) -> InterleavedAnswer:
        parts, finished = interleaved.parse_interleaved(self.system.tokenizer, tokens)
        drawn = self.system.image_codec.decode([part.codes for part in parts if part.codes is not None])
        if not finished and not drawn:
            what = f"the answer was cut after {len(tokens):,} tokens, before its first image."
            raise self._cut(tokens, length) or UserError(what, "Raise --answer_length, or ask for --mode=image.")
        return InterleavedAnswer(prepared.sample, parts, tuple(drawn), finished, prepared.images)

    def _cut(self, tokens: np.ndarray, length: int) -> UserError | None:
        """The error for an answer that ended where an image no longer fitted; None for another one."""
        size = requests_lib.unfinished_size(self.system.tokenizer, tokens)
        if size is None:
            return None
        rows, columns = size
        return UserError(
            f"the answer asked for an image of {rows} x {columns} cells, {requests_lib.image_tokens(rows, columns):,} "
            f"tokens, and {max(0, length - len(tokens)):,} are left.",
            "Raise --answer_length, name a size with --aspect_ratio, or try another --seed.",
        )

    def about_request(self, request: Request) -> dict[str, Any]:
        """What is stored with an answer: model, options and request, as plain values."""
        return {**self.about, **dataclasses.asdict(request), "images": list(request.images)}


def _check_scores(log_probs: np.ndarray) -> None:
    if not np.isfinite(log_probs).all():
        raise UserError(
            "the model's scores are not numbers: its weights hold NaN or infinity.",
            "Use another step of the run, or convert the weights again.",
        )


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
      modes: of `MODES`, or "interleaved" or "image" alone; by default all modes of a model that was trained on
        trajectories, else interleaved texts and images.  "image" is one image and nothing else.
      image_area: pixels of an image, approximately; 0: the image tokenizer's resolution, squared.
      answer_length: most answer tokens; 0: enough for five images.
      text_cap: most tokens of one free text; 0: 96 with the micro tokenizer, else 512.
      about: settings that are recorded with every answer.
    """
    trained_here = "vocabulary" in system.meta
    modes = tuple(dict.fromkeys(modes)) or (MODES if trained_here else (INTERLEAVED,))
    cap = text_cap or system.longest_text
    one_image = IMAGE in modes
    if one_image and modes != (IMAGE,):
        raise UserError(f"mode {IMAGE} does not go with others.", "Ask for it alone.")
    legal = (Mode.DIRECT.value,) if one_image else modes  # a direct answer begins with its image
    options = GrammarOptions(modes=legal, max_reflections=MAX_REFLECTIONS, max_steps=MAX_STEPS, text_cap=cap)
    recorded = {"modes": list(modes), "text_cap": cap, "image_area": image_area, "answer_length": answer_length}
    grammar = Grammar(system.tokenizer, options)
    return Answering(system, grammar, sampling, image_area, answer_length, {**(about or {}), **recorded}, one_image)


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
      modes: "direct", "reflection", "multi_step" (the model chooses among those given; default all), or "interleaved"
        or "image".
      seed: the same seed gives the same answer.
      sampling: temperature, guidance, top-k and top-p; by default temperature 1.
      image_area: see `make_answering`.

    Returns:
      An `Answer` with `trajectory` (rounds of image, evaluation and their cause) and `images` (pixels by name); an
      `InterleavedAnswer` in the modes "interleaved" and "image".

    Raises:
      UserError: an empty prompt, an unreadable image, a request longer than the context, an unfinished answer.
    """
    answering = make_answering(model, sampling or SamplingOptions(), modes, image_area=image_area)
    request = Request("request", prompt, tuple(images), seed=seed)
    requests_lib.check(request)
    return answering.answer(request)[0]
