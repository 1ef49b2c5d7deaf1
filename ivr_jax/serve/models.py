"""A loaded model with what its requests need: grammars by mode, prompts as tokens, previews, finished answers."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from PIL import Image

from ivr_jax.checkpoints.system import MICRO, System
from ivr_jax.errors import UserError
from ivr_jax.generate.answer_folder import InterleavedAnswer
from ivr_jax.images import image_name
from ivr_jax.protocol import codec, interleaved
from ivr_jax.protocol.grammar import ACCEPT, INTERLEAVED, Grammar, GrammarOptions
from ivr_jax.protocol.joined_grammar import JoinedGrammar
from ivr_jax.sampling.requests import Prepared, Request, prepare
from ivr_jax.sampling.rollout import Answer
from ivr_jax.serve.jobs import AUTO, AnswerRequest, PartView
from ivr_jax.serve.partial_answer import EVALUATION, IMAGE, OBSERVATION, Part, filled, masked
from ivr_jax.trajectory import Mode, Sample

EXAMPLES = (  # of the micro-world
    "Put a red circle at b2.",
    "Put a red circle at b2. Put a blue square at a1.",
    "Put a red circle at b2. Put a blue square at a1. Swap b2 with a1.",
)
GOES_ON = {Mode.DIRECT: False, Mode.REFLECTION: True, Mode.MULTI_STEP: True}  # whatever its first verdict


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A request as the engine takes it.

    Attributes:
      sample, images: the question and its references, as the model sees them.
      prompts: tokens of the prompt, and of guidance's unconditional passes.
      size: forced rows and columns of images in latent cells, or `grammar.FREE`.
      limit: most answer tokens, a given prefix included.
    """

    sample: Sample
    images: Mapping[str, np.ndarray]
    prompts: tuple[list[int], ...]
    size: tuple[int, int]
    limit: int


