"""The sharding table, and the decoder on eight devices against the same on one."""

from __future__ import annotations

import functools
import json
import math

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, image_tokenizer, kv_cache, lora
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.training import state
from ivr_jax.training.optimizer import make_optimizer

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2, "sequence": 2},
          {"data": 2, "fsdp": 2, "tensor": 2, "gather": True}]  # gather: config.model.fsdp_over_tensor
EMU35 = BackboneConfig(
    vocab_size=282926, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, vocab_multiple=512,
)  # fmt: skip

# For each mesh: one training step of fine-tuning on padded, packed rows in two micro-batches, and one decoding step.
# The devices recompute everything and add gradients in place, the one that they are compared with does neither.
# Prints the relative errors against one device of the loss, the gradients (the optimiser keeps them as its state) and
# the decoded hidden states; how many shards the largest parameter and its moment have; and on how many devices the
# state that was saved on the mesh came back bit for bit; and whether the fingerprint of the same parameters is that on
# one device.
SCRIPT = """
import dataclasses, functools, json, sys, tempfile
import jax, jax.numpy as jnp, numpy as np, optax
from ivr_jax import sharding
from ivr_jax.models import backbone, kv_cache
from ivr_jax.training import sft, state
from ivr_jax.checkpoints.store import Checkpointer
from ivr_jax.checkpoints.system import sharded_fingerprint
plain = config = backbone.BackboneConfig(41, 32, 64, 2, 4, 2, 16, vocab_multiple=16)
rng, rows = np.random.default_rng(0), 16
positions = np.broadcast_to(np.arange(64, dtype=np.int32) % 40, (rows, 64))
segments = np.where(np.arange(64) < 40, 1, 2 * (np.arange(rows)[:, None] % 3 > 0)).astype(np.int32)
batch = {"tokens": rng.integers(0, 41, (rows, 64)).astype(np.int32), "positions": positions, "segment_ids": segments,
         "loss": rng.integers(0, 2, (rows, 64)).astype(np.uint8)}
axes = backbone.param_axes(config)
init = functools.partial(backbone.init_params, config, jax.random.key(0))
optimizer = optax.chain(optax.trace(0.0), optax.scale(-1e-3))

@jax.jit
def decode(params, tokens):
    cache = kv_cache.init_cache(config, rows, 64)
    return backbone.apply(config, params, tokens[:, :1], jnp.zeros((rows, 1), jnp.int32), cache=cache)[0]

def run(mesh, **changes):
    config = dataclasses.replace(plain, **changes)
    with jax.set_mesh(mesh):
        first, placed = state.shard_state(mesh, axes, init, optimizer)
        given = sharding.global_batch(mesh, batch, rows)
        decoded = decode(first.params, given["tokens"])
        after, sums = sft.make_step(config, optimizer, 256, 2, 20, placed)(first, given)
    return after, decoded, float(sums["loss"][0] / sums["loss"][1])

def fingerprint(params):
    return sharded_fingerprint(params, params["embed"].sharding.mesh)

def came_back(saved):
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(folder)
        checkpointer.save(1, saved, {}, {})
        checkpointer.wait()
        for sizes in ({}, {"fsdp": 2}, {"data": 2, "tensor": 2}):
            mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod([1, *sizes.values()]))])
            like = sharding.abstract_sharded(mesh, sharding.state_axes(axes, saved.params, saved), saved)
            restored = checkpointer.restore(like).state
            same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((np.asarray(a) == np.asarray(b)).all()),
                                restored, saved)
            if all(jax.tree.leaves(same)):
                counts.append(len(restored.params["embed"].sharding.device_set))
        checkpointer.close()
    return counts

def error(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())

def shards(x):
    return x.size // x.addressable_shards[0].data.size

alone, expected, expected_loss = run(sharding.make_mesh({}, jax.devices()[:1]))
for sizes in json.loads(sys.argv[1]):
    gather = sizes.pop("gather", False)
    after, decoded, loss = run(sharding.make_mesh(sizes), remat="full", fsdp_over_tensor=gather)
    gradients, theirs = after.opt_state[0].trace, alone.opt_state[0].trace
    moved = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), alone.params, after.params)
    worst = max(jax.tree.leaves(jax.tree.map(error, gradients, theirs)))
    print(json.dumps({
        "loss": abs(loss / expected_loss - 1), "gradients": worst,
        "same_fingerprint": fingerprint(moved) == fingerprint(alone.params) != fingerprint(after.params),
        "decoded": error(decoded, expected), "restored_on": came_back(after) if sizes == {"fsdp": 8} else None,
        "shards": [shards(tree["layers"]["mlp"]["up"]) for tree in (after.params, gradients)]}))
"""


@pytest.fixture(scope="module")
def on_eight_devices():
    return [json.loads(line) for line in commands.on_devices(8, SCRIPT, json.dumps(MESHES))]


