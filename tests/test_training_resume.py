"""`python -m ivr_jax.train` killed, stopped, and started again equals a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from answer_tokens import trajectory

from ivr_jax import cli, train
from ivr_jax import system as systems
from ivr_jax.data.store import TrajectoryWriter
from ivr_jax.images import image_name
from ivr_jax.trajectory import Reflection, Step

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def flags_of(settings: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in settings.items()]


def trained(workdir: Path, config: str, settings: dict) -> list[str]:
    """Trains in this process; returns the command line that would do the same."""
    argv = ["train", f"--config={ROOT}/configs/{config}.py", f"--workdir={workdir}", *flags_of(settings)]
    train.main(cli.parse(argv, config=True, add_flags=train.add_flags))
    return argv


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a dataset of six trajectories and an image tokenizer that has seen one batch."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    kinds = [([], [True]), ([Reflection("bad", "better")], [False, True]), ([Step("go")], [False, True])] * 2
    with TrajectoryWriter(folder / "dataset") as writer:
        for number, (causes, passed) in enumerate(kinds):
            answer, images, rounds = trajectory(causes, passed), {}, []
            for round_ in answer.rounds:
                pixels = np.full((64, 64, 3), rng.integers(0, 256, 3), np.uint8)
                images[image_name(pixels)] = pixels
                rounds.append(dataclasses.replace(round_, image=image_name(pixels)))
            sample = dataclasses.replace(answer.sample, key=f"sample {number}")
            writer.add(dataclasses.replace(answer, sample=sample, rounds=tuple(rounds)), images)
    sizes = {"ch": 4, "ch_mult": (1, 1, 1, 1, 1), "z_channels": 4, "embed_dim": 4, "n_embed": 8}
    small = {"steps": 1, "continuous_steps": 0, "batch": 2, "eval_images": 2, "codebook_images": 2}
    small["optimizer.kind"] = "adamw"
    settings = small | {f"model.{key}": value for key, value in sizes.items()}
    trained(folder / "image_tokenizer", "micro_image_tokenizer", settings)
    return folder


def sft_settings(runs: Path) -> dict:
    """Log lines and checkpoints fall on different steps, so that half a line's sums must be resumed too."""
    return {
        "steps": 20, "batch": 2, "accumulation": 1, "chunk": 64, "log_every": 3, "checkpoint_every": 4,
        "image_tokenizer": runs / "image_tokenizer", "data.path": runs / "dataset", "data.length": 128,
        "data.mix.reflection": 2.0, "data.mix.multi_step": 2.0, "optimizer.peak": 2e-3,
        **{f"model.{key}": value for key, value in MODEL.items()},
    }  # fmt: skip


@pytest.fixture(scope="module")
def sft(runs) -> tuple[Path, list[str]]:
    """An undisturbed supervised run and its command line."""
    return runs / "sft", trained(runs / "sft", "micro_base", sft_settings(runs))


def rl_settings(sft_run: Path) -> dict:
    return {
        "steps": 8, "prompts_per_step": 2, "group": 2, "answer_length": 128, "minibatch": 2, "buckets": (384,),
        "chunk": 256, "log_every": 3, "checkpoint_every": 2, "init": sft_run, "grammar.text_cap": 3,
        "grammar.max_reflections": 1, "grammar.max_steps": 1, "optimizer.peak": 1e-2,
    }  # fmt: skip


