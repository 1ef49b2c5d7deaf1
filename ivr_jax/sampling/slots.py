"""The rollout engine's slots, which hold answers in progress, and the programs that fill and move them.

A slot is one row of the KV cache with everything that its answer needs.  One model call reads a *window* of W tokens a
slot: the token sampled last and the forced tokens that follow it (EOL, EOI, image sizes, markers), which the grammar
knows without asking the model.  Then one token is sampled from the hidden state of the window's last known token.

    window  [v16 EOI <Evaluate> ...]      known 3      the rest is padding, overwritten before anything can see it
    call    reads them at their positions, samples "pass: " from the hidden state of <Evaluate>
    window  [pass: ...]                   known 1

Speculation (an option) fills the rest of the window with guesses at the tokens of an image, see `speculation.py`.

Cache slot s of a row holds position s, so a row needs no bookkeeping beside its length.  An answer's token t is sampled
with the key `fold_in(key of the answer, t)`: neither the slot it sits in, nor its neighbours, nor the window change
what is sampled.

B slots, W window, C contexts (conditional, and those of guidance), A answer tokens, S cache positions, N answers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax import sharding
from ivr_jax.models import backbone, kv_cache
from ivr_jax.models.kv_cache import CACHE_AXES, KVCache, init_cache
from ivr_jax.protocol.grammar import GRID, Grammar, GrammarState, Tables, advance, legal_row


class Guesses(NamedTuple):
    """Guesses at coming tokens, for speculation.

    count int32 [B]: window tokens after the known ones that are guesses; -1 in an answer that has just arrived.
    states [B, W]: grammar before the first token that is not known, and after each guess.
    reference int32 [B, cells]: visual ids of the image that is being sampled, and where it has none yet, of the one
    before it; -1 where there is neither.
    """

    count: Any
    states: GrammarState
    reference: Any


class Slots(NamedTuple):
    """Answers in progress.

    cache [L, C * B, K, S, h], contexts after one another; starts int32 [C, B]: position of an answer's first token.
    keys [B]: one PRNG key an answer; state [B]: grammar after every token so far; answered int32 [B]: their number.
    window int32 [B, W]: tokens of the next call; known int32 [B]: how many of them are sure (1 to W), the last of
    which is answer token `answered - 1`.
    limit int32 [B]: most tokens of each answer; ended bool [B]: complete, cut, or empty.
    tokens int32, log_probs float32 [B, A + W]: the answer.  kept uint8 [B, A + W, ceil(V / 8)]:
    `logits_processors.pack_kept` of each sampled token, None where nothing is left out.  guesses: None without
    speculation.
    """

    cache: KVCache
    starts: Any
    keys: Any
    state: GrammarState
    answered: Any
    window: Any
    known: Any
    limit: Any
    ended: Any
    tokens: Any
    log_probs: Any
    kept: Any
    guesses: Guesses | None


class Rules(NamedTuple):
    """The grammar's tables, and int32 [rows]: the only legal id of a row of `legal`, -1 where there are more."""

    tables: Tables
    forced: Any


class Work(NamedTuple):
    """Counts of one segment, int32 [].

    calls: model calls; in_use: slots in progress, summed over calls; tokens: answer tokens that were sampled in them;
    image_calls: slots that sampled a visual token, summed over calls; image_tokens: visual tokens sampled;
    drafted, accepted: guesses at visual tokens that were verified, and those that were right.
    """

    calls: Any
    in_use: Any
    tokens: Any
    image_calls: Any
    image_tokens: Any
    drafted: Any
    accepted: Any


def rules_of(grammar: Grammar) -> Rules:
    """`Rules` as numpy arrays."""
    tables = grammar.tables
    sizes = np.bincount(tables.class_of, minlength=tables.legal.shape[1])
    single = np.where((tables.legal * sizes).sum(1) == 1, (tables.legal * (sizes == 1)).argmax(1), -1)
    first_id = np.array([np.argmax(tables.class_of == c) for c in range(len(sizes))])
    return Rules(tables, np.where(single >= 0, first_id[single], -1).astype(np.int32))


