"""Low-rank adapters on chosen kernels of the decoder (LoRA, arXiv 2106.09685), for training with few chips.

A kernel W [L, in, out] is frozen and gets an adapter (alpha / rank) · A B with A [L, in, rank] and B [L, rank, out].  A
parameter tree with adapters has two more entries, which the decoder applies (`adapted`, called by
`backbone.Backbone.__call__`) and `merge` adds to the kernels.  A layer adds the product to its kernel in float32 each
time it runs: no gradient or moment of a kernel is ever kept, while the operations are those of full training.

    params["lora"]         {"attention": {"q": {"a", "b"}, …}, "mlp": {"up": …}}: what is trained
    params["lora_scale"]   float32 scalar alpha / rank
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ivr_jax.config import Count, Section
from ivr_jax.errors import UserError
from ivr_jax.models import layers

Params = dict[str, Any]
ADAPTERS, SCALE = "lora", "lora_scale"
PLACES = {**{name: "attention" for name in ("q", "k", "v", "o")}, **{name: "mlp" for name in ("gate", "up", "down")}}


@dataclasses.dataclass(frozen=True)
class LoraOptions(Section, name="lora"):
    """What is adapted.

    Attributes:
      rank: of the adapters; 0 trains all parameters instead.
      alpha: the adapters' product is scaled by alpha / rank.
      targets: kernels by name: q, k, v, o, gate, up, down.
    """

    rank: Count
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = [name for name in self.targets if name not in PLACES]
        if unknown or len(set(self.targets)) != len(self.targets):
            known = ", ".join(PLACES)
            raise UserError(f"lora.targets {self.targets} are not possible.", f"Name some of {known}, each once.")
        if self.rank and (self.alpha <= 0 or not self.targets):
            raise UserError(f"LoRA of rank {self.rank} with alpha {self.alpha} on {self.targets} is not possible.",
                            "With a rank, alpha must be above 0, and there must be at least one target.")


def add(params: Params, options: LoraOptions, key: jax.Array) -> Params:
    """`params` with fresh float32 adapters: A normal with variance 1 / in, B zero, so that nothing changes at first."""
    made: Params = {}
    for number, name in enumerate(options.targets):
        count, width, out = params["layers"][PLACES[name]][name].shape
        a = layers.fan_in_normal(width)(jax.random.fold_in(key, number), (count, width, options.rank), jnp.float32)
        b = jnp.zeros((count, options.rank, out), jnp.float32)
        made.setdefault(PLACES[name], {})[name] = {"a": a, "b": b}
    return {**params, ADAPTERS: made, SCALE: jnp.float32(options.alpha / options.rank)}


def axes(model_axes: Params, options: LoraOptions) -> Params:
    """Logical axes of what `add` returns: the adapters are split along the model's axes as their kernels are."""
    made: Params = {}
    for name in options.targets:
        first, into, out = model_axes["layers"][PLACES[name]][name]
        made.setdefault(PLACES[name], {})[name] = {"a": (first, into, "rank"), "b": (first, "rank", out)}
    return {**model_axes, ADAPTERS: made, SCALE: ()}


def abstract_sharded(params: Params, options: LoraOptions) -> Params:
    """ShapeDtypeStructs of what `add` returns, sharded as the kernels of `params` (ShapeDtypeStructs) are.

    `params` may be a part of the model: kernels that are not in it get no adapter.
    """
    made: Params = {}
    scalar = None
    for name in options.targets:
        kernel = params["layers"].get(PLACES[name], {}).get(name)
        if kernel is None:
            continue
        (count, width, out), placed = kernel.shape, getattr(kernel, "sharding", None)
        a_place, b_place, scalar = placed, placed, placed
        if isinstance(placed, NamedSharding):
            first, into, across = (*placed.spec, None, None, None)[:3]
            a_place = NamedSharding(placed.mesh, PartitionSpec(first, into, None))
            b_place = NamedSharding(placed.mesh, PartitionSpec(first, None, across))
            scalar = NamedSharding(placed.mesh, PartitionSpec())
        made.setdefault(PLACES[name], {})[name] = {
            "a": jax.ShapeDtypeStruct((count, width, options.rank), jnp.float32, sharding=a_place),
            "b": jax.ShapeDtypeStruct((count, options.rank, out), jnp.float32, sharding=b_place),
        }
    if not made:
        return params
    return {**params, ADAPTERS: made, SCALE: jax.ShapeDtypeStruct((), jnp.float32, sharding=scalar)}


def split(params: Params) -> tuple[Params, Params]:
    """(trained, frozen) parameters: adapters and the rest when there are adapters, else everything and nothing."""
    if ADAPTERS not in params:
        return params, {}
    return {ADAPTERS: params[ADAPTERS]}, {key: value for key, value in params.items() if key != ADAPTERS}


def join(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    return {**frozen, **trained}


def base(params: Params) -> Params:
    """The decoder's own parameters, adapters left out."""
    return {key: value for key, value in params.items() if key not in (ADAPTERS, SCALE)}


def scaled(params: Params) -> Params:
    """The adapters of `params` with the scale multiplied into each B; {} without adapters."""
    if ADAPTERS not in params:
        return {}
    return {
        place: {name: {"a": pair["a"], "b": pair["b"] * params[SCALE]} for name, pair in group.items()}
        for place, group in params[ADAPTERS].items()
    }


def adapted(layer: Params, adapters: Params) -> Params:
    """The parameters of one layer with its adapters (no leading L; scale included) added to its kernels in float32."""
    found = dict(layer)
    for place, name, pair in _pairs(adapters):
        product = jnp.matmul(pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST)
        found[place] = {**found[place], name: layer[place][name].astype(jnp.float32) + product}
    return found


def merge(params: Params) -> Params:
    """Plain parameters that compute the same: W + (alpha / rank) A B, in the kernels' own dtype and place."""
    merged = {**base(params), "layers": {key: value for key, value in params["layers"].items()}}
    for place, name, pair in _pairs(scaled(params)):
        kernel = params["layers"][place][name]
        merged["layers"][place] = {**merged["layers"][place], name: _add(kernel, pair["a"], pair["b"])}
    return merged


@jax.jit
def _add(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    product = jnp.einsum("lir,lro->lio", a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)


def _pairs(adapters: Params) -> Iterator[tuple[str, str, Mapping[str, jax.Array]]]:
    for place, group in adapters.items():
        for name, pair in group.items():
            yield place, name, pair
