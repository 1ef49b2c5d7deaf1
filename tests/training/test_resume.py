"""`python -m ivr_jax.train` killed, stopped, and started again equals a run that nobody disturbed, bit for bit."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_runs import (
    ROOT,
    assert_same_run,
    disturbed,
    flags_of,
    metrics,
    newest_checkpoint,
    prepare,
    rl_settings,
    sft_settings,
    trained,
)

from ivr_jax import cli, train
from ivr_jax.checkpoints import system as systems
from ivr_jax.config import load_config, save_config
from ivr_jax.training import grpo


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("runs"))


def settings_of(runs: Path) -> dict:
    """Of the supervised run, with the optimiser that has the most state to resume."""
    return sft_settings(runs) | {"optimizer.kind": "muon"}


@pytest.fixture(scope="module")
def sft(runs) -> tuple[Path, list[str]]:
    """An undisturbed supervised run and its command line."""
    return runs / "sft", trained(runs / "sft", "micro_base", settings_of(runs))


def test_sft_killed_then_stopped_then_finished_equals_an_undisturbed_run(runs, sft, capsys):
    """It is killed while a checkpoint is being written; six examples make an epoch of about two steps."""
    straight, argv = sft
    workdir = runs / "disturbed"
    status, output = disturbed(argv, workdir, signal.SIGKILL, after=4, saving=True)
    assert status == -signal.SIGKILL, output
    killed_at = newest_checkpoint(workdir)
    assert 4 <= killed_at < 20
    assert list(workdir.glob("checkpoints/*tmp*"))  # half a checkpoint, which nobody takes for one
    status, output = disturbed(argv, workdir, signal.SIGTERM, after=killed_at + 1)
    stopped_at = newest_checkpoint(workdir)
    assert status == 0, output
    assert f"resumed at step {killed_at} of 20" in output and f"step {stopped_at} is saved" in output
    assert killed_at < stopped_at < 20
    trained(workdir, "micro_base", settings_of(runs))
    assert f"resumed at step {stopped_at} of 20" in capsys.readouterr().out
    assert [line["step"] for line in metrics(workdir)] == [3, 6, 9, 12, 15, 18, 20]
    assert_same_run(workdir, straight)


def test_a_finished_run_is_left_alone(runs, sft, capsys):
    workdir, _ = sft
    before = metrics(workdir)
    trained(workdir, "micro_base", settings_of(runs))
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
    assert [row["step"] for row in rows] == [3, 6, 8]
    learnt = [row for row in rows if row["skipped_updates"] < 1]  # in some steps no group has a contrast
    assert len(learnt) >= 2 and all(row["max_ratio_deviation"] < 1e-3 for row in learnt)


# -- what a user may get wrong ----------------------------------------------------------------------------------------


def complaint(capsys, argv: list[str]) -> str:
    """The one line that the command ends in; its status is 2."""
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main, config=True, add_flags=train.add_flags, argv=argv)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_rl_of_draft_groups_resumes_exactly_with_its_buffer(runs, sft, capsys, monkeypatch):
    """Stopped by an error in step 3 of 4; a folder with drafts of another checkpoint is refused."""
    settings = rl_settings(sft[0]) | {"steps": 4, "grpo.group": "draft", "grpo.draft_source": "buffer"}
    trained(runs / "drafts straight", "micro_rl", settings)
    step = grpo.Trainer.step

    def failing(self, state, prompts, number):
        if number == 3:
            raise KeyError("stopped")
        return step(self, state, prompts, number)

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(grpo.Trainer, "step", failing)
        trained(runs / "drafts", "micro_rl", settings)
    capsys.readouterr()
    argv = trained(runs / "drafts", "micro_rl", settings)
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    assert_same_run(runs / "drafts", runs / "drafts straight")
    assert len(list((runs / "drafts" / "drafts-0").glob("*.npz"))) > 4
    (runs / "drafts" / "drafts-0" / "about.json").write_text('{"fingerprint": "another"}')
    assert "config.init" in complaint(capsys, argv)


def test_a_workdir_keeps_its_configuration(sft, capsys):
    workdir, argv = sft
    before = metrics(workdir), newest_checkpoint(workdir)
    message = complaint(capsys, [*argv, "--config.optimizer.learning_rate=0.5"])
    assert "another configuration: optimizer.learning_rate was 0.002, is 0.5" in message and "--workdir" in message
    assert (metrics(workdir), newest_checkpoint(workdir)) == before


def test_a_longer_run_is_told_how_to_go_on(sft, capsys):
    workdir, argv = sft
    longer = [part for part in argv if not part.startswith("--config.steps=")] + ["--config.steps=40"]
    message = complaint(capsys, longer)
    assert "config.steps=20" in message and f"--config.init={workdir}" in message


def test_a_run_that_ended_before_its_first_checkpoint_may_be_started_otherwise(runs, capsys):
    workdir = runs / "begun"
    (workdir / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    save_config(workdir, ConfigDict({"stage": "sft", "steps": 1}))
    trained(workdir, "micro_base", sft_settings(runs) | {"steps": 2})
    assert "resumed" not in capsys.readouterr().out and newest_checkpoint(workdir) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.learning_rtae": 1},
            "has no key `optimizer.learning_rtae`. Did you mean --config.optimizer.learning_rate?",
        ),
        ({"steps": "many"}, "`steps` takes an int, not 'many'"),
        ({"stage": "pretrain"}, "unknown stage 'pretrain'. Use one of image_tokenizer, sft, rl."),
        ({"data.path": "nowhere"}, "nowhere holds no dataset"),
        ({"image_tokenizer": ""}, "no image tokenizer was named."),
        ({"image_tokenizer": "nowhere"}, "no checkpoint in 'nowhere'."),
        ({"data.length": 40}, r"6 of 6 .* 40 tokens, .*'sample 1' .*data\.length.*data\.too_long=drop"),
        ({"model.max_position_embeddings": 50}, r"4 of 6 .* 50 tokens, .*'sample 1' .*data\.too_long=drop"),
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
    greedy = complaint(capsys, [*argv, "--config.init=anything", "--config.sampling.temperature=0.0"])
    assert "cannot learn at temperature 0" in greedy
    photographs = complaint(capsys, [*argv, "--config.init=anything", f"--config.prompts.source={runs / 'dataset'}"])
    assert "is not of the micro-world, so its exact analyzer cannot judge answers. Name a service" in photographs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "config.group_size is 1"),
        ({"reward.min_valid": 9}, "of at least reward.min_valid = 9. Raise config.group_size"),
        ({"num_minibatches": 9}, "config.num_minibatches is 9"),
        ({"prompts_per_step": 0}, "prompts_per_step"),
        ({"prompts.size": 0}, "there is no prompt to answer"),
        ({"prompts.source": "nowhere"}, "nowhere holds no dataset"),
        ({"buckets": ()}, "config.buckets .* are no lengths"),
        (
            {
                "judge.outcome.kind": "openai",
                "judge.outcome.model": "m",
                "judge.outcome.base_url": "http://127.0.0.1:9/v1",
                "judge.outcome.key_variable": "NO_SUCH_KEY",
            },
            "NO_SUCH_KEY",
        ),
        ({"judge.outcome.kind": "oracle"}, "judge.outcome.kind is 'oracle'. Use world, openai or gateway"),
        ({"judge.concurrency": 0}, "judge.concurrency"),
        ({"judge.check_every": -1}, "judge.check_every"),
        ({"reward.score_map": "tenth"}, "`reward.score_map` is 'tenth'"),
        ({"reward.axis_weights": (1.0, 1.0)}, "reward.axis_weights .* one weight >= 0 for each of"),
        ({"reward.preset": "paper"}, "has no key `reward.preset`"),
        ({"grpo.loss_type": "mean"}, "loss_type"),
        ({"grpo.group": "draft", "grammar.modes": ("direct", "multi_step")}, "grpo.group"),
        ({"grammar.modes": ("thought",)}, "grammar modes .*thought.* are not among"),
        ({"sampling.image_top_p": 0.0}, "top_p"),
        ({"engine.refill": 0.0}, "`engine.refill`"),
        ({"lora.rank": 2, "lora.targets": ("embed",)}, "lora.targets .* are not possible"),
        ({"monitor.max_missing": 2.0}, "max_missing"),
        ({"mesh.data": 3}, "mesh"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_mistake_in_an_rl_config_ends_in_one_line(sft, tmp_path, capsys, changes, message):
    argv = ["train", f"--config={ROOT}/configs/micro_rl.py", f"--workdir={tmp_path}", f"--config.init={sft[0]}"]
    assert re.search(message, complaint(capsys, [*argv, *flags_of(changes)]))
    assert newest_checkpoint(tmp_path) == 0


def test_answers_that_fit_no_context_or_no_bucket_end_in_one_line(sft, tmp_path, capsys):
    argv = ["train", f"--config={ROOT}/configs/micro_rl.py"]
    settings = rl_settings(sft[0])
    limit = load_config("micro_base").model.max_position_embeddings
    longer = settings | {"answer_length": limit - 32, "buckets": (2 * limit,)}
    context = complaint(capsys, [*argv, f"--workdir={tmp_path / 'a'}", *flags_of(longer)])
    assert str(limit) in context and "config.answer_length" in context
    bucket = complaint(capsys, [*argv, f"--workdir={tmp_path / 'b'}", *flags_of(settings | {"buckets": (128,)})])
    assert "128" in bucket and "config.buckets" in bucket
    assert not (tmp_path / "b" / "metrics.jsonl").exists()  # before the first step
