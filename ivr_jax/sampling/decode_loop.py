"""A segment: model calls in one jitted loop, until the host has something to do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.models import backbone, kv_cache
from ivr_jax.models.fused_attention import platform
from ivr_jax.protocol.grammar import GRID
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.slots import Rules, Slots, Work
from ivr_jax.sampling.speculation import begin, guess, has_no_guesses, speculate
from ivr_jax.sampling.token_choice import VocabRange, choose, extend, vocab_ranges

UNSTACK_BYTES = 8 << 30  # of all layers, at most
SHORT = 2  # window places that a call reads where no answer has guesses

Step = Callable[
    [Rules, tuple[VocabRange, VocabRange], jax.Array, Slots, SamplingOptions], tuple[Slots, Work]
]  # from the hidden states [C, B, W, D] of a call to the next slots


@functools.partial(jax.jit, static_argnames=("config", "options", "visual_start"), donate_argnames=("slots",))
def run(
    params: Any,
    rules: Rules,
    slots: Slots,
    until: jax.Array,
    calls: jax.Array | None = None,
    *,
    config: backbone.BackboneConfig,
    options: SamplingOptions,
    visual_start: int,
) -> tuple[Slots, Work]:
    """Calls the model until no more than `until` answers are in progress, or one of them needs a wider cache.

    `calls` int32 []: or until this many calls, so that the host can say how far it is; None: no bound.
    """
    rules = jax.tree.map(jnp.asarray, rules)
    width, wide = slots.window.shape[1], kv_cache.length(slots.cache)
    ranges = vocab_ranges(config, params, rules.tables, visual_start)
    unstacked = None
    if _unstacking_pays(config, params["layers"]):
        unstacked = backbone.unstack_layers(params)
        slots = slots._replace(cache=kv_cache.unstack(slots.cache))
        config = dataclasses.replace(config, remat="none")  # there is no gradient; layers are numbered by integers

    def going(carry: tuple[Slots, Work]) -> jax.Array:
        now, work = carry
        more = ((~now.ended).sum() > until) & (reach(now) <= wide)
        return more if calls is None else more & (work.calls < calls)

    def call_with(step: Step, read: int, carry: tuple[Slots, Work]) -> tuple[Slots, Work]:
        now, work = carry
        contexts, batch = now.starts.shape
        positions = first_of(now).reshape(-1, 1) + jnp.arange(read)[None, :]
        window = jnp.tile(now.window[:, :read], (contexts, 1))
        hidden, cache = backbone.apply(config, params, window, positions, cache=now.cache, unstacked_layers=unstacked)
        hidden = hidden.reshape(contexts, batch, read, -1)
        after, counts = step(rules, ranges, hidden, now._replace(cache=cache), options)
        return after, Work(*(x + y for x, y in zip(work, counts, strict=True)))

    carry = slots, Work(*(jnp.int32(0),) * len(Work._fields))
    if slots.guesses is None:
        after, work = jax.lax.while_loop(going, functools.partial(call_with, _step, width), carry)
    else:
        short = min(width, SHORT)

        def in_text(carry: tuple[Slots, Work]) -> jax.Array:
            return going(carry) & has_no_guesses(rules, carry[0], short)

        def in_images(carry: tuple[Slots, Work]) -> jax.Array:
            return going(carry) & ~has_no_guesses(rules, carry[0], short)

        def both(carry: tuple[Slots, Work]) -> tuple[Slots, Work]:
            # Two loops, not a condition in one: XLA copies the caches that go through a condition.
            carry = jax.lax.while_loop(in_text, functools.partial(call_with, _step, short), carry)
            return jax.lax.while_loop(in_images, functools.partial(call_with, speculate, width), carry)

        after, work = jax.lax.while_loop(going, both, (begin(rules, slots, visual_start), carry[1]))
    if unstacked is not None:
        after = after._replace(cache=kv_cache.stack(after.cache))
    return _readable(after), work


def _unstacking_pays(config: backbone.BackboneConfig, layers: Any) -> bool:
    """Whether to hold each layer's kernels and cache in arrays of their own: on a CPU, if they fit in memory twice."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
    return platform() == "cpu" and config.decode_kernel == "plain" and size <= UNSTACK_BYTES


def _readable(slots: Slots) -> Slots:
    """What the host reads is replicated on every device."""
    names = ("answered", "ended", "tokens", "log_probs", "kept")
    arrays = {name: x for name in names if (x := getattr(slots, name)) is not None}
    return slots._replace(**{name: sharding.constrain(x, (None,) * x.ndim) for name, x in arrays.items()})


def first_of(slots: Slots) -> jax.Array:
    """int32 [C, B]: the position of the first token of the next call."""
    return slots.starts + (slots.answered - slots.known)[None, :]


@jax.jit
def reach(slots: Slots) -> jax.Array:
    """int32 []: the cache positions that the next call needs."""
    return jnp.where(slots.ended, 0, first_of(slots).max(0) + slots.window.shape[1]).max()


def _step(
    rules: Rules, ranges: tuple[VocabRange, VocabRange], hidden: jax.Array, slots: Slots, options: SamplingOptions
) -> tuple[Slots, Work]:
    """One token a slot, and the forced ones after it, from hidden [C, B, W, D]."""
    last = jnp.take_along_axis(hidden, (slots.known - 1)[None, :, None, None], axis=2)[:, :, 0]
    active = ~slots.ended
    choice = choose(rules, ranges, last, slots.state, slots.keys, slots.answered, active, options)
    after = extend(rules, slots, choice)
    images = (active & (rules.tables.kind[slots.state.node] == GRID)).sum()
    work = Work(1, active.sum(), (after.answered - slots.answered).sum(), images, images, 0, 0)
    return after if slots.guesses is None else guess(rules, after, ranges[0].first), work
