"""Tokenising as a job of its own: several processes and devices write what fine-tuning writes for itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import commands
import numpy as np
import pytest
from construct_worker import contents
from dataset_fixtures import build
from tiny_runs import prepare, sft_settings, trained
from tqdm import tqdm

from ivr_jax.cluster.engine import Engine
from ivr_jax.cluster.part import Part
from ivr_jax.data import examples
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.services.limits import ProcessLimits
from ivr_jax.tokenise.__main__ import run_part
from ivr_jax.world.language import PHRASES


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_the_number_of_parts_does_not_matter(tmp_path, parts):
    dataset, tokenizer = TrajectoryDataset(build(tmp_path / "data", 11)), PhraseTokenizer(PHRASES, 8)

    def encode(images):
        return [np.full((1, 2), int(image.sum()) % 8, np.int32) for image in images]

    expected = examples.make_examples(dataset, tokenizer, encode, tmp_path / "one", 10_000, "f", chunk=2)
    (tmp_path / "many").mkdir()
    for part in range(parts):
        examples.write_part(dataset, tokenizer, encode, tmp_path / "many", 10_000, part, parts, chunk=2)
    assert examples.join_parts(tmp_path / "many", "f", 10_000, parts) == expected
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert sum(expected["counts"].values()) == 11 and len(list((tmp_path / "many").iterdir())) == 4
    assert not list(tmp_path.glob(".*"))


def test_a_trajectory_that_is_too_long_is_named_and_leaves_nothing(tmp_path):
    dataset, tokenizer = TrajectoryDataset(build(tmp_path / "data", 2)), PhraseTokenizer(PHRASES, 8)
    with pytest.raises(UserError, match="'key/0'.*5"):
        examples.make_examples(dataset, tokenizer, lambda images: [np.zeros((1, 1), np.int32)] * len(images),
                               tmp_path / "out", 5, "f")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_two_processes_of_two_devices_write_what_fine_tuning_takes_for_its_own(tmp_path):
    runs = prepare(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "ivr_jax.tokenise", runs / "dataset", f"--image_tokenizer={runs / 'image_tokenizer'}",
        f"--out={runs / 'sft' / 'examples'}", f"--coordinator=localhost:{port}", "--process_count=2",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [*command, f"--process_id={index}"], env=commands.environment(2, measured=index == 0),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "tokenise:" in outputs[0] and "tokenise:" not in outputs[1]
    written = {path: path.stat().st_mtime_ns for path in (runs / "sft" / "examples").iterdir()}
    settings = sft_settings(runs) | {"steps": 1, "log_every": 1}
    trained(runs / "sft", "micro_base", settings)
    assert {path: path.stat().st_mtime_ns for path in (runs / "sft" / "examples").iterdir()} == written, "made anew"
    trained(runs / "alone", "micro_base", settings)
    together, alone = contents(runs / "sft" / "examples"), contents(runs / "alone" / "examples")
    manifests = [json.loads(files.pop("examples.json")) for files in (together, alone)]
    assert together == alone
    for manifest in manifests:
        manifest.pop("limit")  # fine-tuning knows its context, the command takes every length
    assert manifests[0] == manifests[1]


class Lost(Exception):
    """The cluster is gone."""


def test_parts_on_a_cluster_write_what_one_process_writes_and_finished_ones_are_kept(tmp_path, monkeypatch):
    """The parts run one after the other in this process; the cluster itself is tested with other commands."""
    runs, done = prepare(tmp_path), []
    words = [runs / "dataset", f"--image_tokenizer={runs / 'image_tokenizer'}"]
    commands.succeed("tokenise", *words, f"--out={tmp_path / 'one'}")

    def run(self, function, argv, shared, bar, indices=None):
        assert function == "ivr_jax.tokenise.__main__:run_part"
        for index in indices:
            with open(os.devnull, "w") as nowhere, tqdm(file=nowhere) as own:
                run_part(argv, Part(index, self.parts, own, ProcessLimits))
                assert own.n == own.total == (6 if index == 0 else 0)
            done.append(index)
            if done == [0]:
                raise Lost

    monkeypatch.setattr(Engine, "run", run)
    on_ray = [*words, f"--out={tmp_path / 'parts'}", "--engine=ray", "--shards=3"]
    assert "Lost" in commands.run("tokenise", *on_ray).stderr and not (tmp_path / "parts").exists()
    commands.succeed("tokenise", *on_ray)
    assert done == [0, 1, 2]
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))


def test_what_is_missing_is_said(tmp_path):
    assert "--image_tokenizer" in commands.run("tokenise", build(tmp_path / "data", 2)).complaint
    assert "holds no dataset" in commands.run(
        "tokenise", tmp_path / "no", f"--image_tokenizer={tmp_path}", f"--out={tmp_path / 'out'}"
    ).complaint


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.json").write_text("{}")
    said = commands.run(
        "tokenise", build(tmp_path / "data", 2), f"--image_tokenizer={tmp_path}", f"--out={tmp_path / 'sft'}"
    ).complaint
    assert "sft exists and holds no token examples. Name a new folder: SFT_WORKDIR/examples." in said
    assert (tmp_path / "sft" / "config.json").read_text() == "{}"
