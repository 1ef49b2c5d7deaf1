"""Splash attention, run by Pallas' interpreter on the CPU, against the plain attention; and which kernel is chosen."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax.errors import UserError
from ivr_jax.models import fused_attention, layers
from ivr_jax.models.backbone_config import BackboneConfig

CONFIG = BackboneConfig(64, 256, 512, 2, 4, 2, 128, dtype="bfloat16")


def packed(batch: int = 1, length: int = 256, heads: int = 4, kv_heads: int = 2, dim: int = 128):
    """q, k, v with grouped heads, and rows packed of two segments and padding."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, length, n, dim)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.zeros((batch, length), np.int32)
    segments[:, :100], segments[:, 100:230] = 1, 2
    return q, k, v, jnp.asarray(segments)


@pytest.mark.parametrize("length", [256, 200])  # 200: padded to the kernel's tile
def test_splash_attention_equals_plain_attention_with_segments_and_grouped_heads(length):
    q, k, v, segments = packed(length=length)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def value(attend, q, k, v):
        mixed = attend(q, k, v)
        return (mixed * weights).sum(), mixed

    def run(attend):
        return jax.value_and_grad(functools.partial(value, attend), (0, 1, 2), has_aux=True)(q, k, v)

    mask = layers.causal_mask(segments.shape[1], segments)
    (_, expected), expected_gradients = run(lambda q, k, v: layers.attention(q, k, v, mask))
    splash = functools.partial(fused_attention.splash_attention, segment_ids=segments, interpret=True)
    with jax.numpy_rank_promotion("allow"):  # the kernel is JAX's own
        (_, found), gradients = run(splash)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("kind, block, keys", [("TPU v4", 512, 1024), ("TPU v5 lite", 1024, 2048)])
def test_blocks_fit_the_vector_memory_of_the_chip(monkeypatch, kind, block, keys):
    made = []
    monkeypatch.setattr(fused_attention.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention")
    monkeypatch.setattr(splash, "make_splash_mha", lambda mask, block_sizes, **rest: made.append(block_sizes))
    fused_attention._splash_kernel(2, 4096, 1, 1, fused_attention.largest_block(), False)
    assert (made[0].block_q, made[0].block_q_dkv, made[0].block_kv_dkv) == (block, block, keys)


SHARDED = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from models.test_fused_attention import packed
from ivr_jax import sharding
from ivr_jax.models import fused_attention, layers
q, k, v, segments = packed(batch=2)
expected = layers.attention(q, k, v, layers.causal_mask(segments.shape[1], segments))
for mesh in json.loads(sys.argv[1]):
    over_tensor = mesh.pop("fsdp_over_tensor", False)
    splash = functools.partial(fused_attention.splash_attention, fsdp_over_tensor=over_tensor, interpret=True)
    splash = jax.jit(splash)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        found = splash(q, k, v, segments)
    print(float(jnp.abs(jax.device_get(found) - expected).max()))
"""


def test_splash_attention_on_a_mesh_equals_plain_attention():
    """Rows over fsdp, heads (or rows as well) over tensor, and queries over sequence with all keys at hand."""
    meshes = [{"fsdp": 2, "tensor": 2}, {"tensor": 2, "sequence": 2}]
    meshes += [{"tensor": 2, "sequence": 2, "fsdp_over_tensor": True}]
    lines = commands.on_devices(4, SHARDED, json.dumps(meshes), JAX_NUMPY_RANK_PROMOTION="allow")
    errors = [float(line) for line in lines]
    assert len(errors) == 3 and max(errors) < 2e-5


@pytest.mark.parametrize(
    ("platform", "change", "length", "dropout", "kernel"),
    [
        ("tpu", {}, 256, 0.0, "splash"),
        ("tpu", {}, 200, 0.0, "splash"),
        ("tpu", {"attention": "plain"}, 256, 0.0, "plain"),
        ("gpu", {}, 200, 0.0, "cudnn"),
        ("cpu", {}, 256, 0.0, "plain"),
    ],
)
def test_the_kernel_is_chosen_by_platform_and_shape(monkeypatch, platform, change, length, dropout, kernel):
    monkeypatch.setattr(fused_attention, "platform", lambda: platform)
    assert fused_attention.choose(dataclasses.replace(CONFIG, **change), length, dropout) == kernel


@pytest.mark.parametrize(
    ("platform", "change", "dropout"),
    [("tpu", {"head_dim": 32}, 0.0), ("tpu", {}, 0.1), ("gpu", {"dtype": "float32"}, 0.0)],
)
def test_plain_attention_on_an_accelerator_warns(monkeypatch, platform, change, dropout):
    monkeypatch.setattr(fused_attention, "platform", lambda: platform)
    with pytest.warns(UserWarning):
        kernel = fused_attention.choose(dataclasses.replace(CONFIG, **change), 256, dropout)
    assert kernel == "plain"


@pytest.mark.parametrize("segmented", [True, False])
def test_cudnn_attention_has_the_semantics_of_plain_attention(segmented):
    """The same masks through XLA's implementation of the function; cuDNN itself needs a GPU."""
    q, k, v, segments = packed(length=96, dim=32)
    segments = segments if segmented else None
    found = fused_attention.cudnn_attention(q, k, v, segments, implementation="xla")
    np.testing.assert_allclose(found, layers.attention(q, k, v, layers.causal_mask(96, segments)), atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"attention": "splash", "head_dim": 32}, {"attention": "cudnn", "dtype": "float32"}]
)
def test_a_named_kernel_that_does_not_fit_is_refused(change):
    with pytest.raises(UserError) as error:
        fused_attention.choose(dataclasses.replace(CONFIG, **change), 256)
    assert change["attention"] in error.value.what


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, attention="fast")
    assert "attention" in error.value.what
