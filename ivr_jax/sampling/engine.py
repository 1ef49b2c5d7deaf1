"""The rollout engine: answers to any number of prompts through a fixed number of slots (continuous batching).

The host loop below fills slots with answers, runs a jitted segment of model calls (`decode_loop.run`) until enough
answers have ended, takes them out, and fills their slots with the next ones.  A long answer does not hold back
the others.  When no answer waits any more, the slots still in use are moved together into fewer, and the cache is only
ever as wide as the longest answer in progress needs.

What an answer says depends on its own key and prompt alone (see `slots`): not on the number of slots, the order of
arrival, or the window.  `Samples` is therefore the same for every `EngineOptions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import Grammar, GrammarState, advance, legal_row
from ivr_jax.sampling import decode_loop
from ivr_jax.sampling import slots as device
from ivr_jax.sampling.logits_processors import SamplingOptions

SMALLEST = 8  # slots are moved together down to this many
WAVE = 8  # prompts are read for this part of the slots at a time, or more
ROUND = 32  # cache widths are multiples of this
WATCHED = 64  # model calls between two reports to who watches


class Samples(NamedTuple):
    """What was drawn; A is the longest answer asked for.

    tokens int32 [B, A]: answer tokens, EOS included, then PAD.
    rows int32 [B, A]: row of the grammar's legality table at each token; the trainer replays the mask from it.
    nodes int32 [B, A + 1]: automaton node before each token (`codec.parse_answer` reads it); ACCEPT once finished.
    log_probs float32 [B, A]: log-probability of each token under the sampled distribution; 0 after EOS.
    lengths int32 [B]: answer tokens, EOS included; the row is unfinished when nodes[b, lengths[b]] != ACCEPT.
    kept uint8 [B, A, ceil(V / 8)]: the ids that top-k and top-p kept at each token (`chain.pack_kept`; all of them
      where the grammar leaves one alone); None without.
    """

    tokens: Any
    rows: Any
    nodes: Any
    log_probs: Any
    lengths: Any
    kept: Any = None


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How answers are drawn; none of it changes what is drawn.

    Attributes:
      slots: answers in progress at a time.
      refill: the share of slots that must be free before they are filled again.
      window: most tokens a slot feeds in one model call: one drawn token and the forced ones after it.
      growth: factor by which the cache widens when an answer outgrows it; 1 gives it its full width from the start.
      shrink: move answers together into half the slots once no more than half are in use and none wait.
      speculate: fill the rest of the window with guesses at an image's next tokens (speculative Jacobi decoding).
    """

    slots: int = 64
    refill: float = 0.125
    window: int = 2
    growth: float = 1.5
    shrink: bool = True
    speculate: bool = False

    def __post_init__(self) -> None:
        if self.slots < 1 or not 0 < self.refill <= 1 or self.window < 1 or self.growth < 1:
            raise UserError(
                f"engine options {self} are out of range.", "slots and window are >= 1, 0 < refill <= 1, growth >= 1."
            )


