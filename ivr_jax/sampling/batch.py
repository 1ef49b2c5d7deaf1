"""Answers to a batch of prompts: the loop that keeps the rollout engine's slots full until every answer has ended.

Prompts are read once for all answers to them, some at a time; slots are filled, a segment of model calls runs until
enough answers have ended, and their slots take the next ones.  When none waits any more, the slots still in use are
moved together into fewer.  `Samples` is the same for every `EngineOptions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import Grammar, GrammarState
from ivr_jax.sampling import slots as device
from ivr_jax.sampling.engine import Admission, Engine, EngineOptions, join_contexts, last_image
from ivr_jax.sampling.logits_processors import SamplingOptions

WAVE = 8  # prompts are read for this part of the slots at a time, or more
REPORTED = 64  # model calls between two calls of `on_usage`


class Samples(NamedTuple):
    """What was sampled; A is the longest answer asked for.

    tokens int32 [B, A]: answer tokens, EOS included, then PAD.
    rows int32 [B, A]: row of the grammar's legality table at each token; the trainer replays the mask from it.
    nodes int32 [B, A + 1]: automaton node before each token (`codec.parse_answer` reads it); ACCEPT once finished.
    log_probs float32 [B, A]: log-probability of each token under the sampled distribution; 0 after EOS.
    lengths int32 [B]: answer tokens, EOS included; the row is unfinished when nodes[b, lengths[b]] != ACCEPT.
    kept uint8 [B, A, ceil(V / 8)]: the ids that top-k and top-p kept at each token (`logits_processors.pack_kept`;
      all of them where the grammar leaves one alone); None without.
    """

    tokens: Any
    rows: Any
    nodes: Any
    log_probs: Any
    lengths: Any
    kept: Any = None


@dataclasses.dataclass
class Usage:
    """What a run of the engine cost.

    Attributes:
      calls: model calls; slot_calls: slots in these calls, in use or not; in_use: those in use.
      queued_slot_calls, queued_in_use: the same of the calls made while answers waited for a slot.
      prompts: prompts that were read, once for all answers to them.
      tokens: answer tokens that were sampled in them; opening tokens, which the prefill reads, are not among them.
      image_calls, image_tokens, drafted, accepted: see `slots.Work`.
    """

    calls: int = 0
    slot_calls: int = 0
    in_use: int = 0
    queued_slot_calls: int = 0
    queued_in_use: int = 0
    prompts: int = 0
    tokens: int = 0
    image_calls: int = 0
    image_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the slots of all calls that held an answer in progress."""
        return self.in_use / max(self.slot_calls, 1)

    def add(self, work: device.Work, slots: int, queued: bool) -> None:
        """Adds a segment of `slots` slots; `queued`: answers waited for one of them."""
        for name, count in zip(work._fields, work, strict=True):
            setattr(self, name, getattr(self, name) + int(count))
        self.slot_calls += int(work.calls) * slots
        if queued:
            self.queued_slot_calls += int(work.calls) * slots
            self.queued_in_use += int(work.in_use)

    def metrics(self) -> dict[str, tuple[float, float]]:
        """What a training log shows, as (sum, denominator); what did not happen is left out."""
        found = {
            "slot_utilisation": (float(self.in_use), float(self.slot_calls)),
            "slot_utilisation_queued": (float(self.queued_in_use), float(self.queued_slot_calls)),
            "tokens_per_call": (float(self.tokens), float(self.calls)),
            "calls_per_image_token": (float(self.image_calls), float(self.image_tokens)),
            "draft_acceptance": (float(self.accepted), float(self.drafted)),
        }
        return {name: pair for name, pair in found.items() if pair[1]}


