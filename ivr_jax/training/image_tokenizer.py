"""Training the image tokenizer: reconstruction, quantisation and entropy (IBQ; see `models/image_tokenizer.py`)."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview

from ivr_jax import distributed, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.data import pipeline
from ivr_jax.data.sources import open_dataset
from ivr_jax.errors import UserError
from ivr_jax.images import crop_square
from ivr_jax.models import image_tokenizer as model_lib
from ivr_jax.training.loop import Stage
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.state import TrainState, shard_state
from ivr_jax.world import recognise
from ivr_jax.world.draws import random_scene
from ivr_jax.world.levels import level_of
from ivr_jax.world.render import random_wobble, render


class Steps(NamedTuple):
    """Jitted: (state, pixels uint8 [B, height, width, 3]) -> (state, metrics), and state, pixels -> state."""

    continuous: Callable
    quantised: Callable
    place_codebook: Callable


def make_steps(
    model: model_lib.ImageTokenizerConfig,
    optimizer: optax.GradientTransformation,
    loss_config: Any,
    out_shardings: Any = (None, None),
) -> Steps:
    """The two phases of training, and the passage between them.

    A fresh codebook tends to split the images by position and to merge objects, so training may begin without
    quantisation (`continuous`): noisy latents of small norm, which keep only what the reconstruction needs;
    the codebook is then placed on the latents by spherical k-means, and from there on every cell goes through its
    code (`quantised`, index backpropagation).
    """

    def loss(params: Any, pixels: jax.Array, key: jax.Array, quantised: bool) -> tuple[jax.Array, dict[str, Any]]:
        target, module = model_lib.pixels_to_unit(pixels), model_lib.module(model, params)
        latents, key = module.latents(target), jax.random.split(key)
        if quantised:
            latents, aux = model_lib.quantise(model, module.codebook, latents)
            entropy = aux.cell_entropy - loss_config.diversity * aux.batch_entropy
            extra = loss_config.quantisation * aux.quantisation + loss_config.entropy * entropy
            metrics = {
                "quantisation": aux.quantisation,
                "cell_entropy": aux.cell_entropy,
                "batch_entropy": aux.batch_entropy,
                "codes_in_batch": (aux.code_counts > 0).sum().astype(jnp.float32),
                "batch_perplexity": _perplexity(aux.code_counts),
            }
        else:
            extra, metrics = loss_config.latents * jnp.square(latents).mean(), {}
            latents += loss_config.noise * jax.random.normal(key[0], latents.shape)
        latents, target = shuffle_cells(latents, target, round(loss_config.shuffle * len(pixels)), key[1])
        reconstruction = module.paint(latents)
        absolute, squared = jnp.abs(reconstruction - target).mean(), jnp.square(reconstruction - target).mean()
        total = loss_config.l1 * absolute + loss_config.l2 * squared + extra
        return total, {"loss": total, "psnr": 10 * jnp.log10(4.0 / squared), **metrics}

    def step(
        quantised: bool, state: TrainState, pixels: jax.Array, key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        gradients, metrics = jax.grad(loss, has_aux=True)(state.params, pixels, key, quantised)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = TrainState(optax.apply_updates(state.params, updates), opt_state)
        return state, {**metrics, "grad_norm": optax.tree.norm(gradients)}

    def place_codebook(state: TrainState, pixels: jax.Array) -> TrainState:
        latents = model_lib.module(model, state.params).latents(model_lib.pixels_to_unit(pixels))
        codebook = spherical_k_means(latents.reshape(-1, model.embed_dim), model.n_embed)
        return TrainState(model_lib.with_codebook(state.params, codebook), state.opt_state)

    jit = functools.partial(jax.jit, donate_argnums=0)
    return Steps(
        jit(functools.partial(step, False), out_shardings=out_shardings),
        jit(functools.partial(step, True), out_shardings=out_shardings),
        jit(place_codebook, out_shardings=out_shardings[0]),
    )


def shuffle_cells(latents: jax.Array, target: jax.Array, images: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shuffles the cells of the first `images` images among each other, and their pixels with them.

    A decoder that must draw any arrangement makes every code stand for its own cell's content, wherever it is and
    whatever stands beside it; only then can a small language model recombine codes.

    Args:
      latents: [B, y, x, C]; target: [B, height, width, 3], height and width multiples of y and x.
    """
    batch, rows, columns, _ = latents.shape
    order = jnp.arange(batch * rows * columns)
    some = images * rows * columns
    order = order.at[:some].set(jax.random.permutation(key, some)) if some else order
    size, across = target.shape[1] // rows, target.shape[2] // columns
    tiles = target.reshape(batch, rows, size, columns, across, 3).transpose(0, 1, 3, 2, 4, 5)
    tiles = tiles.reshape(-1, size, across, 3)[order].reshape(batch, rows, columns, size, across, 3)
    latents = latents.reshape(-1, latents.shape[-1])[order].reshape(latents.shape)
    return latents, tiles.transpose(0, 1, 3, 2, 4, 5).reshape(target.shape)


