"""Commands in parts on a real Ray cluster of two nodes on this machine, of which one is killed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
from benchmark_model import SETTINGS, write_model
from benchmark_runs import judge_flags, judging
from construct_worker import KEY, arguments, contents, recorded, write_samples
from openai_service import Behaviour, OpenAIService, serving
from tiny_runs import prepare

from ivr_jax.cluster import engine

pytest.importorskip("ray")
STORE = 80 << 20
# By default a worker gives way to every other process of the machine, for instance to another test.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_worker_niceness": "0"}

# Of several nodes with one address Ray attaches a command to any; the one that is to be killed has its own.
LOST = {"node_ip_address": "127.0.0.2"}
NODE = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "include_log_monitor": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node of one core; every process of it has ended afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (commands.environment() | QUIET | {"TEST_KEY": KEY}).items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        stopped_by = signal.getsignal(signal.SIGTERM)
        made = Cluster(initialize_head=True, head_node_args=NODE | {"no_monitor": True})
        session = made.head_node.get_session_dir_path()
        try:
            assert len(servers(session)) >= 2
            yield made
        finally:
            made.shutdown()
            signal.signal(signal.SIGTERM, stopped_by)  # Ray has put its own in place
    assert not servers(session)


@contextlib.contextmanager
def started(module: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which is killed when it has not ended by itself."""
    command = [sys.executable, "-m", f"ivr_jax.{module}", *map(str, arguments)]
    environment = commands.environment() | QUIET | {"TEST_KEY": KEY}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def processes() -> Iterator[tuple[int, list[str]]]:
    """Process ids on this machine, and their command lines."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_text(errors="replace").split("\0") if entry.name.isdigit() else []
            yield from [(int(entry.name), words)] if words else []


def servers(session: str) -> list[int]:
    """The nodes' servers of the cluster with this folder."""
    names = ("/raylet", "/gcs_server")
    return [pid for pid, words in processes() if words[0].endswith(names) and any(session in word for word in words)]


def runs_a_part(node: Any) -> bool:
    """Whether a worker of the node is busy with a part."""
    raylet = node.all_processes["raylet"][0].process.pid
    for pid, words in processes():
        with contextlib.suppress(OSError):  # it has ended
            is_part, status = words[0].startswith("ray::run_part"), Path(f"/proc/{pid}/status").read_text()
            if is_part and f"\nPPid:\t{raylet}\n" in status:
                return True
    return False


def test_a_node_is_killed_and_the_dataset_is_that_of_one_process(tmp_path, monkeypatch, cluster):
    monkeypatch.setenv("TEST_KEY", KEY)
    samples, service = write_samples(tmp_path, 12), OpenAIService(Behaviour(key=KEY))
    limits = {"services": {"in_flight": 2}}
    with serving(service) as url:
        commands.succeed("construct", *arguments(url, samples, tmp_path / "one", **limits))
        service.log.most_in_flight, more = 0, service.log.more(2)
        # Neither part can end before the node is killed: all calls but a few, of which each needs more, wait for that.
        service.behaviour.held_after = sum(service.log.answered.values()) + 2
        lost, workdir = cluster.add_node(**NODE, **LOST), tmp_path / "ray"
        on_ray = ("--engine=ray", "--shards=2", f"--ray_address={cluster.address}")
        with started("construct", *arguments(url, samples, workdir, **limits), *on_ray) as running:
            wait_for(lambda: more() and len(list(workdir.glob("parts/*"))) == 2 and runs_a_part(lost), running)
            cluster.remove_node(lost, allow_graceful=False)
            service.behaviour.held_after = None
            out, err = running.communicate(timeout=180)
    assert running.returncode == 0, err
    assert int(re.findall(r"(\d+) run again", err)[-1]) >= 1
    assert contents(tmp_path / "ray" / "dataset") == contents(tmp_path / "one" / "dataset")
    assert "kept direct" in out and not (tmp_path / "ray" / "parts").exists()
    # Two services, two calls each, whatever the number of parts; two more may have been under way when the node died.
    assert service.log.most_in_flight <= 6


def test_answers_and_judgements_are_those_of_one_process_when_a_node_is_killed(tmp_path, cluster):
    model, prompts = write_model(tmp_path / "model"), tmp_path / "mine.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{number} cats."}) for number in range(12)))

    def words(name: str, url: str, *more: str) -> list[str]:
        return [
            f"--prompts={prompts}", f"--workdir={tmp_path / name}", f"--checkpoint={model}", "--skip_sanity",
            "--config.modes=('direct',)", *SETTINGS, *judge_flags(url), *more,
        ]  # fmt: skip

    with judging() as (service, url):
        commands.succeed("evaluate", *words("one", url))
        asked, lost, run = service.log.answered.copy(), cluster.add_node(**NODE, **LOST), tmp_path / "ray"
        service.behaviour.latency, more = 0.8, service.log.more(3)
        on_ray = ("--engine=ray", "--shards=2", f"--ray_address={cluster.address}", "--config.judge.in_flight=2")
        with started("evaluate", *words("ray", url, *on_ray)) as running:
            wait_for(lambda: more() and runs_a_part(lost), running)
            cluster.remove_node(lost, allow_graceful=False)
            _, err = running.communicate(timeout=240)
        assert running.returncode == 0, err
        again = service.log.answered - asked - asked  # what was in flight when the node was lost
        assert service.log.answered.keys() == asked.keys() and sum(again.values()) <= 2
    one, parts = contents(tmp_path / "one"), contents(run)
    assert one.keys() == parts.keys() and sum(name.endswith(".png") for name in one) >= 12
    other = ("judge_cache/", "judgements.jsonl", "report.html")  # in the order of the replies; with the time of writing
    assert not [name for name in one if one[name] != parts[name] and not name.startswith(other)]
    lines = [sorted(files["judgements.jsonl"].splitlines()) for files in (one, parts)]
    assert lines[0] == lines[1] and len(lines[0]) == 12