class PromptBatch(NamedTuple):
    """P prompts.

    tokens int32 [P, T], right-padded; lengths int32 [P].
    unconditional: (tokens [P, T'], lengths [P]) of each of guidance's unconditional passes (`SamplingOptions.passes`).
    given: the tokens that the answers to each prompt begin with; () without.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    unconditional: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    given: tuple[Sequence[int], ...] = ()


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How the answers of a rollout are sampled.

    Attributes:
      answer_length: most answer tokens, EOS included.  An image is never cut: where its cells no longer fit, the answer
        stops before them.
      sampling: the distribution; engine: how many answers at a time, which changes no token.
      group_size: answers to each prompt.
      size: latent rows and columns of every generated image, or `grammar.FREE` when the model chooses; None in
        `rollout.roll_out`: those of the first source, or of the image tokenizer's training resolution.
    """

    answer_length: int
    sampling: SamplingOptions = SamplingOptions()
    engine: EngineOptions = EngineOptions()
    group_size: int = 1
    size: tuple[int, int] | None = None


def sample(
    config: backbone.BackboneConfig,
    params: Any,
    grammar: Grammar,
    prompts: PromptBatch,
    keys: jax.Array,
    options: RolloutOptions,
    on_ended: Callable[[int], None] | None = None,
    on_usage: Callable[[Usage], None] | None = None,
) -> tuple[Samples, Usage]:
    """Samples `options.group_size` answers to each prompt.

    Args:
      keys: PRNG keys [P * group_size]; those of one prompt are adjacent and share its prefill.
      on_ended: called with the number of answers that have just ended.
      on_usage: called with the cost so far, every `REPORTED` model calls at least.

    Returns:
      Samples as numpy arrays, and what they cost.
    """
    if len(keys) != len(prompts.tokens) * options.group_size:
        raise ValueError(f"{len(keys)} keys for {len(prompts.tokens) * options.group_size} answers")
    if prompts.tokens.shape[1] + options.answer_length > config.max_position_embeddings:
        raise UserError(
            f"a prompt of {prompts.tokens.shape[1]} and an answer of {options.answer_length} tokens do not fit a "
            f"context of {config.max_position_embeddings}.",
            "Shorten the prompt or lower the answer length.",
        )
    passes = options.sampling.passes
    if len(prompts.unconditional) != passes:
        raise ValueError(f"guidance needs {passes} sets of unconditional prompts, not {len(prompts.unconditional)}")
    return _Batch(config, params, grammar, prompts, keys, options).finish(on_ended or (lambda ended: None), on_usage)


