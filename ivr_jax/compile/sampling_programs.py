"""The rollout engine's programs: prefill of prompts, and one model call of a segment (`sampling.decode_loop.run`).

Both run in the rollout layout of the weights (`sampling.layout`), on the mesh and in the dtype of `config.rollout`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.compile.programs import Placed, Program, bytes_a_chip
from ivr_jax.compile.spelling import Spelling
from ivr_jax.config import as_dataclass
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import Grammar, GrammarOptions, GrammarState
from ivr_jax.sampling import decode_loop, slots
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.layout import RolloutLayout
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.training.throughput import train_flops

PROMPT = 2048  # tokens of a prompt with one source image and its instruction, rounded up


def _rolling_out(placed: Placed) -> Placed:
    """The same chips and model as rollouts use them."""
    rollout = placed.config.rollout
    layout = RolloutLayout(placed.model, placed.mesh, rollout.tensor, rollout.dtype or None)
    return Placed(placed.config, layout.mesh, layout.config)


def prefill(placed: Placed) -> Program:
    """`slots.prefill` of one prompt for each batch shard, `PROMPT` tokens each."""
    placed = _rolling_out(placed)
    rows = placed.mesh.shape["data"] * placed.mesh.shape["fsdp"]
    length = min(PROMPT, placed.model.max_position_embeddings // 2)
    prompts = placed.array((rows, length), jnp.int32, ("batch", "length"))

    def trace() -> jax.stages.Traced:
        return slots.prefill.trace(placed.model, placed.params, prompts)

    resident = {"parameters": bytes_a_chip(placed.params), "batch": bytes_a_chip(prompts)}
    flops = train_flops(placed.model, rows * length, rows * length * length / 2) / 3  # forwards alone
    return placed.program("prefill", trace, resident, flops, rows * length)


def decode(placed: Placed) -> Program:
    """`decode_loop.run`: one call of the model for every slot, with caches of the largest bucket's width.

    The loop's length is not known before it runs, so operations and time are those of one pass.
    """
    placed = _rolling_out(placed)
    config, model = placed.config, placed.model
    engine = as_dataclass(EngineOptions, config.engine)
    options, wide = as_dataclass(SamplingOptions, config.sampling), max(config.buckets)
    grammar = Grammar(Spelling(placed.vocabulary), as_dataclass(GrammarOptions, config.grammar))
    whole = sharding.replicated(placed.mesh)
    state = GrammarState(*(jax.ShapeDtypeStruct((), jnp.int32) for _ in GrammarState._fields))
    shapes = jax.eval_shape(
        lambda key, state: slots.empty(
            model, key, state, batch=engine.slots, contexts=1, slots=wide, length=config.answer_length,
            window=engine.window, pad=0, truncates=options.truncates, cells=None,
        ),
        jax.eval_shape(lambda: jax.random.key(0)), state,
    )  # fmt: skip

    def everywhere(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    cache = backbone.KVCache(*(placed.array(x.shape, x.dtype, axes)
                               for x, axes in zip(shapes.cache, backbone.CACHE_AXES, strict=True)))  # fmt: skip
    held = jax.tree.map(everywhere, shapes._replace(cache=None))._replace(cache=cache)
    rules = jax.tree.map(everywhere, slots.rules_of(grammar))
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)

    def trace() -> jax.stages.Traced:
        return decode_loop.run.trace(placed.params, rules, held, until, config=model, options=options,
                                 visual_start=placed.vocabulary.visual_start)  # fmt: skip

    resident = {"parameters": bytes_a_chip(placed.params), "cache": bytes_a_chip(cache)}
    flops = train_flops(model, engine.slots, engine.slots * wide) / 3
    return dataclasses.replace(placed.program("decode", trace, resident, flops, engine.slots), one_pass=True)
