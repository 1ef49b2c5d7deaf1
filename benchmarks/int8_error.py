"""What int8 weights and an int8 cache would change, by rounding: logits, divergence, and images that stay the same.

    python benchmarks/int8_error.py                            the packaged model, 32 held-out edits
    python benchmarks/int8_error.py --checkpoint=runs/demo/rl --edits=128

Nothing here computes with int8; values are rounded to what int8 could hold, with one float32 scale for each output
column of a kernel and for each token and head of the cache.  Scores are of the answers that float32 draws, teacher
forced through the cache; images are drawn at temperature 0 and compared with float32's and with the task's target.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.checkpoints import system as systems
from ivr_jax.models import backbone
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, sample
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import encode_prompts
from ivr_jax.world.sampler import Task, sample_task


def rounded(x: jax.Array, axis: int) -> jax.Array:
    """`x` as int8 with one scale along `axis` would hold it, in its own dtype."""
    scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-12) / 127
    return (jnp.round(x / scale) * scale).astype(x.dtype)


def with_int8_kernels(params: Any) -> Any:
    """Every kernel [..., in, out] rounded; the embedding and the norms stay."""

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        return leaf if "norm" in name or name == "embed" else rounded(leaf, -2)

    return jax.tree_util.tree_map_with_path(one, params)


def scores(config: backbone.BackboneConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]: log-probabilities after each token, read through a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = backbone.init_cache(config, *tokens.shape)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden, _ = backbone.apply(config, params, tokens, positions, cache=cache)
        return jax.nn.log_softmax(backbone.logits(config, params, hidden).astype(jnp.float32))

    return np.asarray(run(params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=systems.MICRO)
    parser.add_argument("--edits", type=int, default=32)
    options = parser.parse_args()
    system = systems.load(options.checkpoint)
    tasks = [sample_task(0, 11, n, subset="edit", edits=1, held_out=True) for n in range(options.edits)]
    prompts, size = encode_prompts(system, [t.sample for t in tasks], [t.images for t in tasks])
    small = dataclasses.replace(system.config, dtype="bfloat16", param_dtype="bfloat16")
    written = backbone._written

    def written_as_int8(stored: Any, new: Any, *where: Any) -> jax.Array:
        return written(stored, rounded(new, -1), *where)

    kernels = with_int8_kernels(system.params)
    arms = {
        "float32": (system.config, system.params, written),
        "int8 weights": (system.config, kernels, written),
        "bfloat16": (small, jax.tree.map(lambda x: x.astype(jnp.bfloat16), system.params), written),
        "int8 cache": (system.config, system.params, written_as_int8),
        "int8 weights and cache": (system.config, kernels, written_as_int8),
    }
    base = None
    previous = written
    for name, (config, params, write) in arms.items():
        with mock.patch.object(backbone, "_written", write):
            if write is not previous:
                jax.clear_caches()
                previous = write
            base = measure(name, config, params, system, tasks, prompts, size, base)


def measure(
    name: str, config: backbone.BackboneConfig, params: Any, system: systems.System, tasks: list[Task],
    prompts: PromptBatch, size: tuple[int, int], base: tuple[np.ndarray, ...] | None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Prints a line; returns what float32 gave: images, rows to score, which places count, and their scores."""
    grammar = Grammar(system.tokenizer, GrammarOptions(modes=("direct",)))
    length = len(codec.encode_image(system.tokenizer, np.zeros(size, np.int32))) + 1
    keys = jax.random.split(jax.random.key(0), len(tasks))
    how = RolloutOptions(length, SamplingOptions(temperature=0.0), EngineOptions(growth=1, shrink=False), size=size)
    drawn, _ = sample(config, params, grammar, prompts, keys, how)
    images = drawn.tokens[drawn.tokens >= system.tokenizer.vocab.visual_start].reshape(len(tasks), -1)
    wanted = system.codec.encode([task.target_image for task in tasks])
    wanted = np.stack([np.ravel(codes) for codes in wanted]) + system.tokenizer.vocab.visual_start
    if base is None:
        rows = np.pad(prompts.tokens, ((0, 0), (0, length)))
        counted = np.zeros(rows.shape, bool)
        for row, flags, tokens, start in zip(rows, counted, drawn.tokens, prompts.lengths, strict=True):
            row[start : start + length] = tokens
            flags[start : start + length - 1] = tokens[1:] >= system.tokenizer.vocab.visual_start
        base = images, rows, counted, scores(config, params, rows)
    first, rows, counted, expected = base
    found, expected = scores(config, params, rows)[counted], expected[counted]
    divergence = (np.exp(expected) * (expected - found)).sum(-1)
    likely = expected > -10
    shares = {
        "likeliest id the same": found.argmax(-1) == expected.argmax(-1),
        "images as float32's": (images == first).all(1),
        "as the target's": (images == wanted).all(1),
    }
    print(f"{name:<24} scores differ by {np.abs(found - expected)[likely].max():.2e} at most, "
          f"KL {divergence.mean():.1e} on average, {divergence.max():.1e} at most; "
          + ", ".join(f"{what} {share.mean():.1%}" for what, share in shares.items()), flush=True)  # fmt: skip
    return base


if __name__ == "__main__":
    main()
