"""Training runs of a few seconds: their data, their settings, how they are disturbed, and how they are compared."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import jax
import numpy as np
from answer_tokens import trajectory
from checkpoints_fixture import random_tree

from ivr_jax import cli, train
from ivr_jax.checkpoints import store
from ivr_jax.checkpoints import system as systems
from ivr_jax.data.store import TrajectoryWriter
from ivr_jax.images import image_name
from ivr_jax.models import image_tokenizer
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig
from ivr_jax.trajectory import Reflection, Step

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip

IMAGES = ImageTokenizerConfig(
    ch=4, out_ch=3, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=64,
    z_channels=4, n_embed=8, embed_dim=4, norm_groups=1,
)  # fmt: skip


def flags_of(settings: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in settings.items()]


def trained(workdir: Path, config: str, settings: dict) -> list[str]:
    """Trains in this process; returns the command line that would do the same."""
    argv = ["train", f"--config={ROOT}/configs/{config}.py", f"--workdir={workdir}", *flags_of(settings)]
    train.main(cli.parse(argv, config=True, add_flags=train.add_flags))
    return argv


def prepare(folder: Path) -> Path:
    """Fills a folder with a dataset of six trajectories and an image tokenizer of random weights."""
    rng = np.random.default_rng(0)
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
    params = random_tree(image_tokenizer.param_shapes(IMAGES))
    checkpointer = store.Checkpointer(folder / "image_tokenizer")
    meta = {"kind": systems.IMAGE_TOKENIZER, "model": dataclasses.asdict(IMAGES)}
    checkpointer.save(0, {"params": params}, None, meta)
    checkpointer.wait()
    checkpointer.close()
    return folder


def sft_settings(runs: Path) -> dict:
    """Log lines and checkpoints fall on different steps, so that half a line's sums must be resumed too.

    AdamW instead of the config's Muon, whose iterations take long to compile.
    """
    return {
        "steps": 20, "batch": 2, "grad_accum_steps": 1, "loss_chunk_tokens": 64, "log_every": 3, "checkpoint_every": 4,
        "image_tokenizer": runs / "image_tokenizer", "data.path": runs / "dataset", "data.length": 128,
        "data.practice_share": 0.0,
        "data.mix.reflection": 2.0, "data.mix.multi_step": 2.0, "optimizer.kind": "adamw",
        "optimizer.learning_rate": 2e-3,
        **{f"model.{key}": value for key, value in MODEL.items()},
    }  # fmt: skip


def rl_settings(sft_run: Path) -> dict:
    return {
        "steps": 8, "prompts_per_step": 2, "group_size": 2, "answer_length": 128, "micro_batch": 2, "buckets": (384,),
        "loss_chunk_tokens": 256, "log_every": 3, "checkpoint_every": 2, "init": sft_run, "grammar.text_cap": 3,
        "grammar.max_reflections": 1, "grammar.max_steps": 1, "optimizer.learning_rate": 1e-2,
    }  # fmt: skip


def disturbed(
    argv: list[str], workdir: Path, sign: signal.Signals, after: int, saving: bool = False, delay: float = 0.0
) -> tuple[int, str]:
    """Starts the command for `workdir`, sends `sign` once it has saved step `after` or later: (status, output).

    With `saving` it waits, from there, until the next save has begun and is not committed yet; then `delay` seconds.
    """
    command = [sys.executable, "-m", "ivr_jax.train", argv[1], f"--workdir={workdir}", *argv[3:]]
    process = subprocess.Popen(command, cwd=workdir.parent, env=commands.environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.monotonic() + 300

    def early() -> bool:
        return newest_checkpoint(workdir) < after or (saving and not _in_a_save(process, workdir))

    while early() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001 if saving else 0.005)
    time.sleep(delay)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def _in_a_save(process: subprocess.Popen, workdir: Path) -> bool:
    """Stops the process while a save has begun and is not committed: true; false when there is none."""

    def begun() -> bool:
        return any("tmp" in p.name for p in workdir.glob("checkpoints/*"))

    if not begun() or process.poll() is not None:
        return False
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    if begun():
        return True
    process.send_signal(signal.SIGCONT)  # it was committed before the process stopped
    return False


def newest_checkpoint(workdir: Path) -> int:
    return max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)


def metrics(workdir: Path) -> list[dict]:
    """Logged lines without what a clock measured."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same_run(workdir: Path, other: Path) -> None:
    assert metrics(workdir) == metrics(other)
    assert_same_parameters(workdir, other)


def assert_same_parameters(run: Path | str, other: Path | str) -> None:
    """Of two runs, each in a folder or at the URL of a bucket."""
    ours, theirs = systems.load(run), systems.load(other)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)