@pytest.mark.parametrize("index", range(len(MESHES)), ids=lambda i: "x".join(f"{k}{v}" for k, v in MESHES[i].items()))
def test_eight_devices_equal_one(on_eight_devices, index):
    got, mesh = on_eight_devices[index], MESHES[index]
    assert got["loss"] < 1e-5 and got["gradients"] < 1e-5 and got["decoded"] < 1e-5
    assert got["same_fingerprint"]
    assert got["shards"] == [mesh.get("fsdp", 1) * mesh.get("tensor", 1)] * 2


def test_a_state_saved_on_eight_devices_comes_back_on_fewer(on_eight_devices):
    assert on_eight_devices[0]["restored_on"] == [1, 2, 4]


def test_one_device_uses_the_same_path():
    config = BackboneConfig(20, 8, 16, 1, 2, 1, 4)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    init = functools.partial(backbone.init_params, config, jax.random.key(0))
    (params, _), _ = state.shard_state(mesh, backbone.param_axes(config), init, optax.sgd(1e-3))
    expected = jax.jit(init)()
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected)))
    assert params["embed"].sharding.spec == PartitionSpec(("tensor", "fsdp"), None)


PIXELS = ImageTokenizerConfig(256, 3, (1, 1, 2, 2, 4), 4, (16,), 3, 256, 256, 131072, 256)


@pytest.mark.parametrize(
    ("make", "axes"),
    [
        (lambda: backbone.Backbone(EMU35, rngs=nnx.Rngs(0)), backbone.param_axes(EMU35)),
        (lambda: image_tokenizer.ImageTokenizer(PIXELS, rngs=nnx.Rngs(0)), image_tokenizer.param_axes(PIXELS)),
    ],
    ids=["backbone", "image tokenizer"],
)
def test_flax_sees_the_axes_and_its_rules_give_our_partition(make, axes):
    model = nnx.eval_shape(make)
    names, tree = jax.tree.flatten(axes, is_leaf=lambda x: isinstance(x, tuple))
    logical = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
    assert logical == tree.unflatten([PartitionSpec(*a) for a in names])
    with nnx.logical_axis_rules(tuple(sharding.RULES.items())):
        on_mesh = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))
    assert on_mesh == tree.unflatten([sharding.partition(a) for a in names])


def test_every_parameter_of_the_full_models_is_covered():
    mesh = AbstractMesh((1, 32, 4, 1), sharding.MESH_AXES)
    placed = sharding.shardings(mesh, backbone.param_axes(EMU35), backbone.param_shapes(EMU35))
    assert placed["layers"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["lm_head"].spec == PartitionSpec("fsdp", "tensor")
    assert placed["layers"]["mlp"]["down"].spec == PartitionSpec(None, ("tensor", "fsdp"), None)
    placed = sharding.shardings(mesh, image_tokenizer.param_axes(PIXELS), image_tokenizer.param_shapes(PIXELS))
    assert placed["quantize"]["embedding"]["weight"].spec == PartitionSpec("fsdp", None)
    cache = jax.eval_shape(lambda: kv_cache.init_cache(EMU35, 64, 8192))
    assert sharding.sharding(mesh, kv_cache.CACHE_AXES, cache.k.shape).spec[2] == "tensor"


def test_a_large_axis_that_does_not_divide_is_an_error_with_advice():
    mesh = AbstractMesh((1, 1, 4, 1), sharding.MESH_AXES)
    bare = BackboneConfig(**{**EMU35.__dict__, "vocab_multiple": 1})
    with pytest.raises(UserError) as error:
        sharding.shardings(mesh, backbone.param_axes(bare), backbone.param_shapes(bare))
    assert "282926" in error.value.what and "vocab_multiple" in error.value.remedy
    with pytest.raises(UserError) as error:
        sharding.sharding(mesh, ("mlp",), (sharding.LARGE + 6,))
    assert "2 shards" in error.value.remedy
    assert sharding.sharding(mesh, ("mlp",), (6,)).spec == PartitionSpec(None)


def test_a_large_array_that_would_be_replicated_is_an_error():
    mesh = AbstractMesh((1, 2, 1, 1), sharding.MESH_AXES)
    with pytest.raises(UserError):
        sharding.sharding(mesh, ("layers", "head_dim"), (1024, 1024))


@pytest.mark.parametrize("sizes", [(1, 32, 4, 1), (1, 1, 4, 1)])
def test_adapters_of_the_full_model_have_places(sizes):
    """Those whose axis no mesh axis splits are replicated."""
    options = lora.LoraOptions(64, 64.0, ("q", "k", "v", "o", "down"))
    shapes, axes = backbone.param_shapes(EMU35), lora.axes(backbone.param_axes(EMU35), options)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    shapes = jax.eval_shape(lambda: lora.add(zeros(shapes), options, jax.random.key(0)))
    mesh = AbstractMesh(sizes, sharding.MESH_AXES)
    placed = sharding.shardings(mesh, axes, shapes)[lora.ADAPTERS]["attention"]
    assert placed["q"]["a"].spec == PartitionSpec(None, "fsdp", None)
    assert placed["q"]["b"].spec == PartitionSpec(None, None, "tensor")
    assert placed["o"]["a"].spec == PartitionSpec(None, ("tensor", "fsdp"), None)
    assert placed["o"]["b"].spec == PartitionSpec(None, None, None)


def test_two_axes_on_one_mesh_axis_collide():
    for axes, named in ((("vocab", "mlp"), "tensor"), (("nonsense",), "nonsense")):
        with pytest.raises(ValueError) as error:
            sharding.partition(axes)
        assert named in str(error.value)
    assert sharding.partition(("batch", None)) == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize("shape", [{"data": 3}, {"rows": 1}, {"data": 0}, {"data": -1, "fsdp": -1}, {"tensor": -2}])
def test_impossible_meshes_are_refused(shape):
    with pytest.raises(UserError):
        sharding.make_mesh(shape, jax.devices()[:1])


def test_pinning_without_a_mesh_does_nothing():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, ("batch", "width")) is x


