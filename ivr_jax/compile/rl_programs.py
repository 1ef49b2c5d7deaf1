"""The step functions of an rl config: the gradient of one micro-batch of answers, as `training.grpo` computes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.compile.programs import Program, Setup, StandInTokenizer, bytes_a_chip
from ivr_jax.config import as_dataclass
from ivr_jax.models import fused_attention, lora
from ivr_jax.protocol.grammar import Grammar
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.training import answer_batches, policy_logprobs
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.rl_options import rl_options
from ivr_jax.training.throughput import train_flops


def policy_gradient(setup: Setup) -> Program:
    """`training.policy_logprobs.policy_gradient` of one micro-batch of answers, in the largest bucket.

    Beside the arguments stay in memory: the reference policy (the policy without its adapters, where it has some), the
    moments, the sum of earlier micro-batches' gradients, with `overlap` the policies that sampled the next rollouts,
    and the batches of a whole rollout, which all its `num_iterations` and `num_minibatches` read.
    """
    config, model = setup.config, setup.model
    options = rl_options(config)
    size = options.rows_option
    sharding.check_batch(setup.mesh, config[size], f"config.{size}", model.fsdp_over_tensor)
    state = setup.state(make_optimizer(config.optimizer, options.optimizer_steps))
    grammar = Grammar(StandInTokenizer(setup.vocabulary), options.grammar)
    trained, frozen = lora.split(state.params)
    shards = jax.tree.map(lambda x: x.sharding, trained)
    replicated = sharding.replicated(setup.mesh)
    outputs = policy_logprobs.PolicyGradient(shards, replicated, replicated)
    gradient = policy_logprobs.policy_gradient(model, grammar, options, outputs)
    rows, length = config[size], max(config.buckets)
    layout = RolloutLayout(model, setup.mesh, as_dataclass(LayoutOptions, config.rollout))
    kinds = dict(answer_batches.TOKEN_ARRAYS) | {"reference": jnp.float32}
    if not layout.exact:
        kinds["sampler"] = jnp.float32
    if options.packs:
        with jax.set_mesh(setup.mesh):
            shares_prompts = fused_attention.choose(model, length) == "plain"
        kinds |= dict.fromkeys(answer_batches.packed_arrays(shares_prompts), jnp.int32)
    batch = {name: setup.array((rows, length), kind, ("batch", "length")) for name, kind in kinds.items()}
    if passes := options.sampling.passes:
        batch["free_tokens"] = setup.array((rows, passes, length), jnp.int32, ("batch", None, "length"))
        batch["shifts"] = setup.array((rows, passes), jnp.int32, ("batch", None))
    batches = -(-config.prompts_per_step * config.group_size // rows)
    resident = {
        "parameters": bytes_a_chip(state.params), "reference": 0 if frozen else bytes_a_chip(setup.params),
        "previous policy": bytes_a_chip(trained) * options.overlap, "moments": bytes_a_chip(state.opt_state),
        "gradient sum": bytes_a_chip(trained), "batch": bytes_a_chip(batch),
        "rollout": bytes_a_chip(batch) * (batches - 1),
    }  # fmt: skip
    flops = train_flops(model, rows * length, rows * length * length / 2)
    return setup.program("grpo", lambda: gradient.trace(trained, frozen, batch), resident, flops, rows * length)
