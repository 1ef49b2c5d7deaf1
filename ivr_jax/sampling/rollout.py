"""From samples to parsed answers: encode prompts, draw, parse, decode the images.

Used by RL, evaluation, construction and `generate` alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from ivr_jax.checkpoints.system import System
from ivr_jax.errors import UserError
from ivr_jax.images import Images, image_name
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar
from ivr_jax.sampling.batch import Samples, Usage, sample
from ivr_jax.sampling.engine import EngineOptions, pad_prompts
from ivr_jax.sampling.layout import RolloutLayout
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.trajectory import Sample, Trajectory


@dataclasses.dataclass(frozen=True)
class Answer:
    """One parsed answer: image names are content hashes, `images` holds sources and drawn images."""

    trajectory: Trajectory
    images: dict[str, np.ndarray]
    segments: tuple[codec.Segment, ...]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """`group` answers to each of P prompts, groups adjacent; None where an answer is not well-formed.

    `errors[i]` says why.  `samples` holds numpy arrays (see `sampler.Samples`); prompts int32 [P, T], right-padded.
    `unconditional` holds the prompts and lengths of each of guidance's unconditional passes, `usage` what it cost.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    samples: Samples
    answers: tuple[Answer | None, ...]
    errors: tuple[str, ...]
    group: int
    unconditional: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    usage: Usage = dataclasses.field(default_factory=Usage)

    @property
    def total_lengths(self) -> np.ndarray:
        """int32 [P * group]: prompt and answer tokens."""
        return np.repeat(self.prompt_lengths, self.group) + self.samples.lengths

    def prompt(self, row: int) -> np.ndarray:
        """Prompt tokens of answer `row`, without padding."""
        return self.prompts[row // self.group, : self.prompt_lengths[row // self.group]]

    def answer_tokens(self, row: int) -> np.ndarray:
        """Answer tokens of `row`, EOS included."""
        return self.samples.tokens[row, : self.samples.lengths[row]]

    def judgeable(self) -> list[tuple[Trajectory, Images] | None]:
        """What the judge needs of each answer."""
        return [(a.trajectory, a.images) if a else None for a in self.answers]


def roll_out(
    system: System,
    grammar: Grammar,
    samples: Sequence[Sample],
    images: Sequence[Images],
    key: jax.Array,
    answer_length: int,
    options: SamplingOptions | None = None,
    group: int = 1,
    size: tuple[int, int] | None = None,
    engine: EngineOptions | None = None,
    progress: Callable[[int], None] | None = None,
    layout: RolloutLayout | None = None,
    watch: Callable[[Usage], None] | None = None,
    first: int | Sequence[int] = 0,
) -> Rollout:
    """Draws and parses `group` answers to each sample.

    Args:
      images: pixels of each sample's sources, by name; sides must be multiples of the tokenizer's factor.
      size: latent rows and columns of every drawn image, or `grammar.FREE`; by default those of the first source, or
        of the image tokenizer's training resolution without one.  All samples of a call must agree.
      engine: how they are drawn; progress: called with the number of answers that have just ended; watch: with what
        it has cost so far, now and then (`sampler.sample`).
      layout: where and in which dtype they are drawn; by default where the system's parameters are.
      first: number of the first sample among those that `key` is for, of which these may be a part; or the number of
        each.  An answer depends on its number, not on what is drawn beside it.
    """
    if layout is not None:
        system = dataclasses.replace(system, config=layout.config, params=layout(system.params))
    options = options or SamplingOptions()
    tokenizer = system.tokenizer
    per_sample = _source_codes(system, samples, images)
    size = size or _size(system, samples, per_sample)
    pad = tokenizer.vocab.pad
    pairs = list(zip(samples, per_sample, strict=True))
    prompts, lengths = pad_prompts([codec.encode_prompt(tokenizer, s, c) for s, c in pairs], pad)
    unconditional = [
        pad_prompts([codec.encode_unconditional_prompt(tokenizer, s, c, references) for s, c in pairs], pad)
        for references in (True, False)[: options.passes]
    ]
    noise, kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)  # a key lies on the mesh that made it
    with jax.set_mesh(layout.mesh) if layout else contextlib.nullcontext():
        key = jax.random.wrap_key_data(noise, impl=kind)
        starts = first + np.arange(len(samples)) if isinstance(first, int) else np.asarray(first)
        numbers = (starts[:, None] * group + np.arange(group)).reshape(-1)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        drawn, usage = sample(
            system.config, system.params, grammar, prompts, lengths, size, keys, answer_length, options, group,
            unconditional, engine, progress, watch,
        )  # fmt: skip
    answers, errors = _parse(system, grammar, samples, images, drawn, group)
    return Rollout(prompts, lengths, drawn, answers, errors, group, tuple(unconditional), usage)


