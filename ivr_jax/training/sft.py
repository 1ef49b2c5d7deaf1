"""Supervised fine-tuning: next-token loss on the selected tokens of packed trajectories (paper, equation of L_SFT).

Also trains the base model: the same loss on direct trajectories.  Letters: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

from ivr_jax import distributed, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.config import OneOf, as_dataclass, check_value
from ivr_jax.data import examples, online, pipeline
from ivr_jax.data.sources import open_dataset
from ivr_jax.data.store import TrajectorySource
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_codec import ImageCodec
from ivr_jax.protocol.codec import PARTS
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.training.grad_accum import accumulate_gradients
from ivr_jax.training.loop import Stage
from ivr_jax.training.losses import next_token, token_statistics
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.state import TrainState, apply_gradients, micro_batches, shard_state
from ivr_jax.training.throughput import train_flops
from ivr_jax.training.training_samples import write_training_samples
from ivr_jax.world.practice import PracticeOptions

HELD_OUT_BATCHES = 4
DROPOUT = 1  # folded into a step's key for its dropout


def selective_loss(
    config: BackboneConfig,
    params: Any,
    batch: dict[str, jax.Array],
    chunk: int,
    visual_start: int,
    dropout_key: jax.Array | None = None,
    sums: Any = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Sum of the negative log-likelihoods of the selected tokens, and metrics: (sum, denominator) pairs, of text and
    image tokens and of every kind of segment apart, and `attended`, the keys that all tokens see together.

    Args:
      batch: tokens, segment_ids, positions int32 [B, T] and loss uint8 [B, T] (0, or 1 + index in `PARTS`), as
        `pipeline.packed_batches` yields.
      visual_start: first visual id, to tell image tokens from text tokens in the metrics.
      dropout_key: turns on the configured dropout.
      sums: what the gradients of the layers are added to, see `backbone.apply`.
    """
    tokens, segments = batch["tokens"], batch["segment_ids"]
    positions = batch["positions"]
    hidden, _ = backbone.apply(config, params, tokens, positions, segments, dropout_key=dropout_key, grad_accum=sums)
    targets, parts = next_token(tokens), next_token(batch["loss"])
    same = (segments == next_token(segments)) & (segments > 0)
    mask = (same & (parts > 0)).at[:, -1].set(False).astype(jnp.float32)
    head = backbone.lm_head(config, params)
    statistics = token_statistics(
        hidden, head, targets, chunk, vocab_size=config.vocab_size, fsdp_over_tensor=config.fsdp_over_tensor
    )
    loss = -statistics.log_probs * mask
    image = mask * (targets >= visual_start)
    text = mask - image
    of_part = {name: mask * (parts == number) for number, name in enumerate(PARTS, start=1)}
    sums = {
        "loss": (loss.sum(), mask.sum()),
        "image_loss": ((loss * image).sum(), image.sum()),
        "text_loss": ((loss * text).sum(), text.sum()),
        **{f"loss_{name}": ((loss * where).sum(), where.sum()) for name, where in of_part.items()},
        "accuracy": ((statistics.correct * mask).sum(), mask.sum()),
        "packing_efficiency": ((segments > 0).sum().astype(jnp.float32), jnp.float32(tokens.size)),
        "attended": ((batch["positions"] + 1.0) * (segments > 0)).sum(),
    }
    return loss.sum(), sums


def make_step(
    config: BackboneConfig,
    optimizer: optax.GradientTransformation,
    chunk: int,
    accumulation: int,
    visual_start: int,
    out_shardings: Any = None,
    gradient_dtype: str = "float32",
    seed: int = 0,
):
    """Jitted (state, batch, step number) -> (state, metrics); `grad_accum_steps` micro-batches add up exactly.

    Args:
      out_shardings: of the new state and of the metrics, when they live on a mesh (see `state.shard_state`).
      gradient_dtype: of the sum over micro-batches; bfloat16 takes half the memory and loses small contributions.
      seed: of the configured dropout, which is another one at each step number and in each micro-batch.
    """
    drops = config.dropout > 0 or config.attention_dropout > 0

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
    def step(state: TrainState, batch: dict[str, jax.Array], number: int = 0) -> tuple[TrainState, dict[str, Any]]:
        step_key = jax.random.fold_in(jax.random.key(seed), number)
        keys = jax.random.split(jax.random.fold_in(step_key, DROPOUT), accumulation) if drops else None
        parts = jax.tree.map(functools.partial(micro_batches, accumulation), batch), keys
        trained, frozen = lora.split(state.params)

        def loss(trained: Any, part: Any, layer_sums: Any) -> tuple[jax.Array, dict[str, Any]]:
            rows, key = part
            return selective_loss(config, lora.join(trained, frozen), rows, chunk, visual_start, key, layer_sums)

        in_place = config.remat == "full" and not frozen
        gradients, sums = accumulate_gradients(loss, trained, parts, gradient_dtype, in_place)
        state, norm = apply_gradients(state, gradients, sums["loss"][1], optimizer)
        tokens, attended = sums["packing_efficiency"][0], sums.pop("attended")
        work = {"work_tokens": tokens, "work_flops": train_flops(config, tokens, attended)}
        return state, {**sums, "grad_norm": norm, "tokens_per_step": sums["loss"][1], **work}

    return step


