"""The decoder: Emu3.5's architecture (arXiv 2510.26583) at any size, one code for 1 M and 34 B parameters.

Pre-norm decoder with RMSNorm on q and k before rotary positions, grouped kv heads, SwiGLU, no biases, an output matrix
of its own.  Layers are stacked on a leading L axis and scanned.  The module is Flax NNX and used functionally:
parameters live outside as a plain nested dict, and every function here takes them as an argument:

    params = init_params(config, key)
    hidden, _ = apply(config, params, tokens, positions, segment_ids)         training, packed rows
    cache = init_cache(config, batch, slots)
    hidden, cache = apply(config, params, prompts, positions, cache=cache)    prefill
    hidden, cache = apply(config, params, tokens, positions, cache=cache)     one token a row
    scores = logits(config, params, hidden)

Shapes follow the legend of `layers.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ivr_jax import sharding
from ivr_jax.models import accumulate_scan, fused_attention, layers, lora
from ivr_jax.models.backbone_config import BackboneConfig

Params = dict[str, Any]


class KVCache(NamedTuple):
    """Keys (rotated) and values of every layer and slot: k, v [L, B, K, S, h]. Slot s of a row holds its position s."""

    k: jax.Array
    v: jax.Array


class Around(NamedTuple):
    """What all layers share: rotary tables, the attention function (a pytree, masks and segments are its leaves), the
    slots [B, T] of the cache that are written (or None), and the key of dropout (or None)."""

    tables: tuple[jax.Array, jax.Array]
    attend: jax.tree_util.Partial
    write: jax.Array | None
    dropout_key: jax.Array | None


CACHE_AXES = KVCache(*(("layers", "batch", "kv_heads", "slots", "head_dim"),) * 2)


class Attention(nnx.Module):
    """Grouped-query attention of all layers (leading L); `project` and `output` act on one layer's slice."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        self.config = config
        count, width, dim = config.num_hidden_layers, config.hidden_size, config.head_dim
        query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        new = functools.partial(layers.declare, rngs, dtype=config.param_dtype)
        into, ones = layers.fan_in_normal(width), jax.nn.initializers.ones
        back = layers.fan_in_normal(query, 1 / math.sqrt(2 * count))
        self.q = new((count, width, query), ("layers", "embed", "q_heads"), into)
        self.k = new((count, width, kv), ("layers", "embed", "kv_heads"), into)
        self.v = new((count, width, kv), ("layers", "embed", "kv_heads"), into)
        self.o = new((count, query, width), ("layers", "q_rows", "width"), back)
        self.q_norm = new((count, dim), ("layers", "head_dim"), ones)
        self.k_norm = new((count, dim), ("layers", "head_dim"), ones)

    def project(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, gathered: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] → q [B, T, H, h] and k, v [B, T, K, h]; q and k normalised, then rotated."""
        config, (batch, length, _) = self.config, x.shape
        shape = (batch, length, -1, config.head_dim)
        heads = (self.q, "q_heads"), (self.k, "kv_heads"), (self.v, "kv_heads")
        q, k, v = (
            checkpoint_name(layers.project(x, kernel[...], ("embed", axis), None, gathered), "qkv").reshape(shape)
            for kernel, axis in heads
        )
        # XLA:TPU aborts where it fuses these with each other and the reshapes of a batch of one row.
        apart = jax.lax.optimization_barrier if gathered else lambda x: x
        q, k, v = apart((q, k, v))
        q = layers.rotate(apart(layers.rms_norm(q, self.q_norm[...], config.rms_norm_eps)), cos, sin)
        k = layers.rotate(apart(layers.rms_norm(k, self.k_norm[...], config.rms_norm_eps)), cos, sin)
        return apart(tuple(sharding.constrain(x, ("batch", "length", axis, "head_dim"), gathered)
                           for x, (_, axis) in zip((q, k, v), heads, strict=True)))  # fmt: skip

    def output(self, mixed: jax.Array, gathered: bool) -> jax.Array:
        """mixed [B, T, H, h] → [B, T, D]."""
        mixed = sharding.constrain(mixed.reshape(*mixed.shape[:2], -1), ("batch", "length", "q_heads"), gathered)
        return layers.project(mixed, self.o[...], ("q_rows", "width"), None, gathered)


class Mlp(nnx.Module):
    """SwiGLU of all layers (leading L)."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        count, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        new = functools.partial(layers.declare, rngs, dtype=config.param_dtype)
        into, back = layers.fan_in_normal(width), layers.fan_in_normal(inner, 1 / math.sqrt(2 * count))
        self.gate = new((count, width, inner), ("layers", "embed", "mlp"), into)
        self.up = new((count, width, inner), ("layers", "embed", "mlp"), into)
        self.down = new((count, inner, width), ("layers", "mlp_rows", "width"), back)

    def __call__(self, x: jax.Array, gathered: bool) -> jax.Array:
        def inner(kernel: jax.Array, name: str) -> jax.Array:
            made = layers.project(x, kernel, ("embed", "mlp"), None, gathered)
            return checkpoint_name(sharding.constrain(made, ("batch", "length", "mlp"), gathered), name)

        gate, up = inner(self.gate[...], "gate"), inner(self.up[...], "up")
        product = jax.nn.silu(gate) * up
        if gathered:  # XLA:TPU would make it once for each block of the matrix product
            product = jax.lax.optimization_barrier(product)
        return layers.project(product, self.down[...], ("mlp_rows", "width"), None, gathered)


class Layers(nnx.Module):
    """All decoder layers; `nnx.split` it, scan over the leading axis, and merge one slice to run one layer."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs):
        self.config = config
        new = functools.partial(layers.declare, rngs, dtype=config.param_dtype)
        shape, axes = (config.num_hidden_layers, config.hidden_size), ("layers", "embed")
        self.attention_norm = new(shape, axes, jax.nn.initializers.ones)
        self.attention = Attention(config, rngs)
        self.mlp_norm = new(shape, axes, jax.nn.initializers.ones)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x, tables, attend, keys, cache, write) -> tuple[jax.Array, KVCache | None]:
        """One layer. `cache` is all layers' (or None); `write` = (layer, slots [B, T]).

        On a mesh the residual x is split by tokens over the tensor shards, and gathered for each half of the layer;
        with `config.fsdp_over_tensor` it is split by rows, and stays so.
        """
        config, (drop_mix, drop_attention, drop_mlp) = self.config, keys
        gathered = config.fsdp_over_tensor and cache is None
        whole, residual = ("batch", "length", "width"), ("batch", "residual", "width")
        normed = layers.rms_norm(x, self.attention_norm[...], config.rms_norm_eps)
        q, k, v = self.attention.project(sharding.constrain(normed, whole, gathered), *tables, gathered)
        if cache is not None:
            # Slots outside the cache (padding) are dropped. Carrying the whole cache lets XLA update it in place.
            layer, slots = write
            cache = KVCache(*(_written(stored, new, layer, slots) for stored, new in zip(cache, (k, v), strict=True)))
            k, v = (stored[layer].astype(q.dtype).swapaxes(1, 2) for stored in cache)
        if config.remat == "none" and cache is None:
            attend = jax.checkpoint(attend)  # weights [B, H, T, S] are dearer to store than to compute again
        mixed = self.attention.output(attend(q, k, v, key=drop_attention), gathered)
        mixed = checkpoint_name(sharding.constrain(mixed, residual, gathered), "output")
        x = x + layers.drop(mixed, config.dropout, drop_mix)
        normed = layers.rms_norm(x, self.mlp_norm[...], config.rms_norm_eps)
        inner = self.mlp(sharding.constrain(normed, whole, gathered), gathered)
        inner = sharding.constrain(inner, residual, gathered)
        return x + layers.drop(inner, config.dropout, drop_mlp), cache


class Backbone(nnx.Module):
    """The decoder as a module; see the functions below for its functional use."""

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, width = config.padded_vocab_size, config.hidden_size
        new = functools.partial(layers.declare, rngs, dtype=config.param_dtype)
        self.embed = new((rows, width), ("vocab_rows", "width"), layers.fan_in_normal(width))
        self.layers = Layers(config, rngs)
        self.final_norm = new((width,), ("embed",), jax.nn.initializers.ones)
        if not config.tie_word_embeddings:
            self.lm_head = new((width, rows), ("embed", "vocab"), layers.fan_in_normal(width))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
        adapters: Params | None = None,
        sums: Params | None = None,
        apart: tuple[Params, ...] | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm; see `apply`."""
        config = self.config
        gathered = config.fsdp_over_tensor and cache is None
        x = layers.look_up(self.embed[...], tokens, config.dtype, gathered)
        tables = layers.rotary_tables(
            positions, config.head_dim, config.rope_theta, config.scaling, config.max_position_embeddings
        )
        dropout = config.attention_dropout if dropout_key is not None else 0.0
        attend = functools.partial(layers.attention, dropout=dropout)
        if cache is None:
            kernel = fused_attention.choose(config, tokens.shape[1], dropout)
            mask, write = _packed_mask(tokens.shape, segment_ids) if kernel == "plain" else None, None
            attend = functools.partial(attend, causal=True, kernel=kernel, gathered=gathered)
            attend = jax.tree_util.Partial(attend, mask=mask, segment_ids=segment_ids)
        elif segment_ids is not None:
            raise ValueError("packed rows and a cache do not go together: segment_ids must be None with a cache")
        else:
            slots = cache.k.shape[3]
            seen = jnp.arange(slots)[None, None, :] <= positions[:, :, None]
            attend = jax.tree_util.Partial(attend, mask=seen)
            write = jnp.where(positions < 0, slots, positions)  # padding is sent past the end
        around = Around(tables, attend, write, dropout_key)
        if sums is None:
            x, cache = self._scan(x, around, cache, adapters or {}, apart)
        else:
            x = self._scan_adding(x, around, sums)
        return layers.rms_norm(x, self.final_norm[...], config.rms_norm_eps), cache

    def _one_layer(self, graph, around: Around, number, params, x, cache) -> tuple[jax.Array, KVCache | None]:
        gathered, key = self.config.fsdp_over_tensor and cache is None, around.dropout_key
        x = sharding.constrain(x, ("batch", "residual", "width"), gathered)
        keys = (None,) * 3 if key is None else jax.random.split(jax.random.fold_in(key, number), 3)
        place = None if around.write is None else (number, around.write)
        return nnx.merge(graph, params)(x, around.tables, around.attend, keys, cache, place)

    def _scan(self, x, around: Around, cache, adapters, apart) -> tuple[jax.Array, KVCache | None]:
        graph, stacked = nnx.split(self.layers)

        def one_layer(carry, inputs):
            number, params, adapters = inputs
            params = lora.adapted(params, adapters) if adapters else params
            return self._one_layer(graph, around, number, params, *carry), None

        if self.config.remat != "none":
            policies = jax.checkpoint_policies
            kept = policies.save_only_these_names(*self.config.kept)
            if self.config.remat == "dots":
                attended = policies.save_only_these_names(fused_attention.SAVED)
                kept = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attended)
            one_layer = jax.checkpoint(one_layer, policy=kept, prevent_cse=False)
        if apart is not None:
            for number, layer in enumerate(apart):
                (x, cache), _ = one_layer((x, cache), (number, layer, jax.tree.map(lambda a, n=number: a[n], adapters)))
            return x, cache
        inputs = jnp.arange(self.config.num_hidden_layers), nnx.to_pure_dict(stacked), adapters
        return jax.lax.scan(one_layer, (x, cache), inputs, unroll=self.config.unroll)[0]

    def _scan_adding(self, x, around: Around, sums) -> jax.Array:
        graph, stacked = nnx.split(self.layers)

        def one_layer(around, number, params, x):
            return self._one_layer(graph, around, number, params, x, None)[0]

        return accumulate_scan.scan(one_layer, x, nnx.to_pure_dict(stacked), sums, around)

    def lm_head_kernel(self) -> jax.Array:
        """[D, padded V] in the parameter's dtype; columns from `vocab_size` on are padding."""
        return self.embed[...].T if self.config.tie_word_embeddings else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] → float32 [..., V], the padding of the vocabulary left out."""
        kernel = self.lm_head_kernel().astype(hidden.dtype)
        scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return scores[..., : self.config.vocab_size]


def _written(stored: jax.Array, new: jax.Array, layer: jax.Array, slots: jax.Array) -> jax.Array:
    """The cache [L, B, K, S, h] with `new` [B, T, K, h] of one layer at `slots` [B, T]; slots past the end are dropped.

    Each device writes its own part, rows and heads as one axis: where one update spans heads, XLA:TPU lays the heads
    beside the width, and copies a layer's whole cache before it can be read.
    """
    place = sharding.spec(stored.shape, CACHE_AXES.k)

    def local(stored: jax.Array, new: jax.Array, layer: jax.Array, slots: jax.Array) -> jax.Array:
        count, rows, heads, wide, width = stored.shape
        if place[3] is not None:
            slots = slots - jax.lax.axis_index(place[3]) * wide
            slots = jnp.where(slots < 0, wide, slots)
        flat = stored.reshape(count, rows * heads, wide, width)
        new = new.astype(stored.dtype).swapaxes(1, 2).reshape(rows * heads, -1, width)
        index = jnp.arange(rows * heads)[:, None]
        flat = flat.at[layer, index, jnp.repeat(slots, heads, axis=0)].set(new, mode="drop")
        return flat.reshape(stored.shape)

    if jax.sharding.get_abstract_mesh().empty:
        return local(stored, new, layer, slots)
    given = place, PartitionSpec(place[1], None, place[2]), PartitionSpec(), PartitionSpec(place[1])
    return jax.shard_map(local, in_specs=given, out_specs=place, check_vma=False)(stored, new, layer, slots)


def _packed_mask(shape: tuple[int, int], segment_ids: jax.Array | None) -> jax.Array:
    """bool [B or 1, T, T]: causal, and within one segment (0, padding, sees padding only)."""
    order = jnp.arange(shape[1])
    causal = (order[None, :] <= order[:, None])[None]
    return causal if segment_ids is None else causal & (segment_ids[:, None, :] == segment_ids[:, :, None])


@functools.lru_cache(maxsize=32)
def _abstract(config: BackboneConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Backbone(config, rngs=nnx.Rngs(0))))


def module(config: BackboneConfig, params: Params) -> Backbone:
    """The module that holds these parameters; cheap, meant for use inside `jax.jit`."""
    return nnx.merge(_abstract(config)[0], lora.base(params))


def init_params(config: BackboneConfig, key: jax.Array) -> Params:
    """Fresh parameters, a plain nested dict of arrays in `param_dtype`; jit it with out_shardings to place them."""
    return nnx.to_pure_dict(nnx.state(Backbone(config, rngs=nnx.Rngs(key))))


def param_shapes(config: BackboneConfig) -> Params:
    """The tree of `init_params` as ShapeDtypeStructs; nothing is allocated."""
    held = nnx.to_pure_dict(_abstract(config)[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), held)  # without the mesh that was in force


def param_axes(config: BackboneConfig) -> Params:
    """The tree of `init_params` with each array's logical axes, a tuple of one name a dimension."""
    return nnx.to_pure_dict(_abstract(config)[1], extract_fn=lambda variable: variable.get_metadata("axes"))


