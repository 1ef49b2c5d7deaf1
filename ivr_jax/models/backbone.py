"""The decoder: Emu3.5's architecture (arXiv 2510.26583) at any size, one code for 1 M and 34 B parameters.

Pre-norm decoder with RMSNorm on q and k before rotary positions, grouped kv heads, SwiGLU, no biases, an output matrix
of its own.  `Backbone` is a Flax NNX module whose layers are stacked on a leading L axis and scanned; each of its parts
runs by itself:

    model = Backbone(config, rngs=nnx.Rngs(0))
    hidden, _ = model(tokens, positions)
    layer = model.layers[3]
    x, _ = layer(x, layer_inputs(config, positions))
    y = layer.mlp(x)

Training and sampling use it functionally, with parameters as a plain nested dict that every function here takes:

    params = init_params(config, key)
    hidden, _ = apply(config, params, tokens, positions, segment_ids)         training, packed rows
    cache = kv_cache.init_cache(config, batch, cache_length)
    hidden, cache = apply(config, params, prompts, positions, cache=cache)    prefill
    hidden, cache = apply(config, params, tokens, positions, cache=cache)     one token a row
    scores = logits(config, params, hidden)

Axes of shapes are named in `layers.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import accumulate_scan, decode_attention, fused_attention, int8, kv_cache, layers, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.kv_cache import KVCache

Params = dict[str, Any]


class LayerInputs(NamedTuple):
    """What all layers share; `layer_inputs` makes it.

    Attributes:
      positions: int32 [B, T].
      rotary: cosines and sines, float32 [B, T, h/2] each.
      mask: bool [B or 1, T, S], which key each query sees; None where a fused kernel makes its own.
      segment_ids: int32 [B, T] of packed rows, or None.
      cache_positions: int32 [B, T], where in the cache each token is written, or None without a cache.
      dropout_key: None turns dropout off.
    """

    positions: jax.Array
    rotary: tuple[jax.Array, jax.Array]
    mask: jax.Array | None
    segment_ids: jax.Array | None
    cache_positions: jax.Array | None
    dropout_key: jax.Array | None


def layer_inputs(
    config: BackboneConfig,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    dropout_key: jax.Array | None = None,
    prefix_ids: jax.Array | None = None,
) -> LayerInputs:
    """The inputs of a layer beside x; arguments as in `apply`."""
    if cache is not None and segment_ids is not None:
        raise ValueError("packed rows and a cache do not go together: segment_ids must be None with a cache")
    rotary = layers.rotary_tables(
        positions, config.head_dim, config.rope_theta, config.scaling, config.max_position_embeddings
    )
    mask, cache_positions = None, None
    if cache is not None:
        count = kv_cache.length(cache)
        mask = jnp.arange(count)[None, None, :] <= positions[:, :, None]
        # padding is written past the end, which drops it
        cache_positions = jnp.where(positions < 0, count, positions)
    elif prefix_ids is not None or _kernel(config, positions.shape[1], dropout_key) == "plain":
        mask = layers.causal_mask(positions.shape[1], segment_ids, prefix_ids)
    return LayerInputs(positions, rotary, mask, segment_ids, cache_positions, dropout_key)


def _kernel(config: BackboneConfig, length: int, dropout_key: jax.Array | None) -> str:
    return fused_attention.choose(config, length, config.attention_dropout if dropout_key is not None else 0.0)


class Attention(nnx.Module):
    """Grouped-query attention.  Like all parts of a layer it holds one layer's parameters, or all layers' stacked."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs, num_layers: int | None = None):
        self.config = config
        width, dim = config.hidden_size, config.head_dim
        query, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
        new = functools.partial(layers.param, rngs, dtype=config.param_dtype, num_layers=num_layers)
        kernel = functools.partial(_new_kernel, self, rngs, num_layers)
        in_init = layers.fan_in_normal(width)
        out_init = layers.fan_in_normal(query, 1 / math.sqrt(2 * config.num_hidden_layers))
        kernel("q", (width, query), ("embed", "q_heads"), in_init)
        kernel("k", (width, kv), ("embed", "kv_heads"), in_init)
        kernel("v", (width, kv), ("embed", "kv_heads"), in_init)
        kernel("o", (query, width), ("q_rows", "width"), out_init)
        self.q_norm = new((dim,), ("head_dim",), jax.nn.initializers.ones)
        self.k_norm = new((dim,), ("head_dim",), jax.nn.initializers.ones)

    def __call__(
        self,
        x: jax.Array,
        inputs: LayerInputs,
        cache: KVCache | None = None,
        layer: int | jax.Array = 0,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, T, D] → [B, T, D], and the cache with these keys and values at layer `layer` (or None)."""
        q, k, v = self.project(x, *inputs.rotary)
        if cache is None:
            mixed = self._attend(q, k, v, inputs, dropout_key)
        else:
            # The whole cache is carried, so that XLA updates it in place.
            cache = kv_cache.write(cache, k, v, layer, inputs.cache_positions)
            if self.config.decode_kernel == "pallas" and decode_attention.fits(kv_cache.length(cache), q.shape[1]):
                mixed = decode_attention.decode_attention(
                    q, cache.k, cache.v, inputs.positions, layer, scales=(cache.k_scale, cache.v_scale))
            else:
                k, v = kv_cache.read(cache, layer, q.dtype)
                rate = self.config.attention_dropout
                mixed = layers.attention(q, k, v, inputs.mask, dropout_rate=rate, key=dropout_key)
        fsdp_over_tensor = self.config.fsdp_over_tensor
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        mixed = sharding.constrain(mixed, ("batch", "length", "q_heads"), fsdp_over_tensor)
        return _project(self, "o", mixed, ("q_rows", "width")), cache

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, D] → q [B, T, H, h] and k, v [B, T, K, h]; q and k normalised, then rotated."""
        config = self.config
        fsdp_over_tensor, eps = config.fsdp_over_tensor, config.rms_norm_eps
        # XLA:TPU aborts where it fuses these with each other and the reshapes of a batch of one row.
        separate = jax.lax.optimization_barrier if fsdp_over_tensor else lambda x: x

        def heads(name: str, axis: str) -> jax.Array:
            made = _project(self, name, x, ("embed", axis))
            return checkpoint_name(made, "qkv").reshape(*x.shape[:2], -1, config.head_dim)

        q, k, v = separate((heads("q", "q_heads"), heads("k", "kv_heads"), heads("v", "kv_heads")))
        q = layers.rotate(separate(layers.rms_norm(q, self.q_norm[...], eps)), cos, sin)
        k = layers.rotate(separate(layers.rms_norm(k, self.k_norm[...], eps)), cos, sin)
        q = sharding.constrain(q, ("batch", "length", "q_heads", "head_dim"), fsdp_over_tensor)
        k = sharding.constrain(k, ("batch", "length", "kv_heads", "head_dim"), fsdp_over_tensor)
        v = sharding.constrain(v, ("batch", "length", "kv_heads", "head_dim"), fsdp_over_tensor)
        return separate((q, k, v))

    def _attend(self, q, k, v, inputs: LayerInputs, dropout_key) -> jax.Array:
        config = self.config
        kernel = "plain" if inputs.mask is not None else _kernel(config, q.shape[1], dropout_key)

        def attend(q, k, v, inputs, key):
            if kernel != "plain":
                return fused_attention.KERNELS[kernel](q, k, v, inputs.segment_ids, config.fsdp_over_tensor)
            rate = config.attention_dropout
            return layers.attention(q, k, v, inputs.mask, causal=True, dropout_rate=rate, key=key)

        if config.remat == "none":
            attend = jax.checkpoint(attend)  # weights [B, H, T, S] cost more to store than to compute again
        return attend(q, k, v, inputs, dropout_key)


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs, num_layers: int | None = None):
        self.config = config
        width, inner = config.hidden_size, config.intermediate_size
        kernel = functools.partial(_new_kernel, self, rngs, num_layers)
        in_init = layers.fan_in_normal(width)
        out_init = layers.fan_in_normal(inner, 1 / math.sqrt(2 * config.num_hidden_layers))
        kernel("gate", (width, inner), ("embed", "mlp"), in_init)
        kernel("up", (width, inner), ("embed", "mlp"), in_init)
        kernel("down", (inner, width), ("mlp_rows", "width"), out_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] → [B, T, D]."""
        fsdp_over_tensor = self.config.fsdp_over_tensor

        def inner(name: str) -> jax.Array:
            made = _project(self, name, x, ("embed", "mlp"))
            return checkpoint_name(sharding.constrain(made, ("batch", "length", "mlp"), fsdp_over_tensor), name)

        gate, up = inner("gate"), inner("up")
        product = jax.nn.silu(gate) * up
        if fsdp_over_tensor:  # XLA:TPU would compute it once for each block of the matrix product
            product = jax.lax.optimization_barrier(product)
        return _project(self, "down", product, ("mlp_rows", "width"))


def _new_kernel(
    module: Attention | Mlp,
    rngs: nnx.Rngs,
    num_layers: int | None,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    init: jax.nn.initializers.Initializer,
) -> None:
    """Gives `module` the kernel `name`; of int8 weights (`int8.quantise_kernel`) room for it and for its scales."""
    config = module.config
    new = functools.partial(layers.param, rngs, num_layers=num_layers)
    if config.weight_dtype == "int8":
        zeros = jax.nn.initializers.zeros
        setattr(module, name, new(shape, axes, zeros, "int8"))
        setattr(module, name + int8.SCALE, new(shape[1:], axes[1:], zeros, "float32"))
    else:
        setattr(module, name, new(shape, axes, init, config.param_dtype))


def _project(module: Attention | Mlp, name: str, x: jax.Array, axes: tuple[str, str]) -> jax.Array:
    """`layers.project` with the kernel `name` of `module`, times its scales where it is int8."""
    config = module.config
    made = layers.project(x, getattr(module, name)[...], axes, config.fsdp_over_tensor)
    if config.weight_dtype != "int8":
        return made
    scale = getattr(module, name + int8.SCALE)[...]
    scale = jnp.expand_dims(scale, tuple(range(made.ndim - 1)))
    return (made.astype(jnp.float32) * scale).astype(made.dtype)


class DecoderLayer(nnx.Module):
    """One decoder layer; with `num_layers` the parameters of that many, stacked, of which `layers[n]` is one."""

    def __init__(self, config: BackboneConfig, rngs: nnx.Rngs, num_layers: int | None = None):
        self.config = config
        new = functools.partial(layers.param, rngs, dtype=config.param_dtype, num_layers=num_layers)
        self.attention_norm = new((config.hidden_size,), ("embed",), jax.nn.initializers.ones)
        self.attention = Attention(config, rngs, num_layers)
        self.mlp_norm = new((config.hidden_size,), ("embed",), jax.nn.initializers.ones)
        self.mlp = Mlp(config, rngs, num_layers)

    def __getitem__(self, layer: int) -> DecoderLayer:
        """Layer `layer` of stacked ones."""
        state = nnx.to_pure_dict(nnx.state(self))
        return nnx.merge(_abstract(DecoderLayer, self.config)[0], jax.tree.map(lambda x: x[layer], state))

    def __call__(
        self, x: jax.Array, inputs: LayerInputs, cache: KVCache | None = None, layer: int | jax.Array = 0
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, T, D] → [B, T, D].

        On a mesh the residual x is split by tokens over the tensor shards, and gathered for each half of the layer;
        with `config.fsdp_over_tensor` it is split by rows, and stays so.

        Args:
          cache: of all layers, or None; returned with this layer's keys and values.
          layer: this layer's number, which says where its cache is, and which dropout it has.
        """
        config = self.config
        keys: Any = (None, None, None)
        if inputs.dropout_key is not None:
            keys = jax.random.split(jax.random.fold_in(inputs.dropout_key, layer), 3)

        def split(x: jax.Array) -> jax.Array:
            return sharding.constrain(x, ("batch", "residual", "width"), config.fsdp_over_tensor)

        def normed(x: jax.Array, scale: nnx.Param) -> jax.Array:
            x = layers.rms_norm(x, scale[...], config.rms_norm_eps)
            return sharding.constrain(x, ("batch", "length", "width"), config.fsdp_over_tensor)

        x = split(x)
        mixed, cache = self.attention(normed(x, self.attention_norm), inputs, cache, layer, keys[1])
        x = x + layers.dropout(checkpoint_name(split(mixed), "output"), config.dropout, keys[0])
        inner = split(self.mlp(normed(x, self.mlp_norm)))
        return x + layers.dropout(inner, config.dropout, keys[2]), cache


