"""RL of adapters (LoRA): the reference is the policy without them; nothing but them is learnt or held twice."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny_model import noisy_params, requests, system
from tiny_runs import assert_same_run, metrics, prepare, rl_settings, sft_settings, trained

from ivr_jax.checkpoints import system as systems
from ivr_jax.models import lora
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.training import grpo
from ivr_jax.training.prompts import Prompt
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import Scored
from ivr_jax.training.state import TrainState

PARAMS, KEY = noisy_params(), jax.random.key(2)
PROMPTS = [Prompt(*pair) for pair in zip(*requests(2), strict=True)]
ADAPTERS = lora.LoraOptions(2, 4.0, ("q", "v", "down"))


def buffers(tree) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_reference_is_the_policy_without_its_adapters_and_shares_its_memory():
    grammar = GrammarOptions(modes=("direct",), text_cap=2)
    engine = EngineOptions(growth=1, shrink=False)
    options = RLOptions(grammar, 4, 72, 8, (128,), 64, engine=engine, seed=2)
    optimizer = optax.adam(3e-2)
    learner = grpo.Trainer(dataclasses.replace(system(), params=None), None, options, optimizer)
    params = lora.add(PARAMS, ADAPTERS, KEY)
    state = TrainState(params, optimizer.init(lora.split(params)[0]))
    assert size(state.opt_state) <= 2 * size(params[lora.ADAPTERS]) + 16  # moments of nothing else
    everything = np.ones((2, 4), bool)
    scored = Scored([], {}, everything, everything, everything, np.linspace(-1, 2, 8).reshape(2, 4), everything)
    rows, references = [], []
    for step in range(2):
        rollout = learner.collect_rollout(state.params, PROMPTS, step)
        batches = learner.prepare(rollout, scored, behaviour=state.params)
        [batch] = batches
        again = np.asarray(learner._logprobs(PARAMS, batch).log_probs)  # the model that RL started from
        np.testing.assert_array_equal(np.asarray(batch["reference"]) * batch["mask"], again * batch["mask"])
        before = state
        state, found = learner.update(state, batches, check_ratio=True)
        assert buffers(lora.base(state.params)) == buffers(PARAMS)  # neither copied nor moved
        references.append(buffers(lora.base(before.params)))
        rows.append(found)
    assert references[0] == references[1] == buffers(PARAMS) and learner.reference is None
    assert abs(float(rows[0]["kl"][0])) < 1e-6 < 1e-3 < float(rows[1]["kl"][0])
    assert float(rows[1]["max_ratio_deviation"]) < 1e-3  # drawn by merged kernels, learnt with adapters
    for name, group in state.params[lora.ADAPTERS].items():
        for target, pair in group.items():
            assert np.abs(np.asarray(pair["b"])).max() > 1e-3, (name, target)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("runs"))
    trained(folder / "sft", "micro_base", sft_settings(folder) | {"steps": 1})
    return folder


def test_a_run_of_adapters_resumes_exactly_and_its_checkpoint_is_an_ordinary_model(runs, capsys):
    changes = {
        "steps": 4,
        "log_every": 1,
        "max_checkpoints": 0,
        "lora.rank": 2,
        "lora.targets": ("q", "o"),
        "mesh.data": 1,
        "group_size": 4,  # enough answers that some differ in reward
    }
    settings = rl_settings(runs / "sft") | changes
    trained(runs / "whole", "micro_rl", settings)
    shutil.copytree(runs / "whole", runs / "cut")
    shutil.rmtree(runs / "cut" / "checkpoints" / "4")
    capsys.readouterr()
    trained(runs / "cut", "micro_rl", settings)
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    assert_same_run(runs / "cut", runs / "whole")
    rows = [row for row in metrics(runs / "whole") if "kl" in row]  # steps without contrast learn nothing
    assert len(rows) > 1
    assert abs(rows[0]["kl"]) < 1e-8 < rows[-1]["kl"] and all(row["max_ratio_deviation"] < 1e-3 for row in rows)
    start, end = systems.load(runs / "sft").params, systems.load(runs / "whole").params
    changed = {
        name for name, leaf in jax.tree_util.tree_leaves_with_path(start)
        if (np.asarray(leaf) != np.asarray(dict(jax.tree_util.tree_leaves_with_path(end))[name])).any()
    }  # fmt: skip
    assert {jax.tree_util.keystr(name, simple=True, separator="/") for name in changed} == {
        "layers/attention/q", "layers/attention/o"
    }  # fmt: skip
