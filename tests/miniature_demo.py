"""The demo in miniature: its own plan, every command of it, with two training steps a stage, in this process."""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import commands

from ivr_jax.demo import __main__ as demo
from ivr_jax.demo import steps


def settings(**keys: object) -> tuple[str, ...]:
    return tuple(f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items())


IMAGES = settings(
    steps=2, continuous_steps=1, batch=2, eval_images=2, codebook_images=2, log_every=1, optimizer__kind="adamw",
    model__ch=4, model__ch_mult=(1, 1, 1, 1, 1), model__z_channels=4, model__embed_dim=4, model__n_embed=8,
)  # fmt: skip
MODEL = settings(
    model__hidden_size=32, model__intermediate_size=48, model__num_hidden_layers=2, model__num_attention_heads=4,
    model__num_key_value_heads=2, model__head_dim=8, model__unroll=1,
)  # fmt: skip
TRAIN = settings(steps=2, batch=2, log_every=1)
ANSWERS = settings(
    grammar__max_reflections=1, grammar__max_steps=2, grammar__text_cap=4, answer_length=224, engine__growth=1
)
PROMPTS = settings(prompts=4, each_split=0, batch=16)
ALL_PARTS = settings(each_split=1, probe_prompts=8, paired_prompts=8)
OVERRIDES = {
    "image_tokenizer": IMAGES,
    "base": (*TRAIN, *MODEL),
    "eval_base": (*ANSWERS, *PROMPTS, *ALL_PARTS),
    "eval_kinds": (*ANSWERS, *settings(prompts=1, each_kind=1, batch=16)),
    # An untrained model never draws a right first image, so nothing can fill a quota of direct answers.
    "construct": settings(
        batch=8, concurrency=4, quotas__direct=0, quotas__reflection=4, quotas__multi_step=4, quotas__evaluation=4
    ),
    "sft": (*TRAIN, *MODEL),
    "eval_sft": (*ANSWERS, *PROMPTS, *ALL_PARTS),
    "eval_direct": (*ANSWERS, *PROMPTS),
    "eval_multi_step": (*ANSWERS, *PROMPTS),
    "rl": (*ANSWERS, *settings(steps=2, prompts_per_step=2, group_size=2, micro_batch=2, buckets=(384,))),
    "eval_typed": (*ANSWERS, *settings(batch=16)),
    "eval_rl": (*ANSWERS, *PROMPTS, *ALL_PARTS),
}
TRAINED = ("image_tokenizer", "base", "sft", "rl")
EVALUATED = ("eval_base", "eval_sft", "eval_direct", "eval_multi_step", "eval_rl")
ASKED = ("eval_kinds", "eval_typed")  # requests of their own


class AtOnce(concurrent.futures.Executor):
    """Runs what is submitted before `submit` returns, in the same thread."""

    def __init__(self, workers: int, name: str):
        assert workers == 1 and name

    def submit(self, function, /, *args, **kwargs) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def run_demo(root: Path, without: str = "") -> str:
    """`python -m ivr_jax.demo --workdir=ROOT` in miniature, its steps in this process; what all of them printed.

    Steps of the command `without` are left out.
    """

    def in_this_process(command: list[str], check: bool, env: dict[str, str], file=None) -> types.SimpleNamespace:
        assert command[:2] == [sys.executable, "-m"] and not check
        if command[2] == without:
            return types.SimpleNamespace(returncode=0)
        done = commands.run(command[2].removeprefix("ivr_jax."), *command[3:])
        print(done.stdout, done.stderr if done.returncode else "", file=file)
        return types.SimpleNamespace(returncode=done.returncode)

    def begun(command: list[str], stdout, stderr: int, env: dict[str, str]) -> types.SimpleNamespace:
        assert stderr == subprocess.STDOUT
        status = in_this_process(command, check=False, env=env, file=stdout).returncode
        return types.SimpleNamespace(wait=lambda: status, poll=lambda: status)

    small = functools.partial(demo.plan, overrides=OVERRIDES)
    futures = types.SimpleNamespace(ThreadPoolExecutor=AtOnce, wait=concurrent.futures.wait)
    processes = types.SimpleNamespace(run=in_this_process, Popen=begun, STDOUT=subprocess.STDOUT)
    with (
        mock.patch.object(demo, "plan", small),
        mock.patch.object(steps, "subprocess", processes),
        mock.patch.object(steps, "concurrent", types.SimpleNamespace(futures=futures)),
    ):
        done = commands.run("demo", f"--workdir={root}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


def files_of(root: Path, *patterns: str) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file that a pattern finds."""
    found = [file for pattern in patterns for file in root.glob(pattern)]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in found}


def run_twice(base: Path) -> types.SimpleNamespace:
    """The folder of a demo that was run twice, what it printed, and the files that the second run changed.

    As `root`, `first`, `second` and `touched`.

    Made once in the folder `base`, whichever process asks first.
    """
    root, printed = base / "miniature", base / "miniature.json"
    with open(base / "miniature.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            shutil.rmtree(root, ignore_errors=True)
            outputs = [run_demo(root)]
            before = files_of(root, "*/metrics.jsonl", "*/evaluation.json", "*/answers.jsonl", "*/dataset/*")
            outputs.append(run_demo(root, without="ivr_jax.report"))  # which draws all plots anew
            after = files_of(root, "*/metrics.jsonl", "*/evaluation.json", "*/answers.jsonl", "*/dataset/*")
            touched = [name for name in before if before[name] != after[name]]
            printed.write_text(json.dumps({"first": outputs[0], "second": outputs[1], "touched": touched}))
    return types.SimpleNamespace(root=root, **json.loads(printed.read_text()))
