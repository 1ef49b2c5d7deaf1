"""AdamW with warm-up, cosine decay and a global-norm clip, from the `optimizer` part of a config."""

from __future__ import annotations

from typing import Any

import jax
import optax


def schedule(config: Any, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` (a share of `steps`), then cosine from `peak` to `final`."""
    warmup = max(1, round(config.warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, config.peak, warmup, max(steps, warmup + 1), config.final)


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """`config` holds peak, final, warmup, b1, b2, eps, weight_decay, clip_norm.  Vectors (norms, biases) do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
                    mask=lambda params: jax.tree.map_with_path(_decays, params)))


def _decays(path: tuple, value: jax.Array) -> bool:
    names = "/".join(str(key) for key in path)
    return value.ndim >= 2 and "norm" not in names and "embedding" not in names