def test_token_examples_are_those_of_one_process(tmp_path, cluster):
    runs = prepare(tmp_path)
    words = [runs / "dataset", f"--image_tokenizer={runs / 'image_tokenizer'}"]
    commands.succeed("tokenise", *words, f"--out={tmp_path / 'one'}")
    lost, kept = cluster.add_node(**NODE, **LOST), tmp_path / ".ray.parts"
    on_ray = ("--engine=ray", "--shards=3", f"--ray_address={cluster.address}")
    with started("tokenise", *words, f"--out={tmp_path / 'ray'}", *on_ray) as running:
        wait_for(lambda: len(list(kept.glob("lock.*"))) >= 2, running)
        cluster.remove_node(lost, allow_graceful=False)
        _, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert not kept.exists()


def test_a_head_that_is_lost_ends_in_one_line_and_the_same_command_resumes(tmp_path, monkeypatch, cluster):
    """The last test with this cluster, which is gone afterwards."""
    monkeypatch.setenv("TEST_KEY", KEY)
    samples, service = write_samples(tmp_path, 8), OpenAIService(Behaviour(key=KEY, latency=0.1))
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run", services={"in_flight": 4})
        address, more = cluster.address, service.log.more(40)
        with started("construct", *command, "--engine=ray", "--shards=2", f"--ray_address={address}") as running:
            wait_for(more, running)
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            out, err = running.communicate(timeout=120)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert running.returncode == 2 and len(lines) == 1 and "Traceback" not in err, err
        assert not (tmp_path / "run" / "dataset").exists()
        paid = {name for folder in (tmp_path / "run" / "parts").iterdir() for name in recorded(folder / "journal")}
        before = service.log.answered.copy()
        gone = commands.run("construct", *command, "--engine=ray", "--shards=2", f"--ray_address={address}")
        assert address in gone.complaint  # nobody is there any more
        service.behaviour.latency = 0.0
        commands.succeed("construct", *command)  # without a cluster, say
        commands.succeed("construct", *arguments(url, samples, tmp_path / "one"))
    asked_again = {name for name, count in (service.log.answered - before).items() if name in paid and count > 1}
    assert paid and not asked_again  # once more in the run to compare with, and in no other
    assert contents(tmp_path / "run" / "dataset") == contents(tmp_path / "one" / "dataset")


def test_a_head_that_was_started_anew_at_the_same_address_is_told_from_the_one_that_was_lost():
    """By the actor of this run, which the new one does not have, although it accepts connections."""
    now = [0.0]
    signs = engine.Signs(lambda: now[0])

    def lost(seconds: float, reached: bool = True, told: bool = False) -> bool:
        now[0] += seconds
        return signs.lost(reached, told)

    assert not lost(200)  # a coordinator may take its time to begin
    assert not lost(10, told=True) and not lost(50)
    assert lost(20)  # it is silent
    assert not lost(0, told=True) and not lost(5, reached=False)
    assert not lost(10) and lost(10)  # the head was away for a moment, and the coordinator with it
    assert not lost(0, told=True) and not lost(19, reached=False, told=True)
    assert lost(2, reached=False, told=True)  # beside this machine nobody hears anything


@pytest.mark.parametrize(
    "words, said",
    [
        (("--engine=ray", "--ray_address=127.0.0.1:1"), "127.0.0.1:1"),
        (("--shards=3",), "--engine=ray"),
        (("--engine=ray", "--shard_resources=CPU=many"), "CPU=many"),
        (("--engine=ray", "--shard=0/2"), "--shard"),
    ],
)
def test_what_cannot_run_on_ray_is_said_in_one_line(tmp_path, words, said):
    done = commands.run("construct", "--config=micro_construct", f"--workdir={tmp_path / 'run'}", *words)
    assert said in done.complaint
    assert not (tmp_path / "run" / "dataset").exists()


def test_a_run_is_not_continued_with_another_number_of_parts_or_without_what_it_paid_for(tmp_path, monkeypatch):
    samples, service = write_samples(tmp_path, 4), OpenAIService(Behaviour(key=KEY))
    monkeypatch.setenv("TEST_KEY", KEY)
    with serving(service) as url:
        command = arguments(url, samples, tmp_path / "run")
        (tmp_path / "run" / "parts" / "00000-of-00007").mkdir(parents=True)
        assert "--shards=7" in commands.run("construct", *command, "--engine=ray", "--shards=3").complaint
        shutil.rmtree(tmp_path / "run")
        commands.succeed("construct", *command)
        shutil.rmtree(tmp_path / "run" / "dataset")
        assert "--engine=ray" in commands.run("construct", *command, "--engine=ray").complaint
