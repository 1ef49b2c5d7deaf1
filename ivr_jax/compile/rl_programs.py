"""The step functions of an rl config: the gradient of one micro_batch of answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ivr_jax import sharding
from ivr_jax.checkpoints.system import System
from ivr_jax.compile.programs import Placed, Program, bytes_a_chip
from ivr_jax.compile.spelling import Spelling
from ivr_jax.config import as_dataclass
from ivr_jax.models import lora
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.training import grpo
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.throughput import train_flops


def policy_gradient(placed: Placed) -> Program:
    """What `training.grpo.Trainer` differentiates: the objective of one micro_batch of answers, in the largest bucket.

    Beside the arguments the reference policy (the policy without its adapters, where it has some), the moments and the
    sum of earlier minibatches' gradients stay in memory.
    """
    config, model = placed.config, placed.model
    sharding.check_batch(placed.mesh, config.micro_batch, "config.micro_batch", model.fsdp_over_tensor)
    options = grpo.Options(
        sampling=as_dataclass(SamplingOptions, config.sampling), engine=as_dataclass(EngineOptions, config.engine),
        grammar=as_dataclass(GrammarOptions, config.grammar), reward=as_dataclass(RewardOptions, config.reward),
        grpo=as_dataclass(GrpoOptions, config.grpo), group=config.group, answer_length=config.answer_length,
        micro_batch=config.micro_batch, buckets=tuple(config.buckets), num_iterations=config.num_iterations,
        num_minibatches=config.num_minibatches, overlap=config.overlap, loss_chunk_tokens=config.loss_chunk_tokens,
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, config.steps * config.num_iterations * config.num_minibatches)
    state = placed.state(optimizer)
    system = System(model, placed.params, Spelling(placed.vocabulary), None, {})
    lies = jax.tree.map(lambda x: x.sharding, state)
    trainer = grpo.Trainer(system, None, options, optimizer, placed.mesh, lies)
    rows, length = config.micro_batch, max(config.buckets)
    kinds = {"tokens": jnp.int32, "rows": jnp.int32, "old": jnp.float32, "mask": jnp.float32, "reference": jnp.float32}
    if not trainer.layout.exact:
        kinds["sampler"] = jnp.float32
    batch = {name: placed.array((rows, length), kind, ("batch", "length")) for name, kind in kinds.items()}
    batch["advantages"] = placed.array((rows,), jnp.float32, ("batch",))
    trained, frozen = lora.split(state.params)
    resident = {
        "parameters": bytes_a_chip(state.params), "reference": 0 if frozen else bytes_a_chip(placed.params),
        "moments": bytes_a_chip(state.opt_state), "gradient sum": bytes_a_chip(trained), "batch": bytes_a_chip(batch),
    }  # fmt: skip
    flops = train_flops(model, rows * length, rows * length * length / 2)

    def trace() -> jax.stages.Traced:
        return trainer._gradient.trace(trained, frozen, batch)

    return placed.program("grpo", trace, resident, flops, rows * length)