class _Batch:
    """One call of `sample`: what waits, and what has ended."""

    def __init__(
        self,
        config: backbone.BackboneConfig,
        params: Any,
        grammar: Grammar,
        prompts: PromptBatch,
        keys: jax.Array,
        options: RolloutOptions,
    ):
        self.grammar, self.keys, self.options, self.group_size = grammar, keys, options, options.group_size
        rows, columns = options.size
        self.initial = grammar.initial(np.full(1, rows), np.full(1, columns))
        count, length, engine = len(keys), options.answer_length, options.engine
        cells = max(rows, 1) * max(columns, 1)
        self.engine = Engine(
            config, params, grammar, options.sampling, engine, length=length,
            batch=min(engine.slots, _power_above(count)), cells=cells,
        )  # fmt: skip
        given = prompts.given or [()] * len(prompts.tokens)
        opened = {tokens: self.engine.open(self.initial, tokens) for tokens in dict.fromkeys(map(tuple, given))}
        self.openings = [opened[tuple(tokens)] for tokens in given]
        openings = [opening for opening, _ in self.openings]
        contexts = [(prompts.tokens, prompts.lengths), *prompts.unconditional]
        self.prompts, self.starts = join_contexts(contexts, openings, grammar.tokenizer.vocab.pad)
        self.engine.widest = self.prompts.shape[2] + length - min(map(len, openings)) + engine.window
        self.cells = cells if engine.speculate else None
        batch = self.engine.batch
        together = count <= batch  # all fit: one prefill; else as many as a refill takes
        self.quantum = batch if together else max(1, int(batch * engine.refill))
        wave = max(self.quantum, batch // WAVE)  # fewer prompts at a time would keep the device idle
        self.wave_size = min(len(prompts.tokens), -(-wave // self.group_size))
        self.usage, self.next = Usage(), 0
        self.wave: tuple[int, Any] | None = None
        self.tokens = np.full((count, length), grammar.tokenizer.vocab.pad, np.int32)
        self.log_probs = np.zeros((count, length), np.float32)
        self.lengths = np.zeros(count, np.int32)
        bits = (count, length, -(-config.vocab_size // 8))
        self.kept = np.full(bits, 255, np.uint8) if options.sampling.truncates else None

    def finish(
        self, on_ended: Callable[[int], None], on_usage: Callable[[Usage], None] | None
    ) -> tuple[Samples, Usage]:
        """Runs until every answer has ended."""
        engine, count = self.engine, len(self.keys)
        while self.next < count or engine.in_use:
            self._fill()
            if self.next == count:
                engine.shrink()
            work = engine.step(None if on_usage is None else REPORTED, self._until())
            self.usage.add(work, engine.batch, self.next < count)
            if on_usage is not None:
                on_usage(self.usage)
            on_ended(self._take_out())
        initial = GrammarState(*(np.repeat(x, count) for x in self.initial))
        rows, nodes = map(np.asarray, device.replay(self.grammar.tables, initial, self.tokens))
        return Samples(self.tokens, rows, nodes, self.log_probs, self.lengths, self.kept), self.usage

    def _until(self) -> int:
        """How many answers may still be in progress when the segment ends."""
        if self.next < len(self.keys):
            return max(self.engine.in_use - self.quantum, 0)
        return self.engine.batch // 2 if self.engine.can_shrink else 0

    def _take_out(self) -> int:
        """Copies the answers that have ended to their rows; returns their number."""
        finished = self.engine.take_finished()
        for row, answer in finished.items():
            count = len(answer.tokens)
            self.tokens[row, :count], self.log_probs[row, :count] = answer.tokens, answer.log_probs
            self.lengths[row] = count
            if self.kept is not None:
                self.kept[row, :count] = answer.kept
        return len(finished)

    def _fill(self) -> None:
        """Moves waiting answers into free slots, those of one prefilled wave of prompts at a time."""
        while self.next < len(self.keys) and (free := self.engine.free):
            first = self._prefilled(self.next // self.group_size)
            last = min(len(self.keys), (first + self.wave_size) * self.group_size, self.next + min(free, self.quantum))
            arrivals = [self._admission(answer, first) for answer in range(self.next, last)]
            padded = np.minimum(np.arange(self.next, self.next + self.quantum), last - 1)
            self.engine.admit(self.wave[1], arrivals, device.take_keys(self.keys, padded))
            self.next = last

    def _prefilled(self, prompt: int) -> int:
        """Makes sure that `prompt` is prefilled; returns the first prompt of its wave."""
        first = prompt - prompt % self.wave_size
        if self.wave is None or self.wave[0] != first:
            chosen = np.minimum(np.arange(first, first + self.wave_size), self.prompts.shape[1] - 1)
            rows = self.prompts[:, chosen].reshape(-1, self.prompts.shape[2])
            self.wave = first, self.engine.prefill(rows)
            self.usage.prompts += len(np.unique(chosen))
        return self.wave[0]

    def _admission(self, answer: int, first: int) -> Admission:
        prompt = answer // self.group_size
        opening, state = self.openings[prompt]
        starts = self.starts[:, prompt]
        read = self.prompts[0, prompt, : starts[0] + len(opening)]
        visual_start = self.grammar.tokenizer.vocab.visual_start
        reference = None if self.cells is None else last_image(read, self.cells, visual_start)
        limit = self.options.answer_length
        return Admission(answer, prompt - first, starts, opening, state, int(read[-1]), limit, reference)


def _power_above(count: int) -> int:
    return 1 << (count - 1).bit_length()
