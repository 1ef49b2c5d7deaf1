"""Supervised fine-tuning: next-token loss on the selected tokens of packed trajectories (paper, equation of L_SFT).

Also trains the base model: the same loss on direct trajectories.  Letters: B batch, T tokens.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from ivr_jax import system as systems
from ivr_jax.data import examples, pipeline
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.evaluation.taught import write_taught
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.training.loop import Stage
from ivr_jax.training.losses import token_statistics
from ivr_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Everything a stage learns: parameters and optimiser state."""

    params: Any
    opt_state: Any


def selective_loss(
    config: BackboneConfig, params: Any, batch: dict[str, jax.Array], chunk: int, visual_start: int
) -> tuple[jax.Array, dict[str, Any]]:
    """Sum of the negative log-likelihoods of the selected tokens, and metric (sum, denominator) pairs.

    Args:
      batch: tokens, segment_ids, positions int32 [B, T] and loss uint8 [B, T], as `pipeline.packed_examples` yields.
      visual_start: first visual id, to tell image tokens from text tokens in the metrics.
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    hidden, _ = backbone.apply(config, params, tokens, batch["positions"], segments)
    targets = jnp.roll(tokens, -1, axis=1)
    same = (segments == jnp.roll(segments, -1, axis=1)) & (segments > 0)
    mask = (same & (jnp.roll(batch["loss"], -1, axis=1) > 0)).at[:, -1].set(False).astype(jnp.float32)
    head = backbone.lm_head(config, params)[:, : config.vocab_size]
    statistics = token_statistics(hidden, head, targets, chunk)
    loss = -statistics.log_probs * mask
    image = mask * (targets >= visual_start)
    text = mask - image
    sums = {
        "loss": (loss.sum(), mask.sum()),
        "image_loss": ((loss * image).sum(), image.sum()),
        "text_loss": ((loss * text).sum(), text.sum()),
        "accuracy": ((statistics.correct * mask).sum(), mask.sum()),
        "row_fill": ((segments > 0).sum().astype(jnp.float32), jnp.float32(tokens.size)),
    }
    return loss.sum(), sums


def make_step(
    config: BackboneConfig, optimizer: optax.GradientTransformation, chunk: int, accumulation: int, visual_start: int
):
    """Jitted (state, batch) -> (state, metric pairs); `accumulation` micro-batches add up exactly."""
    grad = jax.grad(selective_loss, argnums=1, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

        def one(total, part):
            return jax.tree.map(jnp.add, total, grad(config, state.params, part, chunk, visual_start)), None

        zero = jax.tree.map(
            jnp.zeros_like,
            jax.eval_shape(
                lambda: grad(config, state.params, jax.tree.map(lambda x: x[0], parts), chunk, visual_start)
            ),
        )
        (gradients, sums), _ = jax.lax.scan(one, zero, parts)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums["loss"][1], 1), gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = {**sums, "grad_norm": optax.tree.norm(gradients), "tokens_per_step": sums["loss"][1]}
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    return step


def build(config: Any, workdir: pathlib.Path) -> Stage:
    """The stage of an sft config: tokenises the dataset on the first run, then trains on packed batches."""
    if not config.data.path:
        raise UserError("no dataset was named.", "Give --config.data.path=WORKDIR/dataset of ivr_jax.construct.")
    if config.batch % config.accumulation:
        raise UserError(
            f"a batch of {config.batch} does not divide into {config.accumulation} parts.",
            "Make config.batch a multiple of config.accumulation.",
        )
    codec = systems.load_image_codec(config.image_tokenizer)
    tokenizer = systems.text_tokenizer(config.text_tokenizer, codec.config.n_embed)
    if config.init:
        start = systems.load(config.init, codec=codec, text_tokenizer_path=config.text_tokenizer)
        model, params = start.config, start.params
    else:
        model = BackboneConfig(vocab_size=tokenizer.vocab.size, **config.model)
        params = jax.jit(functools.partial(backbone.init_params, model))(jax.random.key(config.seed))
        print(parameter_overview.get_parameter_overview(params, include_stats=False, max_lines=20))
    fingerprint = (
        f"{tokenizer.fingerprint}-{systems.fingerprint(codec.params)}-{TrajectoryDataset(config.data.path).fingerprint}"
    )
    folder = workdir / "examples"
    manifest = examples.read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint:
        longest = min(config.data.length, model.max_position_embeddings)
        manifest = examples.make_examples(
            TrajectoryDataset(config.data.path), tokenizer, codec.encode, folder, longest, fingerprint
        )
    if not (workdir / "taught").exists():
        write_taught(workdir / "taught", TrajectoryDataset(config.data.path), tokenizer, codec.encode)
    print(f"examples: {manifest['counts']}, {manifest['tokens']:,} tokens, longest {manifest['longest']}")
    data = pipeline.packed_examples(folder, config.data.mix, config.batch, config.data.length, config.seed)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(model, optimizer, config.chunk, config.accumulation, tokenizer.vocab.visual_start)
    meta = systems.backbone_meta(
        model, config.text_tokenizer, tokenizer, config.image_tokenizer, codec, config.to_dict()
    )
    return Stage(TrainState(params, optimizer.init(params)), data, lambda state, batch, _: step(state, batch), meta)
