"""Top-k and top-p at Emu3.5's vocabulary of 282,926 ids, against sorting all logits: equal ids, and the ratio of times.

    python benchmarks/truncation.py [--rows=8] [--repeats=5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.sampling.logits_processors import MASKED, Context, TopK, TopP

VOCABULARY = 282_926


def sorted_top_k(k: int):
    def keep(scores: jax.Array) -> jax.Array:
        threshold = -jnp.sort(-scores, axis=-1)[:, k - 1 : k]
        return jnp.where(scores >= threshold, scores, MASKED)

    return keep


def sorted_top_p(p: float):
    def keep(scores: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(scores)
        ordered = -jnp.sort(-scores, axis=-1)
        before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
        threshold = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scores >= threshold, scores, MASKED)

    return keep


def processor(chosen):
    def keep(scores: jax.Array) -> jax.Array:
        return chosen(scores, Context(None, jnp.ones((len(scores), 1), bool), ()))

    return keep


def seconds(call, scores: jax.Array, repeats: int) -> float:
    """The median of `repeats` calls after one that compiles."""
    jax.block_until_ready(call(scores))
    times = []
    for _ in range(repeats):
        clock = time.perf_counter()
        jax.block_until_ready(call(scores))
        times.append(time.perf_counter() - clock)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    scores = jnp.asarray(np.random.default_rng(0).normal(0, 3, (chosen.rows, VOCABULARY)).astype(np.float32))
    for name, plain, ours in (
        ("top-k 1,024", sorted_top_k(1024), TopK(1024, 1024)),
        ("top-k 5,120", sorted_top_k(5120), TopK(5120, 5120)),
        ("top-p 0.9", sorted_top_p(0.9), TopP(0.9, 0.9)),
    ):
        plain, ours = jax.jit(plain), jax.jit(processor(ours))
        differ = int(((plain(scores) > MASKED / 2) != (ours(scores) > MASKED / 2)).sum())
        slow, fast = seconds(plain, scores, chosen.repeats), seconds(ours, scores, chosen.repeats)
        print(f"{name}: sorting {slow * 1e3:.0f} ms, here {fast * 1e3:.0f} ms, ratio {slow / fast:.1f}; "
              f"{differ} ids differ")


if __name__ == "__main__":
    main()
