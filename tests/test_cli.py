"""The command line as users meet it: configs, overrides, work directories, and one clear line for every mistake."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from absl import flags, logging

from ivr_jax import cli, config
from ivr_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

TINY_CONFIG = '''
"""A tiny experiment.

Cost: nothing.
"""
from ml_collections import ConfigDict, config_dict


def get_config(word="plain"):
    return ConfigDict({
        "steps": 100, "name": word, "remat": True, "shape": (1, 2), "start": config_dict.placeholder(str),
        "untyped": None, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}, "data": {"seed": 0},
    })
'''

TINY_MAIN = '''
"""Adds up.

    python tiny.py --config=tiny_config.py --workdir=runs/tiny
"""
from absl import flags, logging
from ivr_jax import cli
from ivr_jax.errors import UserError


def add_flags(values):
    flags.DEFINE_string("end", "well", "well, badly, full, large, lost, bug, or interrupted", flag_values=values)


def main(call):
    logging.info("for information only")
    logging.warning("worth a warning")
    ends = {"badly": UserError("the well is\\ndry.", "Dig."), "bug": RuntimeError("ours"),
            "large": RuntimeError("INTERNAL: Out of memory allocating 40 bytes.\\nA table of buffers"),
            "full": ValueError("RESOURCE_EXHAUSTED: writing a/b: No space left on device")}
    if call.flags.end == "interrupted":
        raise KeyboardInterrupt
    if call.flags.end in ends:
        raise ends[call.flags.end]
    if call.flags.end == "lost":
        print(call.config.optimizer.decay)
    (call.workdir / "out.txt").write_text(str(call.config.steps + 1))


if __name__ == "__main__":
    cli.run(main, config=True, add_flags=add_flags)
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder with a config and a command, made the current one."""
    (tmp_path / "tiny_config.py").write_text(TINY_CONFIG)
    (tmp_path / "tiny.py").write_text(TINY_MAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*argv: str) -> cli.Call:
    return cli.parse(["tiny", "--config=tiny_config.py", *argv], config=True, workdir=False)


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(*argv)
    return str(caught.value)


def start(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "tiny.py", *argv], cwd=folder, env=env, capture_output=True, text=True)


# Overrides


def test_overrides_replace_values_of_the_same_type(tiny):
    call = parsed("--config.steps=5", "--config.optimizer.lr", "0.5", "--noconfig.remat", "--config.start=runs/base")
    assert (call.config.steps, call.config.optimizer.lr) == (5, 0.5)
    assert (call.config.remat, call.config.start, call.config.name) == (False, "runs/base", "plain")


def test_tuples_are_overridden_whole_and_keep_the_type_of_their_elements(tiny):
    call = parsed("--config.shape=(3, 4, 5)", "--config.optimizer.betas=0,1")
    assert call.config.shape == (3, 4, 5)
    assert call.config.optimizer.betas == (0.0, 1.0) and isinstance(call.config.optimizer.betas[0], float)


def test_a_word_after_the_colon_goes_to_get_config(tiny):
    assert cli.config_from_argv(["--config=tiny_config.py:fancy"]).name == "fancy"


def test_config_from_argv_reads_like_a_command_line(tiny):
    assert cli.config_from_argv(["--config", "tiny_config.py", "--config.steps=7"]).steps == 7


def test_a_parsed_config_takes_no_new_keys(tiny):
    with pytest.raises(AttributeError):
        parsed().config.stepz = 1


@pytest.mark.parametrize(("flag", "meant"), [
    ("--config.stpes=3", "--config.steps?"),
    ("--config.optimizer.lrr=3", "--config.optimizer.lr?"),
    ("--config.optimiser.lr=3", "--config.optimizer.lr?"),
    ("--config.lr=3", "--config.optimizer.lr?"),
    ("--noconfig.remta", "--config.remat?"),
])
def test_an_unknown_key_is_an_error_that_names_the_likely_one(tiny, flag, meant):
    message = complaint(flag)
    assert "tiny_config.py has no key" in message and message.endswith(f"Did you mean {meant}")


def test_an_unknown_key_like_no_other_lists_the_keys(tiny):
    assert complaint("--config.optimizer.zzz=3").endswith("The keys here are: betas, lr.")


