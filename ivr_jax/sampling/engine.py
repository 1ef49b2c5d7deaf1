"""The rollout engine: answers in progress in a fixed number of slots (continuous batching).

`Engine` holds the slots.  Answers are admitted, a jitted segment of model calls (`decode_loop.run`) is run, answers
that have ended are taken out and others cancelled, at any time and in any order: a long answer holds back nobody.
`batch.sample` drives it for a batch of prompts, the server for requests as they arrive.  Slots in use can be moved
together into fewer, and the cache is only ever as wide as the longest answer in progress needs.

What an answer says depends on its own key and prompt alone (see `slots`): not on the number of slots, the order of
arrival, its neighbours, or the window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.config import Positive, Range, Section
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, decode_attention, kv_cache
from ivr_jax.models.kv_cache import KVCache
from ivr_jax.protocol.grammar import ACCEPT, ERROR, GrammarState, advance, legal_row
from ivr_jax.sampling import decode_loop
from ivr_jax.sampling import slots as device
from ivr_jax.sampling.logits_processors import SamplingOptions

FEWEST_SLOTS = 8  # slots are moved together down to this many
# Few shapes, few compilations: widths are multiples of these (caches of more with `decode_kernel="pallas"`).
CACHE_MULTIPLE = 32
PROMPT_MULTIPLE = 96
OPENING_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class EngineOptions(Section, name="engine"):
    """How answers are sampled; none of it changes what they say.

    Attributes:
      slots: answers in progress at a time.
      refill: the share of slots that must be free before they are filled again.
      window: most tokens a slot feeds in one model call: one sampled token and the forced ones after it.
      growth: factor by which the cache widens when an answer outgrows it; 1 gives it its full width from the start.
      shrink: move answers together into half the slots once no more than half are in use and none wait.
      speculate: fill the rest of the window with guesses at an image's next tokens (speculative Jacobi decoding).
    """

    slots: Positive = 64
    refill: Annotated[float, Range(above=0, most=1)] = 0.125
    window: Positive = 2
    growth: Annotated[float, Range(1)] = 1.5
    shrink: bool = True
    speculate: bool = False


class Admission(NamedTuple):
    """An answer that shall move into a slot; letters as in `slots`.

    answer: what the caller knows it by; prompt: which of the prefilled prompts it answers.
    starts int32 [C]: position of its first token in each context.
    opening int32 [O]: its first tokens, which the prefilled prompts already hold; state: the grammar after them, arrays
    of one value; last: the last token of its prompt and opening; limit: most answer tokens, the opening included.
    reference int32 [cells]: see `slots.Guesses`; None without speculation.
    """

    answer: Hashable
    prompt: int
    starts: np.ndarray
    opening: np.ndarray
    state: GrammarState
    last: int
    limit: int
    reference: np.ndarray | None = None


class FinishedAnswer(NamedTuple):
    """An answer of n tokens: tokens int32 [n], log_probs float32 [n], kept uint8 [n, ceil(V / 8)] or None."""

    tokens: np.ndarray
    log_probs: np.ndarray
    kept: np.ndarray | None


class Engine:
    """Answers in progress, admitted and taken out one by one.

        engine = Engine(config, params, grammar, sampling, options, length=512)
        engine.add("a", [prompt], grammar.initial(np.full(1, 4), np.full(1, 4)), key, limit=200)
        while engine.in_use:
            engine.step(calls=16)
            tokens_so_far = engine.tokens()
            answers = engine.take_finished()

    Args:
      grammar: gives `tables` and `tokenizer` (a `Grammar`, or several joined ones).
      sampling: how ids are sampled; options: how many at a time, and how caches grow.
      length: most tokens of one answer; an answer's own `limit` may be lower.
      widest: most cache positions that an answer can need; by default those of the model's context.
      batch: slots, by default those of the options.
      cells: of a reference image, for speculation.
    """

    def __init__(
        self,
        config: backbone.BackboneConfig,
        params: Any,
        grammar: Any,
        sampling: SamplingOptions,
        options: EngineOptions,
        *,
        length: int,
        widest: int = 0,
        batch: int = 0,
        cells: int | None = None,
    ):
        self.config, self.params, self.options, self.sampling = config, params, options, sampling
        self.length, self.batch = length, batch or options.slots
        self.vocab, self.tables = grammar.tokenizer.vocab, grammar.tables
        self.held: list[Hashable | None] = [None] * self.batch
        rules = device.rules_of(grammar)
        self.forced = rules.forced
        self._rules = jax.tree.map(jnp.asarray, rules)
        self.widest = widest or config.max_position_embeddings + options.window
        self._cells = cells if options.speculate else None
        self._prompt_width = 0
        self._slots: device.Slots | None = None

    @property
    def in_use(self) -> int:
        """Slots that hold an answer, ended or not."""
        return sum(answer is not None for answer in self.held)

    @property
    def free(self) -> int:
        """Slots that hold no answer."""
        return self.batch - self.in_use

    # -- admit ------------------------------------------------------------------------------------------------------

    def open(
        self, state: GrammarState, given: Sequence[int] = (), limit: int | None = None
    ) -> tuple[np.ndarray, GrammarState]:
        """An answer's opening, `given` tokens and the forced ones after them (at most `limit`): int32 [O], state.

        Raises UserError where `given` leaves the grammar.
        """
        tokens, limit = [], self.length if limit is None else limit
        for token in given:
            tokens.append(int(token))
            state = advance(self.tables, state, np.array([token]), np)
            if state.node[0] == ERROR:
                raise UserError(f"the given answer leaves the grammar at token {len(tokens) - 1}.", "Correct it.")
        while len(tokens) < limit:
            forced = int(self.forced[legal_row(self.tables, state, np)[0]])
            if forced < 0:  # several ids are legal
                break
            tokens.append(forced)
            state = advance(self.tables, state, np.array([forced]), np)
        return np.array(tokens, np.int32), state

    def add(
        self,
        answer: Hashable,
        prompts: Sequence[Sequence[int]],
        state: GrammarState,
        key: jax.Array,
        limit: int,
        given: Sequence[int] = (),
    ) -> None:
        """Reads one prompt and admits the answer to it.

        Args:
          prompts: tokens of the prompt in each context: the prompt itself, then those of guidance's passes.
          state: grammar before the first answer token, arrays of one value.
          limit: most answer tokens, `given` ones included; given: tokens that the answer begins with.
        """
        if len(prompts) != 1 + self.sampling.passes:
            raise ValueError(f"{len(prompts)} contexts for {self.sampling.passes} passes of guidance")
        opening, after = self.open(state, given, limit)
        contexts = [pad_prompts([list(tokens)], self.vocab.pad, 1) for tokens in prompts]
        rows, starts = join_contexts(contexts, [opening], self.vocab.pad)
        context = self.config.max_position_embeddings
        width = min(_round_up(rows.shape[2], PROMPT_MULTIPLE), context)
        rows = np.pad(rows[:, 0], ((0, 0), (0, max(width - rows.shape[2], 0))), constant_values=self.vocab.pad)
        last = int((*prompts[0], *opening)[-1])
        reference = last_image(prompts[0], self._cells, self.vocab.visual_start) if self._cells else None
        arrival = Admission(answer, 0, starts[:, 0], opening, after, last, limit, reference)
        self.admit(self.prefill(rows), [arrival], key[None])

    def prefill(self, rows: np.ndarray) -> KVCache:
        """Keys and values of prompts int32 [C * P, T], contexts after one another."""
        return device.prefill(self.config, self.params, rows)

    def admit(self, prefilled: KVCache, arrivals: Sequence[Admission], keys: jax.Array) -> None:
        """Moves answers into free slots.

        Args:
          keys: PRNG keys [R], one an arrival; more of them than arrivals pad the call to one shape.
        """
        size = len(keys)
        contexts = len(arrivals[0].starts)
        self._prompt_width = max(self._prompt_width, kv_cache.length(prefilled))
        if self._slots is None:
            self._slots = device.empty(
                self.config, keys[0], _one(arrivals[0].state), batch=self.batch, contexts=contexts,
                cache_length=self._wide(0, self._prompt_width), length=self.length, window=self.options.window,
                pad=self.vocab.pad, truncates=self.sampling.truncates, cells=self._cells,
            )  # fmt: skip
        self._widen(self._prompt_width)
        free = [slot for slot, answer in enumerate(self.held) if answer is None][: len(arrivals)]
        padded = [*arrivals, *[arrivals[-1]] * (size - len(arrivals))]
        slot = np.full(size, self.batch, np.int32)  # out of range: padding is dropped
        slot[: len(free)] = free
        self._slots = device.admit(self._slots, prefilled, self._arrivals(padded, slot, keys), pad=self.vocab.pad)
        for place, arrival in zip(free, arrivals, strict=True):
            self.held[place] = arrival.answer

    def _arrivals(self, padded: Sequence[Admission], slot: np.ndarray, keys: jax.Array) -> device.Arrivals:
        opened = np.array([len(a.opening) for a in padded], np.int32)
        longest = int(opened.max())
        # The openings of a batch of like requests are of one length; those of requests that arrive one by one are not.
        if longest != opened.min() or len(padded) == 1:
            longest = min(_round_up(longest, OPENING_MULTIPLE), self.length)
        opening = np.full((len(padded), longest), self.vocab.pad, np.int32)
        for row, arrival in zip(opening, padded, strict=True):
            row[: len(arrival.opening)] = arrival.opening
        state = GrammarState(*(np.concatenate(x) for x in zip(*(a.state for a in padded), strict=True)))
        limit = np.array([a.limit for a in padded], np.int32)
        return device.Arrivals(
            slot,
            np.array([a.prompt for a in padded], np.int32),
            keys,
            np.stack([a.starts for a in padded], 1),
            state,
            opening,
            opened,
            np.array([a.last for a in padded], np.int32),
            limit,
            device.is_full(self.tables, state, opened, limit, np) | (state.node == ACCEPT),
            None if self._cells is None else np.stack([a.reference for a in padded]),
        )

    # -- run --------------------------------------------------------------------------------------------------------

    def step(self, calls: int | None = None, until: int = 0) -> device.Work:
        """Calls the model until no more than `until` answers are in progress, or `calls` times; counts as integers.

        It may return earlier, when an answer needs a wider cache.
        """
        if self._slots is None:
            return device.Work(*(0,) * len(device.Work._fields))
        self._widen(int(decode_loop.reach(self._slots)))
        self._slots, work = decode_loop.run(
            self.params, self._rules, self._slots, np.int32(until), None if calls is None else np.int32(calls),
            config=self.config, options=self.sampling, visual_start=self.vocab.visual_start,
        )  # fmt: skip
        return device.Work(*map(int, jax.device_get(work)))

    def shrink(self) -> None:
        """Moves answers together into fewer slots while no more than half are in use (`EngineOptions.shrink`)."""
        while self.can_shrink and self._slots is not None and self.in_use <= self.batch // 2:
            self.batch //= 2
            used = [slot for slot, answer in enumerate(self.held) if answer is not None]
            empty = [slot for slot, answer in enumerate(self.held) if answer is None]
            index = [*used, *empty][: self.batch]
            self._slots = device.keep(self._slots, np.array(index, np.int32))
            self.held = [self.held[slot] for slot in index]

    @property
    def can_shrink(self) -> bool:
        """Whether answers may be moved together into half the slots."""
        return self.options.shrink and self.batch >= 2 * FEWEST_SLOTS

    def _widen(self, needed: int) -> None:
        now = kv_cache.length(self._slots.cache)
        wide = self._wide(now, needed)
        if wide != now:
            self._slots = device.widen(self._slots, cache_length=wide)

    def _wide(self, now: int, needed: int) -> int:
        """The width of the cache: enough for `needed`, with room to grow."""
        if needed <= now:
            return now
        multiple = CACHE_MULTIPLE
        if self.config.decode_kernel == "pallas":  # which runs on widths of whole blocks only
            multiple = math.lcm(multiple, decode_attention.BLOCKS[-1])
        most = _round_up(max(self.widest, needed), multiple)
        if self.options.growth == 1:
            return most
        wide = max(needed, int(now * self.options.growth), self._prompt_width + multiple)
        wide = _round_up(wide, multiple)
        return most if wide + multiple >= most else wide  # no compilation for a last small step

    # -- take out ---------------------------------------------------------------------------------------------------

    def tokens(self) -> dict[Hashable, np.ndarray]:
        """The tokens so far of every answer in a slot, int32 [n]."""
        if not self.in_use:
            return {}
        tokens, answered = map(np.asarray, (self._slots.tokens, self._slots.answered))
        return {a: tokens[slot, : answered[slot]] for slot, a in enumerate(self.held) if a is not None}

    def take_finished(self) -> dict[Hashable, FinishedAnswer]:
        """Answers that have ended, or have no room for more; their slots are free then."""
        if self._slots is None:
            return {}
        ended = np.asarray(self._slots.ended)
        return self._take([slot for slot, a in enumerate(self.held) if a is not None and ended[slot]])

    def cancel(self, answers: Sequence[Hashable]) -> dict[Hashable, FinishedAnswer]:
        """Ends answers where they are and frees their slots; what they have so far is returned."""
        chosen = [slot for slot, answer in enumerate(self.held) if answer is not None and answer in answers]
        cancelled = self._take(chosen)
        if chosen:
            stopped = np.full(self.batch, self.batch, np.int32)  # out of range: dropped
            stopped[: len(chosen)] = chosen
            self._slots = self._slots._replace(ended=device.vacate(self._slots.ended, stopped))
        return cancelled

    def reset(self) -> None:
        """Gives up cache memory; there must be no answer in a slot."""
        if self.in_use:
            raise ValueError("answers are in progress")
        self._slots, self._prompt_width = None, 0

    def _take(self, chosen: Sequence[int]) -> dict[Hashable, FinishedAnswer]:
        if not chosen:
            return {}
        names = ("tokens", "log_probs", "answered", "limit")
        tokens, log_probs, answered, limit = (np.asarray(getattr(self._slots, name)) for name in names)
        kept = None if self._slots.kept is None else np.asarray(self._slots.kept)
        found = {}
        for slot in chosen:
            count = int(min(answered[slot], limit[slot]))  # accepted guesses may reach beyond the limit
            found[self.held[slot]] = FinishedAnswer(
                tokens[slot, :count], log_probs[slot, :count], None if kept is None else kept[slot, :count]
            )
            self.held[slot] = None
        return found


def last_image(prompt: Sequence[int], cells: int, visual_start: int) -> np.ndarray:
    """The last image of a prompt, int32 [cells] visual ids; -1 where there is none."""
    visual = np.asarray(prompt, np.int32)
    visual = visual[visual >= visual_start]
    return visual[-cells:] if cells <= len(visual) else np.full(cells, -1, np.int32)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _one(state: GrammarState) -> GrammarState:
    """The first row, still an array of one value."""
    return GrammarState(*(x[:1] for x in state))


def join_contexts(
    contexts: list[tuple[np.ndarray, np.ndarray]], openings: Sequence[np.ndarray], pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of all contexts, each with its answers' opening, int32 [C, P, T + O], and where that starts [C, P]."""
    width = max(prompts.shape[1] for prompts, _ in contexts) + max(map(len, openings))
    joined = np.full((len(contexts), len(contexts[0][0]), width), pad, np.int32)
    starts = np.stack([np.asarray(lengths, np.int32) for _, lengths in contexts])
    for c, (prompts, _) in enumerate(contexts):
        joined[c, :, : prompts.shape[1]] = prompts
        for row, start, opening in zip(joined[c], starts[c], openings, strict=True):
            row[start : start + len(opening)] = opening
    return joined, starts


def pad_prompts(prompts: list[list[int]], pad: int, multiple: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to a common length: int32 [P, T], lengths int32 [P].

    T is a multiple of `multiple`: few shapes, few compilations.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = _round_up(int(lengths.max()), multiple)
    padded = np.full((len(prompts), width), pad, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths
