"""Supervised fine-tuning: next-token loss on the selected tokens of packed trajectories (paper, equation of L_SFT).

Also trains the base model: the same loss on direct trajectories.  Letters: B batch, T tokens.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview

from ivr_jax import distributed, sharding
from ivr_jax import system as systems
from ivr_jax.data import examples, pipeline
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.evaluation.taught import write_taught
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_codec import ImageCodec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.training.loop import Stage
from ivr_jax.training.losses import token_statistics
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.state import TrainState, micro_batches, place


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
    head = backbone.lm_head(config, params)
    statistics = token_statistics(hidden, head, targets, chunk, vocab_size=config.vocab_size)
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
    config: BackboneConfig,
    optimizer: optax.GradientTransformation,
    chunk: int,
    accumulation: int,
    visual_start: int,
    out_shardings: Any = None,
):
    """Jitted (state, batch) -> (state, metric pairs); `accumulation` micro-batches add up exactly.

    `out_shardings`: of the new state and of the metrics, when they live on a mesh (see `state.place`).
    """
    grad = jax.grad(selective_loss, argnums=1, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        parts = jax.tree.map(functools.partial(micro_batches, accumulation), batch)

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


def build(config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of an sft config: tokenises the dataset on the first run, then trains on packed batches."""
    if not config.data.path:
        raise UserError("no dataset was named.", "Give --config.data.path=WORKDIR/dataset of ivr_jax.construct.")
    if config.batch % config.accumulation:
        raise UserError(
            f"a batch of {config.batch} does not divide into {config.accumulation} parts.",
            "Make config.batch a multiple of config.accumulation.",
        )
    sharding.check_batch(mesh, config.batch // config.accumulation, "config.batch / config.accumulation")
    codec = systems.load_image_codec(config.image_tokenizer)
    tokenizer = systems.text_tokenizer(config.text_tokenizer, codec.config.n_embed)
    if config.init:
        initial = systems.load(config.init, codec=codec, text_tokenizer_path=config.text_tokenizer, mesh=mesh)
        model, params = initial.config, initial.params
    else:
        model = BackboneConfig(vocab_size=tokenizer.vocab.size, **config.model)
        params = functools.partial(backbone.init_params, model, jax.random.key(config.seed))
        shapes = backbone.param_shapes(model)
        print(parameter_overview.get_parameter_overview(shapes, include_stats=False, max_lines=20))
    fingerprint = (
        f"{tokenizer.fingerprint}-{systems.fingerprint(codec.params)}-{TrajectoryDataset(config.data.path).fingerprint}"
    )
    folder = workdir / "examples"
    if distributed.is_primary():
        _prepare(config, workdir, tokenizer, codec, min(config.data.length, model.max_position_embeddings), fingerprint)
    distributed.barrier("token examples")
    manifest = examples.read_manifest(folder)
    print(f"examples: {manifest['counts']}, {manifest['tokens']:,} tokens, longest {manifest['longest']}")
    rows = sharding.local_rows(mesh, config.batch)
    data = pipeline.packed_examples(
        folder, config.data.mix, config.batch, config.data.length, config.seed, config.data.streams, rows
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    state, placed = place(mesh, backbone.param_axes(model), params, optimizer)
    step = make_step(model, optimizer, config.chunk, config.accumulation, tokenizer.vocab.visual_start, placed)
    meta = systems.backbone_meta(
        model, config.text_tokenizer, tokenizer, config.image_tokenizer, codec, config.to_dict()
    )

    def placed_step(state: TrainState, batch: dict[str, Any], _: int) -> tuple[TrainState, dict[str, Any]]:
        return step(state, sharding.global_batch(mesh, batch, config.batch))

    return Stage(state, data, placed_step, meta)


def _prepare(
    config: Any, workdir: pathlib.Path, tokenizer: TextTokenizer, codec: ImageCodec, longest: int, fingerprint: str
) -> None:
    """Token examples and the report's taught samples, made once."""
    dataset, folder = TrajectoryDataset(config.data.path), workdir / "examples"
    manifest = examples.read_manifest(folder)
    if manifest is None or manifest["fingerprint"] != fingerprint:
        examples.make_examples(dataset, tokenizer, codec.encode, folder, longest, fingerprint)
    if not (workdir / "taught").exists():
        write_taught(workdir / "taught", dataset, tokenizer, codec.encode)
