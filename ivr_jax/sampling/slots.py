"""The device half of the rollout engine: slots that hold answers in progress, and the programs that move them on.

A slot is one row of the KV cache with everything that its answer needs.  One model call reads a *window* of W tokens a
slot: the token drawn last and the forced tokens that follow it (EOL, EOI, image sizes, markers), which the grammar
knows without asking the model.  Then one token is drawn from the hidden state of the window's last known token.

    window  [v16 EOI <Evaluate> ...]      known 3      the rest is padding, overwritten before anything can see it
    call    reads them at their positions, draws "pass: " from the hidden state of <Evaluate>
    window  [pass: ...]                   known 1

Cache slot s of a row holds position s, so a row needs no bookkeeping beside its length.  An answer's token t is drawn
with the key `fold_in(key of the answer, t)`: neither the slot it sits in, nor its neighbours, nor the window change
what is drawn.

B slots, W window, C contexts (conditional, and those of guidance), A answer tokens, S cache slots, N answers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax import sharding
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import ACCEPT, GRID, Grammar, GrammarState, Tables, advance, legal_row
from ivr_jax.sampling.chain import MASKED, SamplingOptions, draw, log_probabilities, pack_kept


class Slots(NamedTuple):
    """Answers in progress.

    cache [L, C * B, S, K, h], contexts after one another; starts int32 [C, B]: position of an answer's first token.
    keys [B]: one PRNG key an answer; state [B]: grammar after every token so far; answered int32 [B]: their number.
    window int32 [B, W]: tokens of the next call; known int32 [B]: how many of them are sure (1 to W), the last of
    which is answer token `answered - 1`.
    ended bool [B]: complete, cut, or empty.  tokens int32, log_probs float32 [B, A + W]: the answer.  kept uint8
    [B, A + W, ceil(V / 8)]: `chain.pack_kept` of each drawn token, None where nothing is left out.
    """

    cache: backbone.KVCache
    starts: Any
    keys: Any
    state: GrammarState
    answered: Any
    window: Any
    known: Any
    ended: Any
    tokens: Any
    log_probs: Any
    kept: Any


class Rules(NamedTuple):
    """The grammar's tables, and int32 [rows]: the only legal id of a row of `legal`, -1 where there are more."""

    tables: Tables
    forced: Any


class Work(NamedTuple):
    """Counts of one segment: model calls, slots that were in use, summed over calls, and tokens that they added."""

    calls: Any
    in_use: Any
    tokens: Any


def rules_of(grammar: Grammar) -> Rules:
    """`Rules` as numpy arrays."""
    tables = grammar.tables
    sizes = np.bincount(tables.class_of, minlength=tables.legal.shape[1])
    single = np.where((tables.legal * sizes).sum(1) == 1, (tables.legal * (sizes == 1)).argmax(1), -1)
    first_id = np.array([np.argmax(tables.class_of == c) for c in range(len(sizes))])
    return Rules(tables, np.where(single >= 0, first_id[single], -1).astype(np.int32))


def is_full(tables: Tables, state: GrammarState, answered: Any, length: int, xp: Any) -> Any:
    """bool [B]: no room for another token, or for the cells of an image that is about to begin."""
    begins = (tables.kind[state.node] == GRID) & (state.rows_left == state.height) & (state.cells_left == state.width)
    image = xp.where(begins, state.height * (state.width + 1), 1)  # its cells, EOLs and EOI
    return answered + image > length