class Backbone(nnx.Module):
    """The decoder as a module; see the functions below for its functional use."""

    def __init__(self, config: BackboneConfig, *, rngs: nnx.Rngs):
        self.config = config
        rows, width = config.padded_vocab_size, config.hidden_size
        new = functools.partial(layers.param, rngs, dtype=config.param_dtype)
        self.embed = new((rows, width), ("vocab_rows", "width"), layers.fan_in_normal(width))
        self.layers = DecoderLayer(config, rngs, config.num_hidden_layers)
        self.final_norm = new((width,), ("embed",), jax.nn.initializers.ones)
        if not config.tie_word_embeddings:
            self.lm_head = new((width, rows), ("embed", "vocab"), layers.fan_in_normal(width))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        dropout_key: jax.Array | None = None,
        prefix_ids: jax.Array | None = None,
        adapters: Params | None = None,
        grad_accum: Params | None = None,
        unstacked_layers: tuple[Params, ...] | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm; arguments as in `apply`, `adapters` as `lora.scaled` makes them."""
        config = self.config
        inputs = layer_inputs(config, positions, segment_ids, cache, dropout_key, prefix_ids)
        x = layers.embed_lookup(self.embed[...], tokens, config.dtype, config.fsdp_over_tensor)
        graph, stacked = nnx.split(self.layers)
        stacked = nnx.to_pure_dict(stacked)
        if grad_accum is not None:

            def run(inputs: LayerInputs, number: jax.Array, params: Params, x: jax.Array) -> jax.Array:
                return nnx.merge(graph, params)(x, inputs, None, number)[0]

            x = accumulate_scan.scan(run, x, stacked, grad_accum, inputs)
            return layers.rms_norm(x, self.final_norm[...], config.rms_norm_eps), None

        def one_layer(carry: tuple, layer: tuple) -> tuple[tuple, None]:
            number, params, adapters = layer
            params = lora.adapted(params, adapters) if adapters else params
            return nnx.merge(graph, params)(carry[0], inputs, carry[1], number), None

        one_layer = _rematerialised(config, one_layer)
        adapters = adapters or {}
        if unstacked_layers is None:
            numbers = jnp.arange(config.num_hidden_layers)
            (x, cache), _ = jax.lax.scan(one_layer, (x, cache), (numbers, stacked, adapters), unroll=config.unroll)
        else:
            for number, params in enumerate(unstacked_layers):
                own = jax.tree.map(lambda a, n=number: a[n], adapters)
                (x, cache), _ = one_layer((x, cache), (number, params, own))
        return layers.rms_norm(x, self.final_norm[...], config.rms_norm_eps), cache

    def lm_head_kernel(self) -> jax.Array:
        """[D, padded V] in the parameter's dtype; columns from `vocab_size` on are padding."""
        return self.embed[...].T if self.config.tie_word_embeddings else self.lm_head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] → float32 [..., V], the padding of the vocabulary left out."""
        kernel = self.lm_head_kernel().astype(hidden.dtype)
        scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return scores[..., : self.config.vocab_size]


def _rematerialised(config: BackboneConfig, one_layer: Any) -> Any:
    """`one_layer` that stores what `config.remat` says for the backward pass, and computes the rest again."""
    if config.remat == "none":
        return one_layer
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*config.kept)
    if config.remat == "dots":
        attended = policies.save_only_these_names(fused_attention.SAVED)
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attended)
    return jax.checkpoint(one_layer, policy=policy, prevent_cse=False)


@functools.lru_cache(maxsize=32)
def _abstract(module: type[Backbone | DecoderLayer], config: BackboneConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return layers.abstract_module(lambda: module(config, rngs=nnx.Rngs(0)))


def module(config: BackboneConfig, params: Params) -> Backbone:
    """The module that holds these parameters; cheap, meant for use inside `jax.jit`."""
    return nnx.merge(_abstract(Backbone, config)[0], lora.base(params))


def init_params(config: BackboneConfig, key: jax.Array) -> Params:
    """Fresh parameters, a plain nested dict of arrays in `param_dtype`; jit it with out_shardings to place them.

    Raises UserError for a config with int8 weights, which are made of trained ones.
    """
    if config.weight_dtype:
        raise UserError(f"model.weight_dtype={config.weight_dtype} is for inference.", 'Train with weight_dtype="".')
    return nnx.to_pure_dict(nnx.state(Backbone(config, rngs=nnx.Rngs(key))))


def param_shapes(config: BackboneConfig) -> Params:
    """The tree of `init_params` as ShapeDtypeStructs; nothing is allocated."""
    held = nnx.to_pure_dict(_abstract(Backbone, config)[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), held)


def param_axes(config: BackboneConfig) -> Params:
    """The tree of `init_params` with each array's logical axes, a tuple of one name a dimension."""
    held = _abstract(Backbone, config)[1]
    return nnx.to_pure_dict(held, extract_fn=lambda variable: variable.get_metadata("out_sharding"))


