"""Construction over real HTTP: faults, kills, full disks and bad input change nothing but the time it takes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import bucket_servers
import commands
import pytest
from construct_worker import KEY, arguments, contents, kill, recorded, start, write_samples
from openai_service import Behaviour, OpenAIService, serving
from released_reader import read_released

from ivr_jax.cloud import inputs
from ivr_jax.cloud.objects import Objects
from ivr_jax.construct.__main__ import PENDING
from ivr_jax.data.store import TrajectoryDataset

COUNT = 24


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), COUNT)


@pytest.fixture(scope="module")
def calm(samples, tmp_path_factory):
    """A run without any fault: its workdir, and the service that it spoke with."""
    service = OpenAIService(Behaviour(key=KEY))
    workdir = tmp_path_factory.mktemp("calm") / "run"
    with pytest.MonkeyPatch.context() as patch, serving(service) as url:
        patch.setenv("TEST_KEY", KEY)
        commands.succeed("construct", *arguments(url, samples, workdir, folders=True, gallery=True))
    return workdir, service


def test_every_sample_is_accounted_for_and_every_mode_occurs(calm):
    workdir, service = calm
    summary = json.loads((workdir / "summary.json").read_text())
    constructed, dropped = summary["constructed"], summary["dropped"]
    assert sum(constructed.values()) + sum(dropped.values()) == summary["samples"] == COUNT
    assert set(constructed) == {"direct", "reflection", "multi_step"}
    assert set(dropped) == {"ambiguous_prompt", "step_failed"}
    assert not summary["pending"] and not summary["quarantined"]
    dataset = TrajectoryDataset(workdir / "dataset")
    keys = [trajectory.sample.key for trajectory in dataset]
    assert keys == sorted(set(keys)) and len(keys) == sum(constructed.values())
    made_by = dataset[0].sample.facts["made_by"]
    assert made_by["analyzer"] == "openai:gpt-4o" and made_by["prompts"]["reflect"] == 1
    assert {q for q, n in service.log.answered.items() if n > 1} <= tries_of_steps(service)  # no question twice
    used = summary["services"]
    assert used["openai:gpt-4o"]["answers"] + used["openai:gpt-image-1"]["answers"] == sum(
        service.log.answered.values()
    )


def test_the_released_folders_and_the_gallery_stand_beside_the_dataset(calm):
    workdir, _ = calm
    folders = list((workdir / "folders" / "success").iterdir()), list((workdir / "folders" / "fail").iterdir())
    assert sum(map(len, folders)) == COUNT
    trajectories, problems = read_released(workdir / "folders" / "success")
    stored = [trajectory.mode for trajectory in TrajectoryDataset(workdir / "dataset")]
    assert not problems and [trajectory.mode for trajectory, _ in trajectories] == stored
    page = (workdir / "gallery.html").read_text()
    assert "Make picture" in page and page.count("data:image/png") > 20


def test_faults_change_nothing(calm, samples, tmp_path):
    service = OpenAIService(Behaviour(key=KEY, fault_rate=0.2, hang=8.0))
    with serving(service) as url:
        commands.succeed("construct", *arguments(url, samples, tmp_path / "run", services={"timeout": 5.0}))
    assert sum(service.log.faults.values()) > 30
    assert same_dataset(tmp_path / "run", calm[0])


def test_a_run_that_is_killed_goes_on_where_it_was(calm, samples, tmp_path):
    service, dice, kills = OpenAIService(Behaviour(key=KEY, latency=0.05)), random.Random(1), 0
    answered: dict[str, int] = {}
    several = tries_of_steps(calm[1])
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run", concurrency=4)
        for _ in range(6):
            kills += kill(start(command, tmp_path / "log"), dice.uniform(0, 0.1), service.log.more(dice.randrange(60)))
            for question in recorded(tmp_path / "run" / "journal") - several:
                answered.setdefault(question, service.log.answered[question])
        last = start(command, tmp_path / "log")
        last.join(120)
    assert last.exitcode == 0 and kills == 6 and len(answered) > 20, (tmp_path / "log").read_text()
    assert {question: service.log.answered[question] for question in answered} == answered  # none was asked again
    again = sum(n - calm[1].log.answered[question] for question, n in service.log.answered.items())
    assert again <= kills * 16  # four samples on their way, four questions each
    assert same_dataset(tmp_path / "run", calm[0])


OFTEN = """
import importlib, sys
from ivr_jax.cloud import mirror
mirror.PUSH_SECONDS = 0.3
importlib.import_module("ivr_jax.construct.__main__").entry()
"""


def test_a_run_in_a_bucket_that_is_killed_resumes_on_another_machine(calm, samples, tmp_path, monkeypatch):
    """Samples, pictures, journal and dataset are in the bucket; what the last copy of the journal held is not asked."""
    monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path / "cache"))
    service = OpenAIService(Behaviour(key=KEY, latency=0.05))
    with bucket_servers.server("s3"), serving(service) as url:
        bucket = f"s3://{bucket_servers.BUCKET}"
        Objects(f"{bucket}/in").upload({name: samples.parent / name for name in contents(samples.parent)})
        command = arguments(url, f"{bucket}/in/{samples.name}", f"{bucket}/run", concurrency=4)
        process = subprocess.Popen([sys.executable, "-c", OFTEN, *command], env=commands.environment())
        journal, known = f"{bucket}/run/journal", set()
        until = time.monotonic() + 120
        while len(known) < 20 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
            if "journal.sqlite" in inputs.listed(journal):
                known = recorded(inputs.local(journal))
        process.kill()
        process.wait()
        assert len(known) >= 20 and "dataset/dataset.json" not in inputs.listed(f"{bucket}/run")
        known = recorded(inputs.local(journal))
        while service.log.in_flight:
            time.sleep(0.01)
        before, service.behaviour.latency = service.log.answered.copy(), 0.0
        shutil.rmtree(tmp_path / "cache")  # another machine
        commands.succeed("construct", *command)
        asked = {question for question, n in service.log.answered.items() if n > before[question]}
        assert not asked & (known - tries_of_steps(calm[1]))
        made, whole = contents(inputs.local(f"{bucket}/run/dataset")), contents(calm[0] / "dataset")
        assert made.keys() == whole.keys()
        stored = ("records.array_record", "images.array_record", "images.json")  # the others name the list of samples
        assert all(made[name] == whole[name] for name in stored)


def test_a_run_that_is_asked_to_stop_says_so_at_once_and_loses_no_answer(calm, samples, tmp_path):
    service, log = OpenAIService(Behaviour(key=KEY, latency=0.3)), tmp_path / "log"
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run", concurrency=4)
        process, ready = start(command, log), service.log.more(12)
        while process.is_alive() and not ready():
            process.join(0.005)
        os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        while "asked to stop" not in log.read_text() and time.monotonic() < began + 5:
            process.join(0.01)
        answers_at_once = time.monotonic() - began
        process.join(60)
        assert process.exitcode == PENDING and answers_at_once < 5
        assert sum(service.log.answered.values()) < sum(calm[1].log.answered.values())
        service.behaviour.latency = 0.0
        commands.succeed("construct", *command)
    assert service.log.answered == calm[1].log.answered  # none was asked for twice
    assert same_dataset(tmp_path / "run", calm[0])


def test_a_service_that_is_down_leaves_samples_pending_and_none_failed(calm, samples, tmp_path):
    service = OpenAIService(Behaviour(key=KEY, status=503))
    down = {"tries": 2, "breaker_failures": 4, "patience": 0.1, "breaker_rest": 0.05}
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run", services=down)
        done = commands.run("construct", *command)
        assert done.returncode == PENDING and f"{COUNT} pending" in done.stdout
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert len(summary["pending"]) == COUNT and not summary["dropped"]
        assert not (tmp_path / "run" / "dataset").exists()
        service.behaviour.status = 200
        commands.succeed("construct", *command)
    assert same_dataset(tmp_path / "run", calm[0])


def test_a_full_disk_is_said_and_survived(calm, samples, tmp_path):
    service = OpenAIService(Behaviour(key=KEY))
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run")
        process = start(command, tmp_path / "log", file_limit=150_000)
        process.join(240)
        log = (tmp_path / "log").read_text()
        assert process.exitcode == 2 and "Traceback" not in log, log
        assert re.search(r"error: .*journal.sqlite: .*(disk|full)", log)
        known = recorded(tmp_path / "run" / "journal")
        assert known
        while service.log.in_flight:  # a slow service still answers calls of the process that is gone
            time.sleep(0.01)
        before = service.log.answered.copy()
        commands.succeed("construct", *command)
        after = service.log.answered
        assert not [question for question in known - tries_of_steps(calm[1]) if after[question] > before[question]]
        assert after.total() - before.total() <= calm[1].log.answered.total() - len(known)
    assert same_dataset(tmp_path / "run", calm[0])


def test_bad_entries_are_quarantined_with_their_reasons(tmp_path):
    entries = json.loads(write_samples(tmp_path, 4).read_text())
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "pictures" / "0.png").read_bytes()[:200])
    (tmp_path / "bomb.png").write_bytes(bomb(60_000))
    bad = [
        {"key": "../../x"}, {"key": "/etc/x"}, {"key": entries[0]["key"]}, {"key": ""}, {"key": 7},
        {"edit_prompt": " "}, {"edit_prompt": ["a"]}, {"src_path": 3}, {"src_path": "absent.png"}, {"surprise": 1},
        {"src_path": "text.png", "key": "text"}, {"src_path": "cut.png", "key": "cut"},
        {"src_path": "bomb.png", "key": "bomb"}, {"edit_path": "text.png", "key": "candidate"},
    ]
    listed = entries + [entries[1] | {"key": f"bad {i}"} | change for i, change in enumerate(bad)] + [17]
    (tmp_path / "samples.json").write_text(json.dumps(listed))
    with serving(OpenAIService(Behaviour(key=KEY))) as url:
        commands.succeed("construct", *arguments(url, tmp_path / "samples.json", tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["quarantined"]) == len(bad) + 1 and summary["samples"] == 4 + len(bad) + 1
    assert sum(summary["constructed"].values()) + sum(summary["dropped"].values()) == 4
    reasons = summary["quarantined"]
    assert "megapixels" in reasons["bomb"] and "no image" in reasons["text"]
    assert "is taken" in reasons["entry 6"] and "no object" in reasons["entry 18"] and "surprise" in reasons["entry 13"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "run", "pictures", "samples.json", "text.png", "cut.png", "bomb.png"
    }


def test_the_key_is_in_nothing_that_is_written(samples, tmp_path):
    service = OpenAIService(Behaviour(key=KEY, echo_key=True))
    with serving(service) as url:
        done = commands.run("construct", *arguments(url, samples, tmp_path / "run", folders=True), "--verbose")
        service.behaviour.key = "another"
        refused = commands.run("construct", *arguments(url, samples, tmp_path / "other"))
    assert done.returncode == 0 and "the key is refused" in refused.complaint
    written = contents(tmp_path)
    assert any(b"[secret]" in data for data in written.values())
    assert not [name for name, data in written.items() if KEY.encode() in data]
    assert KEY not in "".join((done.stdout, done.stderr, refused.stdout, refused.stderr))


def test_a_changed_setting_that_matters_is_refused_and_another_is_not(calm, samples):
    workdir, _ = calm
    nobody = "http://127.0.0.1:9/v1"  # a finished run asks nobody
    assert "complete" in commands.succeed("construct", *arguments(nobody, samples, workdir, gallery=True, folders=True))
    done = commands.run("construct", *arguments(nobody, samples, workdir, seed=77))
    assert "seed was 2, is 77" in done.complaint


def test_two_processes_do_not_write_one_journal(samples, tmp_path):
    service = OpenAIService(Behaviour(key=KEY, latency=0.3))
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run")
        first = start(command, tmp_path / "log")
        while not (tmp_path / "run" / "journal" / "journal.sqlite").exists():
            first.join(0.05)
        assert "another process" in commands.run("construct", *command).complaint
        kill(first, 0)


def tries_of_steps(service: OpenAIService) -> set[str]:
    """Images that were drawn up to three times, because their step failed and this service always draws alike."""
    return {question for question, n in service.log.answered.items() if len(question) == 32 and 1 < n <= 3}


def same_dataset(one: Path, other: Path) -> bool:
    """Whether the two datasets are equal byte by byte."""
    return contents(one / "dataset") == contents(other / "dataset")


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_when_every_sample_is_dropped_the_causes_are_named_and_no_dataset_is_left(tmp_path):
    samples = write_samples(tmp_path / "in", 2, ends=("ambiguous",))
    with serving(OpenAIService(Behaviour(key=KEY))) as url:
        done = commands.run("construct", *arguments(url, samples, tmp_path / "run", folders=True))
    assert done.returncode == 2 and "ambiguous_prompt 2" in done.complaint
    assert not (tmp_path / "run" / "dataset").exists()
    assert len(list((tmp_path / "run" / "folders" / "fail").iterdir())) == 2
