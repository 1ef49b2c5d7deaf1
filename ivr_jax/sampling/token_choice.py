"""From hidden states to tokens: those that the model chooses, and those that the grammar forces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import ACCEPT, GRID, GrammarState, Tables, advance, legal_row
from ivr_jax.sampling.logits_processors import MASKED, SamplingOptions, log_probabilities, pack_kept, sample_ids
from ivr_jax.sampling.slots import Rules, Slots, is_full


class VocabRange(NamedTuple):
    """A range of ids that is scored alone: its columns [D, ids] of the output matrix, and tables for these ids.

    `visual`: whether it holds the visual ids; `size`: how many ids there are in all.
    """

    visual: bool
    size: int
    first: int
    kernel: jax.Array
    tables: Tables


def vocab_ranges(
    config: backbone.BackboneConfig, params: Any, tables: Tables, visual_start: int
) -> tuple[VocabRange, VocabRange]:
    """Visual ids, and all ids before them: those legal at one position always belong to one of the two."""
    kernel = backbone.lm_head(config, params)

    def between(visual: bool, first: int, end: int) -> VocabRange:
        part = tables._replace(class_of=tables.class_of[first:end])
        return VocabRange(visual, config.vocab_size, first, kernel[:, first:end], part)

    return between(True, visual_start, config.vocab_size), between(False, 0, visual_start)


class Choice(NamedTuple):
    """One token a slot: token int32, log_prob float32 [B], and kept uint8 [B, ceil(V / 8)] or None."""

    token: jax.Array
    log_prob: jax.Array
    kept: jax.Array | None


def choose(
    rules: Rules,
    ranges: Sequence[VocabRange],
    hidden: jax.Array,
    state: GrammarState,
    keys: jax.Array,
    number: jax.Array,
    wanted: jax.Array,
    options: SamplingOptions,
) -> Choice:
    """A token for each of N places, from hidden [C, N, D]: answer token `number` [N] of the answer with key `keys` [N].

    A part of the vocabulary is scored only if some place needs it; a token that is forced needs none, and a place that
    is not `wanted` bool [N], or needs a part that is not among `ranges`, gets some token.
    """
    row = legal_row(rules.tables, state, jnp)
    forced = rules.forced[row]
    in_grid = rules.tables.kind[state.node] == GRID
    undecided = wanted & (forced < 0)
    keys = jax.vmap(jax.random.fold_in)(keys, number)
    size = ranges[0].size
    kept = jnp.full((*row.shape, -(-size // 8)), 255, jnp.uint8) if options.truncates else None
    chosen = Choice(jnp.maximum(forced, 0), jnp.zeros(forced.shape, jnp.float32), kept)
    for part in ranges:
        here = undecided & (in_grid == part.visual)

        def score(part: VocabRange = part, before: Choice = chosen, here: jax.Array = here) -> Choice:
            logits = jnp.matmul(hidden, part.kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
            log_probs = log_probabilities(logits[0], part.tables, row, options, tuple(logits[1:]))
            ids = sample_ids(log_probs, keys, options)
            log_prob = jnp.take_along_axis(log_probs, ids[:, None], axis=1)[:, 0]
            kept = None
            if before.kept is not None:
                others = (part.first, size - part.first - part.kernel.shape[1])
                kept = pack_kept(jnp.pad(log_probs, ((0, 0), others), constant_values=MASKED))
            return where_rows(here, Choice(ids + part.first, log_prob, kept), before)

        chosen = jax.lax.cond(here.any(), score, lambda before=chosen: before)
    return chosen


def where_rows(flags: jax.Array, new: Any, old: Any) -> Any:
    """Row b of every array [B, ...] of two equal trees: that of `new` where flags bool [B] is True, else `old`'s."""

    def choose_rows(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(flags.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(choose_rows, new, old)


def extend(rules: Rules, slots: Slots, choice: Choice) -> Slots:
    """Adds a token to each slot in use, and the forced ones that follow it, as many as the window holds."""
    active, width = ~slots.ended, slots.window.shape[1]

    def full(state: GrammarState, known: jax.Array) -> jax.Array:
        return is_full(rules.tables, state, slots.answered + known, slots.limit, jnp)

    state, known = advance(rules.tables, slots.state, choice.token, jnp), jnp.ones_like(slots.answered)
    window = jnp.tile(choice.token[:, None], (1, width))
    follows, going = next_forced(rules, state)
    added = _Added(state, known, window, follows, going & active & ~full(state, known))

    def more(added: _Added) -> jax.Array:
        return added.going.any() & (added.known.max() < width)

    def add(added: _Added) -> _Added:
        column = jnp.where(added.going, added.known, width)
        window = added.window.at[jnp.arange(len(column)), column].set(added.follows, mode="drop")
        state = where_rows(added.going, advance(rules.tables, added.state, added.follows, jnp), added.state)
        known = added.known + added.going
        follows, going = next_forced(rules, state)
        return _Added(state, known, window, follows, added.going & going & ~full(state, known))

    state, known, window, *_ = jax.lax.while_loop(more, add, added)
    answered = slots.answered + known
    steps = jnp.arange(width)[None, :]
    place = slots.answered[:, None] + steps
    place = jnp.where(active[:, None] & (steps < known[:, None]), place, slots.tokens.shape[1])
    batch = jnp.arange(len(known))
    ended = (state.node == ACCEPT) | full(state, known)
    moved = {"state": state, "answered": answered, "window": window, "known": known, "ended": ended}
    stayed = {name: getattr(slots, name) for name in moved}
    return slots._replace(
        **where_rows(active, moved, stayed),
        tokens=slots.tokens.at[batch[:, None], place].set(window, mode="drop"),
        log_probs=slots.log_probs.at[batch, place[:, 0]].set(choice.log_prob, mode="drop"),
        kept=None if slots.kept is None else slots.kept.at[batch, place[:, 0]].set(choice.kept, mode="drop"),
    )


class _Added(NamedTuple):
    """The loop of `extend`: grammar and number of tokens so far, the window, the next one, and whether it is added."""

    state: GrammarState
    known: jax.Array
    window: jax.Array
    follows: jax.Array
    going: jax.Array


def next_forced(rules: Rules, state: GrammarState) -> tuple[jax.Array, jax.Array]:
    """The only legal id int32 [B], 0 where there are more, and whether it is one and the answer continues, bool [B]."""
    forced = rules.forced[legal_row(rules.tables, state, jnp)]
    return jnp.maximum(forced, 0), (forced >= 0) & (state.node != ACCEPT)