def is_full(tables: Tables, state: GrammarState, answered: Any, limit: Any, xp: Any) -> Any:
    """bool [B]: no room for another token, or for the cells of an image that is about to begin; `limit` int [B]."""
    begins = (tables.kind[state.node] == GRID) & (state.rows_left == state.height) & (state.cells_left == state.width)
    image = xp.where(begins, state.height * (state.width + 1), 1)  # its cells, EOLs and EOI
    return answered + image > limit


@functools.partial(jax.jit, static_argnames=("config",))
def prefill(config: backbone.BackboneConfig, params: Any, prompts: jax.Array) -> KVCache:
    """Keys and values of prompts int32 [P, T]: [L, P, K, T, h]."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    cache = init_cache(config, *prompts.shape)
    return backbone.apply(config, params, prompts, positions, cache=_placed(cache))[1]


@functools.partial(
    jax.jit,
    static_argnames=("config", "batch", "contexts", "cache_length", "length", "window", "pad", "truncates", "cells"),
)
def empty(
    config: backbone.BackboneConfig,
    key: jax.Array,
    state: GrammarState,
    *,
    batch: int,
    contexts: int,
    cache_length: int,
    length: int,
    window: int,
    pad: int,
    truncates: bool,
    cells: int | None,
) -> Slots:
    """B empty slots.

    `key` and `state` (of one row) say what those arrays are made of; `cells` is None or that of `Guesses`.
    """
    count = functools.partial(jnp.full, (batch,), dtype=jnp.int32)
    guesses = None
    if cells is not None:
        states = GrammarState(*(jnp.zeros((batch, window), jnp.int32) for _ in GrammarState._fields))
        guesses = Guesses(count(0), states, jnp.full((batch, cells), -1, jnp.int32))
    return Slots(
        _placed(init_cache(config, contexts * batch, cache_length)),
        jnp.ones((contexts, batch), jnp.int32),
        jnp.broadcast_to(key, (batch,)),
        GrammarState(*(jnp.broadcast_to(x, (batch,)) for x in state)),
        count(0),
        jnp.full((batch, window), pad, jnp.int32),
        count(1),
        count(length),
        jnp.ones((batch,), bool),
        jnp.full((batch, length + window), pad, jnp.int32),
        jnp.zeros((batch, length + window), jnp.float32),
        jnp.zeros((batch, length + window, -(-config.vocab_size // 8)), jnp.uint8) if truncates else None,
        guesses,
    )


@jax.jit
def take_keys(keys: jax.Array, rows: np.ndarray) -> jax.Array:
    """Keys [R] of the answers `rows` int32 [R]; compiled, since indexing keys costs milliseconds otherwise."""
    return keys[rows]


class Arrivals(NamedTuple):
    """Answers that move into slots; R of them, those whose `slot` is out of range are padding.

    slot, prompt int32 [R]: where to, and which of the prefilled prompts; keys [R]; starts int32 [C, R];
    opening int32 [R, O], right-padded: the answer's first tokens, which the prompts already hold (forced ones, or those
    of an answer that is continued); opened int32 [R]: their number; state [R]: grammar after them;
    last int32 [R]: the last token of each prompt, which the first call reads again; limit int32 [R]; ended bool [R];
    reference int32 [R, cells], see `Guesses`, or None.
    """

    slot: Any
    prompt: Any
    keys: Any
    starts: Any
    state: GrammarState
    opening: Any
    opened: Any
    last: Any
    limit: Any
    ended: Any
    reference: Any


@functools.partial(jax.jit, static_argnames=("pad",), donate_argnames=("slots",))
def admit(slots: Slots, prefilled: KVCache, new: Arrivals, *, pad: int) -> Slots:
    """Puts answers into slots: a copy of their prompt's keys and values, and a fresh state."""
    contexts, batch = slots.starts.shape
    prompts = jax.tree.leaves(prefilled)[0].shape[1] // contexts
    inside = new.slot < batch
    rows = jnp.concatenate([jnp.where(inside, c * batch + new.slot, contexts * batch) for c in range(contexts)])
    source = jnp.concatenate([c * prompts + new.prompt for c in range(contexts)])
    width = kv_cache.length(prefilled)

    def put_prompt(whole: jax.Array, part: jax.Array) -> jax.Array:
        return whole.at[:, rows, :, :width].set(part[:, source].astype(whole.dtype), mode="drop")

    cache = jax.tree.map(put_prompt, slots.cache, prefilled)

    def put(old: jax.Array, value: Any) -> jax.Array:
        return old.at[new.slot].set(value, mode="drop")

    beyond = ((0, 0), (0, slots.tokens.shape[1] - new.opening.shape[1]))
    answer = jnp.pad(new.opening, beyond, constant_values=pad)
    return Slots(
        cache,
        slots.starts.at[:, new.slot].set(new.starts, mode="drop"),
        put(slots.keys, new.keys),
        jax.tree.map(put, slots.state, new.state),
        put(slots.answered, new.opened),
        slots.window.at[new.slot, 0].set(new.last, mode="drop"),
        put(slots.known, 1),
        put(slots.limit, new.limit),
        put(slots.ended, new.ended),
        put(slots.tokens, answer),
        put(slots.log_probs, 0.0),
        None if slots.kept is None else put(slots.kept, 255),
        slots.guesses and slots.guesses._replace(
            count=put(slots.guesses.count, -1), reference=put(slots.guesses.reference, new.reference)
        ),
    )