def spherical_k_means(cells: jax.Array, count: int, rounds: int = 10) -> jax.Array:
    """Codes [count, C] for a dot-product assignment of `cells` [n, C]: directions of k-means, all of the mean length.

    Starts from the farthest cells, so rare kinds of cell get a code of their own.
    """
    length = jnp.linalg.norm(cells, axis=1)
    directions = cells / jnp.maximum(length, 1e-6)[:, None]

    def farthest(i: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, nearest = carry
        codes = codes.at[i].set(directions[jnp.argmin(nearest)])
        return codes, jnp.maximum(nearest, directions @ codes[i])

    first = jnp.zeros((count, cells.shape[1])).at[0].set(directions[0])
    codes, _ = jax.lax.fori_loop(1, count, farthest, (first, directions @ directions[0]))

    def refine(_: int, codes: jax.Array) -> jax.Array:
        nearest = jnp.argmax(directions @ codes.T, axis=1)
        sums = jnp.zeros_like(codes).at[nearest].add(directions)
        size = jnp.linalg.norm(sums, axis=1, keepdims=True)
        return jnp.where(size > 1e-6, sums / jnp.maximum(size, 1e-6), codes)

    return jax.lax.fori_loop(0, rounds, refine, codes) * length.mean()


def _perplexity(usage: jax.Array) -> jax.Array:
    share = usage / jnp.maximum(usage.sum(), 1)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))


def image_sources(data: Any, seed: int, resolution: int, held_out: int) -> tuple[pipeline.Indexed, np.ndarray]:
    """Images to train on, and others uint8 [n, height, width, 3] that are never trained on.

    Random boards of the micro-world (`data.source` "world"), or the images of a dataset.  A batch needs images of one
    size and a dataset has several sizes, so of each image the middle square is taken, at the model's training
    resolution; the network is convolutional, so what it learns holds for images of any shape.  n is `held_out`, or a
    tenth of a dataset that has fewer than ten times as many.

    Raises UserError for a dataset of fewer than two images.
    """
    if data.source == "world":
        boards = pipeline.Indexed(functools.partial(_board, data.level, seed), data.size)
        return boards, np.stack([_board(data.level, seed, data.size + i) for i in range(held_out)])
    dataset = open_dataset(data.source)
    names = sorted(dataset.image_names)  # content hashes: their order is random, and the same for every process
    count = min(held_out, max(1, len(names) // 10))
    if len(names) <= count:
        raise UserError(
            f"{data.source} holds {len(names)} image(s), and one at least is held out.", "Name a dataset with more."
        )

    def image(index: int) -> np.ndarray:
        return crop_square(dataset.image(names[index]), resolution)

    others = np.stack([image(index) for index in range(count)])
    return pipeline.Indexed(lambda index: image(count + index), len(names) - count), others


def _board(level: int, seed: int, index: int) -> np.ndarray:
    """Random board `index`, uint8 [height, width, 3]."""
    rng = np.random.default_rng([seed, index])
    return render(random_scene(rng, level_of(level)), level, random_wobble(rng, level))


def build(config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of an image_tokenizer config."""
    model = model_lib.ImageTokenizerConfig(**config.model)
    if model.resolution % model.factor:
        raise UserError(
            f"model.resolution is {model.resolution}, which does not divide into cells of {model.factor} pixels.",
            f"Give a multiple of {model.factor}.",
        )
    sharding.check_batch(mesh, config.batch, "config.batch")
    if distributed.is_primary():
        shapes = model_lib.param_shapes(model)
        print(parameter_overview.get_parameter_overview(shapes, include_stats=False, max_lines=12))
    optimizer = make_optimizer(config.optimizer, config.steps)
    # Before the parameters are made, which takes seconds: data that cannot be read is said at once.
    source, held_out = image_sources(config.data, config.seed, model.resolution, config.eval_images)
    axes = model_lib.param_axes(model)
    init = functools.partial(model_lib.init_params, model, jax.random.key(config.seed))
    first, placed = shard_state(mesh, axes, init, optimizer)
    steps = make_steps(model, optimizer, config.loss, placed)
    data = pipeline.indexed_batches(source, config.batch, config.seed)
    mine = sharding.local_rows(mesh, config.batch)
    meta = {"kind": systems.IMAGE_TOKENIZER, "model": dataclasses.asdict(model), "run": config.to_dict()}
    measure = jax.jit(functools.partial(_reconstruct, model), out_shardings=sharding.replicated(mesh))

    def summary(state: TrainState, _: int) -> dict[str, float]:
        pixels, codes = map(np.asarray, measure(state.params, held_out))
        squared = np.mean((pixels.astype(np.float32) - held_out) ** 2)
        read = {}
        if config.data.source == "world":
            same = recognise.classify(pixels, config.data.level) == recognise.classify(held_out, config.data.level)
            read["eval_cells_right"] = float(same.mean())
        return read | {
            "eval_psnr": float(10 * np.log10(255**2 / max(squared, 1e-9))),
            "eval_codes_used": float(len(np.unique(codes))),
        }

    noise = jax.random.key(config.seed + 1)
    sampled = np.stack([source[i] for i in range(min(len(source), config.codebook_images))])

    def step(state: TrainState, pixels: np.ndarray, number: int) -> tuple[TrainState, dict[str, Any]]:
        pixels = sharding.global_batch(mesh, {"pixels": pixels[mine]}, config.batch)["pixels"]
        if number < config.continuous_steps:
            return steps.continuous(state, pixels, jax.random.fold_in(noise, number))
        if number == config.continuous_steps and number > 0:
            state = steps.place_codebook(state, sampled)
        return steps.quantised(state, pixels, jax.random.fold_in(noise, number))

    return Stage(first, data, step, meta, summary)


def _reconstruct(model: model_lib.ImageTokenizerConfig, params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes = model_lib.encode(model, params, model_lib.pixels_to_unit(pixels))
    return model_lib.unit_to_pixels(model_lib.decode(model, params, codes)), codes
