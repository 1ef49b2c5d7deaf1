"""Programs of the rollout engine: prefill of prompts, and one call of the model (`sampling.decode_loop.run`).

They run in the rollout layout of the weights (`sampling.layout`), on the mesh and in the dtype of `config.rollout`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.compile.programs import Program, Setup, StandInTokenizer, bytes_a_chip
from ivr_jax.config import as_dataclass
from ivr_jax.models.kv_cache import CACHE_AXES
from ivr_jax.protocol.grammar import Grammar, GrammarOptions, GrammarState
from ivr_jax.sampling import decode_loop, slots
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.training.throughput import train_flops

PROMPT = 2048  # tokens of a prompt with one source image and its instruction, rounded up


def _rollout_setup(setup: Setup) -> Setup:
    """The same chips and model as rollouts use them."""
    layout = RolloutLayout(setup.model, setup.mesh, as_dataclass(LayoutOptions, setup.config.rollout))
    return Setup(setup.config, layout.mesh, layout.config)


def prefill(setup: Setup) -> Program:
    """`slots.prefill` of one prompt for each batch shard, `PROMPT` tokens each."""
    setup = _rollout_setup(setup)
    rows = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    length = min(PROMPT, setup.model.max_position_embeddings // 2)
    prompts = setup.array((rows, length), jnp.int32, ("batch", "length"))

    def trace() -> jax.stages.Traced:
        return slots.prefill.trace(setup.model, setup.params, prompts)

    resident = {"parameters": bytes_a_chip(setup.params), "batch": bytes_a_chip(prompts)}
    flops = train_flops(setup.model, rows * length, rows * length * length / 2) / 3  # forwards alone
    return setup.program("prefill", trace, resident, flops, rows * length)


def decode(setup: Setup) -> Program:
    """`decode_loop.run` in the layout of rollouts: one call of the model for every slot of the engine."""
    return _decode("decode", _rollout_setup(setup))


def generate(setup: Setup) -> Program:
    """`decode` in bfloat16, with weights split over as many chips as key heads allow, and copies on the other chips.

    This is what inference needs without training beside it; `config.mesh` and the rollout's dtype and shards do not
    matter, its int8 weights, int8 cache and kernel do.
    """
    tensor = math.gcd(setup.mesh.devices.size, setup.model.num_key_value_heads)
    wanted = as_dataclass(LayoutOptions, setup.config.rollout)
    layout = RolloutLayout(setup.model, setup.mesh, dataclasses.replace(wanted, dtype="bfloat16", tensor=tensor))
    return _decode("generate", Setup(setup.config, layout.mesh, layout.config))


def _decode(name: str, setup: Setup) -> Program:
    """One call with caches of the largest bucket's width.

    The loop's length is known only at run time, so operations and time are those of one pass.
    """
    config, model = setup.config, setup.model
    engine = as_dataclass(EngineOptions, config.engine)
    options = as_dataclass(SamplingOptions, config.sampling)
    width = max(config.buckets)
    sharding.check_batch(setup.mesh, engine.slots, "config.engine.slots")
    grammar = Grammar(StandInTokenizer(setup.vocabulary), as_dataclass(GrammarOptions, config.grammar))
    replicated = sharding.replicated(setup.mesh)
    state = GrammarState(*(jax.ShapeDtypeStruct((), jnp.int32) for _ in GrammarState._fields))
    shapes = jax.eval_shape(
        lambda key, state: slots.empty(
            model, key, state, batch=engine.slots, contexts=1, cache_length=width, length=config.answer_length,
            window=engine.window, pad=0, truncates=options.truncates, cells=None,
        ),
        jax.eval_shape(lambda: jax.random.key(0)), state,
    )  # fmt: skip

    def on_every_chip(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    cache = jax.tree.map(lambda x: setup.array(x.shape, x.dtype, CACHE_AXES), shapes.cache)
    held = jax.tree.map(on_every_chip, shapes._replace(cache=None))._replace(cache=cache)
    rules = jax.tree.map(on_every_chip, slots.rules_of(grammar))
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)

    def trace() -> jax.stages.Traced:
        return decode_loop.run.trace(setup.params, rules, held, until, config=model, options=options,
                                 visual_start=setup.vocabulary.visual_start)  # fmt: skip

    resident = {"parameters": bytes_a_chip(setup.params), "cache": bytes_a_chip(cache)}
    flops = train_flops(model, engine.slots, engine.slots * width) / 3
    return dataclasses.replace(setup.program(name, trace, resident, flops, engine.slots), one_pass=True)