@functools.partial(jax.jit, donate_argnames=("ended",))
def vacate(ended: jax.Array, stopped: jax.Array) -> jax.Array:
    """`Slots.ended` with the answers in slots `stopped` int32 [N] ended; numbers out of range are padding."""
    return ended.at[stopped].set(True, mode="drop")


def widen(slots: Slots, *, cache_length: int) -> Slots:
    """The same slots with `cache_length` cache positions each."""
    return slots._replace(cache=_widened(slots.cache, cache_length=cache_length))


@functools.partial(jax.jit, static_argnames=("cache_length",))
def _widened(cache: KVCache, *, cache_length: int) -> KVCache:
    more = ((0, 0), (0, 0), (0, 0), (0, cache_length - kv_cache.length(cache)), (0, 0))
    return _placed(jax.tree.map(lambda x: jnp.pad(x, more), cache))


@jax.jit
def keep(slots: Slots, index: jax.Array) -> Slots:
    """The slots `index` int32 [B'], in that order."""
    contexts, batch = slots.starts.shape
    rows = jnp.concatenate([c * batch + index for c in range(contexts)])
    cache = jax.tree.map(lambda x: x[:, rows], slots.cache)
    rest = jax.tree.map(lambda x: x[index], slots._replace(cache=None, starts=None))
    return rest._replace(cache=_placed(cache), starts=slots.starts[:, index])


def _placed(cache: KVCache) -> KVCache:
    return jax.tree.map(lambda x: sharding.constrain(x, CACHE_AXES), cache)


@jax.jit
def replay(tables: Tables, state: GrammarState, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the grammar says of finished answers, tokens int32 [N, A].

    Returns:
      rows int32 [N, A], the row of the legality table at each token; nodes int32 [N, A + 1], the node before it.
    """
    tables = Tables(*map(jnp.asarray, tables))

    def read(state: GrammarState, token: jax.Array) -> tuple[GrammarState, tuple[jax.Array, jax.Array]]:
        after = advance(tables, state, token, jnp)
        return after, (legal_row(tables, state, jnp), after.node)

    state = GrammarState(*map(jnp.asarray, state))
    _, (rows, nodes) = jax.lax.scan(read, state, tokens.T)
    return rows.T, jnp.concatenate([state.node[:, None], nodes.T], axis=1)
