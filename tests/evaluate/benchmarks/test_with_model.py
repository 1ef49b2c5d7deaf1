"""Every benchmark with a tiny model: drawn through the rollout engine, judged behind HTTP, resumed, taken apart."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import benchmark_fixtures as fixtures
import commands
import pytest
from benchmark_model import SETTINGS, write_model
from benchmark_runs import judge_flags, judging, summary_of

from ivr_jax.evaluate.benchmarks import generation, interface, registry, run_folder
from ivr_jax.evaluate.benchmarks.suites import micro
from ivr_jax.images import load_image


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write_data(name: str, folder: Path) -> None:
    if name == "micro":
        micro.write_tasks(folder, prompts=4, each_split=0)
    else:
        fixtures.WRITERS[name](folder)


def flags(name: str, root: Path, model: Path, *more: str) -> list[str]:
    return [f"--benchmark={name}", f"--data={root / 'data'}", f"--workdir={root / 'run'}", f"--checkpoint={model}",
            "--samples=2" if name == "geneval" else "--samples=1", *SETTINGS, *more]  # fmt: skip


@pytest.mark.parametrize("name", ["gedit", "geneval", "geneval2", "imgedit", "kris", "micro", "omnicontext", "rise",
                                  "wise"])  # fmt: skip
def test_a_run_from_prompts_to_summary(name, tmp_path, model):
    write_data(name, tmp_path / "data")
    with judging() as (service, url):
        done = commands.run("evaluate", *flags(name, tmp_path, model, *judge_flags(url)))
        assert done.returncode == 0, done
        asked = sum(service.log.answered.values())
        written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.png")}
        again = commands.run("evaluate", *flags(name, tmp_path, model, *judge_flags(url)))
        assert again.returncode == 0 and "generate" not in again.stderr
        assert sum(service.log.answered.values()) == asked
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.png")} == written
    benchmark = registry.load(name)
    items = benchmark.items(tmp_path / "data", tmp_path / "run/references")
    samples = 2 if name == "geneval" else 1
    answers = list(run_folder.read_answers(tmp_path / "run", items, samples))
    assert len(answers) == len(items) * samples
    made, drawn = summary_of(tmp_path / "run"), 0
    for item, record in answers:
        final = tmp_path / "run/images" / benchmark.image_path(item, record.sample)
        folder = run_folder.answer_folder(tmp_path / "run", item, record.sample)
        assert final.is_file() == (record.images > 0) == (record.mode != "invalid") == (record.error == "")
        assert len(list(folder.glob("G*.png"))) == record.images
        drawn += record.images > 0
        if record.images and final.suffix == ".png":
            assert (load_image(final) == load_image(folder / f"G{record.images}.png")).all()
    form = benchmark.judges[0] if benchmark.judges == ("world",) else "chat"
    questions = sum(len(benchmark.questions(item, record.sample, form)) for item, record in answers if record.images)
    assert made["states"]["ok"] == questions and drawn > 0
    assert sum(made["states"].values()) >= made["states"]["ok"]
    share = made["answers"]["overall"]["modes"]
    assert sum(share.values()) == pytest.approx(1) and made["answers"]["overall"]["answers"] == len(answers)


def test_halves_can_run_apart_and_answers_do_not_depend_on_their_batch(tmp_path, model):
    for folder in ("a", "b"):
        write_data("wise", tmp_path / folder / "data")
    with judging() as (_, url):
        only = commands.run("evaluate", *flags("wise", tmp_path / "a", model, "--generate_only"))
        assert only.returncode == 0 and not (tmp_path / "a/run/summary.json").exists()
        rest = [flag for flag in flags("wise", tmp_path / "a", model, *judge_flags(url)) if "checkpoint" not in flag]
        assert commands.run("evaluate", *rest, "--judge_only").returncode == 0
        whole = flags("wise", tmp_path / "b", model, *judge_flags(url), "--config.batch=3")
        assert commands.run("evaluate", *whole).returncode == 0
    first, second = (summary_of(tmp_path / folder / "run") for folder in ("a", "b"))
    assert first["figures"] == second["figures"] and first["answers"] == second["answers"]
    for path in (tmp_path / "a/run/images").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "b/run/images" / path.name).read_bytes()
    run = json.loads((tmp_path / "a/run/run.json").read_text())
    assert run["generation"]["checkpoint_hash"] and run["judge"]["date"]
    other = commands.run("evaluate", *flags("wise", tmp_path / "a", model, "--config.seed=1", "--generate_only"))
    assert "seed" in other.complaint  # another seed is another run


def test_a_prompt_that_leaves_no_room_is_an_invalid_answer_with_its_reason(tmp_path, model):
    write_data("wise", tmp_path / "data")
    path = next((tmp_path / "data").rglob("cultur*"))
    rows = json.loads(path.read_text())
    rows[0]["Prompt"] = "A plant, " * 400
    path.write_text(json.dumps(rows))
    done = commands.run("evaluate", *flags("wise", tmp_path, model, "--generate_only"))
    assert done.returncode == 0, done
    record = run_folder.read_answer(tmp_path / "run", interface.Item("1", "p", "c"), 0)
    assert record.mode == "invalid" and record.tokens == 0 and "tokens" in record.error


def test_a_disk_that_fills_up_while_answers_are_drawn_is_one_line_and_loses_none(tmp_path, model, monkeypatch):
    write_data("wise", tmp_path / "data")
    wanted, replace, renamed = flags("wise", tmp_path, model, "--generate_only"), os.replace, []

    def full(source, target):
        if Path(target).name == run_folder.ANSWER_FILE:
            renamed.append(target)
            if len(renamed) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert "answer.json" in commands.run("evaluate", *wanted).complaint
    monkeypatch.setattr(os, "replace", replace)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob(run_folder.ANSWER_FILE)}
    assert len(kept) == 3
    assert commands.run("evaluate", *wanted).returncode == 0
    assert len(list((tmp_path / "run").rglob(run_folder.ANSWER_FILE))) == 7
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_shares_of_several_processes_are_the_whole(tmp_path, model, monkeypatch):
    """What each process would draw, one after the other; a share does not depend on what others have written."""
    write_data("wise", tmp_path / "data")
    drawn = []
    generate = generation.generate

    def shared(*arguments, **options):
        arguments = list(arguments)
        for index in range(2):
            arguments[10] = (index, 2)
            drawn.append(generate(*arguments, **options))
        return sum(drawn)

    monkeypatch.setattr(generation, "generate", shared)
    assert commands.run("evaluate", *flags("wise", tmp_path, model, "--generate_only")).returncode == 0
    benchmark = registry.load("wise")
    items = benchmark.items(tmp_path / "data", tmp_path)
    assert len(list(run_folder.read_answers(tmp_path / "run", items, 1))) == 7 and sum(drawn) == 7