def _source_codes(
    system: System, samples: Sequence[Sample], images: Sequence[Images]
) -> list[dict[str, np.ndarray]]:
    """Codes of each sample's sources by name, all encoded together: the image tokenizer works in batches."""
    names = list(dict.fromkeys((i, name) for i, s in enumerate(samples) for name in s.sources))
    codes = dict(zip(names, system.codec.encode([images[i][name] for i, name in names]), strict=True))
    return [{name: codes[i, name] for name in s.sources} for i, s in enumerate(samples)]


def _size(system: System, samples: Sequence[Sample], codes: Sequence[Mapping[str, np.ndarray]]) -> tuple[int, int]:
    default = system.codec.config.resolution // system.codec.config.factor
    sizes = {c[s.sources[0]].shape if s.sources else (default, default) for s, c in zip(samples, codes, strict=True)}
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
    drawn: Samples,
    group: int,
) -> tuple[tuple[Answer | None, ...], tuple[str, ...]]:
    count = len(drawn.lengths)
    parsed: list[codec.ParsedAnswer | None] = []
    errors = []
    for row in range(count):
        length = drawn.lengths[row]
        try:
            parsed.append(
                codec.parse_answer(
                    grammar, samples[row // group], drawn.tokens[row, :length], drawn.nodes[row, : length + 1]
                )
            )
            errors.append("")
        except UserError as error:
            parsed.append(None)
            errors.append(str(error))
    pixels = iter(system.codec.decode([grid for p in parsed if p for grid in p.codes.values()]))
    answers = []
    for row, answer in enumerate(parsed):
        if answer is None:
            answers.append(None)
            continue
        drawn_images = {name: next(pixels) for name in answer.codes}
        renamed = {name: image_name(x) for name, x in drawn_images.items()}
        rounds = tuple(dataclasses.replace(r, image=renamed[r.image]) for r in answer.trajectory.rounds)
        held = {**images[row // group], **{renamed[name]: x for name, x in drawn_images.items()}}
        answers.append(Answer(dataclasses.replace(answer.trajectory, rounds=rounds), held, answer.segments))
    return tuple(answers), tuple(errors)


def draw_first_images(
    system: System,
    samples: Sequence[Sample],
    images: Sequence[Images],
    key: jax.Array,
    options: SamplingOptions | None = None,
    engine: EngineOptions | None = None,
) -> list[np.ndarray]:
    """`G1` alone, uint8 [height, width, 3] for each sample: drawing stops when the first image is complete."""
    grammar = Grammar(system.tokenizer)
    codes = _source_codes(system, samples, images)
    rows, columns = _size(system, samples, codes)
    length = len(codec.encode_image(system.tokenizer, np.zeros((rows, columns), np.int32)))
    prompts, lengths = pad_prompts(
        [codec.encode_prompt(system.tokenizer, s, c) for s, c in zip(samples, codes, strict=True)],
        system.tokenizer.vocab.pad,
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(len(samples)))
    drawn, _ = sample(
        system.config, system.params, grammar, prompts, lengths, (rows, columns), keys, length, options, engine=engine
    )
    return system.codec.decode([codec.decode_image(system.tokenizer, tokens) for tokens in drawn.tokens])
