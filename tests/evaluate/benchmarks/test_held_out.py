"""A benchmark as a metric of training: on part of the prompts, with a tiny model, and in an RL run."""

from __future__ import annotations

import json

import benchmark_fixtures as fixtures
import pytest
from benchmark_model import write_model
from benchmark_runs import judging

from ivr_jax.checkpoints import system as systems
from ivr_jax.cli import config_from_argv
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.held_out import HeldOutBenchmark, HeldOutOptions, spread
from ivr_jax.evaluate.benchmarks.suites import micro
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.config import ServiceConfig


def measure(options: HeldOutOptions, judge, workdir):
    grammar = GrammarOptions(modes=("direct",), text_cap=3)
    return HeldOutBenchmark(options, judge, grammar, SamplingOptions(), EngineOptions(slots=8), 384, 0, workdir)


def test_prompts_are_spread_over_all():
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 0) == [0, 1, 2] and spread(range(2), 9) == [0, 1]


@pytest.mark.parametrize("change", [{"every": -1}, {"prompts": -1}, {"batch": 0}, {"data": ""}])
def test_options_out_of_range_are_refused(change):
    options = {"every": 1, "benchmark": "micro", "data": "x", "prompts": 1, "batch": 1, **change}
    with pytest.raises(UserError):
        HeldOutOptions(**options)


def test_a_benchmark_without_a_judge_is_refused(tmp_path):
    fixtures.write_wise(tmp_path / "data")
    with pytest.raises(UserError):
        measure(HeldOutOptions(1, "wise", str(tmp_path / "data"), 2, 8), None, tmp_path / "run")


def test_a_model_is_measured_exactly_or_behind_a_service(tmp_path):
    system = systems.load(write_model(tmp_path / "model"))
    micro.write_tasks(tmp_path / "micro", prompts=4, each_split=0)
    exact = measure(HeldOutOptions(1, "micro", str(tmp_path / "micro"), 2, 8), None, tmp_path / "exact")
    found = exact(system, 5)
    assert set(found) <= {"held_out", "held_out_images", "held_out_coverage"} and found["held_out_coverage"] > 0
    assert found["held_out_images"] == 1 and 0 <= found["held_out"] <= 100
    summary = json.loads((tmp_path / "exact/000005/summary.json").read_text())
    assert summary["prompts"] == 2 and summary["figures"]["Exact"]["fixed"]["value"] == found["held_out"]
    assert exact(system, 6) == found  # the same model, the same answers
    fixtures.write_wise(tmp_path / "wise")
    with judging() as (service, url):
        flags = ["--config=benchmark", "--config.judge.model=x", f"--config.judge.base_url={url}",
                 "--config.judge.key_variable="]  # fmt: skip
        judge = as_dataclass(ServiceConfig, config_from_argv(flags).judge)
        chat = measure(HeldOutOptions(1, "wise", str(tmp_path / "wise"), 3, 8), judge, tmp_path / "chat")
        found = chat(system, 1)
        asked = sum(service.log.answered.values())
        assert 0 <= found["held_out"] <= 1 and asked > 3
        assert chat(system, 1) == found and sum(service.log.answered.values()) == asked