def test_moments_are_sharded_as_their_parameters_and_nothing_large_is_replicated():
    """Muon keeps other moments for matrices than for the rest, in trees with holes."""
    config = ConfigDict({"kind": "muon", "learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup_ratio": 0.1,
                         "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
                         "clip_norm": 1.0, "moment_dtype": "float32"})  # fmt: skip
    shapes, axes = backbone.param_shapes(EMU35), backbone.param_axes(EMU35)
    moments = jax.eval_shape(make_optimizer(config, 100).init, shapes)
    mesh = AbstractMesh((1, 32, 4, 1), sharding.MESH_AXES)
    placed = sharding.shardings(mesh, sharding.state_axes(axes, shapes, moments), moments)
    large = [(leaf.shape, place.spec) for leaf, place in
             zip(jax.tree.leaves(moments), jax.tree.leaves(placed), strict=True) if math.prod(leaf.shape) > 1 << 20]
    assert len(large) == 7 + 2 * 2  # one moment of each matrix in the layers, two of embedding and output matrix
    for _, spec in large:
        names = {name for part in spec for name in ((part,) if isinstance(part, str) else part or ())}
        assert names & {"fsdp", "tensor"}
    stray = {"cache": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    with pytest.raises(UserError) as error:
        sharding.shardings(mesh, sharding.state_axes(axes, shapes, stray), stray)
    assert "cache" in error.value.what


def test_a_batch_must_divide_over_the_mesh():
    mesh = AbstractMesh((2, 4, 1, 1), sharding.MESH_AXES)
    sharding.check_batch(mesh, 16, "config.batch")
    with pytest.raises(UserError) as error:
        sharding.check_batch(mesh, 12, "config.batch")
    assert "config.batch" in error.value.what and "8" in error.value.remedy
    with pytest.raises(UserError) as error:
        sharding.check_batch(AbstractMesh((1, 4, 2, 1), sharding.MESH_AXES), 4, "micro_batch", fsdp_over_tensor=True)
    assert "micro_batch" in error.value.what and "fsdp_over_tensor" in error.value.what


def test_fsdp_over_tensor_splits_rows_alone():
    axes = ("batch", "residual", "q_heads")
    assert sharding.partition(axes[:2]) == PartitionSpec(("data", "fsdp"), ("sequence", "tensor"))
    expected = PartitionSpec(("data", "fsdp", "tensor"), ("sequence",), None)
    assert sharding.partition(axes, fsdp_over_tensor=True) == expected


def test_a_batch_is_split_along_rows_and_tokens():
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    batch = sharding.global_batch(mesh, {"tokens": np.ones((4, 6), np.int32), "advantages": np.ones(4)}, 4)
    assert batch["tokens"].sharding.spec == PartitionSpec(("data", "fsdp"), "sequence")
    assert batch["advantages"].sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(sharding.local_rows(mesh, 4), np.arange(4))
    given = sharding.global_batch(mesh, {"free": np.ones((4, 2, 6))}, 4, {"free": ("batch", None, "length")})
    assert given["free"].sharding.spec == PartitionSpec(("data", "fsdp"), None, "sequence")


def test_shapes_asked_for_under_a_mesh_are_free_of_it():
    """They are remembered, and a checkpoint may be read into them when that mesh is long gone."""
    config = BackboneConfig(20, 8, 16, 1, 2, 1, 4, rope_theta=2e4)  # one that nobody asked for before
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        shapes = backbone.param_shapes(config)
    assert {leaf.sharding for leaf in jax.tree.leaves(shapes)} == {None}
