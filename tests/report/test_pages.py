"""The page: one file that asks the network for nothing, shows every answer round by round, and runs nobody's script."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from answers_fixture import ARMS, Studio, plain_answer, tasks
from photographs import photograph
from PIL import Image

from ivr_jax.errors import UserError
from ivr_jax.evaluate.paired import EXACT, OWN, Case, paired_test
from ivr_jax.evaluate.verdicts import Verdict
from ivr_jax.report.answers import EvaluatedAnswer, SegmentRecord
from ivr_jax.report.gallery import LONGEST_TEXT, GalleryItem, GallerySection, choose, section_view
from ivr_jax.report.gates import Gate
from ivr_jax.report.metrics import evaluate
from ivr_jax.report.pages import PAIRED_COLUMNS, Run, paired_tables, render, write_report
from ivr_jax.report.plots import Curve, curve_svg, smooth, thin
from ivr_jax.trajectory import AxisVerdict, Mode, Reflection, Round, Sample, Trajectory

EVIL = "<script>alert('pwned')</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Tags with their attributes, the text of the body, and whether every tag is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.script = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags
                if name == tag and all(value in (found.get(key) or "").split() for key, value in attributes.items())]


def page(title="Report", runs=(), evaluations=None, gallery=(), gates=(), notes=(), swaps=None) -> Page:
    written = datetime(2030, 5, 17, 9, 30)
    return Page(render(title, runs, evaluations or {}, gallery, gates, notes, swaps or {}, written))


@pytest.fixture(scope="module")
def studio() -> tuple[Studio, list[EvaluatedAnswer]]:
    made = Studio(seed=5)
    return made, [
        made.answer(task, ARMS["eval_sft"], "mixture" if i // 4 % 2 else "kris/procedural")
        for i, task in enumerate(tasks(24))
    ]


@pytest.fixture(scope="module")
def whole(studio) -> Page:
    """A page with every section."""
    made, answers = studio
    evaluations = {arm: evaluate(answers, about={"checkpoint": "rl/90"}) for arm in ("Base", "SFT")}
    curves = (Curve("loss", tuple(range(1, 400)), tuple(1 / n for n in range(1, 400))),)
    run = Run("SFT", "17 May 2030", {"seed": 3, "optimizer": {"learning_rate": 0.0015}}, curves)
    items = tuple(GalleryItem("SFT", answer, made.images) for answer in answers[:8])
    section = GallerySection("Answers", "Round by round.", items)
    return page("A run", [run], evaluations, [section], [Gate("Critique right", "≥ 50%", "", None)], ["RL is missing."])


def test_every_section_is_there(whole):
    for words in ("A run", "17 May 2030, 09:30", "RL is missing.", "Exact match", "Modes", "rl/90",
                  "Critique right", "not measured", "optimizer.learning_rate", "0.0015", "P(passes | wrong)",
                  "By number of edits"):
        assert words in whole.text
    assert {tag["id"] for tag in whole.all("h2")} == {"result", "gates", "training", "section1"}
    assert whole.open == []


def test_arms_of_fewer_prompts_say_how_many_they_answered(studio):
    _, answers = studio
    whole, part = len(answers), len(answers) // 2
    text = page(evaluations={"Base": evaluate(answers), "held": evaluate(answers[:part])}).text
    assert f"Answers {whole} {part} Exact match" in text
    assert " By split Answers " in text and " kris/procedural 8–12 " in text and " mixture 4–12 " in text


def test_the_page_asks_the_network_for_nothing(whole):
    names = {name for name, _ in whole.tags}
    assert not names & {"link", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for _, attributes in whole.tags:
        for name, value in attributes.items():
            assert name not in ("srcset", "background") and not name.startswith("on")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
            if name == "href":
                assert value.startswith("#")
            assert "url(" not in (value or "")
    policy = next(tag["content"] for tag in whole.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_style_sheet_and_the_script_name_no_address():
    folder = Path(__file__).parents[2] / "ivr_jax" / "report" / "templates"
    for name in ("report.css", "report.js"):
        assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch|XMLHttp", (folder / name).read_text())


def test_the_policy_admits_the_page_s_own_script_and_no_other(whole):
    assert len(whole.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(whole.script.encode()).digest()).decode()
    policy = next(tag["content"] for tag in whole.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}';" in policy


def evil_section() -> GallerySection:
    """Hostile text wherever a model or a user can put any."""
    sample = Sample(EVIL, EVIL, (EVIL,), EVIL, EVIL, {"edits": 2})
    fine = plain_answer().own[0]
    failed = dataclasses.replace(fine, quality=AxisVerdict(False, EVIL, 1.0))
    rounds = (Round(None, EVIL, failed), Round(Reflection(EVIL, EVIL), EVIL + "2", fine))
    trajectory = Trajectory(sample, rounds)
    answer = EvaluatedAnswer(
        sample, trajectory, EVIL, trajectory.images, (failed, failed), (False, False), {EVIL: 1.0},
        (SegmentRecord(EVIL, EVIL, None, 3, True),), EVIL, Mode.REFLECTION,
    )  # fmt: skip
    segments = (SegmentRecord(EVIL, EVIL, None, 3, False),)
    broken = EvaluatedAnswer(sample, None, EVIL, (EVIL,), (failed,), (), {}, segments, EVIL)
    images = {EVIL: np.zeros((8, 8, 3), np.uint8)}
    return GallerySection(EVIL, EVIL, (GalleryItem(EVIL, answer, images), GalleryItem("x", broken, {})))


def test_hostile_text_is_shown_and_never_run():
    answers = [item.answer for item in evil_section().items]
    run = Run(EVIL, EVIL, {EVIL: EVIL}, (Curve(EVIL, (1, 2), (0.0, 1.0)),))
    evaluations = {EVIL: evaluate(answers, about={EVIL: EVIL}), "other": evaluate(answers)}
    result = page(EVIL, [run], evaluations, [evil_section()], [Gate(EVIL, EVIL, EVIL, True)], [EVIL])
    assert len(result.all("script")) == 1 and "pwned" not in result.script
    assert not any("onerror" in attributes for _, attributes in result.tags)
    assert all(tag["src"].startswith("data:") for tag in result.all("img"))
    assert result.text.count(EVIL) >= 20
    assert result.open == []


def test_half_characters_are_written_too(tmp_path):
    answer = dataclasses.replace(plain_answer(), error="torn \ud83d apart")
    write_report(tmp_path / "r.html", "t", (), {}, [GallerySection("s", "", (GalleryItem("a", answer, {}),))], (), ())
    assert "torn &#55357; apart" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_long_text_is_cut_and_says_so():
    answer = dataclasses.replace(plain_answer(), error="x" * (LONGEST_TEXT + 50))
    text = page(gallery=[GallerySection("s", "", (GalleryItem("a", answer, {}),))]).text
    assert "x" * LONGEST_TEXT + " … (50 more characters)" in text and "x" * (LONGEST_TEXT + 1) not in text


def test_an_answer_is_shown_image_by_image_with_both_verdicts(studio):
    made, answers = studio
    answer = next(a for a in answers if a.mode is Mode.MULTI_STEP and len(a.images) > 2)
    view = section_view(GallerySection("s", "", (GalleryItem("SFT", answer, made.images),)))["groups"][0]["answers"][0]
    assert [panel["label"] for panel in view["panels"]] == [f"G{k + 1}" for k in range(len(answer.images))]
    steps = [r.cause.instruction for r in answer.trajectory.rounds[1:]]
    assert [text["text"] for panel in view["panels"] for text in panel["texts"]] == steps  # each below the image before
    first, truth = view["panels"][0], answer.truth[0]
    assert [v["axis"] for v in first["verdicts"]] == ["instruction", "consistency", "quality", "knowledge"]
    assert [v["score"] for v in first["verdicts"]] == [f"{score:g}" for score in truth.scores]
    assert [v["own"]["passed"] for v in first["verdicts"]] == [axis.passed for axis in answer.own[0].axes]
    shown = Image.open(io.BytesIO(base64.b64decode(first["picture"]["uri"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), made.images[answer.images[0]])


def test_where_model_and_analyzer_differ_the_axis_is_marked_and_the_answer_filed():
    answer = plain_answer(exact=False, passes=True)  # wrong, yet passes itself
    view = section_view(GallerySection("s", "", (GalleryItem("a", answer, {}),)))
    shown = view["groups"][0]["answers"][0]
    assert [v["differ"] for v in shown["panels"][0]["verdicts"]] == [True, False, False, False]
    assert shown["panels"][0]["verdicts"][0]["why"] == [("truth", "wrong")]
    assert shown["results"] == ["wrong", "false_pass"] and view["results"] == ["wrong", "false_pass"]


def test_segments_show_which_tokens_carried_loss():
    made = Studio(seed=1)
    sample = made.training_sample(tasks(4)[3], Mode.REFLECTION)
    view = section_view(GallerySection("s", "", (GalleryItem("t", sample, made.images),)))["groups"][0]["answers"][0]
    assert [(s["kind"], s["context"]) for s in view["segments"]] == [
        ("G1", True), ("E1", False), ("R1", False), ("G2", False), ("E2", False)]
    assert [panel["context"] for panel in view["panels"]] == [True, False]
    assert (view["trained"], view["tokens"]) == (75, 100)
    result = page(gallery=[GallerySection("s", "", (GalleryItem("t", sample, made.images),))])
    assert "75 of 100 tokens carry loss" in result.text
    assert [len(result.all(tag, **{"class": "context"})) for tag in ("span", "figure")] == [1, 1]


def test_an_answer_without_loss_is_not_called_context(studio):
    made, answers = studio
    result = page(gallery=[GallerySection("s", "", (GalleryItem("SFT", answers[0], made.images),))])
    assert not result.all("span", **{"class": "context"}) and "carry loss" not in result.text


def test_an_answer_that_did_not_parse_shows_what_there_is():
    made = Studio(seed=1)
    answer = made.garbled(tasks(2)[1], "and then nothing")
    view = section_view(GallerySection("s", "", (GalleryItem("a", answer, made.images),)))["groups"][0]["answers"][0]
    assert view["mode"] == "invalid" and view["error"] == "token 27: expected <Evaluate>"
    assert [text["text"] for text in view["panels"][0]["texts"]] == ["and then nothing"]
    assert all(v["own"] is None and v["truth"] is not None for v in view["panels"][0]["verdicts"])
    segments = (SegmentRecord("text", "only words", None, 3, False),)
    empty = EvaluatedAnswer(answer.sample, None, "nothing drawn", segments=segments)
    assert "only words" in page(gallery=[GallerySection("s", "", (GalleryItem("a", empty, made.images),))]).text


def test_small_images_keep_hard_pixels_and_photographs_are_reduced_and_smooth():
    sample = Sample("k", "Do it.", ("photo", "tiny", "gone"))
    answer = dataclasses.replace(plain_answer(), sample=sample, trajectory=None, mode=None)
    images = {"photo": photograph("astronaut", 512), "tiny": np.zeros((64, 64, 3), np.uint8)}
    group = section_view(GallerySection("s", "", (GalleryItem("a", answer, images),)))["groups"][0]
    photo, tiny, gone = group["sources"]
    assert (photo["size"], photo["smooth"]) == ("512 × 512", True)
    assert (tiny["size"], tiny["smooth"]) == ("64 × 64", False)
    assert Image.open(io.BytesIO(base64.b64decode(photo["uri"].partition(",")[2]))).size == (320, 320)
    assert gone["uri"] is None


def test_the_same_prompt_stands_together_and_rare_answers_are_shown():
    common = [plain_answer(1, key=f"c{i}") for i in range(30)]
    last = [*common[:-2], plain_answer(3, key="c28"), plain_answer(1, exact=False, key="c29")]
    shown = choose({"SFT": (common, {}), "RL": (last, {})}, prompts=4, seed=0)
    assert [item.arm for item in shown] == ["SFT", "RL"] * 4
    assert [a.answer.key for a in shown[::2]] == [b.answer.key for b in shown[1::2]]
    assert {"c28", "c29"} <= {item.answer.key for item in shown}
    assert shown == choose({"SFT": (common, {}), "RL": (last, {})}, prompts=4, seed=0)
    assert choose({}, 4, 0) == ()


def test_filters_list_what_is_in_the_section(whole):
    values = {(tag["data-field"], tag["value"]) for tag in whole.all("input")}
    assert {("mode", "direct"), ("result", "right"), ("result", "wrong")} <= values
    assert not any(field == "arm" for field, _ in values)  # one arm needs no filter
    assert all(tag.get("data-results") is not None for tag in whole.all("section", **{"class": "answer"}))


def test_a_curve_is_thinned_smoothed_and_drawn():
    curve = Curve("loss", tuple(range(1000)), tuple(float(n % 2) for n in range(1000)))
    steps, values = thin(curve)
    assert len(steps) == len(values) <= 240 and steps[0] < 5 and values.mean() == pytest.approx(0.5, abs=0.01)
    assert smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    assert smooth(np.arange(100.0))[40:60] == pytest.approx(np.arange(40.0, 60.0))  # no shift
    for drawn in (curve, Curve("loss", (5,), (0.1,)), Curve("flat", (1, 2, 3), (0.0, 0.0, 0.0))):
        svg = curve_svg(drawn)
        assert svg.startswith("<svg") and "var(--accent)" in svg and "url(" not in svg and "nan" not in svg


def test_the_files_are_the_page_and_its_plots(studio, tmp_path):
    curves = tuple(Curve(f"m{i} $x_{i}", (1, 2, 3), (1.0, 0.5, float(i))) for i in range(4))
    runs = [Run("Image tokenizer", "", {}, curves), Run("RL", "", {}, ())]
    evaluations = {"A_$1": evaluate(studio[1]), "B": evaluate(studio[1])}
    files = write_report(tmp_path / "deep" / "r.html", "t", runs, evaluations, (), (), ())
    assert [file.name for file in files] == [
        "r.html", "curves_image_tokenizer.png", "exact_by_edits.png", "images_by_edits.png"]
    assert files[1].parent.name == "r_plots"
    for file in files[1:]:
        with Image.open(file) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 1


def test_an_empty_report_says_so_and_an_unwritable_place_is_an_error(tmp_path):
    assert "Nothing has been run yet." in page().text
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_report(tmp_path / "file" / "r.html", "t", (), {}, (), (), ())
    assert str(tmp_path / "file") in caught.value.what


def test_paired_and_swap_tests_stand_in_a_section_of_their_own(studio):
    cases = [
        Case(np.arange(n), {OWN: np.zeros((1, 1)), EXACT: np.ones((1, 1))}, False, {"by_edits": (str(1 + n % 2),)})
        for n in range(6)
    ]
    result = paired_test(cases, lambda images: [Verdict(0.25 + image.codes.item() / 2) for image in images])
    found = page(evaluations={"SFT": evaluate(studio[1]) | {"paired": result}}, swaps={"photographs": result})
    assert [tag["id"] for tag in found.all("h2")] == ["result", "paired"]
    assert "photographs (swap test)" in found.text and found.open == []
    table = paired_tables({"SFT": {"paired": result}, "Base": {}}, {})[0]
    rows = [(row["label"], row["cases"]) for row in table["rows"]]
    assert rows == [("all prompts", 6), ("edits 1", 3), ("edits 2", 3)]
    assert table["columns"][0] == PAIRED_COLUMNS["sight"] and table["rows"][0]["cells"][0][0] == "50.0%"


def test_a_garbled_text_is_marked():
    answer = dataclasses.replace(plain_answer(2), garbled=("S2",))
    assert ": S2" in page(gallery=[GallerySection("s", "", (GalleryItem("a", answer, {}),))]).text
