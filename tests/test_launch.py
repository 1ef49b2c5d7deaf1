"""The launch scripts say what the program understands: every command they print names a real module, config and key."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ivr_jax import cli

ROOT = Path(__file__).resolve().parent.parent
LAPTOP = ROOT / "launch" / "laptop.sh"


def dry_run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(LAPTOP), *argv], cwd=cwd, capture_output=True, text=True, env=environment)


def commands() -> list[list[str]]:
    done = dry_run("--dry-run", "--out=/tmp/a folder")
    assert done.returncode == 0 and done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines() if " -m ivr_jax." in line]


def workdir(words: list[str]) -> str:
    """The last part of a command's work directory, "" without one."""
    return next((Path(word.partition("=")[2]).name for word in words if word.startswith("--workdir=")), "")


def test_the_stages_come_in_the_order_in_which_they_need_each_other():
    workdirs = [workdir(words) for words in commands()]
    assert workdirs == ["image_tokenizer", "construct_base", "base", "eval_base", "construct", "sft", "eval_sft",
                        "eval_direct", "eval_multi_step", "rl", "eval_rl", ""]


@pytest.mark.parametrize("words", commands(), ids=workdir)
def test_every_printed_command_is_understood(words):
    module = words[words.index("-m") + 1]
    found = importlib.util.find_spec(module)
    assert found is not None
    assert not found.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__") is not None
    settings = [word for word in words if word.startswith("--config")]
    assert not settings or cli.config_from_argv(settings)


def test_a_folder_is_meant_from_where_the_user_stands(tmp_path):
    assert f"--workdir={tmp_path}/mine/sft" in dry_run("--dry-run", "--out=mine", cwd=tmp_path).stdout


def test_an_unknown_argument_is_one_line_and_status_2():
    done = dry_run("--fast")
    assert done.returncode == 2 and done.stderr == "error: unknown argument '--fast'. See launch/laptop.sh --help.\n"