def build(config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of an sft config: tokenises the dataset on the first run, then trains on packed batches."""
    _check_config(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)  # before the images are tokenised: it may be refused
    image_codec = systems.load_image_codec(config.image_tokenizer)
    tokenizer = systems.text_tokenizer(config.text_tokenizer, image_codec.config.n_embed)
    options = as_dataclass(lora.LoraOptions, config.lora)
    model, params = _initial_model(config, options, tokenizer, image_codec, mesh)
    if model.weight_dtype:
        raise UserError("int8 weights cannot be trained.", 'Set config.model.weight_dtype to "".')
    if model.cache_dtype:
        raise UserError("training has no cache to hold as int8.", 'Set config.model.cache_dtype to "".')
    axes = backbone.param_axes(model)
    if options.rank:
        params, axes = lora.add(params, options, jax.random.key(config.seed)), lora.axes(axes, options)
    rows = sharding.local_rows(mesh, config.batch)
    found = _examples(config, workdir, tokenizer, image_codec, model.max_position_embeddings)
    data = pipeline.packed_batches(
        found, config.batch, config.data.length, config.seed, config.data.streams, rows
    )
    state, placed = shard_state(mesh, axes, params, optimizer)
    start = tokenizer.vocab.visual_start
    step = make_step(
        model,
        optimizer,
        config.loss_chunk_tokens,
        config.grad_accum_steps,
        start,
        placed,
        config.gradient_dtype,
        config.seed,
    )
    meta = systems.backbone_meta(
        model, config.text_tokenizer, tokenizer, config.image_tokenizer, image_codec, config.to_dict()
    )
    if options.rank:
        meta["lora"] = dataclasses.asdict(options)

    def placed_step(state: TrainState, batch: dict[str, Any], number: int) -> tuple[TrainState, dict[str, Any]]:
        return step(state, sharding.global_batch(mesh, batch, config.batch), number)

    summary = None
    if config.data.held_out:
        held_out = _held_out_batches(config, workdir, mesh, tokenizer, image_codec, model.max_position_embeddings)
        summary = held_out_loss(model, config.loss_chunk_tokens, start, mesh, held_out)
    return Stage(state, data, placed_step, meta, summary)


def _check_config(config: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for values that do not go together."""
    if not 0 <= config.data.practice_share <= 1:
        raise UserError(f"data.practice_share is {config.data.practice_share}.", "Give a share from 0 to 1.")
    if config.data.practice_share == 1 and config.data.path:
        raise UserError("a dataset was named, but all examples are to be practice.",
                        "Lower data.practice_share (0: the dataset alone), or name none.")
    if config.data.practice_share < 1 and not config.data.path:
        raise UserError("no dataset was named.", "Give --config.data.path=WORKDIR/dataset of ivr_jax.construct.")
    if config.batch % config.grad_accum_steps:
        raise UserError(
            f"a batch of {config.batch} does not divide into {config.grad_accum_steps} parts.",
            "Make config.batch a multiple of config.grad_accum_steps.",
        )
    if config.batch % config.data.streams:
        raise UserError(f"data.streams is {config.data.streams} and config.batch {config.batch}.",
                        "Make data.streams a divisor of config.batch.")
    if config.data.held_out and config.data.held_out == config.data.path:
        raise UserError("data.held_out is the dataset that is trained on.", "Name another one, or leave it empty.")
    part = config.batch // config.grad_accum_steps
    sharding.check_batch(mesh, part, "config.batch / config.grad_accum_steps", config.model.fsdp_over_tensor)


def _initial_model(
    config: Any, options: lora.LoraOptions, tokenizer: TextTokenizer, image_codec: ImageCodec, mesh: jax.sharding.Mesh
) -> tuple[BackboneConfig, Any]:
    """The model that training starts from and its parameters, or a function that makes new ones."""
    if config.init:
        text = config.text_tokenizer
        # a config that names no dtype trains in float32, as one that starts from nothing does, whatever the import's is
        model_options = {"dtype": "float32", "param_dtype": "float32", **config.model}
        initial = systems.load(
            config.init, image_codec=image_codec, text_tokenizer_path=text, mesh=mesh, **model_options
        )
        return initial.config, initial.params
    if options.rank:
        raise UserError("LoRA adapts a trained model.", "Give --config.init=WORKDIR, or set config.lora.rank to 0.")
    model = BackboneConfig(vocab_size=tokenizer.vocab.size, **config.model)
    _say(parameter_overview.get_parameter_overview(backbone.param_shapes(model), include_stats=False, max_lines=20))
    return model, lambda: backbone.init_params(model, jax.random.key(config.seed))


def held_out_loss(
    config: BackboneConfig, chunk: int, visual_start: int, mesh: jax.sharding.Mesh, batches: list[dict[str, jax.Array]]
) -> Callable[[TrainState, int], dict[str, float]]:
    """(state, step) -> mean loss of held-out batches: held_out_loss, of text and of image tokens apart."""
    names = ("loss", "text_loss", "image_loss")

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def measure(params: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
        _, sums = selective_loss(config, params, batch, chunk, visual_start)
        return {name: sums[name] for name in names}

    def summary(state: TrainState, _: int) -> dict[str, float]:
        measured = [jax.device_get(measure(state.params, batch)) for batch in batches]
        sums = {name: np.sum([row[name] for row in measured], axis=0) for name in names}
        return {f"held_out_{name}": float(total / count) for name, (total, count) in sums.items() if count}

    return summary


def _held_out_batches(
    config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh, tokenizer: TextTokenizer, image_codec: ImageCodec,
    longest: int,
) -> list[dict[str, jax.Array]]:  # fmt: skip
    """The first `HELD_OUT_BATCHES` packed batches of the dataset `data.held_out`, all its modes as often as they are
    in it."""
    folder, length = workdir / "held_out_examples", min(config.data.length, longest)
    if distributed.is_primary():
        _make_examples(open_dataset(config.data.held_out), folder, tokenizer, image_codec, length, config.data.too_long)
    distributed.share_folder(workdir, "held-out examples")
    mix = {mode: float(count) for mode, count in examples.read_manifest(folder)["counts"].items()}
    stored = pipeline.stored_examples(folder, mix, config.data.length, config.seed)
    rows = sharding.local_rows(mesh, config.batch)
    packed = pipeline.packed_batches(
        stored, config.batch, config.data.length, config.seed, config.data.streams, rows
    )
    return [sharding.global_batch(mesh, next(packed), config.batch) for _ in range(HELD_OUT_BATCHES)]


def _say(text: str) -> None:
    if distributed.is_primary():
        print(text)


def _examples(
    config: Any, workdir: pathlib.Path, tokenizer: TextTokenizer, image_codec: ImageCodec, longest: int
) -> grain.MapDataset:
    """The token examples of the dataset, of practice, or of both, none longer than a row and `longest`."""
    length, share, parts = min(config.data.length, longest), config.data.practice_share, []
    if share < 1:
        folder = workdir / "examples"
        if distributed.is_primary():
            _prepare(config, workdir, tokenizer, image_codec, length)
        distributed.share_folder(workdir, "token examples")
        manifest = examples.read_manifest(folder)
        _say(f"examples: {manifest['counts']}, {manifest['tokens']:,} tokens, longest {manifest['longest']}")
        parts.append((pipeline.stored_examples(folder, config.data.mix, config.data.length, config.seed), 1 - share))
    if share > 0:
        options = as_dataclass(PracticeOptions, config.data.practice)
        lessons = online.LessonExamples(tokenizer, image_codec.encode, options, config.seed)
        parts.append((pipeline.made_examples(lessons, length), share))
    datasets, weights = zip(*parts, strict=True)
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)


def _prepare(
    config: Any, workdir: pathlib.Path, tokenizer: TextTokenizer, image_codec: ImageCodec, longest: int
) -> None:
    """Token examples and the report's training samples, made once."""
    dataset = open_dataset(config.data.path)
    _make_examples(dataset, workdir / "examples", tokenizer, image_codec, longest, config.data.too_long)
    if not (workdir / "training_samples").exists():
        write_training_samples(workdir / "training_samples", dataset, tokenizer, image_codec.encode)


def _make_examples(
    dataset: TrajectorySource, folder: pathlib.Path, tokenizer: TextTokenizer, image_codec: ImageCodec, longest: int,
    too_long: str,
) -> None:  # fmt: skip
    """Token examples of a dataset, unless the folder holds those of the same content already.

    `too_long`: "error", or "drop" to leave out trajectories of more than `longest` tokens.
    """
    check_value("data.too_long", too_long, Annotated[str, OneOf("error", "drop")])
    drop = too_long == "drop"
    fingerprint = examples.source_fingerprint(dataset, tokenizer, systems.fingerprint(image_codec.params))
    manifest = examples.read_manifest(folder)
    if not examples.are_current(manifest, fingerprint, longest, drop):
        left_out = examples.too_long(dataset, tokenizer, image_codec.config.factor, longest, drop)
        examples.make_examples(dataset, tokenizer, image_codec.encode, folder, longest, fingerprint, left_out=left_out)