@pytest.mark.parametrize(("flag", "says"), [
    ("--config.steps=many", "`steps` takes an int, not 'many'. It is 100 in the config file."),
    ("--config.steps=1.5", "`steps` takes an int, not '1.5'."),
    ("--config.optimizer.lr=fast", "`optimizer.lr` takes a float, not 'fast'."),
    ("--config.remat=perhaps", "`remat` takes a bool, not 'perhaps'."),
    ("--config.shape=(1, 'a')", "`shape` takes a tuple of int, not (1, 'a')."),
    ("--config.shape=(True, 1)", "`shape` takes a tuple of int"),
    ("--config.optimizer={}", "`optimizer` is a section of tiny_config.py, not a value."),
    ("--config.steps.x=1", "`steps` is a value, not a section"),
    ("--config.untyped=1", "`untyped` of tiny_config.py holds None"),
    ("--config.steps", "Missing value for flag --config.steps."),
])
def test_a_wrong_type_is_an_error_that_names_the_right_one(tiny, flag, says):
    assert says in complaint(flag)


# Flags


@pytest.mark.parametrize(("flag", "says"), [
    ("--config.optimizer.lr=nan", "`optimizer.lr` is nan. Give a finite number."),
    ("--config.optimizer.lr=-inf", "`optimizer.lr` is -inf."),
    ("--config.optimizer.betas=(0.9,1e999)", "`optimizer.betas` is inf."),
    ("--config.data.seed=-1", "`data.seed` is -1. Use a seed from 0 to 4294967295."),
    ("--config.data.seed=4294967296", "`data.seed` is 4294967296."),
])
def test_a_number_that_no_config_can_mean_is_an_error(tiny, flag, says):
    assert says in complaint(flag)


def test_a_mistyped_flag_is_an_error_that_names_the_likely_one(tiny):
    assert complaint("--wrkdir=x") == "unknown flag --wrkdir. Did you mean --workdir? See --help."


def test_an_argument_that_is_no_flag_is_an_error(tiny):
    assert "unexpected argument 'runs/x'" in complaint("runs/x")


def test_a_command_without_a_config_says_so(tiny):
    with pytest.raises(UserError, match="--config"):
        cli.parse(["tiny", "--config=tiny_config.py"], config=False, workdir=False)


def test_a_command_with_a_config_asks_for_one_and_only_one(tiny):
    with pytest.raises(UserError, match="--config"):
        cli.parse(["tiny"], config=True, workdir=False)
    assert "given 2 times" in complaint("--config=other.py")


@pytest.mark.parametrize("argv", [[], ["--workdir="]], ids=["none", "of an unset variable"])
def test_a_command_that_writes_asks_for_a_work_directory(tiny, argv):
    with pytest.raises(UserError, match="--workdir"):
        cli.parse(["tiny", "--config=tiny_config.py", *argv], config=True)


def test_two_commands_may_use_the_same_flag_name_for_their_own_ends():
    def add_text(values):
        flags.DEFINE_string("size", "big", "a word", flag_values=values)

    def add_number(values):
        flags.DEFINE_integer("size", 3, "a number", flag_values=values)

    assert cli.parse(["a"], config=False, workdir=False, add_flags=add_text).flags.size == "big"
    assert cli.parse(["b", "--size=4"], config=False, workdir=False, add_flags=add_number).flags.size == 4
    with pytest.raises(UserError, match="--size=x"):
        cli.parse(["b", "--size=x"], config=False, workdir=False, add_flags=add_number)


def test_bad_flags_leave_no_work_directory_behind(tiny):
    complaint("--workdir=runs/new", "--config.stpes=1")
    assert not (tiny / "runs").exists()


def test_help_shows_the_commands_own_words_and_the_keys_of_a_config(tiny):
    plain = start(tiny, "--help")
    assert plain.returncode == 0 and plain.stderr == ""
    assert plain.stdout.startswith("Adds up.\n\n    python tiny.py --config=tiny_config.py")
    assert "--end=…" in plain.stdout and "(default: well)" in plain.stdout
    assert "--pdb" not in plain.stdout, "absl's own flags would bury the command's"
    described = start(tiny, "--config=tiny_config.py", "-h").stdout
    assert "A tiny experiment." in described and "--config.optimizer.lr" in described and "0.001" in described