@dataclasses.dataclass
class Usage:
    """What a run of the engine cost.

    Attributes:
      calls: model calls; slot_calls: slots in these calls, in use or not; in_use: those in use.
      queued_slot_calls, queued_in_use: the same of the calls made while answers waited for a slot.
      prompts: prompts that were read, once for all answers to them.
      tokens: answer tokens that came of them; opening tokens, which the prefill reads, are not among them.
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


def sample(
    config: backbone.BackboneConfig,
    params: Any,
    grammar: Grammar,
    prompts: np.ndarray,
    prompt_lengths: np.ndarray,
    size: tuple[int, int],
    keys: jax.Array,
    answer_length: int,
    options: SamplingOptions | None = None,
    group: int = 1,
    unconditional: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    engine: EngineOptions | None = None,
    progress: Callable[[int], None] | None = None,
    watch: Callable[[Usage], None] | None = None,
) -> tuple[Samples, Usage]:
    """Draws `group` answers to each prompt.

    Args:
      prompts: int32 [P, T] right-padded prompt tokens; prompt_lengths: int32 [P].
      size: forced image size in latent cells (rows, columns), or `grammar.FREE` when the model chooses.
      keys: PRNG keys [P * group]; rows p * group ... (p + 1) * group - 1 answer prompt p and share its prefill.
      answer_length: most answer tokens, EOS included.  An image is never cut: where its cells no longer fit, the answer
        stops before them.
      unconditional: (prompts [P, T'], lengths [P]) of each of guidance's unconditional passes (`options.passes`).
      progress: called with the number of answers that have just ended.
      watch: called with what it has cost so far, every `WATCHED` model calls at least.

    Returns:
      Samples as numpy arrays, and what they cost.
    """
    options, engine = options or SamplingOptions(), engine or EngineOptions()
    if len(keys) != len(prompts) * group:
        raise ValueError(f"{len(keys)} keys for {len(prompts) * group} answers")
    if prompts.shape[1] + answer_length > config.max_position_embeddings:
        raise UserError(
            f"a prompt of {prompts.shape[1]} and an answer of {answer_length} tokens do not fit a context of "
            f"{config.max_position_embeddings}.",
            "Shorten the prompt or lower the answer length.",
        )
    if len(unconditional) != options.passes:
        raise ValueError(f"guidance needs {options.passes} sets of unconditional prompts, not {len(unconditional)}")
    contexts = [(prompts, prompt_lengths), *unconditional]
    run = _Run(config, params, grammar, contexts, size, keys, answer_length, options, group, engine)
    return run.finish(progress or (lambda ended: None), watch)


class _Run:
    """One call of `sample`: what waits, what is in the slots, and what has ended."""

    def __init__(self, config, params, grammar, contexts, size, keys, answer_length, options, group, engine):
        self.config, self.params, self.grammar, self.engine = config, params, grammar, engine
        self.keys, self.group, self.length, self.options = keys, group, answer_length, options
        self.pad, self.forced = grammar.tokenizer.vocab.pad, device.rules_of(grammar).forced
        self.rules = jax.tree.map(jnp.asarray, device.rules_of(grammar))
        self.initial = grammar.initial(np.full(1, size[0]), np.full(1, size[1]))
        self.opening, self.opened = self._open()
        self.prompts, self.starts = _join(contexts, self.opening, self.pad)
        self.references = self._references(max(size[0], 1) * max(size[1], 1))
        count = len(keys)
        self.batch = min(engine.slots, _power_above(count))
        self.most = self.prompts.shape[2] + answer_length - len(self.opening) + engine.window
        together = count <= self.batch  # all fit: one prefill; else as many as a refill takes
        self.quantum = self.batch if together else max(1, int(self.batch * engine.refill))
        wave = max(self.quantum, self.batch // WAVE)  # fewer prompts at a time would keep the device idle
        self.wave_size = min(contexts[0][0].shape[0], -(-wave // group))
        self.usage, self.next = Usage(), 0
        self.wave: tuple[int, Any] | None = None
        self.held = np.full(self.batch, -1)  # the answer in each slot
        self.tokens = np.full((count, answer_length), self.pad, np.int32)
        self.log_probs = np.zeros((count, answer_length), np.float32)
        self.lengths = np.zeros(count, np.int32)
        bits = (count, answer_length, -(-config.vocab_size // 8))
        self.kept = np.full(bits, 255, np.uint8) if options.truncates else None

    def _open(self) -> tuple[np.ndarray, GrammarState]:
        """The forced tokens that every answer begins with, and the grammar's state after them."""
        state, tokens, tables = self.initial, [], self.grammar.tables
        while len(tokens) < self.length:
            token = self.forced[legal_row(tables, state, np)[0]]
            if token < 0:
                break
            tokens.append(token)
            state = advance(tables, state, np.array([token]), np)
        return np.array(tokens, np.int32), state

    def _references(self, cells: int) -> np.ndarray:
        """The last image of each prompt, int32 [P, cells] visual ids; the first code where there is none."""
        first = self.grammar.tokenizer.vocab.visual_start
        found = np.full((self.prompts.shape[1], cells), first, np.int32)
        for row, prompt, start in zip(found, self.prompts[0], self.starts[0], strict=True):
            visual = prompt[:start][prompt[:start] >= first]
            if cells <= len(visual):
                row[:] = visual[-cells:]
        return found

    # -- the loop ---------------------------------------------------------------------------------------------------

    def finish(
        self, progress: Callable[[int], None], watch: Callable[[Usage], None] | None
    ) -> tuple[Samples, Usage]:
        """Runs until every answer has ended."""
        count, calls = len(self.keys), None if watch is None else np.int32(WATCHED)
        slots = device.empty(
            self.config, self.keys[0], self.opened, batch=self.batch, contexts=len(self.prompts),
            slots=self._wide(0, self.prompts.shape[2]), length=self.length, window=self.engine.window, pad=self.pad,
            truncates=self.options.truncates, cells=self.references.shape[1] if self.engine.speculate else None,
        )  # fmt: skip
        while self.next < count or (self.held >= 0).any():
            slots = self._fill(slots)
            slots = self._resize(slots)
            slots, work = decode_loop.run(
                self.params, self.rules, slots, self._until(), calls, config=self.config, options=self.options,
                length=self.length, visual_start=self.grammar.tokenizer.vocab.visual_start,
            )  # fmt: skip
            self.usage.add(work, self.batch, self.next < count)
            if watch is not None:
                watch(self.usage)
            progress(self._take_out(slots))
        initial = GrammarState(*(np.repeat(x, count) for x in self.initial))
        rows, nodes = map(np.asarray, device.replay(self.grammar.tables, initial, self.tokens))
        return Samples(self.tokens, rows, nodes, self.log_probs, self.lengths, self.kept), self.usage

    def _until(self) -> np.int32:
        """How many answers may still be in progress when the segment ends."""
        in_use = int((self.held >= 0).sum())
        if self.next < len(self.keys):
            return np.int32(max(in_use - self.quantum, 0))
        return np.int32(self.batch // 2 if self._can_shrink() else 0)

    def _can_shrink(self) -> bool:
        return self.engine.shrink and self.batch >= 2 * SMALLEST

    def _take_out(self, slots: device.Slots) -> int:
        """Copies the answers that have ended to their rows; returns their number."""
        ended = np.flatnonzero(np.asarray(slots.ended) & (self.held >= 0))
        if len(ended) == 0:
            return 0
        tokens, log_probs, answered = map(np.asarray, (slots.tokens, slots.log_probs, slots.answered))
        self.tokens[self.held[ended]] = tokens[ended, : self.length]
        self.log_probs[self.held[ended]] = log_probs[ended, : self.length]
        self.lengths[self.held[ended]] = answered[ended]
        if self.kept is not None:
            self.kept[self.held[ended]] = np.asarray(slots.kept)[ended, : self.length]
        self.held[ended] = -1
        return len(ended)

    # -- slots ------------------------------------------------------------------------------------------------------

    def _fill(self, slots: device.Slots) -> device.Slots:
        """Moves waiting answers into free slots, those of one prefilled wave of prompts at a time."""
        while self.next < len(self.keys) and (free := np.flatnonzero(self.held < 0)).size:
            first = self._prefilled(self.next // self.group)
            last = min(len(self.keys), (first + self.wave_size) * self.group, self.next + min(len(free), self.quantum))
            answers = np.arange(self.next, last)
            used = free[: len(answers)]
            slots = device.admit(slots, self.wave[1], self._arrivals(answers, used, first), pad=self.pad)
            self.held[used] = answers
            self.next = last
        return slots

    def _prefilled(self, prompt: int) -> int:
        """Makes sure that `prompt` is prefilled; returns the first prompt of its wave."""
        first = prompt - prompt % self.wave_size
        if self.wave is None or self.wave[0] != first:
            chosen = np.minimum(np.arange(first, first + self.wave_size), self.prompts.shape[1] - 1)
            rows = self.prompts[:, chosen].reshape(-1, self.prompts.shape[2])
            self.wave = first, device.prefill(self.config, self.params, rows)
            self.usage.prompts += len(np.unique(chosen))
        return self.wave[0]

    def _arrivals(self, answers: np.ndarray, used: np.ndarray, first: int) -> device.Arrivals:
        size = self.quantum
        slot = np.full(size, self.batch, np.int32)
        slot[: len(used)] = used
        padded = np.pad(answers, (0, size - len(answers)), mode="edge")
        prompt = padded // self.group
        ends = self.starts[0, prompt] + len(self.opening) - 1
        full = device.is_full(self.grammar.tables, self.opened, np.int32(len(self.opening)), self.length, np)
        return device.Arrivals(
            slot,
            (prompt - first).astype(np.int32),
            self.keys[padded],
            self.starts[:, prompt],
            GrammarState(*(np.repeat(x, size) for x in self.opened)),
            self.opening,
            self.prompts[0, prompt, ends],
            np.repeat(full, size),
            self.references[prompt] if self.engine.speculate else None,
        )

    def _resize(self, slots: device.Slots) -> device.Slots:
        """Fewer slots when no more than half are in use and none wait; a wider cache when an answer needs it."""
        while self.next == len(self.keys) and self._can_shrink() and (self.held >= 0).sum() <= self.batch // 2:
            self.batch //= 2
            index = np.concatenate([np.flatnonzero(self.held >= 0), np.flatnonzero(self.held < 0)])[: self.batch]
            slots, self.held = device.keep(slots, index.astype(np.int32)), self.held[index]
        wide = self._wide(slots.cache.k.shape[3], int(decode_loop.reach(slots)))
        return slots if wide == slots.cache.k.shape[3] else device.widen(slots, slots_wide=wide)

    def _wide(self, now: int, needed: int) -> int:
        """The width of the cache: enough for `needed`, with room to grow."""
        if needed <= now:
            return now
        if self.engine.growth == 1:
            return self.most
        wide = max(needed, int(now * self.engine.growth), self.prompts.shape[2] + ROUND)
        wide = -(-wide // ROUND) * ROUND
        return self.most if wide + ROUND >= self.most else wide


def _power_above(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _join(
    contexts: list[tuple[np.ndarray, np.ndarray]], opening: np.ndarray, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of all contexts, the answer's opening added, int32 [C, P, T + O], and where it starts, int32 [C, P]."""
    width = max(prompts.shape[1] for prompts, _ in contexts) + len(opening)
    joined = np.full((len(contexts), len(contexts[0][0]), width), pad, np.int32)
    starts = np.stack([np.asarray(lengths, np.int32) for _, lengths in contexts])
    for c, (prompts, _) in enumerate(contexts):
        joined[c, :, : prompts.shape[1]] = prompts
        for row, start in zip(joined[c], starts[c], strict=True):
            row[start : start + len(opening)] = opening
    return joined, starts


def pad_prompts(prompts: list[list[int]], pad: int, multiple: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to a common length: int32 [P, T], lengths int32 [P].

    T is a multiple of `multiple`: few shapes, few compilations.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = -(-int(lengths.max()) // multiple) * multiple
    padded = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths
