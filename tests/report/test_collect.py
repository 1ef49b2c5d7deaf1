"""What is gathered from a working directory: all that is there, a note on what is not, an error for what is broken."""

from __future__ import annotations

import shutil

import pytest
from answers_fixture import plain_answer, write_workdir

from ivr_jax.errors import UserError
from ivr_jax.report.collect import collect, read_curves
from ivr_jax.report.metrics import evaluate, write_evaluation
from ivr_jax.report.pages import write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "demo"
    write_workdir(root, count=16)
    return root


def test_a_finished_run_is_gathered_whole(finished, tmp_path):
    inputs = collect(finished)
    assert inputs.title == "Report on demo" and inputs.notes == ()
    assert [run.title for run in inputs.runs] == ["Image tokenizer", "Base", "SFT", "RL"]
    assert [curve.name for curve in inputs.runs[3].curves][:2] == ["loss", "learning_rate"]
    assert inputs.runs[2].config["optimizer"]["schedule"] == "cosine"
    assert list(inputs.evaluations) == ["Base", "SFT", "SFT + RL"]
    answered, samples = inputs.gallery
    assert {item.arm for item in answered.items} == {"Base", "SFT", "SFT + RL"} and len(answered.items) == 36
    assert samples.title == "Training samples of SFT" and len({item.answer.mode for item in samples.items}) == 3
    assert len(inputs.gates) == 11
    page, *plots = write_report(tmp_path / "report.html", *inputs)
    assert page.stat().st_size > 50_000 and len(plots) == 6


def test_what_is_missing_is_left_out_and_said(finished, tmp_path):
    root = tmp_path / "half"
    shutil.copytree(finished, root)
    for gone in ("rl", "eval_rl", "sft/training_samples"):
        shutil.rmtree(root / gone)
    for gone in ("gates.json", "base/config.json", "image_tokenizer/metrics.jsonl", "eval_base/answers.jsonl"):
        (root / gone).unlink()
    inputs = collect(root)
    assert [run.title for run in inputs.runs] == ["Image tokenizer", "Base", "SFT"]
    assert list(inputs.evaluations) == ["Base", "SFT"] and len(inputs.gallery) == 1 and inputs.gates == ()
    assert inputs.notes == (
        "The stage “Image tokenizer” has logged no metrics.",
        "The stage “Base” has kept no configuration.",
        "The stage “RL” is not in this working directory.",
        "The answers of “Base” were not kept, so none is shown.",
        "“SFT + RL” has not been evaluated.",
    )
    write_report(tmp_path / "report.html", *inputs)


def test_an_empty_folder_still_makes_a_report(tmp_path):
    inputs = collect(tmp_path, title="Nothing yet")
    assert len(inputs.notes) == 7 and not inputs.runs and not inputs.evaluations
    write_report(tmp_path / "report.html", *inputs)
    assert "Nothing has been run yet." in (tmp_path / "report.html").read_text()


def test_further_arms_follow_the_three(tmp_path):
    for name in ("eval_sft", "eval_rl_no_bonus", "eval_base"):
        write_evaluation(tmp_path / name, evaluate([plain_answer()]))
    assert list(collect(tmp_path).evaluations) == ["Base", "SFT", "rl no bonus"]


def test_curves_of_a_resumed_and_then_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0, "note": "x"}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 9.0}\n'
                    '{"step": 3, "loss": 1.0, "kl": 0.5}\n{"step": 4, "loss": NaN, "kl": "inf", "ok": true}\n'
                    '{"step": 5, "lo')
    loss, kl = read_curves(path)
    assert (loss.name, loss.steps, loss.values) == ("loss", (1, 2, 3), (3.0, 2.0, 1.0))
    assert (kl.name, kl.steps, kl.values) == ("kl", (3,), (0.5,))


@pytest.mark.parametrize("line", ["not json", '{"loss": 1.0}', '{"step": "x"}', '{"step": true}', "[1]", "7"])
def test_a_bad_metrics_line_is_reported_with_file_and_number(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        read_curves(path)
    assert "metrics.jsonl, line 2" in caught.value.what


@pytest.mark.parametrize("file, text", [
    ("sft/config.json", "{"), ("sft/config.json", "[]"), ("gates.json", '[{"name": 1}]'),
    ("eval_rl/evaluation.json", "{}"), ("eval_rl/answers.jsonl", "{}"),
])
def test_a_broken_file_is_named(file, text, finished, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(finished, root)
    (root / file).write_text(text)
    with pytest.raises(UserError) as caught:
        collect(root)
    assert file in caught.value.what


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError) as caught:
        collect(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in caught.value.what
