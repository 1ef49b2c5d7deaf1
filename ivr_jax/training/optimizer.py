"""AdamW or Muon with warm-up, cosine decay and a global-norm clip, from the `optimizer` part of a config."""

from __future__ import annotations

import re
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from ivr_jax.config import Range, check_value
from ivr_jax.errors import UserError


def schedule(config: Any, steps: int) -> optax.Schedule:
    """The learning rate of update 0, 1, … `steps` - 1.

    Linear warm-up over the first `warmup_ratio` (a share) of the updates, then cosine decay.  The first update has
    1 / warm-up updates of `learning_rate` (all of it without warm-up), the last one has `final_learning_rate`.
    """
    warmup = max(1, round(config.warmup_ratio * steps))
    after = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1), config.final_learning_rate
    )
    return lambda count: after(count + 1)  # rate 0 would waste the first update


def make_optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """The optimiser of a config section with kind, learning_rate, final_learning_rate, warmup_ratio, b1, b2, eps,
    weight_decay, clip_norm, moment_dtype.

    `kind` is "adamw", or "muon": orthogonalised momentum for kernels of convolutions and dense layers (updates scaled
    to the size of Adam's), Adam for the rest.  Vectors, norms and embeddings do not decay; with "muon" only the kernels
    that it orthogonalises do.
    With `moment_dtype` "bfloat16" the moments take half the memory; they are rounded after every step, so `b2` may not
    be so large that its changes vanish.
    """
    _check_ranges(config)
    rate = schedule(config, steps)
    if config.kind == "adamw":
        core = optax.adamw(
            rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=_decay_mask
        )
    elif config.kind == "muon":
        core = contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=_decay_mask,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        raise UserError(f"unknown optimizer.kind {config.kind!r}.", 'Use "adamw" or "muon".')
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise UserError(f"unknown optimizer.moment_dtype {config.moment_dtype!r}.", 'Use "float32" or "bfloat16".')
    if config.moment_dtype == "bfloat16":
        if max(config.b1, config.b2) > 0.99:
            raise UserError(f"bfloat16 moments with b1 = {config.b1}, b2 = {config.b2} would not change: a step "
                            "moves them by less than their precision.", "Use at most 0.99, or float32 moments.")
        core = stored_in(core, jnp.bfloat16)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


def _check_ranges(config: Any) -> None:
    ranges = {
        **dict.fromkeys(("learning_rate", "final_learning_rate", "weight_decay"), Range(0)),
        "warmup_ratio": Range(0, 1),
        **dict.fromkeys(("b1", "b2"), Range(0, below=1)),
        **dict.fromkeys(("clip_norm", "eps"), Range(above=0)),
    }
    for name, wanted in ranges.items():
        check_value(f"optimizer.{name}", getattr(config, name), Annotated[float, wanted])


def stored_in(core: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """`core` with the float32 arrays of its state kept in `dtype` between steps, and computed with in float32."""

    def cast(state: Any, before: Any, after: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(after) if x.ndim and x.dtype == before else x, state)

    def init(params: Any) -> Any:
        return cast(core.init(params), jnp.float32, dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = core.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(init, update)


def _name(path: tuple) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _decay_mask(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, x: x.ndim >= 2 and not re.search("norm|embed", _name(path)), params)


def _matrices(params: Any) -> Any:
    """How Muon sees each parameter as a matrix: conv kernels [y, x, in, out], stacked dense kernels [L, in, out]."""

    def matrix(path: tuple, x: jax.Array) -> contrib.MuonDimensionNumbers | None:
        if re.search("norm|embed|lm_head|conv_in/|conv_out/", _name(path)) or x.ndim < 3:
            return None
        return contrib.MuonDimensionNumbers(tuple(range(3)) if x.ndim == 4 else 1, x.ndim - 1)

    return jax.tree.map_with_path(matrix, params)
