"""RL on eight devices: drawn in the rollout layout, replayed in that of training, and learnt from as on one device."""

from __future__ import annotations

import json

import commands

SCRIPT = """
import json
import jax, numpy as np, optax
from tiny_model import CONFIG, noisy_params, requests, system
from ivr_jax import sharding
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.sampling.layout import RolloutLayout
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.training import grpo, state
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import Scored

grammar = GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2)
engine = EngineOptions(growth=1, shrink=False)
options = RLOptions(grammar, 4, 72, 8, (128,), 64, engine=engine)
samples, images = requests(2)
tasks = [grpo.Prompt(*pair) for pair in zip(samples, images, strict=True)]
optimizer = optax.chain(optax.trace(0.0), optax.scale(-1e-3))
axes = backbone.param_axes(CONFIG)

def made(sizes, devices):
    mesh = sharding.make_mesh(sizes, devices)
    first, (placed, _) = state.shard_state(mesh, axes, noisy_params(), optimizer)
    held = jax.device_put(noisy_params(), placed.params)
    placement = grpo.Placement(mesh, placed, Watched(CONFIG, mesh))
    return mesh, first, grpo.Trainer(system(held), None, options, optimizer, placement)

class Watched(RolloutLayout):
    # What the rollouts are drawn with; the guard raises if anything on the way is fetched by the host or comes from it.
    def __call__(self, params):
        with jax.transfer_guard("disallow_explicit"):
            self.made = super().__call__(params)
        return self.made

def through_the_host(params, layout):
    # What the guard is there to catch.
    try:
        with jax.transfer_guard("disallow_explicit"):
            jax.device_put(jax.tree.map(np.asarray, params), layout.shardings)
    except Exception as error:
        return "isallowed" in str(error)
    return False

def rolled(mesh, first, trainer):
    with jax.set_mesh(mesh):
        rollout = trainer.collect_rollout(first.params, tasks, 3)
        trainer.check_logprobs(first.params, rollout)
        return rollout

def cuts(tree):
    # Shards of each large array, by how many different parts its devices hold.
    return sorted({len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(tree) if x.ndim > 2})

def gradients(mesh, first, trainer, rollout, scored):
    with jax.set_mesh(mesh):
        after, metrics = trainer.update(first, trainer.prepare(rollout, scored), check_ratio=True)
    loss = float(metrics["loss"][0]) / float(metrics["loss"][1])
    return jax.tree.map(np.asarray, after.opt_state[0].trace), loss, float(metrics["max_ratio_deviation"])

def error(a, b):
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))

one = made({}, jax.devices()[:1])
eight = made({"data": 2, "fsdp": 2, "tensor": 2}, None)
rollout = rolled(*eight)
some = np.ones((2, 4), bool)
scored = Scored([], {}, some, some, some, np.linspace(-1, 2, 8).reshape(2, 4), some)
moments = cuts(eight[1].opt_state)
theirs, expected, _ = gradients(*one, rollout, scored)
ours, loss, deviation = gradients(*eight, rollout, scored)
layout, learner = eight[2].placement.layout, eight[2]
drawn_with = layout.made["layers"]["mlp"]["gate"]
print(json.dumps({"loss": abs(loss / expected - 1), "ratio": deviation,
                  "gradients": max(jax.tree.leaves(jax.tree.map(error, ours, theirs))),
                  "mesh": dict(layout.mesh.shape), "spec": [str(x) for x in drawn_with.sharding.spec],
                  "guarded": through_the_host(learner.reference, layout),
                  "programs": layout._move._cache_size(),
                  "reference": cuts(learner.reference), "moments": moments}))
"""


def test_rollout_and_update_on_eight_devices_equal_one():
    found = json.loads(commands.on_devices(8, SCRIPT)[-1])
    assert found["loss"] < 1e-5 and found["gradients"] < 1e-5 and found["ratio"] < 1e-4, found
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}, found  # two key heads: two shards
    assert found["spec"] == ["None", "fsdp", "tensor"] and found["programs"] == 1, found
    assert found["guarded"], found
    assert found["reference"] == found["moments"] == [4], found  # fsdp x tensor
