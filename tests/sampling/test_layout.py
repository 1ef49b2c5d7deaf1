"""The rollout layout on eight devices: weights and cache cut, the same guided answers, no way through the host."""

from __future__ import annotations

import json

import commands
import jax
import pytest

from ivr_jax import sharding
from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout, rollout_mesh

# Prints what the layout does to the weights of a tiny model, whether eight devices draw with guidance what one draws,
# and how the cache lies when they are done.
SCRIPT = """
import dataclasses, json
import jax, numpy as np
from tiny_model import CONFIG, TOKENIZER, noisy_params, prompts_of, requests
from ivr_jax import sharding
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling import decode_loop
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, sample
from ivr_jax.sampling.engine import EngineOptions, pad_prompts

config = dataclasses.replace(CONFIG, vocab_multiple=8)
plain = noisy_params(config)
grammar = Grammar(TOKENIZER, GrammarOptions(modes=("direct",), text_cap=2))
prompts = pad_prompts(prompts_of(*requests(4)), TOKENIZER.vocab.pad, 32)
free = pad_prompts(prompts_of(*requests(4), unconditional=True), TOKENIZER.vocab.pad, 32)
keys = jax.random.split(jax.random.key(0), 16)
engine = EngineOptions(slots=8, growth=1, shrink=False)

run, caches = decode_loop.run, []

def watched(*args, **how):
    found = run(*args, **how)
    caches.append([str(axes) for axes in getattr(found[0].cache.k.sharding, "spec", ())])
    return found

decode_loop.run = watched

def answers(config, params):
    options = RolloutOptions(48, SamplingOptions(guidance=2.0), engine, 4, (2, 2))
    return sample(config, params, grammar, PromptBatch(*prompts, (free,)), keys, options)[0]

expected = answers(config, jax.device_put(plain, jax.devices()[0]))
mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
params = jax.device_put(plain, sharding.shardings(mesh, backbone.param_axes(config), plain))
layout = RolloutLayout(config, mesh, LayoutOptions(tensor=2))
with jax.transfer_guard("disallow"):
    weights = layout(params)
    again = layout(params)
with jax.set_mesh(layout.mesh):
    found = answers(layout.config, weights)
half = RolloutLayout(config, mesh, LayoutOptions(dtype="bfloat16"))
halved = half(params)
rounded = RolloutLayout(config, mesh, LayoutOptions(tensor=2, weight_dtype="int8", cache_dtype="int8"))
alone = RolloutLayout(config, sharding.make_mesh({}, jax.devices()[:1]), LayoutOptions(weight_dtype="int8",
                                                                                     cache_dtype="int8"))
rounded_weights = rounded(params)
on_one = answers(alone.config, alone(jax.device_put(plain, jax.devices()[0])))
with jax.set_mesh(rounded.mesh):
    on_eight = answers(rounded.config, rounded_weights)
print(json.dumps({
    "rounded": bool((on_eight.tokens == on_one.tokens).all()),
    "rounded_error": float(np.abs(on_eight.log_probs - on_one.log_probs).max()),
    "rounded_gate": [str(rounded_weights["layers"]["mlp"]["gate"].dtype),
                     *map(str, rounded_weights["layers"]["mlp"]["gate_scale"].sharding.spec)],
    "tokens": bool((found.tokens == expected.tokens).all()),
    "error": float(np.abs(found.log_probs - expected.log_probs).max()),
    "values": all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), weights, plain))),
    "specs": {k: [str(x) for x in layers.sharding.spec] for k, layers in
              {"mlp": weights["layers"]["mlp"]["gate"], "embed": weights["embed"]}.items()},
    "cache": caches[-1], "halved": sorted({str(x.dtype) for x in jax.tree.leaves(halved)}),
    "tensor": half.mesh.shape["tensor"],
    "shards": len({str(s.index) for s in halved["layers"]["mlp"]["gate"].addressable_shards}),
    "programs": layout._move._cache_size(),
}))
"""


def test_eight_devices_draw_what_one_draws_from_weights_that_were_resharded_in_place():
    found = json.loads(commands.on_devices(8, SCRIPT)[-1])
    assert found["tokens"] and found["error"] < 1e-4 and found["values"]
    assert found["specs"] == {"mlp": ["None", "fsdp", "tensor"], "embed": ["('tensor', 'fsdp')", "None"]}
    assert found["cache"][1] == "data" and found["cache"][2] == "tensor"  # after the loop, as before it
    assert found["halved"] == ["bfloat16"] and found["tensor"] == found["shards"] == 2  # as many as heads
    assert found["programs"] == 1
    # A sum in another order may round to the next of the 255 values.
    assert found["rounded"] and found["rounded_error"] < 0.02
    assert found["rounded_gate"] == ["int8", "None", "tensor"]


def test_one_device_and_the_same_dtype_need_no_copy():
    config = backbone.BackboneConfig(16, 8, 8, 1, 2, 2, 4)
    params = backbone.init_params(config, jax.random.key(0))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    assert RolloutLayout(config, mesh)(params) is params
    assert RolloutLayout(config, mesh, LayoutOptions(dtype="bfloat16"))(params)["embed"].dtype == "bfloat16"
    with pytest.raises(UserError, match="3"):
        rollout_mesh(mesh, 3)
