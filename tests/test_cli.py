"""The command line as users meet it: overrides, flags, work directories, and one clear line for every mistake."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags, logging
from tiny_command import parsed

from ivr_jax import cli
from ivr_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


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


CACHES = """
import json, os, sys
from ivr_jax import cli
import jax
told = jax.config.jax_compilation_cache_dir
for kept in json.loads(sys.argv[1]):
    if kept is not None:
        os.environ["IVR_JAX_CACHE"] = kept
    jax.config.update("jax_compilation_cache_dir", told)
    made = cli.enable_compilation_cache()
    assert str(made) == str(jax.config.jax_compilation_cache_dir)
    print(made)
"""


def caches_of(folder: Path, *kept: str | None, **env: str) -> list[str]:
    """What a fresh process has as JAX's compilation cache, for each value of IVR_JAX_CACHE in turn."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_COMPILATION", "IVR_JAX"))}
    done = subprocess.run([sys.executable, "-c", CACHES, json.dumps(kept)], cwd=folder, capture_output=True, text=True,
                          check=True, env={**clean, "PYTHONPATH": str(ROOT), "HOME": str(folder), **env})
    return done.stdout.splitlines()


def test_compiled_programs_are_kept_where_the_user_says_or_nowhere(tmp_path):
    (tmp_path / "file").touch()
    mine, unusable = str(tmp_path / "mine"), str(tmp_path / "file" / "x")
    usual = str(tmp_path / ".cache" / "ivr_jax" / "xla")
    assert caches_of(tmp_path, None, mine, "", unusable) == [usual, mine, "None", "None"]
    assert (tmp_path / "mine").is_dir()


def test_a_cache_that_jax_was_told_of_stays(tmp_path):
    told = str(tmp_path / "jax")
    assert caches_of(tmp_path, None, JAX_COMPILATION_CACHE_DIR=told) == [told]


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