def disturbed(argv: list[str], workdir: Path, sign: signal.Signals, after: int) -> tuple[int, str]:
    """Starts the command for `workdir`, sends `sign` once it has saved step `after` or later: (status, output)."""
    command = [sys.executable, "-m", "ivr_jax.train", argv[1], f"--workdir={workdir}", *argv[3:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=workdir.parent, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.monotonic() + 300
    while newest_checkpoint(workdir) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def newest_checkpoint(workdir: Path) -> int:
    return max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)


def metrics(workdir: Path) -> list[dict]:
    """Logged lines without what a clock measured."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same_run(workdir: Path, other: Path) -> None:
    assert metrics(workdir) == metrics(other)
    ours, theirs = systems.load(workdir), systems.load(other)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sft_killed_then_stopped_then_finished_equals_an_undisturbed_run(runs, sft, capsys):
    straight, argv = sft
    workdir = runs / "disturbed"
    status, output = disturbed(argv, workdir, signal.SIGKILL, after=4)
    assert status == -signal.SIGKILL, output
    killed_at = newest_checkpoint(workdir)
    assert 4 <= killed_at < 20
    status, output = disturbed(argv, workdir, signal.SIGTERM, after=killed_at + 1)
    stopped_at = newest_checkpoint(workdir)
    assert status == 0, output
    assert f"resumed at step {killed_at} of 20" in output and f"asked to stop; saved step {stopped_at}." in output
    assert killed_at < stopped_at < 20
    trained(workdir, "micro_base", sft_settings(runs))
    assert f"resumed at step {stopped_at} of 20" in capsys.readouterr().out
    assert [line["step"] for line in metrics(workdir)] == [3, 6, 9, 12, 15, 18, 20]
    assert_same_run(workdir, straight)


def test_a_finished_run_is_left_alone(runs, sft, capsys):
    workdir, _ = sft
    before = metrics(workdir)
    trained(workdir, "micro_base", sft_settings(runs))
    assert "already trained 20 steps" in capsys.readouterr().out
    assert metrics(workdir) == before


def test_rl_killed_and_finished_equals_an_undisturbed_run(runs, sft, capsys):
    settings = rl_settings(sft[0])
    argv = trained(runs / "rl", "micro_rl", settings)
    status, output = disturbed(argv, runs / "rl disturbed", signal.SIGKILL, after=2)
    assert status == -signal.SIGKILL, output
    killed_at = newest_checkpoint(runs / "rl disturbed")
    assert 2 <= killed_at < 8
    capsys.readouterr()
    trained(runs / "rl disturbed", "micro_rl", settings)
    assert f"resumed at step {killed_at} of 8" in capsys.readouterr().out
    assert_same_run(runs / "rl disturbed", runs / "rl")
    started = systems.load(sft[0]).params["lm_head"]
    assert (np.asarray(systems.load(runs / "rl").params["lm_head"]) != np.asarray(started)).any()  # it did learn
    rows = metrics(runs / "rl")
    assert [row["step"] for row in rows] == [3, 6, 8] and all(row["ratio_deviation"] < 1e-3 for row in rows)


# -- what a user may get wrong ----------------------------------------------------------------------------------------


def complaint(capsys, argv: list[str]) -> str:
    """The one line that the command ends in; its status is 2."""
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main, config=True, add_flags=train.add_flags, argv=argv)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_a_workdir_keeps_its_configuration(sft, capsys):
    workdir, argv = sft
    before = metrics(workdir), newest_checkpoint(workdir)
    message = complaint(capsys, [*argv, "--config.optimizer.peak=0.5"])
    assert "another configuration: optimizer.peak was 0.002, is 0.5" in message and "--workdir" in message
    assert (metrics(workdir), newest_checkpoint(workdir)) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.paek": 1}, "has no key `optimizer.paek`. Did you mean --config.optimizer.peak?"),
        ({"steps": "many"}, "`steps` takes an int, not 'many'"),
        ({"stage": "pretrain"}, "unknown stage 'pretrain'. Use one of image_tokenizer, sft, rl."),
        ({"data.path": "nowhere"}, "nowhere holds no dataset"),
        ({"image_tokenizer": ""}, "no image tokenizer was named."),
        ({"image_tokenizer": "nowhere"}, "no checkpoint in 'nowhere'."),
        ({"data.length": 40}, r"trajectory 'sample 0' has \d+ tokens; the context holds 40. Raise data.length"),
        ({"model.max_position_embeddings": 50}, r"trajectory 'sample 1' has \d+ tokens; the context holds 50."),
        ({"data.mix.direct": -1.0, "data.mix.reflection": 0.0, "data.mix.multi_step": 0.0}, "data.mix weights nothing"),
        ({"init": "nowhere"}, "no checkpoint in 'nowhere'."),
        ({"optimizer.kind": "sgd"}, "unknown optimizer.kind 'sgd'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_ends_in_one_line_and_leaves_no_checkpoint(runs, sft, tmp_path, capsys, changes, message):
    settings = flags_of(sft_settings(runs) | changes)
    config = f"--config={ROOT}/configs/micro_base.py"
    assert re.search(message, complaint(capsys, ["train", config, f"--workdir={tmp_path}", *settings]))
    assert newest_checkpoint(tmp_path) == 0
    assert not list(tmp_path.glob(".examples*"))  # what was half made is gone


def test_rl_needs_a_trained_backbone(runs, tmp_path, capsys):
    argv = ["train", f"--config={ROOT}/configs/micro_rl.py", f"--workdir={tmp_path}"]
    assert "rl starts from a trained model" in complaint(capsys, argv)
    wrong = complaint(capsys, [*argv, f"--config.init={runs / 'image_tokenizer'}"])
    assert "holds a checkpoint of kind 'image_tokenizer', not a backbone" in wrong
    guided = complaint(capsys, [*argv, "--config.init=anything", "--config.sampling.guidance=3.0"])
    assert "without guidance" in guided
