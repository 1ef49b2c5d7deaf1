"""Every benchmark from published files and images to its summary, through the command and a judge behind HTTP.

Totals are worked out by hand from the scripted scores (`benchmark_fixtures`), for both modes.
"""

from __future__ import annotations

import json
import math

import benchmark_fixtures as fixtures
import commands
import pytest
from benchmark_runs import Prepared, judge_flags, judging, summary_of, values_of

from ivr_jax.evaluate.benchmarks import judges, sanity, session
from ivr_jax.evaluate.benchmarks.command import add_flags, arguments

SAMPLES = {"geneval": {f"{i:05d}": len(outcomes) for i, outcomes in enumerate(fixtures.OUTCOMES)}}
RECORDS = {
    "geneval": fixtures.geneval_records, "omnicontext": lambda items: fixtures.omni_records(),
    "wise": lambda items: fixtures.wise_records(), "rise": lambda items: fixtures.rise_records(),
    "imgedit": lambda items: fixtures.imgedit_records(), "gedit": lambda items: fixtures.gedit_records(),
    "kris": fixtures.kris_records,
}  # fmt: skip
BY_HAND = {
    "geneval": {"strict": {"Overall": 2.75 / 6, "Correct images": 0.5, "Correct prompts": 4 / 6},
                "fixed": {"Overall": 2.75 / 6}},
    "omnicontext": {"strict": {"Average": 13 / 3, "scene_object": 6}, "fixed": {"Average": 16 / 3, "scene_object": 9}},
    "wise": {"strict": {"Overall": 0.56}, "fixed": {"Overall": 0.56, "culture": 0.5}},
    "rise": {"strict": {"Accuracy": 40}, "fixed": {"Accuracy": 60, "Score": 79.5}},
    "imgedit": {"strict": {"Mean of items": 8 / 3, "Overall": 2.25}, "fixed": {"Mean of items": 24 / 9}},
    "gedit": {"strict": {"en overall": 7, "cn overall": 0}, "fixed": {"en overall": 7, "en semantics": 7.5}},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_a_run_gives_the_totals_worked_out_by_hand(name, tmp_path):
    prepared = Prepared(name, tmp_path, SAMPLES.get(name))
    records = RECORDS[name](prepared.items)

    def answer(item, sample, question):
        return {"reasoning": "Seen.", **records.all[item.key, sample, question.metric].value["scores"]}

    with judging(prepared.script(answer)) as (service, url):
        done = prepared.judge(url, tmp_path / "run")
        assert done.returncode == 0, done
        asked = sum(service.log.answered.values())
        again = prepared.judge(url, tmp_path / "run")
        assert again.returncode == 0 and sum(service.log.answered.values()) == asked  # nothing is asked twice
    for mode in ("strict", "fixed"):
        values = values_of(tmp_path / "run", mode)
        for figure, value in BY_HAND.get(name, {}).get(mode, {}).items():
            assert values[figure] == pytest.approx(value, abs=0.01 if name == "imgedit" else 1e-12), figure
        expected = fixtures.figure_values(prepared.benchmark, prepared.items, records.judged, mode)
        assert values == pytest.approx(expected, nan_ok=True)
    made = summary_of(tmp_path / "run")
    assert made["states"]["ok"] == len(records.all) and made["run"]["sanity"] == "passed"
    assert made["run"]["judge"]["name"] == "openai:scripted"
    assert (made["headline"] is None) == (prepared.benchmark.count > 0)  # fewer prompts than are published
    results = {str(path.relative_to(tmp_path / "run/results")) for path in (tmp_path / "run/results").rglob("*")
               if path.is_file()}  # fmt: skip
    written = prepared.benchmark.result_files(prepared.items, records.judged, "tiny", "openai_scripted")
    assert results == set(written)
    for name in ("table.md", "table.tex", "report.html", "judgements.jsonl", "run.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_kris_shows_the_empty_instruction_to_the_judge_in_strict_alone(tmp_path):
    prepared = Prepared("kris", tmp_path)
    with judging() as (service, url):
        service.log.keep = True
        assert prepared.judge(url, tmp_path / "run", "--figures=strict").returncode == 0
        strict = json.dumps(service.log.bodies)
        service.log.bodies.clear()
        assert prepared.judge(url, tmp_path / "fixed", "--figures=fixed").returncode == 0
        fixed = json.dumps(service.log.bodies)
    assert "Edit of chemistry 1." not in strict and "Edit of chemistry 1." in fixed
    assert set(summary_of(tmp_path / "run")["figures"]["Overall"]) == {"category", "strict"}


def test_geneval2_reads_first_token_probabilities(tmp_path):
    prepared = Prepared("geneval2", tmp_path)

    def answer(item, sample, question):
        if "three" in question.accepted:
            return {"three": 0.5, "3": 0.125, " ": 0.25, "Yes": 0.0625}
        return {"Yes": 0.5, " yes": 0.25, " ": 0.125} if "Yes" in question.accepted else {"2": 0.25, "two": 0.25}

    with judging(prepared.script(answer)) as (service, url):
        done = prepared.judge(url, tmp_path / "run")
    assert done.returncode == 0, done
    strict, fixed = (values_of(tmp_path / "run", mode) for mode in ("strict", "fixed"))
    assert fixed["AM"] == pytest.approx(100 * ((0.75 * 2 + 0.625) / 3 + (0.75 * 3 + 0.5) / 4) / 2)
    assert strict["AM"] == pytest.approx(100 * ((0.75 * 2 + 0.875) / 3 + (0.75 * 3 + 0.5) / 4) / 2)
    assert fixed["GM"] == pytest.approx(100 * ((0.75**2 * 0.625) ** (1 / 3) + (0.75**3 * 0.5) ** 0.25) / 2)
    lines = [json.loads(line) for line in (tmp_path / "run/judgements.jsonl").read_text().splitlines()]
    assert {round(line["value"]["mass"], 6) for line in lines} == {0.875, 0.9375, 0.5}
    scores = json.loads((tmp_path / "run/results/scores.json").read_text())
    assert scores[0] == pytest.approx([0.75, 0.875, 0.75])


class PaintDetector:
    """Finds boxes by a table of the image's grey; every box is red."""

    name, version, settings = "paint", "1", {}

    def __init__(self, prepared: Prepared, boxes):
        self._prepared, self._boxes = prepared, boxes

    def detect(self, pixels, names):
        item, _ = self._prepared.find(pixels)
        return {name: boxes for name, boxes in self._boxes.get(item.key, {}).items() if name in names}

    def colors(self, pixels, name, boxes):
        return ["red"] * len(boxes)


def test_geneval_with_a_detector_behind_its_interface(tmp_path):
    prepared = Prepared("geneval", tmp_path)
    left, right = [0, 0, 10, 10, 0.95], [40, 0, 50, 10, 0.95]
    detector = PaintDetector(prepared, {
        "00000": {"bench": [left]}, "00001": {"cup": [left]}, "00002": {"clock": [left, right, [0, 0, 5, 5, 0.8]]},
        "00003": {"car": [left]}, "00004": {"cat": [right], "bus": [left]}, "00005": {"cup": [left], "tie": [right]},
    })  # fmt: skip
    from ivr_jax import cli

    argv = arguments(["evaluate", f"--benchmark={prepared.benchmark.name}", f"--data={prepared.data}", "--judge_only",
                      f"--answers={prepared.images}", f"--workdir={tmp_path / 'run'}", "--samples=1"])  # fmt: skip
    call = cli.parse(argv, config=True, workdir=False, add_flags=add_flags)
    made = session.Session(call, judges.DetectorJudge(detector)).run()
    values = values_of(tmp_path / "run", "strict")
    # The third clock is below the threshold of counting; the cup of the last prompt is not blue.
    assert [values[tag] for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")] == [
        1, 0, 1, 1, 1, 0,
    ]  # fmt: skip
    assert values["Overall"] == pytest.approx(4 / 6)
    assert made["run"]["judge"]["name"] == "paint" and made["run"]["sanity"] == sanity.NOT_RUN
    assert made["headline"] is None
    rows = [json.loads(line) for line in (tmp_path / "run/results/results.jsonl").read_text().splitlines()]
    assert json.loads(rows[2]["details"]) == {"clock": [left, right]}
    assert rows[1]["reason"] == "expected dog>=1, found 0"


def test_sanity_images_of_a_detector_come_from_a_folder(tmp_path):
    import asyncio

    import numpy as np

    from ivr_jax.images import save_png

    prepared = Prepared("geneval", tmp_path)
    detector = PaintDetector(prepared, {"00000": {"bench": [[0, 0, 10, 10, 0.95]]}})
    judge = judges.DetectorJudge(detector)
    save_png(tmp_path / "sanity/bench.png", np.full((64, 64, 3), 4, np.uint8))
    metadata = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "p"}
    row = {"file": "bench.png", "metadata": metadata, "correct": True}
    (tmp_path / "sanity/metadata.jsonl").write_text(json.dumps(row))
    checks = sanity.checks_for(prepared.benchmark, judge, tmp_path / "sanity")
    assert asyncio.run(sanity.run(checks, judge)) == sanity.PASSED
    (tmp_path / "sanity/metadata.jsonl").write_text(json.dumps({**row, "correct": False}))
    checks = sanity.checks_for(prepared.benchmark, judge, tmp_path / "sanity")
    assert asyncio.run(sanity.run(checks, judge)) not in (sanity.PASSED, sanity.NOT_RUN)


def test_costs_are_told_before_anything_is_spent(tmp_path):
    prepared = Prepared("kris", tmp_path)
    with judging() as (service, url):
        done = commands.run(
            "evaluate", "--benchmark=kris", f"--data={prepared.data}", "--dry_run", *judge_flags(url),
            "--config.judge.price_in=2.5", "--config.judge.price_out=10.0", "--config.judge.max_tokens=100",
            "--config.judge.image_tokens=1000",
        )  # fmt: skip
        assert done.returncode == 0 and sum(service.log.answered.values()) == 0
    assert not (tmp_path / "run").exists()
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("prompts", "answers")))
    assert lines == {"prompts": "21", "answers": "21"}
    # Five questions an item; 21 show the edited image alone, the other 84 the references and the edited image, and the
    # two of the viewpoint category on the instruction also its ground truth.
    pictures = 21 + 4 * (19 * 2 + 3 + 4) + 2
    assert f"{21 * 5:,}, showing {pictures:,} images" in done.stdout
    tokens_out = 21 * 5 * 100
    assert f"{tokens_out:,} out" in done.stdout
    price = float(done.stdout.split("price")[1].split()[0])
    assert price > (pictures * 1000 * 2.5 + tokens_out * 10) / 1e6 - 0.01


