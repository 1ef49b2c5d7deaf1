"""From samples to parsed answers: encode prompts, sample, parse, decode the images.

Used by RL, evaluation, construction and `generate` alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax.checkpoints.system import System
from ivr_jax.errors import UserError
from ivr_jax.images import Images, image_name
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import ACCEPT, Grammar
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, Samples, Usage, sample
from ivr_jax.sampling.engine import pad_prompts
from ivr_jax.sampling.layout import RolloutLayout
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.trajectory import Sample, Trajectory


@dataclasses.dataclass(frozen=True)
class Answer:
    """One parsed answer: image names are content hashes, `images` holds sources and generated images."""

    trajectory: Trajectory
    images: dict[str, np.ndarray]
    segments: tuple[codec.Segment, ...]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """`group_size` answers to each of P prompts, groups adjacent; None where an answer is not well-formed.

    Attributes:
      prompts: int32 [P, T], right-padded; prompt_lengths: int32 [P].
      samples: numpy arrays, see `batch.Samples`.
      answers, errors: of each answer what it says, or why it is not well-formed.
      unconditional: prompts and lengths of each of guidance's unconditional passes.
      usage: the cost; seconds: how long it took.
      draft_length: tokens that every answer of a group begins with (`Drafts`); 0 without.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    samples: Samples
    answers: tuple[Answer | None, ...]
    errors: tuple[str, ...]
    group_size: int
    unconditional: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    usage: Usage = dataclasses.field(default_factory=Usage)
    seconds: float = 0.0
    draft_length: int = 0

    @property
    def total_lengths(self) -> np.ndarray:
        """int32 [P * group_size]: prompt and answer tokens."""
        return np.repeat(self.prompt_lengths, self.group_size) + self.samples.lengths

    @property
    def truncated(self) -> np.ndarray:
        """bool [P * group_size]: answers that were cut at the answer length."""
        last = self.samples.nodes[np.arange(len(self.samples.lengths)), self.samples.lengths]
        return last != ACCEPT

    def prompt(self, number: int) -> np.ndarray:
        """Prompt tokens of an answer, without padding."""
        return self.prompts[number // self.group_size, : self.prompt_lengths[number // self.group_size]]

    def answer_tokens(self, number: int) -> np.ndarray:
        """Tokens of an answer, EOS included."""
        return self.samples.tokens[number, : self.samples.lengths[number]]

    def judgeable(self) -> list[tuple[Trajectory, Images] | None]:
        """What the judge needs of each answer."""
        return [(a.trajectory, a.images) if a else None for a in self.answers]


@dataclasses.dataclass(frozen=True)
class Drafts:
    """First images as the tokens that answers begin with; P drafts of one size.

    Attributes:
      tokens: int32 [P, L]; log_probs: float32 [P, L] under the sampled distribution.
      kept: uint8 [P, L, ceil(V / 8)], the ids that top-k and top-p kept; None without.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def roll_out(
    system: System,
    grammar: Grammar,
    samples: Sequence[Sample],
    images: Sequence[Images],
    key: jax.Array,
    options: RolloutOptions,
    *,
    layout: RolloutLayout | None = None,
    first: int | Sequence[int] = 0,
    drafts: Drafts | None = None,
    on_ended: Callable[[int], None] | None = None,
    on_usage: Callable[[Usage], None] | None = None,
) -> Rollout:
    """Samples and parses `options.group_size` answers to each sample.

    Args:
      images: pixels of each sample's sources, by name; sides must be multiples of the tokenizer's factor.
      options: without a size, all samples of a call must agree in theirs.
      layout: where and in which dtype answers are sampled; by default where the system's parameters are.
      first: number of the first sample among those that `key` is for, of which these may be a part; or the number of
        each.  An answer depends on its number, not on what is sampled beside it.
      drafts: of each sample the first image that its answers begin with.
      on_ended: called with the number of answers that have just ended; on_usage: with the cost so far, now and then.
    """
    clock = time.perf_counter()
    given = () if drafts is None else tuple(drafts.tokens)
    prompts, sampled, usage = _sample(
        system, grammar, samples, images, key, options, layout, first, given, on_ended=on_ended, on_usage=on_usage
    )
    if drafts is not None:
        sampled = _with_drafts(sampled, drafts, options.group_size)
    answers, errors = _parse(system, grammar, samples, images, sampled, options.group_size)
    return Rollout(
        prompts.tokens,
        prompts.lengths,
        sampled,
        answers,
        errors,
        options.group_size,
        prompts.unconditional,
        usage,
        seconds=time.perf_counter() - clock,
        draft_length=0 if drafts is None else drafts.tokens.shape[1],
    )


def _sample(
    system: System,
    grammar: Grammar,
    samples: Sequence[Sample],
    images: Sequence[Images],
    key: jax.Array,
    options: RolloutOptions,
    layout: RolloutLayout | None = None,
    first: int | Sequence[int] = 0,
    given: tuple[Sequence[int], ...] = (),
    only_image: bool = False,
    **callbacks: Callable[[Any], None] | None,
) -> tuple[PromptBatch, Samples, Usage]:
    """Prompts and sampled tokens; with `only_image` sampling stops when the first image is complete."""
    if layout is not None:
        system = dataclasses.replace(system, config=layout.config, params=layout(system.params))
    prompts, size = encode_prompts(system, samples, images, options.sampling.passes, options.size)
    options = dataclasses.replace(options, size=size)
    if only_image:
        length = len(codec.encode_image(system.tokenizer, np.zeros(size, np.int32)))
        options = dataclasses.replace(options, answer_length=length, group_size=1)
    noise, kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)  # a key is bound to its mesh
    with jax.set_mesh(layout.mesh) if layout else system.on_mesh():
        key = jax.random.wrap_key_data(noise, impl=kind)
        starts = first + np.arange(len(samples)) if isinstance(first, int) else np.asarray(first)
        numbers = (starts[:, None] * options.group_size + np.arange(options.group_size)).reshape(-1)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        prompts = prompts._replace(given=given)
        sampled, usage = sample(system.config, system.params, grammar, prompts, keys, options, **callbacks)
    return prompts, sampled, usage


def sample_drafts(
    system: System,
    grammar: Grammar,
    samples: Sequence[Sample],
    images: Sequence[Images],
    key: jax.Array,
    options: RolloutOptions,
    *,
    layout: RolloutLayout | None = None,
    first: int | Sequence[int] = 0,
) -> Drafts:
    """One draft a sample; arguments as in `roll_out`."""
    _, sampled, _ = _sample(system, grammar, samples, images, key, options, layout, first, only_image=True)
    return Drafts(sampled.tokens, sampled.log_probs, sampled.kept)


def _with_drafts(sampled: Samples, drafts: Drafts, group_size: int) -> Samples:
    """Samples whose drafts, which were only read here, carry what was noted when they were sampled."""
    length = drafts.tokens.shape[1]
    log_probs = sampled.log_probs.copy()
    log_probs[:, :length] = np.repeat(drafts.log_probs, group_size, axis=0)
    kept = sampled.kept
    if kept is not None:
        kept = kept.copy()
        kept[:, :length] = np.repeat(drafts.kept, group_size, axis=0)
    return sampled._replace(log_probs=log_probs, kept=kept)


def encode_prompts(
    system: System,
    samples: Sequence[Sample],
    images: Sequence[Images],
    passes: int = 0,
    size: tuple[int, int] | None = None,
) -> tuple[PromptBatch, tuple[int, int]]:
    """The prompts of samples, and the latent size of the images that answer them.

    Args:
      passes: unconditional passes of guidance; size: latent rows and columns, by default those of the first source.
    """
    tokenizer = system.tokenizer
    pad = tokenizer.vocab.pad
    codes = _source_codes(system, samples, images)
    size = size or _size(system, samples, codes)
    pairs = list(zip(samples, codes, strict=True))
    tokens, lengths = pad_prompts([codec.encode_prompt(tokenizer, s, c) for s, c in pairs], pad)
    unconditional = tuple(
        pad_prompts([codec.encode_unconditional_prompt(tokenizer, s, c, references) for s, c in pairs], pad)
        for references in (True, False)[:passes]
    )
    return PromptBatch(tokens, lengths, unconditional), size


def _source_codes(
    system: System, samples: Sequence[Sample], images: Sequence[Images]
) -> list[dict[str, np.ndarray]]:
    """Codes of each sample's sources by name, all encoded together: the image tokenizer works in batches."""
    names = list(dict.fromkeys((i, name) for i, s in enumerate(samples) for name in s.sources))
    codes = dict(zip(names, system.image_codec.encode([images[i][name] for i, name in names]), strict=True))
    return [{name: codes[i, name] for name in s.sources} for i, s in enumerate(samples)]


def _size(system: System, samples: Sequence[Sample], codes: Sequence[Mapping[str, np.ndarray]]) -> tuple[int, int]:
    sizes = {c[s.sources[0]].shape if s.sources else system.cells for s, c in zip(samples, codes, strict=True)}
    if len(sizes) != 1:
        raise UserError(
            f"one batch asks for images of different sizes {sorted(sizes)}.", "Answer them in separate batches."
        )
    return next(iter(sizes))


def _parse(
    system: System,
    grammar: Grammar,
    samples: Sequence[Sample],
    images: Sequence[Images],
    sampled: Samples,
    group_size: int,
) -> tuple[tuple[Answer | None, ...], tuple[str, ...]]:
    """What each answer says, with its images decoded, and its error."""
    parsed: list[codec.ParsedAnswer | None] = []
    errors = []
    for number, length in enumerate(sampled.lengths):
        tokens, nodes = sampled.tokens[number, :length], sampled.nodes[number, : length + 1]
        try:
            parsed.append(codec.parse_answer(grammar, samples[number // group_size], tokens, nodes))
            errors.append("")
        except UserError as error:
            parsed.append(None)
            errors.append(str(error))
    pixels = iter(system.image_codec.decode([grid for p in parsed if p for grid in p.codes.values()]))
    answers = []
    for number, answer in enumerate(parsed):
        if answer is None:
            answers.append(None)
            continue
        generated = {name: next(pixels) for name in answer.codes}
        renamed = {name: image_name(x) for name, x in generated.items()}
        rounds = tuple(dataclasses.replace(r, image=renamed[r.image]) for r in answer.trajectory.rounds)
        held = {**images[number // group_size], **{renamed[name]: x for name, x in generated.items()}}
        answers.append(Answer(dataclasses.replace(answer.trajectory, rounds=rounds), held, answer.segments))
    return tuple(answers), tuple(errors)


def draw_first_images(
    system: System,
    samples: Sequence[Sample],
    images: Sequence[Images],
    key: jax.Array,
    options: SamplingOptions | None = None,
    size: tuple[int, int] | None = None,
    on_usage: Callable[[Usage], None] | None = None,
) -> list[np.ndarray]:
    """`G1` alone, uint8 [height, width, 3] for each sample: sampling stops when the first image is complete.

    Args:
      size: latent rows and columns; by default those of the first source, or `system.cells` without sources.
      on_usage: called with the cost so far, now and then; what it raises ends the drawing.
    """
    how = RolloutOptions(0, options or SamplingOptions(), size=size)
    _, sampled, _ = _sample(system, Grammar(system.tokenizer), samples, images, key, how, only_image=True,
                            on_usage=on_usage)
    return system.image_codec.decode([codec.decode_image(system.tokenizer, tokens) for tokens in sampled.tokens])
