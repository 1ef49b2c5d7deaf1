"""The step functions of an rl config: the gradient of one micro-batch of answers, as `training.grpo` computes it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.compile.programs import Program, Setup, StandInTokenizer, bytes_a_chip
from ivr_jax.config import as_dataclass
from ivr_jax.models import fused_attention, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol.grammar import Grammar
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.training import answer_batches, policy_logprobs
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.rl_options import RLOptions, rl_options
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
    shapes = batch_shapes(model, setup.mesh, options, layout.exact)
    batch = {
        name: setup.array(x.shape, x.dtype, answer_batches.AXES.get(name, answer_batches.TOKEN_AXES))
        for name, x in shapes.items()
    }
    answers = config.prompts_per_step * options.group_count * config.group_size
    batches = -(-answers // rows)
    resident = {
        "parameters": bytes_a_chip(state.params), "reference": 0 if frozen else bytes_a_chip(setup.params),
        "previous policy": bytes_a_chip(trained) * options.overlap, "moments": bytes_a_chip(state.opt_state),
        "gradient sum": bytes_a_chip(trained), "batch": bytes_a_chip(batch),
        "rollout": bytes_a_chip(batch) * (batches - 1),
    }  # fmt: skip
    flops = train_flops(model, rows * length, rows * length * length / 2)
    return setup.program("grpo", lambda: gradient.trace(trained, frozen, batch), resident, flops, rows * length)


def batch_shapes(
    model: BackboneConfig, mesh: jax.sharding.Mesh, options: RLOptions, exact: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of what `training.grpo.Trainer.prepare` makes of a pass in the largest bucket.

    Args:
      exact: whether answers are sampled in training's precision (`RolloutLayout.exact`).
    """
    rows, length, packed = getattr(options, options.rows_option), max(options.buckets), ()
    if options.packs:
        with jax.set_mesh(mesh):
            packed = answer_batches.packed_arrays(fused_attention.choose(model, length) == "plain")
    kept_bytes = math.ceil(model.vocab_size / 8) if options.sampling.truncates else 0
    shapes = answer_batches.array_shapes(rows, length, options.sampling.passes, kept_bytes, packed)
    further = ("reference",) if exact else ("reference", "sampler")
    return shapes | {name: jax.ShapeDtypeStruct((rows, length), jnp.float32) for name in further}