def init_cache(config: BackboneConfig, batch: int, slots: int, dtype: str | None = None) -> KVCache:
    """An empty cache of `slots` positions a row, in `dtype` (the compute dtype unless given)."""
    shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
    return KVCache(*(sharding.constrain(jnp.zeros(shape, dtype or config.dtype), axes) for axes in CACHE_AXES))


def apply(
    config: BackboneConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    *,
    dropout_key: jax.Array | None = None,
    sums: Params | None = None,
    apart: tuple[Params, ...] | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Run the decoder.

    Args:
      params: the tree of `init_params`, with adapters or without (`models/lora.py`).
      tokens: int32 [B, T].
      positions: int32 [B, T], rotary positions. With a cache also the slot that a token is written to; a token at a
        negative position is padding and written nowhere (left padding), and right padding continues the positions: its
        slots are overwritten before any query can see them.
      segment_ids: int32 [B, T] for packed rows (no cache): a token sees earlier tokens of its own segment only. 0 is
        padding. None: plain causal attention.
      cache: keys and values so far; a query at position p sees the slots 0 … p.
      dropout_key: turns on the configured dropout.
      sums: a tree like `params["layers"]`: the gradient with respect to it is `sums` plus the gradient of the layers'
        parameters, and that of the parameters themselves is lost (`accumulate_scan.scan`). No cache, no adapters, and
        everything is recomputed.
      apart: `unstack_layers(params)`, which is used in place of the stacked layers.

    Returns:
      hidden [B, T, D] after the final norm, in the compute dtype, and the cache with these tokens added (or None).
    """
    return module(config, params)(tokens, positions, segment_ids, cache, dropout_key, lora.scaled(params), sums, apart)


def unstack_layers(params: Params) -> tuple[Params, ...]:
    """The layers one by one, each in arrays of its own.

    XLA:CPU copies a layer's kernels out of the stacked ones each time before it multiplies with them. Whoever calls the
    model many times in one program copies them once in this way, at the cost of holding them twice.
    """
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.optimization_barrier(tuple(jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(count)))


@functools.partial(jax.jit, static_argnames="config")
def apply_layer(config: BackboneConfig, layer: Params, x: jax.Array, positions: jax.Array) -> jax.Array:
    """One layer alone, for a model that does not fit into memory: x [B, T, D] → [B, T, D], causal, no cache.

    `layer` is a slice of `params["layers"]`, without its leading axis; positions int32 [B, T].
    """
    tables = layers.rotary_tables(
        positions, config.head_dim, config.rope_theta, config.scaling, config.max_position_embeddings
    )
    graph, _ = nnx.split(nnx.eval_shape(lambda: Layers(config, nnx.Rngs(0))))
    attend = functools.partial(layers.attention, mask=_packed_mask(positions.shape, None))
    return nnx.merge(graph, layer)(x, tables, attend, (None,) * 3, None, None)[0]


def logits(config: BackboneConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] → float32 [..., V]."""
    return module(config, params).logits(hidden)


def lm_head(config: BackboneConfig, params: Params) -> jax.Array:
    """The output matrix [D, padded V] for losses that work in chunks; mask columns from `vocab_size` on."""
    return module(config, params).lm_head_kernel()
