"""One run as two real processes over loopback: the losses of one process, and exact resumption after one is killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bucket_servers
import commands
import jax
import numpy as np
import pytest
from tiny_runs import assert_same_parameters, metrics, newest_checkpoint, prepare, rl_settings, sft_settings, trained

from ivr_jax import distributed
from ivr_jax.checkpoints import store
from ivr_jax.cloud import inputs
from ivr_jax.cloud.inputs import CACHE_VARIABLE
from ivr_jax.errors import UserError


def processes(
    argv: list[str], workdir: Path | str, count: int = 2, caches: Path | None = None
) -> list[subprocess.Popen]:
    """Starts the command as `count` processes that find each other on a free port.

    `caches`: where each has a cache folder of its own for buckets, as on machines of their own.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ivr_jax.train", argv[1], f"--workdir={workdir}", *argv[3:],
               "--config.mesh.data=-1", f"--coordinator=localhost:{port}", f"--process_count={count}"]  # fmt: skip
    return [
        subprocess.Popen(
            [*command, f"--process_id={index}"],
            env=commands.environment(measured=index == 0) | ({CACHE_VARIABLE: f"{caches}/{index}"} if caches else {}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(count)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def settings(runs) -> dict:
    changes = {"steps": 8, "batch": 4, "grad_accum_steps": 2, "data.streams": 4}
    return sft_settings(runs) | changes | {"log_every": 1, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def alone(runs, settings) -> list[str]:
    return trained(runs / "alone", "micro_base", settings)


@pytest.fixture(scope="module")
def undisturbed(runs, alone, tmp_path_factory) -> Iterator[tuple[str, Path, list[str]]]:
    """The run as two processes in a bucket, with a cache each: its URL, their caches, and what each printed."""
    url, caches = f"gs://{bucket_servers.BUCKET}/both", tmp_path_factory.mktemp("machines")
    with pytest.MonkeyPatch.context() as patch, bucket_servers.server("gs"):
        patch.setenv(CACHE_VARIABLE, str(caches / "third machine"))
        yield url, caches, finish(processes(alone, url, caches=caches))


def test_two_processes_compute_what_one_does_in_a_bucket_from_disks_of_their_own(runs, undisturbed):
    """Process 0 alone tokenises; the other one has its examples from the bucket.  Orbax writes from both."""
    url, caches, (first, second) = undisturbed
    assert "examples:" in first and "examples:" not in second  # process 0 alone speaks
    theirs, ours = metrics(runs / "alone"), metrics(inputs.local(f"{url}/metrics.jsonl").parent)
    assert [row["step"] for row in ours] == list(range(1, 9))
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-5)
        for name in ("packing_efficiency", "tokens_per_step"):
            assert row[name] == expected[name]  # the same rows, whoever reads them
    assert list((caches / "1" / "written").glob("*/both/examples/examples.json"))
    assert f"{url}/checkpoints/8" == str(store.resolve(url))


def test_one_of_two_processes_that_is_killed_costs_nothing(runs, alone, undisturbed):
    """On a disk that both share."""
    workdir, (url, *_) = runs / "killed", undisturbed
    started = processes(alone, workdir)
    deadline = time.monotonic() + 300
    while newest_checkpoint(workdir) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    started[1].send_signal(signal.SIGKILL)
    time.sleep(1)  # what a scheduler does next: it ends the others and starts all again
    started[0].kill()
    for process in started:
        process.communicate()
    killed_at = newest_checkpoint(workdir)
    assert 2 <= killed_at < 8
    first, second = finish(processes(alone, workdir))
    assert f"resumed at step {killed_at} of 8" in first and "resumed" not in second
    assert metrics(workdir) == metrics(inputs.local(f"{url}/metrics.jsonl").parent)
    assert_same_parameters(workdir, url)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["mesh"]["data"] == -1


def test_rl_as_two_processes_draws_judges_and_learns_what_one_does(runs, alone):
    """Each draws the answers to its own prompt, on its own device; rewards and losses are of all of them."""
    changes = {"steps": 2, "log_every": 1, "group_size": 4, "micro_batch": 4, "gallery.every": 2, "overlap": 1}
    argv = trained(runs / "rl alone", "micro_rl", rl_settings(runs / "alone") | changes)
    outputs = finish(processes(argv, runs / "rl both"))
    theirs, ours = metrics(runs / "rl alone"), metrics(runs / "rl both")
    assert [row["step"] for row in ours] == [1, 2], outputs
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        same = ("reward", "outcome", "format", "bonus", "images", "judge_calls", "answer_tokens", "missing")
        assert {name: row[name] for name in same} == {name: expected[name] for name in same}  # the same answers
        for name in expected:
            if name not in ("slot_utilisation", "tokens_per_call", "calls_per_image_token", "max_ratio_deviation"):
                np.testing.assert_allclose(row[name], expected[name], rtol=2e-4, atol=1e-6, err_msg=name)
    assert (runs / "rl both" / "gallery" / "step_000002.html").exists()


def test_prompts_that_do_not_divide_over_the_processes_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    changes = ("--config.init=none", "--config.prompts_per_step=3", "--config.group_size=4")
    done = commands.run("train", "--config=micro_rl", f"--workdir={tmp_path}", *changes)
    assert "config.prompts_per_step" in done.complaint and "2 processes" in done.complaint


def flags_of(**given) -> object:
    defaults = {"coordinator": None, "process_count": None, "process_id": None, "distributed": False}
    return type("Flags", (), defaults | given)


@pytest.mark.parametrize(
    "given",
    [{"coordinator": "here:1"}, {"process_id": 0}, {"coordinator": "here:1", "process_count": 2, "process_id": 2}],
)
def test_flags_that_do_not_go_together(given):
    with pytest.raises(UserError) as error:
        distributed.start(flags_of(**given))
    assert "--process_id" in error.value.what


def test_a_job_of_several_is_recognised():
    assert not distributed.in_a_job_of_several({})
    assert not distributed.in_a_job_of_several({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert distributed.in_a_job_of_several({"SLURM_STEP_NUM_TASKS": "16"})
    assert distributed.in_a_job_of_several({"TPU_WORKER_HOSTNAMES": "host-0,host-1"})


def test_one_process_needs_nobody():
    distributed.start(flags_of())
    distributed.barrier("nobody else")
    assert distributed.is_primary() and distributed.union({"a": [1]}) == {"a": [1]}
    np.testing.assert_array_equal(distributed.fetch({"x": np.arange(3)})["x"], np.arange(3))
