"""The page of a run and of a comparison in a real headless Chromium; screenshots are kept."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import benchmark_fixtures as fixtures
import commands
import numpy as np
import pytest
from answer_tokens import trajectory
from benchmark_runs import Prepared, judge_flags, judging

from ivr_jax.evaluate.benchmarks import datafiles, generation, run_folder
from ivr_jax.images import image_name, save_png
from ivr_jax.report.answers import SegmentRecord, answer_to_json, make_answer
from ivr_jax.trajectory import Reflection, Sample, Step

ARTEFACTS = Path(__file__).resolve().parents[3] / ".cache" / "screenshots"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e&amp; {{7*7}}"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
KINDS = (
    ((), (True,)),
    ((Reflection("The cup is missing its handle.", "Draw the handle on the right."),), (False, True)),
    ((Step("Remove the lamp. All else stays as it is."), Step("Add the clock.")), (False, False, True)),
)


def write_answers(prepared: Prepared, workdir: Path) -> None:
    """A run of ours as generation leaves it: answers of every mode with plain images."""
    hashes = datafiles.fingerprint(prepared.benchmark.prompt_files(prepared.data), prepared.data)
    run_folder.claim(workdir, {
        "schema": run_folder.SCHEMA, "benchmark": "kris", "model": "ours", "samples": 1, "data": hashes,
        "generation": {"checkpoint": "tiny"}, "answers": None, "rewriter": None, "seed": 0, "judge": None,
        "sanity": None,
    })  # fmt: skip
    for number, item in enumerate(prepared.items):
        causes, passed = KINDS[number % len(KINDS)]
        answer, rounds, folder = trajectory(list(causes), list(passed)), [], run_folder.answer_folder(workdir, item, 0)
        for index, round_ in enumerate(answer.rounds, 1):
            pixels = fixtures.picture(100 * number + index, 96)
            save_png(folder / f"G{index}.png", pixels)
            rounds.append(dataclasses.replace(round_, image=image_name(pixels)))
        generation.save_image(workdir / "images" / prepared.benchmark.image_path(item, 0), pixels)
        names = tuple(f"source {n}" for n in range(len(item.references)))
        sample = Sample(item.key, f"{item.prompt} {HOSTILE}" if number == 0 else item.prompt, names)
        shown = make_answer(dataclasses.replace(answer, sample=sample, rounds=tuple(rounds)), split=item.category)
        kinds = [f"{part}{n}" for n in range(1, len(rounds) + 1) for part in "GE"]
        shown = dataclasses.replace(shown, segments=tuple(SegmentRecord(kind, "", None, 23, False) for kind in kinds))
        content = answer_to_json(shown)
        record = run_folder.AnswerRecord(item.key, 0, shown.mode.value, len(rounds), 46 * len(rounds), content=content)
        run_folder.write_answer(workdir, item, record)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    prepared = Prepared("kris", root)

    def judge(text: str, images: list[np.ndarray]) -> dict | None:
        return {"reasoning": HOSTILE, "quality_score": 3} if "quality_score" in text else None

    with judging(judge) as (_, url):
        write_answers(prepared, root / "ours")
        done = commands.run("evaluate", "--benchmark=kris", f"--data={prepared.data}", f"--workdir={root / 'ours'}",
                            "--judge_only", *judge_flags(url))  # fmt: skip
        assert done.returncode == 0, done
        assert prepared.judge(url, root / "theirs").returncode == 0
    done = commands.run("evaluate", "--compare", root / "theirs", root / "ours", f"--data={prepared.data}",
                        f"--workdir={root / 'both'}")  # fmt: skip
    assert done.returncode == 0, done
    return {"run": root / "ours/report.html", "comparison": root / "both/comparison.html"}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


def opened(browser, path: Path, complaints: list[str], **options):
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page


def test_the_page_of_a_run(pages, browser):
    complaints: list[str] = []
    page = opened(browser, pages["run"], complaints, viewport={"width": 1280, "height": 900})
    assert page.title() == "KRIS-Bench: ours"  # no script of an answer or of the judge has run
    headings = page.locator("h2").all_inner_texts()
    assert headings == ["Result", "Figures", "By category", "Images an answer, and modes", "Best answers",
                        "Worst answers"]  # fmt: skip
    assert page.locator(".bars .fill").count() == 20
    rows = page.locator("#table1 + p + div tbody tr").all_inner_texts()
    assert any("Emu3.5" in row and "73.75" in row for row in rows) and rows[-1].startswith("ours")
    assert page.locator("text=2.00 [").count() >= 1  # images an answer: 1, 2 and 3 in turn
    second = page.locator(".request > details").nth(1)
    assert not second.locator("img").first.is_visible()
    second.locator("summary").first.click()
    assert second.locator("img").first.is_visible()
    broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length")
    assert broken == 0 and complaints == []
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / "benchmark.png", full_page=True)
    assert {"consistency", "instruction", "knowledge", "quality"} <= score_names(page)
    for width in (1280, 390):  # a bar stands beside its label, or right below it
        page.set_viewport_size({"width": width, "height": 900})
        labels, tracks = page.locator(".bars > span:not(.value)").all(), page.locator(".bars .track").all()
        for label, track in zip(labels[:3], tracks[:3], strict=True):
            assert 0 <= track.bounding_box()["y"] - label.bounding_box()["y"] < 32
    page.locator(".bars").screenshot(path=ARTEFACTS / "benchmark_phone_bars.png")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def score_names(page) -> set[str]:
    """What the scores of the first answer are called."""
    return {text.split()[0] for text in page.locator(".answer").first.locator(".rewards > *").all_inner_texts()}


def test_the_page_of_a_comparison_on_a_phone_in_the_dark(pages, browser):
    complaints: list[str] = []
    page = opened(browser, pages["comparison"], complaints, viewport={"width": 390, "height": 800}, color_scheme="dark")
    headings = page.locator("h2").all_inner_texts()
    assert headings[:3] == ["Differences, strict", "Differences, fixed", "Wins by category"]
    assert {"Gains", "Losses"} & set(headings[3:])
    first = page.locator(".gallery-section article").first
    assert first.locator(".answer .arm").all_inner_texts() == ["tiny", "ours"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") and complaints == []
    page.screenshot(path=ARTEFACTS / "benchmark_comparison.png", full_page=True)
