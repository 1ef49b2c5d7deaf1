"""The launch scripts say what the program understands: every command they print names a real module, config and key."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ivr_jax import cli
from ivr_jax.compile import jobs
from ivr_jax.compile.topologies import parse_topology

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
    assert workdirs == ["image_tokenizer", "base", "eval_base", "eval_kinds", "construct", "sft", "eval_sft",
                        "eval_direct", "eval_multi_step", "rl", "eval_typed", "eval_rl", ""]


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


RUN = ("--", "ivr_jax.train", "--config=emu35_sft", "--workdir=/mnt/runs/a run")
SLICE = ("--dry-run", "--name=a", "--zone=z", "--accelerator=v5p-256")
SET = ("--dry-run", "--name=a", "--image=i", "--topology=4x4x8", "--accelerator=tpu-v5p-slice", "--bucket=b")


def script(name: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(ROOT / "launch" / name), *argv], capture_output=True, text=True)


def printed(name: str, *argv: str) -> list[list[str]]:
    """The commands that a dry run prints, as words."""
    done = script(name, *argv)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_slice_is_asked_for_and_given_back():
    (words,) = printed("tpu_pod.sh", "create", *SLICE, "--spot", "--project=p")
    assert words[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--spot", "--project=p"} <= set(words)
    (words,) = printed("tpu_pod.sh", "delete", *SLICE)
    assert words[4:6] == ["delete", "a"] and "--force" in words


def test_every_host_of_a_slice_runs_the_same_command_and_finds_the_others():
    archive, copied, prepared, started = printed("tpu_pod.sh", "run", *SLICE, "--bucket=b", *RUN)
    assert "archive" in archive and copied[4] == "scp" and all("--worker=all" in w for w in (copied, prepared, started))
    line = next(word for word in started if word.startswith("--command="))
    words = shlex.split(line.partition("=")[2])
    module = words[words.index("-m") + 1 :]
    assert module == ["ivr_jax.train", "--config=emu35_sft", "--workdir=/mnt/runs/a run", "--distributed"]
    assert cli.config_from_argv(module[1:2])


def test_a_jobset_has_a_pod_for_every_host():
    done = script("gke.sh", *SET, *RUN)
    assert done.returncode == 0 and done.stderr == ""
    text = done.stdout
    assert "completions: 32" in text and "google.com/tpu: 4" in text
    assert 'cloud.google.com/gke-tpu-topology: "4x4x8"' in text
    assert re.findall(r'^ {20}- "(.*)"$', text, re.MULTILINE) == list(RUN[1:])
    assert script("gke.sh", *SET, "--chips=3", *RUN).returncode == 2


def test_a_slurm_chain_starts_one_task_a_node():
    first, second = printed("slurm.sh", "--dry-run", "--nodes=4", "--chain=2", *RUN)
    assert first == second and first[0] == "sbatch" and "--ntasks-per-node=1" in first
    wrapped = shlex.split(next(word for word in first if word.startswith("--wrap=")).partition("=")[2])
    assert wrapped[0] == "srun" and wrapped[-4:] == ["-m", *RUN[1:]]


@pytest.mark.parametrize("kind", ["v5p", "v6e", "v5e", "v4"])
def test_runs_are_compiled_as_they_were_planned(kind):
    code = f"source launch/tpu_flags.sh; libtpu_flags {kind}"
    said = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    topology = parse_topology(f"{kind}:2x2x2" if kind in ("v4", "v5p") else f"{kind}:2x2")
    assert dict(word.removeprefix("--").split("=") for word in said) == jobs.options_for(topology)


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("tpu_pod.sh", ()),
        ("tpu_pod.sh", ("create", "--name=a")),
        ("tpu_pod.sh", ("run", *SLICE, "--bucket=b")),
        ("tpu_pod.sh", ("create", *SLICE, "--accelerator=v9-8")),
        ("gke.sh", ("--dry-run", "--name=A B", *RUN)),
        ("slurm.sh", ("--nodes=x", *RUN)),
        ("slurm.sh", RUN),
        ("slurm.sh", ("--fast",)),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(name, argv):
    done = script(name, *argv)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and f"launch/{name} --help" in done.stderr


def test_a_missing_number_of_nodes_is_told_from_a_wrong_one():
    assert script("slurm.sh", *RUN).stderr != script("slurm.sh", "--nodes=x", *RUN).stderr


@pytest.mark.parametrize("name", ["tpu_pod.sh", "gke.sh", "slurm.sh", "laptop.sh"])
def test_each_script_explains_itself(name):
    done = script(name, "--help")
    assert done.returncode == 0 and f"launch/{name}" in done.stdout and "--dry-run" in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_container_installs_what_setup_py_says():
    text = (ROOT / "launch" / "Containerfile").read_text()
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied) and {"setup.py", "launch/constraints.txt"} <= copied
    assert re.findall(r"pip install (.*?) &&", text) == ['--constraint constraints.txt ".[${EXTRA}]"']


def test_rented_machines_get_the_versions_that_were_tested():
    """Every requirement of setup.py has a version, and it is one that setup.py allows."""
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): Version(version) for name, _, version in
              (line.partition("==") for line in lines if not line.startswith("#"))}  # fmt: skip
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    arguments = setup.call_args.kwargs
    wanted = [Requirement(text) for text in (*arguments["install_requires"], *arguments["extras_require"]["services"])]
    assert len(wanted) > 20
    for requirement in wanted:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    _, _, prepared, _ = printed("tpu_pod.sh", "run", *SLICE, "--bucket=b", *RUN)
    assert any("--constraint launch/constraints.txt" in word for word in prepared)


def test_one_host_of_gpus_runs_the_command_on_as_many_as_it_says():
    script = ROOT / "launch" / "gpu_host.sh"
    wanted = ["ivr_jax.train", "--config=emu35_sft", "--workdir=a folder", "--config.mesh.fsdp=4"]
    done = subprocess.run(["bash", str(script), "--dry-run", "--gpus=4", "--", *wanted], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    words = shlex.split(done.stdout)
    assert done.returncode == 0 and "CUDA_VISIBLE_DEVICES=0,1,2,3" in words
    assert words[words.index(sys.executable) :] == [sys.executable, "-m", *wanted]
    for wrong in (["--gpus=none", "--", "ivr_jax.train"], ["--gpus=4"], ["--cpus=4"]):
        assert subprocess.run(["bash", str(script), *wrong], capture_output=True).returncode == 2
