"""What int8 weights and an int8 cache change in the scores of a model, beside what bfloat16 changes.

    python benchmarks/int8_error.py                                  the packaged model, 128 held-out requests
    python benchmarks/int8_error.py --checkpoint=runs/demo/sft --requests=512

The float32 model samples an answer to each request of the training mixture.  Each variant reads the same prompts and
answers through its cache and scores every answer token: the largest difference of a logit, the mean divergence
KL(float32 || variant) of a token's distribution over the whole vocabulary, and how often the likeliest id is another.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from speculation import LENGTH, workload

from ivr_jax.checkpoints import system as systems
from ivr_jax.models import backbone, int8, kv_cache
from ivr_jax.sampling.batch import RolloutOptions, sample

ROWS = 16  # answers at a time
VARIANTS: dict[str, dict[str, str]] = {
    "bfloat16": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    "int8 weights": {"weight_dtype": "int8"},
    "int8 cache": {"cache_dtype": "int8"},
    "int8 weights and cache": {"weight_dtype": "int8", "cache_dtype": "int8"},
    "bfloat16, int8 weights and cache": {
        "dtype": "bfloat16", "param_dtype": "bfloat16", "weight_dtype": "int8", "cache_dtype": "int8"
    },
}  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def scores(config: backbone.BackboneConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """float32 [B, T, V]: logits after each of tokens [B, T], read through a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache = kv_cache.init_cache(config, *tokens.shape)
    hidden, _ = backbone.apply(config, params, tokens, positions, cache=cache)
    return backbone.logits(config, params, hidden)


def variant(system: systems.System, options: dict[str, str]) -> tuple[backbone.BackboneConfig, Any]:
    config = dataclasses.replace(system.config, **options)
    params = jax.tree.map(lambda x: x.astype(config.param_dtype), system.params)
    return config, int8.quantise_kernels(params) if config.weight_dtype else params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=systems.MICRO)
    parser.add_argument("--requests", type=int, default=128, help=f"a multiple of {ROWS}")
    options = parser.parse_args()
    system = systems.load(options.checkpoint, dtype="float32", param_dtype="float32")
    grammar, prompts, size = workload(system, "all", options.requests, 0)
    keys = jax.random.split(jax.random.key(0), options.requests)
    answers, _ = sample(system.config, system.params, grammar, prompts, keys, RolloutOptions(LENGTH, size=size))
    width = int((prompts.lengths + answers.lengths).max())
    tokens = np.full((options.requests, width), system.tokenizer.vocab.pad, np.int32)
    scored = np.zeros(tokens.shape, bool)  # positions whose next token is the answer's
    for row, (start, length) in enumerate(zip(prompts.lengths, answers.lengths, strict=True)):
        tokens[row, :start] = prompts.tokens[row, :start]
        tokens[row, start : start + length] = answers.tokens[row, :length]
        scored[row, start - 1 : start + length - 1] = True
    print(f"{options.requests} answers, {scored.sum():,} tokens")
    for name, changed in VARIANTS.items():
        config, params = variant(system, changed)
        found: list[np.ndarray] = []
        for first in range(0, options.requests, ROWS):
            part = slice(first, first + ROWS)
            exact, other = (np.asarray(scores(*model, tokens[part]))[scored[part]]
                            for model in ((system.config, system.params), (config, params)))  # fmt: skip
            p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(other)
            divergence = np.asarray((jnp.exp(p) * (p - q)).sum(-1))
            found.append(np.stack([np.abs(exact - other).max(-1), divergence, exact.argmax(-1) != other.argmax(-1)]))
        difference, divergence, changed_ids = np.concatenate(found, axis=1)
        print(f"{name:<34} largest difference of a logit {difference.max():.3f}, in the median token "
              f"{np.median(difference):.4f}; KL {divergence.mean():.2e} nats a token, {divergence.max():.3f} at most; "
              f"another likeliest id {changed_ids.mean():.2%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
