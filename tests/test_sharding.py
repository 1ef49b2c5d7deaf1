"""The sharding table, and the decoder on eight devices against the same on one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, image_tokenizer
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig

MESHES = [
    {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 2, "sequence": 2},
]  # fmt: skip
EMU35 = BackboneConfig(
    vocab_size=282926, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
    num_key_value_heads=8, head_dim=128, vocab_multiple=512,
)  # fmt: skip

# Prints, for each mesh, the loss, the gradients' worst relative error against one device, and how many shards of the
# largest parameter there are; then the same for one decoding step.
SCRIPT = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from ivr_jax import sharding
from ivr_jax.models import backbone
config = backbone.BackboneConfig(40, 32, 64, 2, 4, 2, 16, vocab_multiple=16, remat="full")
tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 64)), jnp.int32)
positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32)[None], tokens.shape)
segments = jnp.where(positions < 40, 1, 2)
init = functools.partial(backbone.init_params, config)

def step(params, tokens):
    def loss(params):
        hidden, _ = backbone.apply(config, params, tokens, positions, segments)
        log_p = jax.nn.log_softmax(backbone.logits(config, params, hidden))
        return -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], 2).mean()
    cache = backbone.init_cache(config, 8, 64)
    decoded, _ = backbone.apply(config, params, tokens[:, :1], positions[:, :1], cache=cache)
    return jax.value_and_grad(loss)(params), decoded

def run(mesh, devices):
    mesh = sharding.make_mesh(mesh, devices)
    with jax.set_mesh(mesh):
        params = sharding.sharded_init(mesh, init, backbone.param_axes(config), jax.random.key(0))
        placed = sharding.sharding(mesh, ("batch", "length"), tokens.shape)
        return params, jax.jit(step)(params, jax.device_put(tokens, placed))

_, ((expected_loss, expected), expected_decoded) = run({}, jax.devices()[:1])
for mesh in json.loads(sys.argv[1]):
    params, ((loss, gradients), decoded) = run(mesh, None)
    error = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
    worst = max(jax.tree.leaves(jax.tree.map(error, gradients, expected)))
    up = params["layers"]["mlp"]["up"]
    print(json.dumps({"loss": abs(float(loss) - float(expected_loss)), "gradients": worst,
                      "decoded": error(decoded, expected_decoded),
                      "shards": up.size // up.addressable_shards[0].data.size}))
"""


@pytest.fixture(scope="module")
def on_eight_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(MESHES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=os.getcwd())
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("index", range(len(MESHES)), ids=lambda i: "x".join(f"{k}{v}" for k, v in MESHES[i].items()))
def test_eight_devices_equal_one(on_eight_devices, index):
    got, mesh = on_eight_devices[index], MESHES[index]
    assert got["loss"] < 1e-5 and got["gradients"] < 1e-5 and got["decoded"] < 1e-5
    assert got["shards"] == mesh.get("fsdp", 1) * mesh.get("tensor", 1)


def test_one_device_uses_the_same_path():
    config = BackboneConfig(20, 8, 16, 1, 2, 1, 4)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    init = functools.partial(backbone.init_params, config)
    params = sharding.sharded_init(mesh, init, backbone.param_axes(config), jax.random.key(0))
    expected = jax.jit(init)(jax.random.key(0))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected)))
    assert params["embed"].sharding.spec == PartitionSpec("tensor", "fsdp")


def test_every_parameter_of_the_full_models_is_covered():
    mesh = AbstractMesh((1, 32, 4, 1), sharding.MESH_AXES)
    placed = sharding.shardings(mesh, backbone.param_axes(EMU35), backbone.param_shapes(EMU35))
    assert placed["layers"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["lm_head"].spec == PartitionSpec("fsdp", "tensor")
    pixels = ImageTokenizerConfig(256, 3, (1, 1, 2, 2, 4), 4, (16,), 3, 256, 256, 131072, 256)
    placed = sharding.shardings(mesh, image_tokenizer.param_axes(pixels), image_tokenizer.param_shapes(pixels))
    assert placed["quantize"]["embedding"]["weight"].spec == PartitionSpec("fsdp", None)
    cache = jax.eval_shape(lambda: backbone.init_cache(EMU35, 64, 8192))
    assert sharding.shardings(mesh, backbone.CACHE_AXES, cache).k.spec[3] == "tensor"


def test_a_large_axis_that_does_not_divide_is_an_error_with_advice():
    mesh = AbstractMesh((1, 1, 4, 1), sharding.MESH_AXES)
    with pytest.raises(UserError, match="embed.*282926.*vocab_multiple"):
        bare = BackboneConfig(**{**EMU35.__dict__, "vocab_multiple": 1})
        sharding.shardings(mesh, backbone.param_axes(bare), backbone.param_shapes(bare))
    with pytest.raises(UserError, match="at most 2 shards"):
        sharding.sharding(mesh, ("mlp",), (sharding.LARGE + 6,))
    assert sharding.sharding(mesh, ("mlp",), (6,)).spec == PartitionSpec(None)


def test_a_large_array_left_whole_is_an_error():
    mesh = AbstractMesh((1, 2, 1, 1), sharding.MESH_AXES)
    with pytest.raises(UserError, match="whole on every device"):
        sharding.sharding(mesh, ("layers", "head_dim"), (1024, 1024))


def test_two_axes_on_one_mesh_axis_collide():
    with pytest.raises(ValueError, match="tensor"):
        sharding.partition(("vocab", "mlp"))
    with pytest.raises(ValueError, match="nonsense"):
        sharding.partition(("nonsense",))
    assert sharding.partition(("batch", None)) == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize("shape", [{"data": 3}, {"rows": 1}, {"data": 0}, {"data": -1, "fsdp": -1}, {"tensor": -2}])
def test_impossible_meshes_are_refused(shape):
    with pytest.raises(UserError):
        sharding.make_mesh(shape, jax.devices()[:1])


def test_pinning_without_a_mesh_does_nothing():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, ("batch", "width")) is x
