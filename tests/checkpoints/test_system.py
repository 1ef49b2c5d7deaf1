"""What a checkpoint may be loaded as: how it computes may change, which model it is may not."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax import sharding
from ivr_jax.checkpoints import store
from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, int8, lora
from ivr_jax.models.backbone_config import BackboneConfig

CONFIG = BackboneConfig(
    vocab_size=21, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    params = backbone.init_params(CONFIG, jax.random.key(0))
    checkpointer = store.Checkpointer(folder)
    checkpointer.save(0, {"params": params}, None, {"kind": systems.BACKBONE, "model": dataclasses.asdict(CONFIG)})
    checkpointer.close()
    return folder, params


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_the_vocabulary_is_padded_and_cast_as_it_is_read(saved, multiple):
    folder, params = saved
    config = dataclasses.replace(CONFIG, vocab_multiple=multiple, param_dtype="bfloat16")
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    like = sharding.abstract_sharded(mesh, backbone.param_axes(config), backbone.param_shapes(config))
    read, _ = store.read_params(folder, systems.BACKBONE, like, systems.VOCABULARY)
    rows = config.padded_vocab_size
    assert read["embed"].shape == (rows, 8) and read["lm_head"].shape == (8, rows)
    for ours, theirs in ((read["embed"], params["embed"]), (read["lm_head"].T, params["lm_head"].T)):
        assert ours.dtype == "bfloat16" and not np.asarray(ours[21:], np.float32).any()
        np.testing.assert_array_equal(np.asarray(ours[:21]), np.asarray(theirs.astype("bfloat16")))


@pytest.mark.parametrize(("name", "value"), [
    ("hidden_size", 16), ("num_hidden_layers", 3), ("rope_theta", 1e4), ("max_position_embeddings", 7),
    ("rms_norm_eps", 1e-5), ("tie_word_embeddings", True),
])  # fmt: skip
def test_an_option_that_makes_it_another_model_is_named(name, value):
    with pytest.raises(UserError) as caught:
        systems._config(dataclasses.asdict(CONFIG), {name: value}, "run")
    assert f"model.{name}" in caught.value.what and repr(value) in caught.value.what


@pytest.mark.parametrize("adapted", [False, True])
def test_int8_weights_read_one_kernel_at_a_time_are_those_of_the_whole_checkpoint(saved, tmp_path, adapted):
    folder, params = saved
    if adapted:
        options = lora.LoraOptions(2, 4.0, ("q", "down"))
        params = lora.add(params, options, jax.random.key(1))
        params["lora"] = jax.tree.map(lambda x: x + 0.1, params["lora"])
        meta = {"kind": systems.BACKBONE, "model": dataclasses.asdict(CONFIG), "lora": dataclasses.asdict(options)}
        folder, checkpointer = tmp_path, store.Checkpointer(tmp_path)
        checkpointer.save(0, {"params": params}, None, meta)
        checkpointer.close()
    like = backbone.param_shapes(CONFIG)
    expected = int8.quantise_kernels(store.read_params(folder, systems.BACKBONE, like)[0])
    found, meta = systems._read_quantised(folder, like)
    assert jax.tree.structure(found) == jax.tree.structure(expected) and meta["kind"] == systems.BACKBONE
    assert found["layers"]["mlp"]["down"].dtype == "int8"
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        one_step = 1 if ours.dtype == "int8" else 0  # of a compiled division
        np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=1e-6, atol=one_step)


def test_options_of_how_it_computes_are_taken():
    wanted = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full", "vocab_multiple": 4, "dropout": 0.1,
              "hidden_size": 8}  # fmt: skip
    config = systems._config(dataclasses.asdict(CONFIG), wanted, "run")
    assert all(getattr(config, name) == value for name, value in wanted.items())


@pytest.mark.parametrize(("area", "cells"), [(0, (4, 4)), (512 * 512, (32, 32)), (100 * 100, (6, 6))])
def test_images_without_a_source_have_the_area_that_is_asked_for(area, cells):
    image_codec = types.SimpleNamespace(config=types.SimpleNamespace(resolution=64, factor=16))
    assert systems.System(CONFIG, None, None, image_codec, {}, area=area).cells == cells


def test_a_mesh_is_given_as_it_is_or_by_what_the_config_asks_for():
    mesh = sharding.local_mesh()
    for given in (mesh, lambda config: mesh):  # a mesh can be called as well
        assert systems.load("micro", mesh=given).mesh is mesh


def test_a_sharded_fingerprint_tells_other_values_and_the_same_ones_in_another_place():
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    one = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(4, jnp.bfloat16), "c": jnp.int32(3)}
    others = [
        {**one, "a": one["a"].at[1, 2].add(1e-6)},
        {**one, "a": one["a"].at[0].set(one["a"][1]).at[1].set(one["a"][0])},
        {**one, "b": one["b"].at[3].set(-0.0)},
        {**one, "c": jnp.int32(4)},
    ]
    found = [systems.sharded_fingerprint(tree, mesh) for tree in (one, jax.tree.map(jnp.copy, one), *others)]
    assert found[0] == found[1] and len(set(found)) == 1 + len(others)
