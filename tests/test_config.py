"""Config files and their sections, and the config that a run keeps: one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import pytest
from tiny_command import TINY_CONFIG, parsed

from ivr_jax import cli, config
from ivr_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


# Config files


def test_a_missing_config_file_is_an_error_that_names_the_likely_one(tiny, monkeypatch):
    monkeypatch.setattr(config, "config_folders", lambda: [tiny])
    assert config.config_names() == ["tiny", "tiny_config"]
    with pytest.raises(UserError, match="tiny_confg.*--config=tiny_config"):
        config.load_config("tiny_confg")
    with pytest.raises(UserError, match="else/where.py.*tiny, tiny_config"):
        config.load_config("else/where.py")


@pytest.mark.parametrize("name", ["micro_x", "micro_x.py", "configs/micro_x.py"])
def test_bare_names_and_the_readmes_paths_find_installed_configs(tmp_path, monkeypatch, name):
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "micro_x.py").write_text(TINY_CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "config_folders", lambda: [installed])
    assert config.load_config(name).steps == 100


def test_a_file_in_the_current_folder_comes_before_an_installed_one(tmp_path, monkeypatch):
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "x.py").write_text(TINY_CONFIG)
    (tmp_path / "x.py").write_text(TINY_CONFIG.replace("100", "1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "config_folders", lambda: [tmp_path / "installed"])
    assert config.load_config("x.py").steps == 1


def test_the_configs_of_a_checkout_are_found_beside_the_package():
    assert config.config_folders()[0] == ROOT / "configs"


def test_a_config_may_start_from_its_neighbour(tiny):
    (tiny / "longer.py").write_text("from .tiny_config import get_config as tiny\n"
                                    "def get_config():\n    c = tiny()\n    c.steps = 900\n    return c\n")
    assert config.load_config("longer.py").steps == 900
    assert config.load_config("tiny_config.py").steps == 100


@pytest.mark.parametrize(("code", "says"), [
    ("def get_config(:", "line 1: invalid syntax"),
    ("\n\nimport no_such_module", "line 3: ModuleNotFoundError: No module named 'no_such_module'"),
    ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
    ("def get_config():\n    return {}", "get_config() returned a dict. Return an ml_collections.ConfigDict."),
    ("steps = 3", "has no function get_config()"),
    ("def get_config(word):\n    pass", "needs an argument"),
    ("from ivr_jax.errors import UserError as E\ndef get_config():\n    raise E('no.', 'Yes.')", "broken.py: no. Yes."),
])
def test_a_broken_config_file_says_where(tiny, code, says):
    (tiny / "broken.py").write_text(code)
    with pytest.raises(UserError) as caught:
        config.load_config("broken.py")
    assert says in str(caught.value) and "broken.py" in str(caught.value)


def test_a_word_for_a_config_that_takes_none_is_an_error(tiny):
    (tiny / "fixed.py").write_text("def get_config():\n    pass")
    with pytest.raises(UserError, match="'big'"):
        config.load_config("fixed.py:big")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the tiny config's section describes."""

    lr: float
    betas: tuple[float, ...]


def test_a_section_becomes_a_dataclass_only_when_every_field_is_there_and_no_other():
    assert config.as_dataclass(Optimizer, {"lr": 0.1, "betas": [0.9, 0.95]}) == Optimizer(0.1, (0.9, 0.95))
    with pytest.raises(UserError, match="Optimizer.*betas, decay"):
        config.as_dataclass(Optimizer, config.ConfigDict({"lr": 0.1, "decay": 0.0}))


@dataclasses.dataclass(frozen=True)
class Ranges(config.Section, name="part"):
    """Every kind of range."""

    count: config.Positive = 1
    share: config.Share = 0.5
    rate: Annotated[float, config.Range(above=0, below=1)] = 0.5
    kind: Annotated[str, config.OneOf("a", "b")] = "a"
    off: config.Count | None = None
    on: bool = True
    free: tuple[int, ...] = ()


@pytest.mark.parametrize(("field", "values"), [
    ("count", (0, -1, 1.0, True, "1", None)), ("share", (-0.1, 1.1, float("nan"), "x", True)),
    ("rate", (0, 1, float("inf"))), ("kind", ("c", "", 1)), ("off", (-1, 0.5)), ("on", (1, "yes")),
])  # fmt: skip
def test_a_section_refuses_what_its_annotations_exclude_and_names_the_key(field, values):
    for value in values:
        with pytest.raises(UserError) as caught:
            Ranges(**{field: value})
        assert f"`part.{field}`" in caught.value.what


def test_a_section_takes_what_its_annotations_allow():
    assert Ranges(count=7, share=1, rate=0.1, kind="b", off=0, on=False, free=(1,)).share == 1
    assert config.as_dataclass(Ranges, {"count": 2, "share": 0.0, "rate": 0.5, "kind": "a", "on": True, "free": [3]}) \
        == Ranges(2, 0.0, free=(3,))


