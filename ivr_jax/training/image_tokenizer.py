"""Training the image tokenizer: reconstruction, quantisation and entropy (IBQ; see `models/image_tokenizer.py`)."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

from ivr_jax import system as systems
from ivr_jax.data import pipeline
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.models import image_tokenizer as model_lib
from ivr_jax.training.loop import Stage
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.sft import TrainState
from ivr_jax.world.sampler import sample_task


def make_step(model: model_lib.ImageTokenizerConfig, optimizer: optax.GradientTransformation, loss_config: Any):
    """Jitted (state, pixels uint8 [B, height, width, 3]) -> (state, metrics)."""

    def loss(params: Any, pixels: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        target = model_lib.pixels_to_unit(pixels)
        reconstruction, aux = model_lib.train_forward(model, params, target)
        absolute, squared = jnp.abs(reconstruction - target).mean(), jnp.square(reconstruction - target).mean()
        reconstruction_loss = loss_config.l1 * absolute + loss_config.l2 * squared
        entropy = aux.cell_entropy - loss_config.diversity * aux.batch_entropy
        total = reconstruction_loss + loss_config.quantisation * aux.quantisation + loss_config.entropy * entropy
        metrics = {"loss": total, "reconstruction": reconstruction_loss, "quantisation": aux.quantisation,
                   "psnr": 10 * jnp.log10(4.0 / squared), "cell_entropy": aux.cell_entropy, "batch_entropy": aux.batch_entropy,
                   "codes_in_batch": (aux.code_counts > 0).sum().astype(jnp.float32), "batch_perplexity": _perplexity(aux.code_counts)}
        return total, metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, pixels: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        gradients, metrics = jax.grad(loss, has_aux=True)(state.params, pixels)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), {**metrics, "grad_norm": optax.global_norm(gradients)}

    return step


def _perplexity(usage: jax.Array) -> jax.Array:
    share = usage / jnp.maximum(usage.sum(), 1)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))


def image_source(data: Any, seed: int, factor: int) -> pipeline.Indexed:
    """Images to train on: rendered scenes of the micro-world (`data.source` "world"), or those of a trajectory dataset."""
    if data.source == "world":
        return pipeline.Indexed(functools.partial(_world_image, data.level, seed), data.size)
    dataset = TrajectoryDataset(data.source)
    names = dataset.image_names
    shapes = {dataset.image(name).shape for name in names[:1]}
    if any(side % factor for shape in shapes for side in shape[:2]):
        raise UserError(f"images of {data.source!r} have sides that are not multiples of {factor}.", "Build the dataset with resized images.")
    return pipeline.Indexed(lambda index: dataset.image(names[index]), len(names))


def _world_image(level: int, seed: int, index: int) -> np.ndarray:
    """One of the images of task `index`, the target included."""
    task = sample_task(level, seed, index)
    images = [*task.images.values(), task.target_image]
    return images[index % len(images)]


def build(config: Any, workdir: pathlib.Path) -> Stage:
    """The stage of an image_tokenizer config."""
    model = model_lib.ImageTokenizerConfig(**config.model)
    params = jax.jit(functools.partial(model_lib.init_params, model))(jax.random.key(config.seed))
    print(parameter_overview.get_parameter_overview(params, include_stats=False, max_lines=12))
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(model, optimizer, config.loss)
    source = image_source(config.data, config.seed, model.factor)
    data = pipeline.indexed_batches(source, config.batch, config.seed)
    meta = {"kind": systems.IMAGE_TOKENIZER, "model": dataclasses.asdict(model), "run": config.to_dict()}
    fresh = pipeline.indexed_batches(dataclasses.replace(source), config.eval_images, config.seed + 1)
    held_out = np.asarray(next(fresh))
    measure = jax.jit(functools.partial(_reconstruct, model))

    def summary(state: TrainState, _: int) -> dict[str, float]:
        pixels, codes = measure(state.params, held_out)
        squared = np.mean((pixels.astype(np.float32) - held_out) ** 2)
        return {"eval_psnr": float(10 * np.log10(255**2 / max(squared, 1e-9))), "eval_codes_used": float(len(np.unique(codes)))}

    return Stage(TrainState(params, optimizer.init(params)), data, lambda state, batch, _: step(state, batch), meta, summary)


def _reconstruct(model: model_lib.ImageTokenizerConfig, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes = model_lib.encode(model, params, model_lib.pixels_to_unit(pixels))
    return model_lib.unit_to_pixels(model_lib.decode(model, params, codes)), codes