@functools.partial(jax.jit, static_argnames=("config",))
def prefill(config: backbone.BackboneConfig, params: Any, prompts: jax.Array) -> backbone.KVCache:
    """Keys and values of prompts int32 [P, T]: [L, P, T, K, h]."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    cache = backbone.init_cache(config, *prompts.shape)
    return backbone.apply(config, params, prompts, positions, cache=_placed(cache))[1]


@functools.partial(
    jax.jit, static_argnames=("config", "batch", "contexts", "slots", "length", "window", "pad", "truncates")
)
def empty(
    config: backbone.BackboneConfig,
    key: jax.Array,
    state: GrammarState,
    *,
    batch: int,
    contexts: int,
    slots: int,
    length: int,
    window: int,
    pad: int,
    truncates: bool,
) -> Slots:
    """B empty slots; `key` and `state` (of one row) say what those arrays are made of."""
    count = functools.partial(jnp.full, (batch,), dtype=jnp.int32)
    return Slots(
        _placed(backbone.init_cache(config, contexts * batch, slots)),
        jnp.ones((contexts, batch), jnp.int32),
        jnp.broadcast_to(key, (batch,)),
        GrammarState(*(jnp.broadcast_to(x, (batch,)) for x in state)),
        count(0),
        jnp.full((batch, window), pad, jnp.int32),
        count(1),
        jnp.ones((batch,), bool),
        jnp.full((batch, length + window), pad, jnp.int32),
        jnp.zeros((batch, length + window), jnp.float32),
        jnp.zeros((batch, length + window, -(-config.vocab_size // 8)), jnp.uint8) if truncates else None,
    )


class Arrivals(NamedTuple):
    """Answers that move into slots; R of them, those whose `slot` is out of range are padding.

    slot, prompt int32 [R]: where to, and which of the prefilled prompts; keys [R]; starts int32 [C, R];
    state [R]: grammar after the opening; opening int32 [O]: forced tokens that the prompts already hold;
    last int32 [R]: the last token of each prompt, which the first call reads again; ended bool [R].
    """

    slot: Any
    prompt: Any
    keys: Any
    starts: Any
    state: GrammarState
    opening: Any
    last: Any
    ended: Any


@functools.partial(jax.jit, static_argnames=("pad",), donate_argnames=("slots",))
def admit(slots: Slots, prefilled: backbone.KVCache, new: Arrivals, *, pad: int) -> Slots:
    """Puts answers into slots: a copy of their prompt's keys and values, and a fresh state."""
    contexts, batch = slots.starts.shape
    prompts = prefilled.k.shape[1] // contexts
    inside = new.slot < batch
    rows = jnp.concatenate([jnp.where(inside, c * batch + new.slot, contexts * batch) for c in range(contexts)])
    source = jnp.concatenate([c * prompts + new.prompt for c in range(contexts)])
    width, opened = prefilled.k.shape[2], new.opening.shape[0]
    cache = backbone.KVCache(
        *(
            whole.at[:, rows, :width].set(part[:, source].astype(whole.dtype), mode="drop")
            for whole, part in zip(slots.cache, prefilled, strict=True)
        )
    )

    def put(old: jax.Array, value: Any) -> jax.Array:
        return old.at[new.slot].set(value, mode="drop")

    answer = jnp.full_like(slots.tokens[0], pad).at[:opened].set(new.opening)
    return Slots(
        cache,
        slots.starts.at[:, new.slot].set(new.starts, mode="drop"),
        put(slots.keys, new.keys),
        jax.tree.map(put, slots.state, new.state),
        put(slots.answered, opened),
        slots.window.at[new.slot, 0].set(new.last, mode="drop"),
        put(slots.known, 1),
        put(slots.ended, new.ended),
        put(slots.tokens, answer),
        put(slots.log_probs, 0.0),
        None if slots.kept is None else put(slots.kept, 255),
    )


@functools.partial(jax.jit, static_argnames=("slots_wide",), donate_argnames=("slots",))
def widen(slots: Slots, *, slots_wide: int) -> Slots:
    """The same slots with `slots_wide` cache slots each."""
    more = ((0, 0), (0, 0), (0, slots_wide - slots.cache.k.shape[2]), (0, 0), (0, 0))
    return slots._replace(cache=_placed(backbone.KVCache(*(jnp.pad(x, more) for x in slots.cache))))


@jax.jit
def keep(slots: Slots, index: jax.Array) -> Slots:
    """The slots `index` int32 [B'], in that order."""
    contexts, batch = slots.starts.shape
    rows = jnp.concatenate([c * batch + index for c in range(contexts)])
    cache = backbone.KVCache(*(x[:, rows] for x in slots.cache))
    rest = jax.tree.map(lambda x: x[index], slots._replace(cache=None, starts=None))
    return rest._replace(cache=_placed(cache), starts=slots.starts[:, index])


@functools.partial(jax.jit, static_argnames=("config", "options", "length", "visual_start"), donate_argnames=("slots",))
def run(
    params: Any,
    rules: Rules,
    slots: Slots,
    until: jax.Array,
    *,
    config: backbone.BackboneConfig,
    options: SamplingOptions,
    length: int,
    visual_start: int,
) -> tuple[Slots, Work]:
    """Calls the model until no more than `until` answers are in progress, or one of them needs a wider cache."""
    rules = jax.tree.map(jnp.asarray, rules)
    width, wide = slots.window.shape[1], slots.cache.k.shape[2]
    parts = _parts(config, params, rules.tables, visual_start)

    def going(carry: tuple[Slots, Work]) -> jax.Array:
        now = carry[0]
        return ((~now.ended).sum() > until) & (reach(now) <= wide)

    def call(carry: tuple[Slots, Work]) -> tuple[Slots, Work]:
        now, work = carry
        contexts, batch = now.starts.shape
        positions = (now.starts + now.answered - now.known).reshape(-1, 1) + jnp.arange(width)
        hidden, cache = backbone.apply(config, params, jnp.tile(now.window, (contexts, 1)), positions, cache=now.cache)
        at = jnp.tile(now.known - 1, contexts)
        hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0].reshape(contexts, batch, -1)
        drawn = _choose(rules, parts, hidden, now, options)
        after = _extend(rules, now._replace(cache=cache), drawn, length)
        counts = Work(1, (~now.ended).sum(), (after.answered - now.answered).sum())
        return after, Work(*(x + y for x, y in zip(work, counts, strict=True)))

    return jax.lax.while_loop(going, call, (slots, Work(*(jnp.int32(0),) * 3)))


@jax.jit
def reach(slots: Slots) -> jax.Array:
    """int32 []: the cache slots that the next call needs."""
    first = (slots.starts + slots.answered - slots.known).max(0)
    return jnp.where(slots.ended, 0, first + slots.window.shape[1]).max()