def help_of(capsys, *, workdir: bool) -> str:
    """The flags that --help lists for a command with a flag that may be repeated."""
    def add_images(values):
        flags.DEFINE_multi_string("image", [], "a reference", flag_values=values)

    with pytest.raises(SystemExit):
        cli.parse(["c", "--help"], config=False, workdir=workdir, add_flags=add_images)
    return capsys.readouterr().out


def test_help_is_one_line_a_flag_and_leaves_out_a_work_directory_that_is_of_no_use(capsys):
    text = help_of(capsys, workdir=False)
    assert text.splitlines()[1].split() == ["--image=…", "a", "reference"] and "--workdir" not in text
    assert "--workdir=…" in help_of(capsys, workdir=True)


def test_commands_in_help_keep_the_backslashes_that_break_their_lines():
    for file in (*(ROOT / "configs").glob("*.py"), *(ROOT / "ivr_jax").rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or ""
        assert len(doc.splitlines()) >= len(source.partition('"""')[2].partition('"""')[0].strip().splitlines()), file


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


# Work directories


def test_a_work_directory_is_made_with_its_parents(tiny):
    assert parsed("--workdir=runs/a/b").workdir.is_dir()


def test_a_work_directory_that_is_a_file_or_below_one_is_an_error(tiny):
    assert "'tiny.py' is a file. Name a folder" in complaint("--workdir=tiny.py")
    assert "cannot write to the work directory 'tiny.py/x': Not a directory." in complaint("--workdir=tiny.py/x")


@pytest.mark.parametrize("url", ["hdfs://bucket/run", "gs://", "gs://Not a bucket/run", "s3://bucket/../run"])
def test_a_work_directory_that_is_nowhere_is_an_error_and_not_a_strange_local_folder(tiny, url):
    assert url in complaint(f"--workdir={url}")
    assert not list(tiny.glob("*:"))


def test_a_work_directory_in_a_bucket_has_a_local_folder_that_is_not_made_yet(tiny):
    call = cli.parse(["cmd", "--workdir=gs://bucket/a/run/"], config=False)
    assert call.bucket == "gs://bucket/a/run" and call.workdir.name == "run" and not call.workdir.exists()
    with pytest.raises(UserError):
        cli.prepare_workdir("gs://bucket/out", "out")


def test_a_work_directory_without_permission_is_an_error(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)  # root may write anywhere; nobody may not
    try:
        with pytest.raises(UserError, match=str(locked)):
            cli.prepare_workdir(locked)
    finally:
        os.seteuid(was)


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


# A whole command


def test_a_command_succeeds_quietly_and_shows_more_when_asked(tiny):
    done = start(tiny, "--config=tiny_config.py", "--config.steps=4", "--workdir=run")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tiny / "run" / "out.txt").read_text() == "5"
    assert "worth a warning" in done.stderr and "for information only" not in done.stderr
    loud = start(tiny, "--config=tiny_config.py", "--workdir=run", "--verbose")
    assert loud.returncode == 0 and "for information only" in loud.stderr


def run_in_process(tiny: Path, capsys, *argv: str) -> tuple[int, str]:
    """Exit status and stderr of the tiny command, without a new process."""
    sys.path.insert(0, str(tiny))
    try:
        module = importlib.import_module("tiny")
        with pytest.raises(SystemExit) as exited:
            cli.run(module.main, config=True, add_flags=module.add_flags, argv=["tiny", *argv])
    finally:
        sys.path.remove(str(tiny))
        sys.modules.pop("tiny", None)
        logging.use_python_logging(quiet=True)
    return exited.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("argv", "line"), [
    (["--config=tiny_config.py", "--workdir=run", "--end=badly"], "error: the well is dry. Dig."),
    (["--config=tiny_config.py", "--workdir=run", "--end=full"], "error: the disk is full. Make room and give"),
    (["--config=tiny_config.py", "--workdir=run", "--end=large"], "error: out of memory (INTERNAL: Out of memory"),
    (["--config=tiny_config.py", "--workdir=run", "--end=lost"], "error: tiny_config.py has no key `decay`, which"),
    (["--config=tiny_config.py", "--workdir=tiny.py"], "error: the work directory 'tiny.py' is a file. Name a folder"),
    (["--config=nowhere.py", "--workdir=run"], "error: there is no config file 'nowhere.py'."),
    (["--config=tiny_config.py", "--workdir=run", "--config.x=1"], "error: tiny_config.py has no key `x`."),
])
def test_bad_input_ends_in_one_line_and_status_2(tiny, capsys, argv, line):
    status, stderr = run_in_process(tiny, capsys, *argv)
    errors = [text for text in stderr.splitlines() if "worth a warning" not in text]
    assert status == 2 and len(errors) == 1 and errors[0].startswith(line)


