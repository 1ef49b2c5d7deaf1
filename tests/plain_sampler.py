"""The reference for the rollout engine: one padded batch in lock-step, one token a model call for every sequence.

Prompts of different lengths are right-padded; every row writes its own cache positions, so padding is
overwritten before it can be seen.  Row b draws token t with the key `fold_in(keys[b], t)`: what a row draws depends on
its own key and prompt alone, not on its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.models import backbone, kv_cache
from ivr_jax.protocol.grammar import ACCEPT, GRID, Grammar, GrammarState, Tables, advance, legal_row
from ivr_jax.sampling.batch import Samples
from ivr_jax.sampling.logits_processors import SamplingOptions, log_probabilities, pack_kept, sample_ids


class _Loop(NamedTuple):
    step: jax.Array
    state: GrammarState
    logits: jax.Array
    cache: Any
    samples: Samples


def plain_sample(
    config: backbone.BackboneConfig,
    params: Any,
    grammar: Grammar,
    prompts: np.ndarray,
    prompt_lengths: np.ndarray,
    size: tuple[int, int],
    keys: jax.Array,
    answer_length: int,
    options: SamplingOptions | None = None,
    group_size: int = 1,
    unconditional: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> Samples:
    """Draws `group_size` answers to each prompt.

    Args:
      prompts: int32 [P, T] right-padded prompt tokens; prompt_lengths: int32 [P].
      size: forced image size in latent cells (rows, columns), or `grammar.FREE` when the model chooses.
      keys: PRNG keys [P * group_size]; those of one prompt are adjacent and share its prefill.
      answer_length: most answer tokens, EOS included.
      unconditional: (prompts [P, T'], lengths [P]) of each of guidance's unconditional passes (`options.passes`).
    """
    options = options or SamplingOptions()
    batch = len(prompts) * group_size
    if len(keys) != batch:
        raise ValueError(f"{len(keys)} keys for {batch} answers")
    state = grammar.initial(np.full(batch, size[0]), np.full(batch, size[1]))
    if len(unconditional) != options.passes:
        raise ValueError(f"guidance needs {options.passes} sets of unconditional prompts, not {len(unconditional)}")
    return _sample(
        params,
        grammar.tables,
        state,
        jnp.asarray(prompts),
        jnp.asarray(prompt_lengths),
        keys,
        tuple(unconditional),
        config=config,
        answer_length=answer_length,
        options=options,
        group_size=group_size,
        pad=grammar.tokenizer.vocab.pad,
        visual_start=grammar.tokenizer.vocab.visual_start,
    )


@functools.partial(jax.jit, static_argnames=("config", "answer_length", "options", "group_size", "pad", "visual_start"))
def _sample(
    params: Any,
    tables: Tables,
    state: GrammarState,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    keys: jax.Array,
    unconditional: tuple[tuple[jax.Array, jax.Array], ...],
    *,
    config: backbone.BackboneConfig,
    answer_length: int,
    options: SamplingOptions,
    group_size: int,
    pad: int,
    visual_start: int,
) -> Samples:
    tables = Tables(*map(jnp.asarray, tables))
    state = GrammarState(*map(jnp.asarray, state))
    for other in unconditional:  # one batch: conditional rows, then the rows of each unconditional pass
        prompts, prompt_lengths = _join(prompts, prompt_lengths, *other, pad)
    logits, cache = _prefill(config, params, prompts, prompt_lengths, prompts.shape[1] + answer_length, group_size)
    lengths = jnp.repeat(prompt_lengths, group_size)
    batch = state.node.shape[0]
    samples = Samples(
        jnp.full((batch, answer_length), pad, jnp.int32),
        jnp.zeros((batch, answer_length), jnp.int32),
        jnp.zeros((batch, answer_length + 1), jnp.int32).at[:, 0].set(state.node),
        jnp.zeros((batch, answer_length), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch, answer_length, -(-logits.shape[-1] // 8)), jnp.uint8) if options.truncates else None,
    )

    def running(loop: _Loop) -> jax.Array:
        return (loop.step < answer_length) & (loop.state.node != ACCEPT).any()

    def body(loop: _Loop) -> _Loop:
        t, before = loop.step, loop.state
        active = before.node != ACCEPT
        row = legal_row(tables, before, jnp)
        given, *others = jnp.split(loop.logits, 1 + len(unconditional))
        log_probs = log_probabilities(given, tables, row, options, tuple(others))
        drawn_with = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)
        text = sample_ids(log_probs[:, :visual_start], drawn_with, options)
        visual = sample_ids(log_probs[:, visual_start:], drawn_with, options) + visual_start
        token = jnp.where(tables.kind[before.node] == GRID, visual, text)
        token = jnp.where(active, token, pad)
        drawn = jnp.where(active, jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0], 0.0)
        after = advance(tables, before, token, jnp)
        out = loop.samples
        samples = Samples(
            out.tokens.at[:, t].set(token),
            out.rows.at[:, t].set(row),
            out.nodes.at[:, t + 1].set(after.node),
            out.log_probs.at[:, t].set(drawn),
            out.lengths + active,
            out.kept.at[:, t].set(pack_kept(log_probs)) if options.truncates else None,
        )
        inputs = jnp.tile(token, 1 + len(unconditional))
        hidden, cache = backbone.apply(config, params, inputs[:, None], (lengths + t)[:, None], cache=loop.cache)
        return _Loop(t + 1, after, backbone.logits(config, params, hidden[:, 0]), cache, samples)

    return jax.lax.while_loop(running, body, _Loop(jnp.int32(0), state, logits, cache, samples)).samples


def _prefill(
    config: backbone.BackboneConfig, params: Any, prompts: jax.Array, lengths: jax.Array, slots: int, group_size: int
) -> tuple[jax.Array, Any]:
    """Logits after the last prompt token float [B, V], and the filled cache, both repeated `group_size` times."""
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    cache = kv_cache.init_cache(config, prompts.shape[0], slots)
    hidden, cache = backbone.apply(config, params, prompts, positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = backbone.logits(config, params, last)
    return jnp.repeat(logits, group_size, axis=0), jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=1), cache)


def _join(
    prompts: jax.Array, lengths: jax.Array, other: jax.Array, other_lengths: jax.Array, pad: int
) -> tuple[jax.Array, jax.Array]:
    width = max(prompts.shape[1], other.shape[1])
    rows = [jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=pad) for x in (prompts, other)]
    return jnp.concatenate(rows), jnp.concatenate([lengths, other_lengths])
