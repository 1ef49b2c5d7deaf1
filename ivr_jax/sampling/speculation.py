"""Speculative Jacobi decoding of image tokens: several tokens a model call, and the same tokens as without it.

A token is a function of the tokens before it and of its own noise (its key is that of the answer, folded with its
place), so an answer is the fixed point of sampling all places at once, and decoding in sequence is only one way to find
it.  Jacobi iteration is another (Teng et al. 2024, arXiv 2410.01699, who accept guesses at random instead): the model
reads guesses, every place is sampled again, and as far as the samples repeat the guesses they are final, with the first
one that differs.  The samples after it are the next guesses; further on, the cells of the image before this one, since
most of an image stays as it was, or where there is none, the cells of the row above.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ivr_jax.protocol.grammar import GRID, GrammarState, advance, image_ahead, legal_row
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.slots import Rules, Slots, Work, is_full
from ivr_jax.sampling.token_choice import Choice, VocabRange, choose, extend, next_forced, where_rows


def guess(rules: Rules, slots: Slots, visual_start: int) -> Slots:
    """Guesses where no call has sampled anything yet: from the image before, and the grammar."""
    nothing = jnp.full(slots.window.shape, -1, jnp.int32)
    return _fill_window(rules, slots, slots.answered, nothing, visual_start)


def begin(rules: Rules, slots: Slots, visual_start: int) -> Slots:
    """Guesses for the answers that have arrived since the last segment."""
    filled, new = guess(rules, slots, visual_start), slots.guesses.count < 0
    return filled._replace(
        window=where_rows(new, filled.window, slots.window), guesses=where_rows(new, filled.guesses, slots.guesses)
    )


def has_no_guesses(rules: Rules, slots: Slots, short: int) -> jax.Array:
    """bool []: whether the next call needs no more than the first `short` window places: all answers are in text."""
    in_grid = rules.tables.kind[slots.state.node] == GRID
    return (slots.ended | (~in_grid & (slots.guesses.count <= 0) & (slots.known <= short))).all()


def speculate(
    rules: Rules, ranges: tuple[VocabRange, VocabRange], hidden: jax.Array, slots: Slots, options: SamplingOptions
) -> tuple[Slots, Work]:
    """Samples every place of the window, from hidden [C, B, W, D], and keeps what is final."""
    width, contexts = slots.window.shape[1], hidden.shape[0]
    steps, active = jnp.arange(width)[None, :], ~slots.ended
    draft = jnp.take_along_axis(slots.window, jnp.minimum(slots.known[:, None] + steps, width - 1), axis=1)
    states = slots.guesses.states
    at = jnp.minimum(slots.known[:, None] - 1 + steps, width - 1)
    hidden = jnp.take_along_axis(hidden, at[None, :, :, None], axis=2).reshape(contexts, -1, hidden.shape[-1])
    scored = active[:, None] & (steps <= slots.guesses.count[:, None])
    place = slots.answered[:, None] + steps
    keys = jnp.broadcast_to(slots.keys[:, None], scored.shape).reshape(-1)
    flat_states = jax.tree.map(jnp.ravel, states)
    choice = choose(rules, ranges[:1], hidden, flat_states, keys, place.ravel(), scored.ravel(), options)
    choice = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), choice)
    in_grid = rules.tables.kind[states.node] == GRID
    choice = _with_text(rules, ranges, hidden, slots, choice, in_grid, options)

    offered = active[:, None] & (steps < slots.guesses.count[:, None])
    right = jnp.cumprod((offered & (choice.token == draft)).astype(jnp.int32), axis=1)
    accepted = right.sum(1)
    last = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), accepted], (choice, states))
    moved = _record(slots, choice, right > 0)
    moved = moved._replace(
        state=where_rows(active, last[1], slots.state),
        answered=slots.answered + accepted,
    )
    cells = slots.guesses.reference.shape[1]
    committed = active[:, None] & in_grid & (steps <= accepted[:, None])
    cell = (states.height - states.rows_left) * states.width + states.width - states.cells_left
    cell = jnp.where(committed, jnp.minimum(cell, cells), cells)
    rows = jnp.arange(accepted.shape[0])[:, None]
    reference = slots.guesses.reference.at[rows, cell].set(choice.token, mode="drop")
    after = extend(rules, moved._replace(guesses=slots.guesses._replace(reference=reference)), last[0])
    samples = jnp.where(scored, choice.token, -1)
    work = Work(
        1, active.sum(), (after.answered - slots.answered).sum(), committed.any(1).sum(), committed.sum(),
        (offered & in_grid & (steps <= accepted[:, None])).sum(), ((right > 0) & in_grid).sum(),
    )  # fmt: skip
    return _fill_window(rules, after, slots.answered, samples, ranges[0].first), work


def _with_text(
    rules: Rules,
    ranges: tuple[VocabRange, VocabRange],
    hidden: jax.Array,
    slots: Slots,
    choice: Choice,
    in_grid: jax.Array,
    options: SamplingOptions,
) -> Choice:
    """`choice` [B, W] with a token of text where one comes next: only behind the last guess can that be.

    So the vocabulary of text, most of all ids, is scored for one place of a slot; `hidden` [C, B * W, D].
    """
    batch, width = in_grid.shape
    rows, last = jnp.arange(batch), jnp.minimum(jnp.maximum(slots.guesses.count, 0), width - 1)
    state = jax.tree.map(lambda x: x[rows, last], slots.guesses.states)
    wanted = ~slots.ended & ~in_grid[rows, last]
    hidden = hidden.reshape(hidden.shape[0], batch, width, -1)[:, rows, last]
    text = choose(rules, ranges[1:], hidden, state, slots.keys, slots.answered + last, wanted, options)
    here = wanted & (rules.forced[legal_row(rules.tables, state, jnp)] < 0)
    column = jnp.where(here, last, width)
    return jax.tree.map(lambda x, y: x.at[rows, column].set(y, mode="drop"), choice, text)


def _record(slots: Slots, choice: Choice, accepted: jax.Array) -> Slots:
    """Writes the samples [B, W] that are `accepted` bool [B, W] behind the answers."""
    rows, steps = jnp.arange(accepted.shape[0])[:, None], jnp.arange(accepted.shape[1])[None, :]
    place = jnp.where(accepted, slots.answered[:, None] + steps, slots.tokens.shape[1])
    return slots._replace(
        tokens=slots.tokens.at[rows, place].set(choice.token, mode="drop"),
        log_probs=slots.log_probs.at[rows, place].set(choice.log_prob, mode="drop"),
        kept=None if slots.kept is None else slots.kept.at[rows, place].set(choice.kept, mode="drop"),
    )


def _fill_window(rules: Rules, slots: Slots, first: jax.Array, samples: jax.Array, visual_start: int) -> Slots:
    """Fills the window after the known tokens with guesses: the rest of an image, and the forced tokens after it.

    Args:
      samples: int32 [B, W], samples of the last call for the answer's tokens from number `first` [B] on, each given
        wrong guesses before it; -1 where there is none.
    """
    width = slots.window.shape[1]
    rows, places = jnp.arange(len(first))[:, None], jnp.arange(width)[None, :]
    states, cells = image_ahead(rules.tables, slots.state, width, jnp)
    number = slots.answered[:, None] - first[:, None] + places
    guess = jnp.take_along_axis(samples, jnp.minimum(number, width - 1), axis=1)
    guess = jnp.where((number < width) & (guess >= 0), guess, _from_reference(slots, cells, visual_start))
    token = jnp.where(cells >= 0, guess, jnp.maximum(rules.forced[states.node], 0))
    room = width - slots.known
    count = jnp.where(slots.ended, 0, jnp.minimum((cells > -2).sum(1), room))
    column = jnp.where(places < count[:, None], slots.known[:, None] + places, width)
    window = slots.window.at[rows, column].set(token, mode="drop")

    # Behind an EOI that the window holds, what the grammar forces.
    end = jnp.maximum(count - 1, 0)[:, None]
    eoi, state = (jnp.take_along_axis(token, end, 1)[:, 0], jax.tree.map(lambda x: x[rows, end][:, 0], states))
    closes = (count > 0) & (jnp.take_along_axis(cells, end, 1)[:, 0] == -1) & (state.rows_left == 0)
    tail = _Tail(where_rows(closes, advance(rules.tables, state, eoi, jnp), state), count, window, states, closes)

    def add(tail: _Tail) -> _Tail:
        place = jnp.where(tail.going, tail.count, width)[:, None]
        states = jax.tree.map(lambda x, y: x.at[rows, place].set(y[:, None], mode="drop"), tail.states, tail.state)
        follows, going = next_forced(rules, tail.state)
        full = is_full(rules.tables, tail.state, slots.answered + tail.count, slots.limit, jnp)
        going &= tail.going & (tail.count < room) & ~full
        column = jnp.where(going, slots.known + tail.count, width)[:, None]
        window = tail.window.at[rows, column].set(follows[:, None], mode="drop")
        state = where_rows(going, advance(rules.tables, tail.state, follows, jnp), tail.state)
        return _Tail(state, tail.count + going, window, states, going)

    tail = jax.lax.while_loop(lambda tail: tail.going.any(), add, tail)
    return slots._replace(window=tail.window, guesses=slots.guesses._replace(count=tail.count, states=tail.states))


class _Tail(NamedTuple):
    """The loop of `_fill_window`: grammar after `count` guesses, the window, all states, and which rows continue."""

    state: GrammarState
    count: jax.Array
    window: jax.Array
    states: GrammarState
    going: jax.Array


def _from_reference(slots: Slots, cells: jax.Array, visual_start: int) -> jax.Array:
    """int32 [B, W]: guesses at `cells` int32 [B, W] of an image.

    Those cells of the image so far or before; without one the cell one row above, then two, then the cell sampled last,
    then the first code.
    """
    reference = slots.guesses.reference
    columns = slots.state.width[:, None]

    def known(index: jax.Array) -> jax.Array:
        inside = (index >= 0) & (index < reference.shape[1])
        found = jnp.take_along_axis(reference, jnp.clip(index, 0, reference.shape[1] - 1), axis=1)
        return jnp.where(inside, found, -1)

    guess = known(cells)
    for other in (cells - columns, cells - 2 * columns, cells[:, :1] - 1):
        guess = jnp.where(guess >= 0, guess, known(other))
    return jnp.maximum(guess, visual_start)