def test_two_runs_are_compared_and_what_is_not_comparable_is_refused(tmp_path):
    prepared = Prepared("wise", tmp_path)
    second = {"1": 1, "2": 1, "401": 0, "568": 1, "701": 1, "801": 1, "901": 1}
    for folder, scores in (("a", fixtures.WISE_SCORES), ("b", second)):
        script = prepared.script(lambda item, sample, question, scores=scores: {"score": scores[item.key]})
        with judging(script) as (_, url):
            assert prepared.judge(url, tmp_path / folder).returncode == 0
    both = ["--compare", tmp_path / "a", tmp_path / "b", f"--data={prepared.data}", f"--workdir={tmp_path / 'ab'}"]
    done = commands.run("evaluate", *both)
    assert done.returncode == 0, done
    found = json.loads((tmp_path / "ab/comparison.json").read_text())
    overall = found["figures"]["fixed"]["Overall"]
    assert overall["difference"] == pytest.approx((0.4 + 0.12 * 4) - 0.56)
    assert (overall["wins"], overall["losses"], overall["ties"]) == (3, 1, 3) and overall["sign_test"] == 0.625
    assert found["wins"]["fixed"]["chemistry"] == [1, 0, 0] and not math.isnan(overall["low"])
    page = (tmp_path / "ab/comparison.html").read_text()
    assert "Prompt 901." in page and "Gains" in page and "Losses" in page
    with judging(prepared.script(lambda *_: {"score": 1})) as (_, url):
        assert prepared.judge(url, tmp_path / "c", "--config.judge.temperature=0.5").returncode == 0
    other = ["--compare", tmp_path / "a", tmp_path / "c", f"--data={prepared.data}", f"--workdir={tmp_path / 'ac'}"]
    assert "settings" in commands.run("evaluate", *other).complaint
    assert commands.run("evaluate", *other, "--force").returncode == 0
    assert len(json.loads((tmp_path / "ac/comparison.json").read_text())["not_comparable"]) == 1


def test_part_of_the_figures_can_be_given_a_headline(tmp_path):
    prepared = Prepared("wise", tmp_path)
    with judging(prepared.script(lambda item, *_: {"score": fixtures.WISE_SCORES[item.key]})) as (_, url):
        assert prepared.judge(url, tmp_path / "run", "--partial").returncode == 0
    made = summary_of(tmp_path / "run")
    assert made["headline"] == {"strict": pytest.approx(0.56), "fixed": pytest.approx(0.56)} and made["reasons"]