class ServedModel:
    """One model of the server.  Its image tokenizer is used from several threads, one at a time.

    Args:
      name: what requests call it.
      area: pixels of an image, about; 0: the image tokenizer's own.
      answer_length: most answer tokens; 0: what the prompt leaves of the context.
      text_cap: longest free text; 0: 96 with the micro tokenizer, else 512.
    """

    def __init__(self, name: str, system: System, area: int = 0, answer_length: int = 0, text_cap: int = 0):
        self.name, self.system = name, system
        self.area = area or system.image_codec.config.resolution**2
        self.answer_length = answer_length or system.config.max_position_embeddings
        cap = text_cap or system.longest_text
        modes = {INTERLEAVED: GrammarOptions(modes=(INTERLEAVED,), text_cap=cap)}
        if "vocabulary" in system.meta:  # trained here, on trajectories
            modes = {AUTO: GrammarOptions(text_cap=cap)}
            for mode, force in GOES_ON.items():
                modes[mode.value] = GrammarOptions(modes=(mode.value,), force=force, text_cap=cap)
        self.grammar = JoinedGrammar({name: Grammar(system.tokenizer, options) for name, options in modes.items()})
        self._lock = threading.Lock()

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that a request may name, the usual one first."""
        return tuple(self.grammar.grammars)

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts to begin with, where the model's language is known."""
        return EXAMPLES if self.system.meta.get("text_tokenizer") == MICRO else ()

    def grammar_of(self, mode: str) -> str:
        """The grammar of a request's mode.  Raises UserError for a mode that this model does not have."""
        if mode == AUTO:
            return self.modes[0]
        if mode not in self.modes:
            raise UserError(f"{self.name} has no mode {mode!r}.", f"Its modes are {', '.join(self.modes)}.")
        return mode

    # -- requests ---------------------------------------------------------------------------------------------------

    def prepare(self, request: AnswerRequest) -> PreparedRequest:
        """Fits and encodes the references, and settles size and room.  Raises UserError when it does not fit."""
        prepared = self._fitted(request)
        with self._lock:
            codes = self.system.image_codec.encode(list(prepared.images.values()))
        by_name = dict(zip(prepared.images, codes, strict=True))
        tokenizer, sample = self.system.tokenizer, prepared.sample
        prompts = [codec.encode_prompt(tokenizer, sample, by_name)]
        for references in (True, False)[: request.sampling.passes]:
            prompts.append(codec.encode_unconditional_prompt(tokenizer, sample, by_name, references))
        limit = self._room(request, prepared.size, max(map(len, prompts)))
        return PreparedRequest(sample, prepared.images, tuple(prompts), prepared.size, limit)

    def _fitted(self, request: AnswerRequest) -> Prepared:
        asked = Request("request", request.prompt, request.references, aspect_ratio=request.aspect_ratio)
        with self._lock:
            return prepare(asked, self.system, self.area)

    def _room(self, request: AnswerRequest, size: tuple[int, int], prompt: int) -> int:
        """Most answer tokens.  Raises UserError when the context does not hold prompt, given tokens and one image."""
        rows, columns = self._cells(size)
        context, given = self.system.config.max_position_embeddings, len(request.prefix)
        wanted = min(request.max_tokens or self.answer_length, self.answer_length)
        limit = min(given + wanted, self.answer_length, context - prompt)
        image = rows * (columns + 1) + 7
        if limit < (given + 1 if given else image):
            raise UserError(
                f"the prompt takes {prompt} of the {context} tokens of the context, {given} are given, an image of "
                f"{rows} x {columns} cells takes {image}, and at most {max(limit, 0)} are left or allowed.",
                "Shorten the prompt, give fewer references, or raise max_tokens.",
            )
        return limit

    # -- images -----------------------------------------------------------------------------------------------------

    def pictures(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """Pixels of image parts, uint8 [height, width, 3], grey where nothing is drawn yet; decoded together."""
        with self._lock:
            decoded = self.system.image_codec.decode([filled(part.codes) for part in parts])
        return [masked(pixels, part.codes) for pixels, part in zip(decoded, parts, strict=True)]

    def warm_up_pictures(self, size: tuple[int, int], most: int) -> None:
        """Compiles the decoding of 1, 4 and 16 images of `size` at a time, as far as `most` goes."""
        rows, columns = self._cells(size)
        for count in (1, 4, 16):
            if count <= most:
                grids = [np.full((rows, columns), n, np.int32) for n in range(1, count + 1)]
                with self._lock:
                    self.system.image_codec.decode(grids)

    def _cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image: `size`, or those of the model's own area where it is free."""
        side = round(self.area**0.5) // self.system.image_codec.config.factor
        return size if min(size) > 0 else (side, side)

    def codes_of(self, pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Codes int32 [rows, columns] of an image that takes the place of a drawn one: resized to its size."""
        factor = self.system.image_codec.config.factor
        if pixels.shape[:2] != (rows * factor, columns * factor):
            size = (columns * factor, rows * factor)
            pixels = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        with self._lock:
            return self.system.image_codec.encode([pixels])[0]

    # -- finished answers -------------------------------------------------------------------------------------------

    def finish(
        self,
        prepared: PreparedRequest,
        mode: str,
        tokens: Sequence[int],
        nodes: Sequence[int],
        parts: Sequence[Part],
        pictures: Mapping[int, np.ndarray],
    ) -> Answer | InterleavedAnswer:
        """The answer as the answer folder takes it: a trajectory when it came to its end, else its parts as they are.

        Args:
          mode: the grammar that it followed; nodes: before each token and after the last.
          pictures: pixels of its image parts, by their place in `parts`.
        """
        if nodes[-1] != ACCEPT or mode == INTERLEAVED:
            return self._spoken(prepared, tokens, parts, pictures, nodes[-1] == ACCEPT)
        parsed = codec.parse_answer(cast(Grammar, self.grammar), prepared.sample, np.array(tokens), np.array(nodes))
        drawn = [picture for number, picture in sorted(pictures.items())]
        pixels = dict(zip(parsed.codes, drawn, strict=True))
        names = {name: image_name(x) for name, x in pixels.items()}
        rounds = tuple(dataclasses.replace(r, image=names[r.image]) for r in parsed.trajectory.rounds)
        held = {**prepared.images, **{names[name]: x for name, x in pixels.items()}}
        return Answer(dataclasses.replace(parsed.trajectory, rounds=rounds), held, parsed.segments)

    def _spoken(
        self,
        prepared: PreparedRequest,
        tokens: Sequence[int],
        parts: Sequence[Part],
        pictures: Mapping[int, np.ndarray],
        finished: bool,
    ) -> InterleavedAnswer:
        """Texts and images in order; in an interleaved answer thoughts are told from texts."""
        shown: list[interleaved.Part] = []
        for number, part in enumerate(parts):
            if number in pictures:
                shown.append(interleaved.Part(interleaved.IMAGE, "", part.codes, part.start, part.end))
            elif part.kind == "text":
                found, _ = interleaved.parse_interleaved(self.system.tokenizer, tokens[part.start : part.end])
                shown += found
            elif said := part_text(part):
                shown.append(interleaved.Part(interleaved.TEXT, "\n".join(said), None, part.start, part.end))
        drawn = tuple(picture for _, picture in sorted(pictures.items()))
        return InterleavedAnswer(prepared.sample, tuple(shown), drawn, finished, prepared.images)


def has_picture(part: Part) -> bool:
    """Whether an image's size is known, so that something of it can be shown."""
    return part.kind == IMAGE and part.codes is not None


def part_text(part: Part | PartView) -> list[str]:
    """Lines that say what a text part says."""
    if part.kind != EVALUATION:
        return [text for text in part.texts.values() if text]
    lines = [
        f"{axis.capitalize()}: {'pass' if passed else 'fail'}: {part.texts.get(axis, '')}".rstrip(": ")
        for axis, passed in part.verdicts.items()
    ]
    return [part.texts[OBSERVATION], *lines] if OBSERVATION in part.texts else lines


def named(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The model that a request names; the first for "".  Raises UserError for another."""
    if not name:
        return next(iter(models.values()))
    if name not in models:
        raise UserError(f"there is no model {name!r} here.", f"The models are {', '.join(models)}.")
    return models[name]
