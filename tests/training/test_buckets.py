"""Training with a work directory and a dataset in a bucket: emulators of both kinds, killed in the middle of a save."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bucket_servers
import commands
import jax.numpy as jnp
import pytest
from tiny_runs import ROOT, assert_same_parameters, flags_of, metrics, prepare, sft_settings, trained

from ivr_jax.checkpoints import store
from ivr_jax.cloud import inputs, manifest, mirror
from ivr_jax.cloud.objects import Objects
from ivr_jax.errors import UserError

STEPS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def settings(runs) -> dict:
    return sft_settings(runs) | {"steps": STEPS, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def straight(runs, settings) -> Path:
    """An undisturbed run on the disk."""
    trained(runs / "straight", "micro_base", settings)
    return runs / "straight"


@pytest.fixture(scope="module", params=bucket_servers.SCHEMES)
def bucket(request, tmp_path_factory):
    """The URL of an emulator's bucket, and a cache folder that is this machine's."""
    with pytest.MonkeyPatch.context() as patch, bucket_servers.server(request.param):
        patch.setenv(inputs.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield f"{request.param}://{bucket_servers.BUCKET}"


def upload(folder: Path, url: str) -> None:
    """What a tool like gsutil would copy."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    Objects(url).upload({file.relative_to(folder).as_posix(): file for file in files})


def steps(url: str) -> tuple[set[int], set[int]]:
    """Committed steps of a run in a bucket, and those of which there are objects."""
    names = Objects(url).names("checkpoints/")
    begun = {int(name.split("/")[1]) for name in names if re.match(r"checkpoints/\d+/", name)}
    if url.startswith("gs://"):
        return {step for step in begun if f"checkpoints/{step}/commit_success.txt" in names}, begun
    found = manifest.read(Objects(url))
    return {int(p.split("/")[1]) for p in (found.files if found else ()) if p.startswith("checkpoints/")}, begun


def start(argv: list[str], url: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ivr_jax.train", argv[1], f"--workdir={url}", *argv[3:]]
    return subprocess.Popen(command, env=commands.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def test_a_run_that_is_killed_while_it_saves_resumes_on_another_machine_bit_for_bit(
    runs, settings, straight, bucket, capfd
):
    upload(runs / "dataset", f"{bucket}/dataset")
    url, changes = f"{bucket}/a/sft", settings | {"data.path": f"{bucket}/dataset"}
    argv = ["train", f"--config={ROOT}/configs/micro_base.py", f"--workdir={url}", *flags_of(changes)]
    process, until = start(argv, url), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        committed, begun = steps(url)
        if max(committed, default=0) >= 2 and begun - committed:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    committed = steps(url)[0]
    assert committed and max(committed) < STEPS
    shutil.rmtree(inputs.cache_folder())  # another machine
    capfd.readouterr()
    trained(url, "micro_base", changes)
    assert f"resumed at step {max(committed)} of {STEPS}" in capfd.readouterr().out
    assert max(steps(url)[0]) == STEPS and ".ivr_jax/lock.json" not in Objects(url).names(".ivr_jax")
    there = inputs.local(f"{url}/metrics.jsonl")
    assert metrics(there.parent) == metrics(straight)
    assert_same_parameters(url, straight)
    commands.succeed("report", f"--workdir={bucket}/a")
    assert b"<svg" in Objects(f"{bucket}/a").read("report.html")[0]
    trained(url, "micro_base", changes)  # a finished run is left alone
    assert f"already trained {STEPS} steps" in capfd.readouterr().out


SHARDED = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ivr_jax import sharding
from ivr_jax.checkpoints import store
from ivr_jax.cloud import mirror

def state(mesh, make):
    shapes = {"kernel": ((64, 96), P("fsdp", "tensor"), jnp.bfloat16), "embed": ((40, 16), P("tensor"), jnp.float32),
              "scale": ((7,), P(), jnp.float32)}
    return {name: make(name, shape, NamedSharding(mesh, part), dtype) for name, (shape, part, dtype) in shapes.items()}

def random(name, shape, placed, dtype):
    return jax.device_put(jax.random.normal(jax.random.key(len(name)), shape, dtype), placed)

def shape_of(name, shape, placed, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

for url in sys.argv[1:]:
    saved = state(sharding.make_mesh({"fsdp": 2, "tensor": 4}), random)
    with mirror.open_folder(url, without=store.written_directly(url)) as folder:
        checkpointer = store.Checkpointer(folder)
        checkpointer.save(3, saved, [1], {"kind": "test"})
        checkpointer.wait()
        checkpointer.close()
    like = state(sharding.make_mesh({"fsdp": 4, "tensor": 2}), shape_of)
    with mirror.open_folder(url, without=store.written_directly(url)) as folder:
        checkpointer = store.Checkpointer(folder)
        restored = checkpointer.restore(like)
        assert restored.step == 3 and restored.data == [1]
        checkpointer.close()
    restored = restored.state
    for name, array in saved.items():
        found = restored[name]
        same = found.dtype == array.dtype and np.array_equal(found, array)
        print(url.partition(":")[0], name, len(found.sharding.device_set), same)
"""


def test_a_sharded_checkpoint_comes_back_bit_for_bit_on_another_mesh(tmp_path, monkeypatch):
    monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path))
    with contextlib.ExitStack() as stack:
        for scheme in bucket_servers.SCHEMES:
            stack.enter_context(bucket_servers.server(scheme))
        urls = [f"{scheme}://{bucket_servers.BUCKET}/sharded" for scheme in bucket_servers.SCHEMES]
        lines = commands.on_devices(8, SHARDED, *urls)
    found = [line for line in lines if line.endswith("True")]
    names = ("kernel", "embed", "scale")
    assert found == [f"{scheme} {name} 8 True" for scheme in bucket_servers.SCHEMES for name in names]


def test_a_bucket_that_vanishes_while_a_checkpoint_is_written_shows_the_last_whole_one(tmp_path, monkeypatch):
    monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path / "cache"))
    url, vanishes = f"gs://{bucket_servers.BUCKET}/run", tmp_path / "vanishes"

    def save(step: int, after: int | None = None) -> None:
        """Checkpoint `step`; the bucket vanishes after so many requests of it."""
        with mirror.open_folder(url, without=store.written_directly(url)) as folder:
            checkpointer = store.Checkpointer(folder)
            if after is not None:
                vanishes.write_text(str(after))
            checkpointer.save(step, {"params": jnp.full((64, 64), step)}, [step], {"kind": "test"})
            checkpointer.wait()
            checkpointer.close()

    with bucket_servers.server("gs", GCS_VANISHES=str(vanishes)):
        save(2)
        with pytest.raises(UserError) as error:
            save(4, after=20)
        assert url in error.value.what and "\n" not in error.value.what
        assert int(vanishes.read_text()) == 0
        vanishes.unlink()
        assert steps(url)[0] == {2} and store.resolve(url).name == "2"
        save(4)
        assert steps(url)[0] == {2, 4}
