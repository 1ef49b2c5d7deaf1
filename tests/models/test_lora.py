"""Adapters: what they change, what they leave alone, and that a merged model computes the same."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG, TOKENIZER, noisy_params

from ivr_jax.checkpoints import store
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, kv_cache, lora
from ivr_jax.training import sft, state

OPTIONS = lora.LoraOptions(3, 6.0, ("q", "o", "down"))
PARAMS = noisy_params()


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12)), jnp.int32)


@jax.jit
def hidden_of(params):
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12))
    return backbone.apply(CONFIG, params, tokens(), positions)[0]


def filled() -> dict:
    """Adapters whose B is not zero."""
    params = lora.add(PARAMS, OPTIONS, jax.random.key(0))
    rng = np.random.default_rng(1)
    for group in params[lora.ADAPTERS].values():
        for pair in group.values():
            pair["b"] = jnp.asarray(rng.normal(0, 0.1, pair["b"].shape), jnp.float32)
    return params


def test_fresh_adapters_change_nothing_and_filled_ones_are_what_merging_adds():
    np.testing.assert_array_equal(hidden_of(lora.add(PARAMS, OPTIONS, jax.random.key(0))), hidden_of(PARAMS))
    params = filled()
    merged = lora.merge(params)
    pair = params["lora"]["mlp"]["down"]
    by_hand = np.asarray(PARAMS["layers"]["mlp"]["down"]) + 2.0 * np.asarray(pair["a"]) @ np.asarray(pair["b"])
    np.testing.assert_allclose(merged["layers"]["mlp"]["down"], by_hand, atol=1e-5)
    assert merged["layers"]["mlp"]["up"] is PARAMS["layers"]["mlp"]["up"]
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(hidden_of(params), hidden_of(merged), rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(hidden_of(params) - hidden_of(PARAMS))).max() > 0.1


@pytest.mark.parametrize("params", [PARAMS, filled()], ids=["plain", "adapters"])
def test_layers_taken_apart_decode_the_same(params):
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], (2, 12))

    @functools.partial(jax.jit, static_argnames="apart")
    def decode(params, apart):
        layers, cache = backbone.unstack_layers(params) if apart else None, kv_cache.init_cache(CONFIG, 2, 16)
        return backbone.apply(CONFIG, params, tokens(), positions, cache=cache, unstacked_layers=layers)

    scanned, taken = decode(params, False), decode(params, True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), taken, scanned)


def test_training_moves_adapters_alone_and_the_checkpoint_reads_back_merged(tmp_path):
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    batch = {"tokens": np.asarray(tokens()), "positions": positions, "segment_ids": np.ones((2, 12), np.int32),
             "loss": np.ones((2, 12), np.uint8)}  # fmt: skip
    optimizer = optax.adamw(1e-2)
    params = lora.add(jax.tree.map(jnp.copy, PARAMS), OPTIONS, jax.random.key(0))
    first = state.TrainState(params, optimizer.init(lora.split(params)[0]))
    step = sft.make_step(CONFIG, optimizer, 8, 1, TOKENIZER.vocab.visual_start)
    after, metrics = step(first, batch)
    for name, before in lora.base(PARAMS).items():
        jax.tree.map(np.testing.assert_array_equal, after.params[name], before)
    moved = after.params["lora"]["attention"]["q"]["b"]
    assert np.abs(np.asarray(moved)).max() > 1e-3 and metrics["grad_norm"] > 0
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(after.params["lora"]))
    checkpointer = store.Checkpointer(tmp_path)
    checkpointer.save(1, after, None, {"kind": "backbone", "lora": dataclasses.asdict(OPTIONS)})
    checkpointer.wait()
    checkpointer.close()
    read, _ = store.read_params(tmp_path, "backbone", backbone.param_shapes(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, read, lora.merge(after.params))


@pytest.mark.parametrize("wrong", [(2, 1.0, ("embed",)), (2, 1.0, ("q", "q")), (2, 0.0, ("q",)), (2, 1.0, ())])
def test_impossible_options(wrong):
    with pytest.raises(UserError):
        lora.LoraOptions(*wrong)