def apply(
    config: BackboneConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    *,
    dropout_key: jax.Array | None = None,
    prefix_ids: jax.Array | None = None,
    grad_accum: Params | None = None,
    unstacked_layers: tuple[Params, ...] | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Run the decoder.

    Args:
      params: the tree of `init_params`, with adapters or without (`models/lora.py`).
      tokens: int32 [B, T].
      positions: int32 [B, T], rotary positions. With a cache also where a token is written; a token at a
        negative position is padding and written nowhere (left padding), and right padding continues the positions: its
        keys are overwritten before any query can see them.
      segment_ids: int32 [B, T] for packed rows (no cache): a token sees earlier tokens of its own segment only. 0 is
        padding. None: plain causal attention.
      cache: keys and values so far; a query at position p sees the cache positions 0 … p.
      dropout_key: turns on the configured dropout.
      prefix_ids: int32 [B, T] for packed rows: the segment, beside its own, that a token sees (0: none), as answers to
        one prompt see it. Attention is the plain one then, whatever the platform.
      grad_accum: a tree like `params["layers"]`, sums of earlier gradients: the gradient with respect to it is
        `grad_accum` plus the gradient of the layers' parameters, and that of the parameters themselves is lost
        (`accumulate_scan.scan`). No cache, no adapters, and everything is recomputed.
      unstacked_layers: `unstack_layers(params)`, which is used in place of the stacked layers.

    Returns:
      hidden [B, T, D] after the final norm, in the compute dtype, and the cache with these tokens added (or None).
    """
    if cache is not None and config.fsdp_over_tensor:  # which is a layout of training
        config = dataclasses.replace(config, fsdp_over_tensor=False)
    return module(config, params)(
        tokens, positions, segment_ids, cache, dropout_key=dropout_key, prefix_ids=prefix_ids,
        adapters=lora.scaled(params), grad_accum=grad_accum, unstacked_layers=unstacked_layers,
    )  # fmt: skip


def unstack_layers(params: Params) -> tuple[Params, ...]:
    """The layers one by one, each in arrays of its own.

    XLA:CPU copies a layer's kernels out of the stacked ones each time before it multiplies with them. A program that
    calls the model many times copies them once in this way, at the cost of holding them twice.
    """
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.optimization_barrier(tuple(jax.tree.map(lambda x, n=n: x[n], stacked) for n in range(count)))


@functools.partial(jax.jit, static_argnames="config")
def apply_layer(config: BackboneConfig, layer: Params, x: jax.Array, positions: jax.Array) -> jax.Array:
    """One layer alone, for a model that does not fit into memory: x [B, T, D] → [B, T, D], causal, no cache.

    `layer` is a slice of `params["layers"]`, without its leading axis; positions int32 [B, T].
    """
    model = nnx.merge(_abstract(DecoderLayer, config)[0], layer)
    return model(x, layer_inputs(config, positions))[0]


def logits(config: BackboneConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] → float32 [..., V]."""
    return module(config, params).logits(hidden)


def lm_head(config: BackboneConfig, params: Params) -> jax.Array:
    """The output matrix [D, padded V] for losses that work in chunks; mask columns from `vocab_size` on."""
    return module(config, params).lm_head_kernel()
