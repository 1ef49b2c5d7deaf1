"""Speculative Jacobi decoding of image tokens: several tokens a model call, and the same tokens as without it.

A token is a function of the tokens before it and of its own noise (its key is that of the answer, folded with its
place), so an answer is the fixed point of sampling all places at once, and decoding in sequence is only one way to find
it.  Jacobi iteration is another (Teng et al. 2024, arXiv 2410.01699, who accept guesses at random instead): the model
reads guesses, every place is sampled again, and as far as the samples repeat the guesses they are final, with the first
one that differs.  The samples after it are the next guesses; further on, the cells of the image before this one, since
most of an image stays as it was, or where there is none, the cells of the row above.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ivr_jax.protocol.grammar import ACCEPT, GRID, GrammarState, advance, legal_row
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.slots import Rules, Slots, Work, is_full
from ivr_jax.sampling.token_choice import Choice, VocabRange, choose, extend, where_rows


def speculate(
    rules: Rules, ranges: tuple[VocabRange, VocabRange], hidden: jax.Array, slots: Slots, options: SamplingOptions
) -> tuple[Slots, Work]:
    """Samples every place of the window, from hidden [C, B, W, D], and keeps what is final."""
    tables, width, contexts = rules.tables, slots.window.shape[1], hidden.shape[0]
    steps, active = jnp.arange(width)[None, :], ~slots.ended
    draft = jnp.take_along_axis(slots.window, jnp.minimum(slots.known[:, None] + steps, width - 1), axis=1)
    states = [slots.state]
    for i in range(width - 1):
        states.append(advance(tables, states[-1], jnp.maximum(draft[:, i], 0), jnp))
    states = jax.tree.map(lambda *x: jnp.stack(x, 1), *states)
    at = jnp.minimum(slots.known[:, None] - 1 + steps, width - 1)
    hidden = jnp.take_along_axis(hidden, at[None, :, :, None], axis=2).reshape(contexts, -1, hidden.shape[-1])
    scored = active[:, None] & (steps <= slots.drafts.count[:, None])
    place = slots.answered[:, None] + steps
    keys = jnp.broadcast_to(slots.keys[:, None], scored.shape).reshape(-1)
    flat_states = jax.tree.map(jnp.ravel, states)
    choice = choose(rules, ranges, hidden, flat_states, keys, place.ravel(), scored.ravel(), options)
    choice = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), choice)

    offered = active[:, None] & (steps < slots.drafts.count[:, None])
    right = jnp.cumprod((offered & (choice.token == draft)).astype(jnp.int32), axis=1)
    accepted, in_grid = right.sum(1), tables.kind[states.node] == GRID
    last = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), accepted], (choice, states))
    moved = _record(slots, choice, right > 0)
    moved = moved._replace(
        state=where_rows(active, last[1], slots.state),
        answered=slots.answered + accepted,
    )
    cells = slots.drafts.reference.shape[1]
    committed = active[:, None] & in_grid & (steps <= accepted[:, None])
    cell = jnp.where(committed, jnp.minimum(_cell(states), cells), cells)
    rows = jnp.arange(accepted.shape[0])[:, None]
    reference = slots.drafts.reference.at[rows, cell].set(choice.token, mode="drop")
    after = extend(rules, moved._replace(drafts=slots.drafts._replace(reference=reference)), last[0])
    known_guesses = jnp.where(scored, choice.token, -1)
    work = Work(
        1, active.sum(), (after.answered - slots.answered).sum(), committed.any(1).sum(), committed.sum(),
        (offered & in_grid & (steps <= accepted[:, None])).sum(), ((right > 0) & in_grid).sum(),
    )  # fmt: skip
    return _fill_window(rules, after, slots.answered, known_guesses, ranges[0].first), work


def _cell(state: GrammarState) -> jax.Array:
    """int32: number of the cell of an image that comes next."""
    return (state.height - state.rows_left) * state.width + state.width - state.cells_left


def _record(slots: Slots, choice: Choice, accepted: jax.Array) -> Slots:
    """Writes the samples [B, W] that are `accepted` bool [B, W] behind the answers."""
    rows, steps = jnp.arange(accepted.shape[0])[:, None], jnp.arange(accepted.shape[1])[None, :]
    place = jnp.where(accepted, slots.answered[:, None] + steps, slots.tokens.shape[1])
    return slots._replace(
        tokens=slots.tokens.at[rows, place].set(choice.token, mode="drop"),
        log_probs=slots.log_probs.at[rows, place].set(choice.log_prob, mode="drop"),
        kept=None if slots.kept is None else slots.kept.at[rows, place].set(choice.kept, mode="drop"),
    )


def _fill_window(
    rules: Rules, slots: Slots, first: jax.Array, guesses: jax.Array, visual_start: int
) -> Slots:
    """Fills the window after the known tokens while an image is incomplete.

    Args:
      guesses: int32 [B, W], samples for the answer's tokens from number `first` [B] on; -1 where there is none.
    """
    state, answered, width = slots.state, slots.answered, slots.window.shape[1]
    going, count, window = ~slots.ended, jnp.zeros_like(answered), slots.window
    rows = jnp.arange(answered.shape[0])
    for column in range(1, width):
        before = column < slots.known
        forced = rules.forced[legal_row(rules.tables, state, jnp)]
        guess = guesses[rows, jnp.minimum(answered - first, width - 1)]
        unknown = (guess < 0) | (answered - first >= width)
        guess = jnp.where(unknown, _reference_token(slots.drafts.reference, state, visual_start), guess)
        in_grid = rules.tables.kind[state.node] == GRID
        going &= before | (((forced >= 0) | in_grid) & (state.node != ACCEPT))
        adds = going & ~before
        token = jnp.where(forced >= 0, forced, guess)
        window = window.at[:, column].set(jnp.where(adds, token, window[:, column]))
        state = where_rows(adds, advance(rules.tables, state, token, jnp), state)
        answered, count = answered + adds, count + adds
        going &= before | ~is_full(rules.tables, state, answered, slots.limit, jnp)
    return slots._replace(window=window, drafts=slots.drafts._replace(count=count))


def _reference_token(reference: jax.Array, state: GrammarState, visual_start: int) -> jax.Array:
    """int32 [B]: a guess at the next cell of an image.

    That cell of the image so far or before; without one the cell above, then the one to the left, then the first code.
    """
    rows, cell = jnp.arange(reference.shape[0]), _cell(state)

    def token(index: jax.Array) -> jax.Array:
        return jnp.where(index >= 0, reference[rows, jnp.clip(index, 0, reference.shape[1] - 1)], -1)

    here, above, left = token(cell), token(cell - state.width), token(cell - 1)
    guess = jnp.where(here >= 0, here, jnp.where(above >= 0, above, left))
    return jnp.maximum(guess, visual_start)
