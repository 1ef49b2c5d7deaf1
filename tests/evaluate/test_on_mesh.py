"""The evaluation of a model that is sharded over eight devices: answers and images are those of one device."""

from __future__ import annotations

import json

import commands
import jax
import pytest
from benchmark_model import write_model
from construct_worker import contents

RUNS = """
import sys
import commands
import ivr_jax.evaluate.__main__ as evaluate
model, root = sys.argv[1:]
load = evaluate.load_sampler

def noted(*arguments):
    system = load(*arguments)
    kernel = system.params["layers"]["attention"]["q"]
    print(len(kernel.sharding.device_set), kernel.size // kernel.addressable_shards[0].data.size, file=sys.__stdout__)
    return system

evaluate.load_sampler = noted
small = ("prompts=6", "each_split=0", "probe_prompts=4", "paired_prompts=2", "batch=8", "engine.slots=8",
         "answer_length=384", "grammar.text_cap=3")
for name, mesh in (("one", ()), ("eight", ("--config.mesh.fsdp=4", "--config.mesh.tensor=2"))):
    commands.succeed("evaluate", "--config=micro_evaluate", f"--workdir={root}/{name}", f"--config.checkpoint={model}",
                     *(f"--config.{word}" for word in small), *mesh)
"""


def test_eight_devices_evaluate_as_one_does(tmp_path):
    model = write_model(tmp_path / "model", kv_heads=2)
    lines = commands.on_devices(8, RUNS, model, tmp_path)
    assert lines == ["1 1", "8 2"]  # devices that hold weights, and parts of a kernel
    one, eight = contents(tmp_path / "one"), contents(tmp_path / "eight")
    assert one.keys() == eight.keys() and sum(name.endswith(".png") for name in one) >= 6
    assert {name for name in one if one[name] != eight[name]} <= {"config.json", "evaluation.json"}
    found = [json.loads(files["evaluation.json"]) for files in (one, eight)]
    figures = [dict(jax.tree.leaves_with_path(evaluation)) for evaluation in found]
    assert figures[0].keys() == figures[1].keys()
    for path, figure in figures[0].items():  # probabilities are sums over devices
        assert figures[1][path] == (pytest.approx(figure, abs=1e-6) if isinstance(figure, float) else figure)