@pytest.mark.parametrize(("old", "new"), [
    ("minibatch", "micro_batch"), ("optimizer.peak", "optimizer.learning_rate"), ("grpo.kl", "grpo.beta"),
    ("watch.window", "monitor.window"), ("keep", "max_checkpoints"), ("reward.scale", "reward.score_map"),
    ("group", "group_size"),
])  # fmt: skip
def test_an_old_key_is_answered_with_the_new_one(old, new):
    with pytest.raises(UserError) as caught:
        cli.config_from_argv(["--config=micro_rl", f"--config.{old}=1"])
    assert f"`config.{old}` is now `config.{new}`" in caught.value.what


def test_every_new_name_is_a_key_of_a_config():
    keys = set()
    for name in config.config_names():
        keys |= set(config.flatten(config.load_config(name)))
    assert {new for new in config.RENAMED.values() if new != "monitor"} <= keys
    assert any(key.startswith("monitor.") for key in keys)
    assert not {old for old in keys if config.new_name(old)}


def test_an_old_config_file_is_answered_with_the_new_names(tiny):
    (tiny / "old.py").write_text(TINY_CONFIG.replace('"steps": 100', '"minibatch": 100'))
    with pytest.raises(UserError) as caught:
        config.load_config("old.py")
    assert "`config.micro_batch`" in caught.value.what
    (tiny / "old.py").write_text(TINY_CONFIG.replace('"steps": 100', '"reward": {"score_map": "fifth"}'))
    with pytest.raises(UserError) as caught:
        config.load_config("old.py")
    assert "'div5'" in caught.value.what


def test_a_run_of_an_earlier_version_resumes_with_the_new_names(tmp_path):
    old = {"minibatch": 8, "optimizer": {"peak": 0.1}, "grpo": {"normalisation": "token"}, "watch": {"window": 3},
           "reward": {"scale": "fifth", "evaluations": "literal"}, "model": {"gather_tensor": True}}  # fmt: skip
    now = {"micro_batch": 8, "optimizer": {"learning_rate": 0.1}, "grpo": {"loss_type": "bnpo"},
           "monitor": {"window": 3}, "reward": {"score_map": "div5", "step_reward_evals": "none"},
           "model": {"fsdp_over_tensor": True}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert config.saved_config(tmp_path) == now
    config.claim_workdir(tmp_path, config.ConfigDict(now), resuming=True)
    assert json.loads((tmp_path / "config.json").read_text()) == now


# The config of a run


def test_a_config_is_saved_as_json_and_read_back(tiny):
    call = parsed("--workdir=run", "--config.steps=5")
    config.claim_workdir(call.workdir, call.config, resuming=False)
    assert json.loads((tiny / "run" / "config.json").read_text())["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.95]}
    assert config.saved_config(call.workdir)["steps"] == 5
    config.claim_workdir(call.workdir, call.config, resuming=True)
    assert os.listdir(call.workdir) == ["config.json"], "nothing half-written stays behind"


def test_a_checkpoint_of_another_config_is_an_error_that_lists_the_keys(tiny):
    call = parsed("--workdir=run")
    config.claim_workdir(call.workdir, call.config, resuming=False)
    other = parsed("--config.optimizer.lr=1.0", "--config.shape=(1,)").config
    with pytest.raises(UserError) as caught:
        config.claim_workdir(call.workdir, other, resuming=True)
    message = str(caught.value)
    assert "optimizer.lr was 0.001, is 1.0" in message and "shape was [1, 2], is [1]" in message
    assert "steps" not in message and "Use another --workdir" in message
    assert config.saved_config(call.workdir)["optimizer"]["lr"] == 1e-3, "the run keeps its own config"


def test_a_folder_without_a_checkpoint_may_change_its_config(tiny):
    call = parsed("--workdir=run")
    config.claim_workdir(call.workdir, call.config, resuming=False)
    config.claim_workdir(call.workdir, parsed("--config.steps=9").config, resuming=False)
    assert config.saved_config(call.workdir)["steps"] == 9


def test_keys_and_sections_that_may_change_are_ignored_and_then_kept(tiny):
    call = parsed("--workdir=run")
    config.claim_workdir(call.workdir, call.config, resuming=False)
    longer = parsed("--config.steps=200", "--config.optimizer.lr=0.5").config
    config.claim_workdir(call.workdir, longer, resuming=True, ignore=("steps", "optimizer"))
    assert config.saved_config(call.workdir)["steps"] == 200
    with pytest.raises(UserError, match="step.*1"):
        config.check_same_config({}, config.ConfigDict({"step": 1}), ignore=("ste", "steps"))


def test_many_differences_are_cut_short():
    with pytest.raises(UserError, match="3"):
        config.check_same_config({f"k{i}": 0 for i in range(8)}, config.ConfigDict({f"k{i}": 1 for i in range(8)}))


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_damaged_saved_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="config.json"):
        config.claim_workdir(tmp_path, config.ConfigDict(), resuming=True)


def test_a_checkpoint_without_its_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        config.claim_workdir(tmp_path, config.ConfigDict(), resuming=True)


def test_a_config_of_unplain_values_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="a.b"):
        config.save_config(tmp_path, config.ConfigDict({"a": {"b": {1}}}))
    assert os.listdir(tmp_path) == []