def test_an_interrupted_command_has_status_130(tiny, capsys):
    status, stderr = run_in_process(tiny, capsys, "--config=tiny_config.py", "--workdir=run", "--end=interrupted")
    assert status == 130 and stderr.splitlines()[-1] == "interrupted."


def test_a_bug_keeps_its_traceback(tiny):
    done = start(tiny, "--config=tiny_config.py", "--workdir=run", "--end=bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: ours" in done.stderr


# The compilation cache


def cache_of(folder: Path, **env: str) -> str:
    """What a fresh process with these variables ends up with as JAX's compilation cache."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "IVR_JAX"))}
    code = ("from ivr_jax import cli; import jax; made = cli.enable_compilation_cache();"
            "assert str(made) == str(jax.config.jax_compilation_cache_dir); print(made)")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
                          env={**clean, "PYTHONPATH": str(ROOT), "HOME": str(folder), **env})
    return done.stdout.strip()


def test_compiled_programs_are_kept_where_the_user_says(tmp_path):
    assert cache_of(tmp_path) == str(tmp_path / ".cache" / "ivr_jax" / "xla")
    assert cache_of(tmp_path, IVR_JAX_CACHE=str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_without_a_usable_folder_nothing_is_kept_and_the_command_goes_on(tmp_path):
    (tmp_path / "file").touch()
    assert cache_of(tmp_path, IVR_JAX_CACHE="") == "None"
    assert cache_of(tmp_path, IVR_JAX_CACHE=str(tmp_path / "file" / "x")) == "None"


def test_a_cache_that_jax_was_told_of_stays(tmp_path):
    assert cache_of(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) == str(tmp_path / "jax")


@pytest.mark.parametrize("name", ["nonsense"])
def test_a_backend_that_is_not_there_is_one_line_that_names_the_variable(tiny, monkeypatch, name):
    (tiny / "device.py").write_text(
        "from ivr_jax import cli\ndef main(call):\n    import jax.numpy as jnp\n    print(jnp.ones(2) + 1)\n"
        "if __name__ == '__main__':\n    cli.run(main, config=False, workdir=False)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": name}
    done = subprocess.run([sys.executable, "device.py"], cwd=tiny, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and f"JAX_PLATFORMS={name}" in done.stderr
    assert "Traceback" not in done.stderr


def test_64_bit_defaults_of_the_environment_change_nothing(tiny):
    (tiny / "dtype.py").write_text(
        "from ivr_jax import cli\ndef main(call):\n    import jax.numpy as jnp\n    print(jnp.arange(2.0).dtype)\n"
        "if __name__ == '__main__':\n    cli.run(main, config=False, workdir=False)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "1"}
    done = subprocess.run([sys.executable, "dtype.py"], cwd=tiny, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "float32"


@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION"])
@pytest.mark.parametrize("command", ["train", "export"], ids=["imports JAX at the top", "imports it later"])
def test_a_value_that_jax_refuses_is_one_line_that_names_the_variable(tmp_path, command, name):
    env = {**os.environ, "PYTHONPATH": str(ROOT), name: "maybe"}
    call = [sys.executable, "-m", f"ivr_jax.{command}", "nothing", "--format=card"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and f"{name}=maybe" in done.stderr
    assert "Traceback" not in done.stderr
