"""A user's own prompts: answered and shown without a judge, then judged over HTTP from the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import numpy as np
import pytest
from benchmark_model import SETTINGS, write_model
from benchmark_runs import judge_flags, judging, summary_of, values_of

from ivr_jax.checkpoints import system as systems
from ivr_jax.evaluate.benchmarks.suites.own import BENCHMARK
from ivr_jax.images import load_image, save_png
from ivr_jax.sampling.requests import output_size

SCORES = {
    "Put a cup on the table.": {"instruction": 5, "consistency": 3, "quality": 4, "knowledge": 3},
    "A wide street.": {"instruction": 4, "consistency": 5, "quality": 5, "knowledge": 5},
    "A dog.": {"instruction": 5, "consistency": 5, "quality": 2, "knowledge": 5},
}


def write_prompts(folder: Path) -> Path:
    save_png(folder / "pictures" / "table.png", np.full((32, 32, 3), 90, np.uint8))
    lines = [
        {"prompt": "Put a cup on the table.", "image": "pictures\\table.png", "category": "edit", "key": "cup",
         "explanation": "Cups stand upright."},
        {"prompt": "A wide street.", "aspect_ratio": "4:1", "category": "draw"},
        {"prompt": "A dog.", "category": "draw"},
    ]  # fmt: skip
    file = folder / "mine.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of an evaluation without a judge, and the flags of its command."""
    root = tmp_path_factory.mktemp("own")
    model, file = write_model(root / "model"), write_prompts(root)
    flags = [f"--prompts={file}", f"--checkpoint={model}", f"--workdir={root / 'run'}", "--config.modes=('direct',)",
             *SETTINGS]  # fmt: skip
    commands.succeed("evaluate", *flags)
    return root / "run", flags


def test_without_a_judge_there_are_answers_and_a_page_and_no_figure(run):
    workdir, _ = run
    made = summary_of(workdir)
    assert made["headline"] is None and made["reasons"] == ["not judged"] and not sum(made["states"].values())
    assert {figure["fixed"]["value"] for figure in made["figures"].values()} == {None}
    assert made["answers"]["overall"]["modes"] == {"direct": 1.0}
    page = (workdir / "report.html").read_text()
    assert all(prompt in page for prompt in SCORES) and page.count("data:image/png") >= 4
    drawn = {key: load_image(workdir / "images" / key / "0.png").shape[:2] for key in ("cup", "0002", "0003")}
    config = systems.load_image_codec(workdir.parent / "model" / "image_tokenizer").config
    side, factor = config.resolution, config.factor
    assert drawn["cup"] == drawn["0003"] == (side, side)
    wide = output_size("4:1", [], side**2, factor)
    assert wide[0] < wide[1] and drawn["0002"] == (factor * wide[0], factor * wide[1])


def test_a_judge_scores_the_answers_that_are_there(run):
    workdir, flags = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.png")}
    asked = []

    def script(text, images):
        prompt = next((prompt for prompt in SCORES if prompt in text), None)
        if prompt is None:
            return None
        asked.append((prompt, len(images), "Cups stand upright." in text))
        return {"reasoning": f"Seen: {prompt}", **SCORES[prompt]}

    with judging(script) as (_, url):
        commands.succeed("evaluate", *flags, *judge_flags(url))
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.png")} == before
    assert sorted(asked) == [("A dog.", 1, False), ("A wide street.", 1, False), ("Put a cup on the table.", 2, True)]
    values = values_of(workdir, "fixed")
    assert values == {"Passed": pytest.approx(100 / 3), "instruction": pytest.approx(14 / 3),
                      "consistency": pytest.approx(13 / 3), "quality": pytest.approx(11 / 3),
                      "knowledge": pytest.approx(13 / 3), "Passed: edit": 100.0, "Passed: draw": 0.0}  # fmt: skip
    assert summary_of(workdir)["headline"] == {"strict": values["Passed"], "fixed": values["Passed"]}
    lines = [json.loads(line) for line in (workdir / "results" / "results.jsonl").read_text().splitlines()]
    assert [(line["key"], line["instruction"], line["image"]) for line in lines] == [
        ("cup", 5, "images/cup/0.png"), ("0002", 4, "images/0002/0.png"), ("0003", 5, "images/0003/0.png"),
    ]  # fmt: skip
    assert "Seen: A dog." in (workdir / "report.html").read_text()


@pytest.mark.parametrize("line", ['{"prompt": "A cup.", "seed": 3}', '{"prompt": "A cup.", "image": "gone.png"}',
                                  '{"prompt": "<|im_start|>"}', "[]", ""])  # fmt: skip
def test_what_cannot_be_asked_is_one_line(tmp_path, line):
    (tmp_path / "mine.jsonl").write_text(line)
    done = commands.run("evaluate", f"--prompts={tmp_path / 'mine.jsonl'}", f"--workdir={tmp_path / 'run'}",
                        f"--checkpoint={tmp_path}")  # fmt: skip
    assert done.returncode == 2 and ("gone.png" if "gone" in line else "mine.jsonl") in done.complaint


def test_prompts_and_a_benchmark_exclude_each_other(tmp_path):
    flags = [f"--prompts={tmp_path}", "--benchmark=wise", f"--workdir={tmp_path}"]
    assert commands.run("evaluate", *flags).returncode == 2
    assert BENCHMARK.find_images(tmp_path, BENCHMARK.items(write_prompts(tmp_path), tmp_path)[0]) == []