class _Part(NamedTuple):
    """A range of ids that is scored alone: its columns [D, ids] of the output matrix, and tables for these ids."""

    first: int
    kernel: jax.Array
    tables: Tables


def _parts(config: backbone.BackboneConfig, params: Any, tables: Tables, visual_start: int) -> tuple[_Part, _Part]:
    """Visual ids, and all ids before them: those legal at one position always lie within one of the two."""
    kernel = backbone.lm_head(config, params)
    ranges = (visual_start, config.vocab_size), (0, visual_start)
    return tuple(_Part(a, kernel[:, a:b], tables._replace(class_of=tables.class_of[a:b])) for a, b in ranges)


class _Drawn(NamedTuple):
    """One token a slot: token int32, log_prob float32 [B], and kept uint8 [B, ceil(V / 8)] or None."""

    token: jax.Array
    log_prob: jax.Array
    kept: jax.Array | None


def _choose(
    rules: Rules, parts: tuple[_Part, _Part], hidden: jax.Array, slots: Slots, options: SamplingOptions
) -> _Drawn:
    """The next token of each slot, from hidden [C, B, D].

    A part of the vocabulary is scored only if some slot needs it; a token that is forced needs none.
    """
    row = legal_row(rules.tables, slots.state, jnp)
    forced = rules.forced[row]
    in_grid = rules.tables.kind[slots.state.node] == GRID
    open_ = ~slots.ended & (forced < 0)
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.answered)
    kept = None if slots.kept is None else jnp.full_like(slots.kept[:, 0], 255)
    chosen = _Drawn(jnp.maximum(forced, 0), jnp.zeros(forced.shape, jnp.float32), kept)
    for part, wanted in zip(parts, (open_ & in_grid, open_ & ~in_grid), strict=True):

        def score(part: _Part = part, before: _Drawn = chosen, wanted: jax.Array = wanted) -> _Drawn:
            logits = jnp.matmul(hidden, part.kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
            log_probs = log_probabilities(logits[0], part.tables, row, options, tuple(logits[1:]))
            drawn, kept = draw(log_probs, keys, options), None
            if before.kept is not None:
                after = parts[0].first + parts[0].kernel.shape[1] - part.first - part.kernel.shape[1]
                whole = jnp.pad(log_probs, ((0, 0), (part.first, after)), constant_values=MASKED)
                kept = pack_kept(whole)
            found = _Drawn(drawn + part.first, jnp.take_along_axis(log_probs, drawn[:, None], axis=1)[:, 0], kept)
            return jax.tree.map(lambda new, old: jnp.where(_like(wanted, new), new, old), found, before)

        chosen = jax.lax.cond(wanted.any(), score, lambda before=chosen: before)
    return chosen


def _like(flags: jax.Array, values: jax.Array) -> jax.Array:
    """flags [B] as [B, 1, ...], to choose between rows of `values`."""
    return flags.reshape(-1, *(1,) * (values.ndim - 1))


def _extend(rules: Rules, slots: Slots, drawn: _Drawn, length: int) -> Slots:
    """Adds a token to each slot in use, and the forced ones that follow it, as many as the window holds."""
    token, active, width = drawn.token, ~slots.ended, slots.window.shape[1]
    state, answered = advance(rules.tables, slots.state, token, jnp), slots.answered + 1
    known = jnp.ones_like(answered)
    window, going = [token], active & ~is_full(rules.tables, state, answered, length, jnp)
    for _ in range(1, width):
        follows = rules.forced[legal_row(rules.tables, state, jnp)]
        going &= (follows >= 0) & (state.node != ACCEPT)
        window.append(follows)
        following = advance(rules.tables, state, jnp.maximum(follows, 0), jnp)
        state = jax.tree.map(lambda new, old, on=going: jnp.where(on, new, old), following, state)
        answered, known = answered + going, known + going
        going &= ~is_full(rules.tables, state, answered, length, jnp)
    place = slots.answered[:, None] + jnp.arange(width)
    place = jnp.where(active[:, None] & (jnp.arange(width) < known[:, None]), place, slots.tokens.shape[1])
    window, batch = jnp.stack(window, 1), jnp.arange(token.shape[0])
    ended = (state.node == ACCEPT) | is_full(rules.tables, state, answered, length, jnp)
    moved = {"state": state, "answered": answered, "window": window, "known": known, "ended": ended}
    stayed = {name: getattr(slots, name) for name in moved}
    moved = jax.tree.map(lambda new, old: jnp.where(_like(active, new), new, old), moved, stayed)
    return slots._replace(
        **moved,
        tokens=slots.tokens.at[batch[:, None], place].set(window, mode="drop"),
        log_probs=slots.log_probs.at[batch, place[:, 0]].set(drawn.log_prob, mode="drop"),
        kept=None if slots.kept is None else slots.kept.at[batch, place[:, 0]].set(drawn.kept, mode="drop"),
    )


def _placed(cache: backbone.KVCache) -> backbone.KVCache:
    return backbone.KVCache(*(sharding.constrain(x, axes) for x, axes in zip(cache, backbone.CACHE_AXES, strict=True)))


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
