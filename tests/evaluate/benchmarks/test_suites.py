"""OmniContext, WISE, RISEBench, ImgEdit, GEdit: layouts, quirks, summaries by hand and by their official rules."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from benchmark_fixtures import (
    OMNI_SCORES,
    figure_values,
    gedit_records,
    imgedit_records,
    load_items,
    metrics,
    omni_records,
    picture,
    rise_records,
    wise_records,
)

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import prompts, registry
from ivr_jax.evaluate.benchmarks.interface import ANSWER, State, for_mode
from ivr_jax.evaluate.benchmarks.suites.wise import WEIGHTS, area_of
from ivr_jax.images import save_png

OMNI, WISE, RISE = registry.load("omnicontext"), registry.load("wise"), registry.load("rise")
IMGEDIT, GEDIT = registry.load("imgedit"), registry.load("gedit")


def test_every_benchmark_is_found_by_its_file():
    assert {"geneval", "geneval2", "kris", "omnicontext", "wise", "rise", "imgedit", "gedit"} <= set(registry.names())
    with pytest.raises(UserError):
        registry.load("nothing")


@pytest.mark.parametrize("name", ["geneval", "geneval2", "kris", "omnicontext", "wise", "rise", "imgedit", "gedit"])
def test_every_question_has_its_prompt_and_its_pictures(name, tmp_path):
    benchmark = registry.load(name)
    items = load_items(benchmark, tmp_path)
    assert len({item.key for item in items}) == len(items)
    assert benchmark.name == name and len(prompts.digest(benchmark)) == 16
    for item in items:
        questions = benchmark.questions(item, 0, "chat")
        assert len(set(metrics(questions))) == len(questions)
        assert any(question.pictures[-1].path == ANSWER for question in questions)
        for question in questions:
            text = prompts.render(question)
            assert all(f'"{score}"' in text for score in question.scores)
            for shown in question.pictures:
                if shown.path != ANSWER:
                    assert (tmp_path / shown.path).is_file()


@pytest.mark.parametrize("name", ["geneval", "geneval2", "kris", "omnicontext", "wise", "rise", "imgedit", "gedit"])
def test_the_folder_of_another_benchmark_is_refused(name, tmp_path):
    other = registry.load("wise" if name != "wise" else "imgedit")
    load_items(other, tmp_path)
    with pytest.raises(UserError):
        registry.load(name).items(tmp_path, tmp_path)
    with pytest.raises(UserError):
        registry.load(name).items(tmp_path / "nowhere", tmp_path)


def test_two_images_for_one_prompt_are_refused(tmp_path):
    items = load_items(WISE, tmp_path)
    save_png(tmp_path / "images/1.png", picture(1))
    assert [path.name for path in WISE.find_images(tmp_path / "images", items[0])] == ["1.png"]
    save_png(tmp_path / "images/1.jpg", picture(1))
    with pytest.raises(UserError):
        WISE.find_images(tmp_path / "images", items[0])


# -- OmniContext --


def test_omnicontext_takes_english_alone_and_shows_references_before_the_result(tmp_path):
    items = load_items(OMNI, tmp_path)
    assert [item.key for item in items] == list(OMNI_SCORES)
    assert OMNI.image_path(items[0], 0) == "fullset/single_character/k0.png"
    (following, consistency) = OMNI.questions(items[2], 0, "chat")
    assert [shown.path for shown in following.pictures] == ["images/2_1.png" if n else "images/2_0.png"
                                                            for n in range(2)] + [ANSWER]  # fmt: skip
    assert (following.pictures[0].max_area, following.pictures[0].multiple) == (1024 * 1024, 16)
    assert (consistency.low, consistency.high) == (0, 10)


def test_omnicontext_uses_the_scene_form_in_fixed_alone(tmp_path):
    item = load_items(OMNI, tmp_path)[3]
    questions = OMNI.questions(item, 0, "chat")
    assert {q.metric: q.template for q in for_mode(questions, ["strict"])} == {
        "PF (strict)": "omnicontext_following", "SC": "omnicontext_consistency",
    }  # fmt: skip
    assert {q.metric: q.template for q in for_mode(questions, ["fixed"])} == {
        "PF": "omnicontext_following_scene", "SC": "omnicontext_consistency",
    }  # fmt: skip


def test_omnicontext_summary_by_hand(tmp_path):
    items = load_items(OMNI, tmp_path)
    strict = figure_values(OMNI, items, omni_records().judged, "strict")
    fixed = figure_values(OMNI, items, omni_records().judged, "fixed")
    assert strict["single_character"] == fixed["single_character"] == (6 + 8) / 2
    assert strict["multi_object"] == 0 and strict["scene_object"] == 6 and fixed["scene_object"] == 9
    assert strict["Average"] == pytest.approx((7 + 0 + 6) / 3) and fixed["Average"] == pytest.approx((7 + 0 + 9) / 3)


def test_an_unreadable_reply_is_missing_not_random(tmp_path):
    items = load_items(OMNI, tmp_path)
    records = omni_records()
    records.add("single_character/k0", "SC", state=State.UNPARSABLE)
    for mode in ("strict", "fixed"):
        figures = {figure.name: figure for figure in OMNI.figures(items, records.judged, mode)}
        assert figures["single_character"].value == 8  # the other item alone
        assert (figures["Average"].got, figures["Average"].wanted) == (7, 8)


def test_omnicontext_result_files_by_the_official_rule(tmp_path):
    items = load_items(OMNI, tmp_path)
    files = OMNI.result_files(items, omni_records().judged, "ours", "gpt")
    assert set(files) == {f"ours/gpt/{task}/score.jsonl" for task in ("single_character", "multi_object",
                                                                      "scene_object")}  # fmt: skip
    tasks = {}
    for text in files.values():
        for row in map(json.loads, text.splitlines()):
            assert list(row) == ["key", "task_type", "instruction", "instruction_language", "output_image_path",
                                 "PF_score", "PF_score_reason", "SC_score", "SC_score_reason"]  # fmt: skip
            tasks.setdefault(row["task_type"], []).append(math.sqrt(row["PF_score"] * row["SC_score"]))
    official = np.mean([np.mean(scores) for scores in tasks.values()])
    ours = figure_values(OMNI, items, omni_records().judged, "strict")["Average"]
    assert f"{official:.12f}" == f"{ours:.12f}"


def test_images_inside_parquet_files_are_written_out_once(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture(5)).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    rows = [{"key": "a", "task_type": "multi_object", "instruction": "Both.", "input_images": [cell, cell],
             "instruction_language": "en"}]  # fmt: skip
    (tmp_path / "data").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data/train-0.parquet")
    (item,) = OMNI.items(tmp_path, tmp_path / "scratch")
    assert item.references[0] == item.references[1]
    assert [str(path) for path in (tmp_path / "scratch").iterdir()] == [item.references[0]]


# -- WISE --


def test_wise_areas_come_from_subcategory_category_or_file():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert area_of("cultural_common_sense_verified.json", "Any", "Festival", "") == "culture"
    assert area_of("spatio-temporal_reasoning_verified.json", "Spatio-temporal", "Longitudinal time", "") == "time"
    assert area_of("spatio-temporal_reasoning_verified.json", "Spatio-temporal", "Different View", "") == "space"
    assert area_of("natural_science_verified.json", "Physical Knowledge", "Mechanics", "") == "physics"
    with pytest.raises(UserError):
        area_of("natural_science_verified.json", "Geology", "Rocks", "")


def test_wise_summary_by_hand_and_from_the_result_files(tmp_path):
    items = load_items(WISE, tmp_path)
    records = wise_records()
    for mode in ("strict", "fixed"):
        values = figure_values(WISE, items, records.judged, mode)
        assert values["Overall"] == pytest.approx(0.40 * 0.5 + 0.12 * (1 + 0 + 1 + 1 + 0), abs=1e-12)
        assert values["culture"] == 0.5
    rows = [json.loads(line) for text in WISE.result_files(items, records.judged, "m", "j").values()
            for line in text.splitlines()]  # fmt: skip
    groups = {"culture": range(1, 401), "time": range(401, 568), "space": range(568, 701),
              "biology": range(701, 801), "physics": range(801, 901), "chemistry": range(901, 1001)}  # fmt: skip
    official = sum(
        WEIGHTS[area] * np.mean([row["score"] for row in rows if row["prompt_id"] in ids])
        for area, ids in groups.items()
    )
    assert f"{official:.12f}" == f"{values['Overall']:.12f}"


def test_the_legacy_files_of_wise_are_refused(tmp_path):
    (tmp_path / "cultural_common_sense.json").write_text("[]")
    with pytest.raises(UserError):
        WISE.items(tmp_path, tmp_path)


# -- RISEBench --


def test_rise_asks_what_the_category_needs_and_shows_what_it_should(tmp_path):
    items = {item.data["index"]: item for item in load_items(RISE, tmp_path)}
    asked = {index: {q.metric: q for q in RISE.questions(item, 0, "chat")} for index, item in items.items()}
    assert set(asked["temporal_reasoning_2"]) == {"reasoning", "quality"}
    assert set(asked["logical_reasoning_1"]) == {"reasoning", "consistency"}
    assert asked["logical_reasoning_1"]["reasoning"].fields["reference"] == "Forty-two."
    assert (asked["logical_reasoning_1"]["reasoning"].low, asked["logical_reasoning_1"]["reasoning"].high) == (0, 1)
    counts = {index: len(found["reasoning"].pictures) for index, found in asked.items()}
    assert counts == {"temporal_reasoning_1": 1, "temporal_reasoning_2": 1, "causal_reasoning_1": 2,
                      "spatial_reasoning_1": 2, "logical_reasoning_1": 1}  # fmt: skip
    assert asked["spatial_reasoning_1"]["reasoning"].pictures[0].path == "spatial_reasoning_images/ref.png"


def test_rise_summary_by_hand(tmp_path):
    items = load_items(RISE, tmp_path)
    strict = figure_values(RISE, items, rise_records().judged, "strict")
    fixed = figure_values(RISE, items, rise_records().judged, "fixed")
    assert strict["Accuracy"] == 40 and fixed["Accuracy"] == 60  # the item without consistency is lost in strict
    assert strict["temporal_reasoning"] == 50 and fixed["temporal_reasoning"] == 100
    assert fixed["causal_reasoning"] == 0 and fixed["logical_reasoning"] == 100
    # Weighted: 5, 5, .3*4 + .5*5 + .2*5 = 4.7, (.3*3 + .5*1 + .2*5) / 2 = 1.2, 5; as (s - 1) x 25.
    assert fixed["Score"] == pytest.approx(np.mean([100, 100, 92.5, 5, 100]))
    assert fixed["Score reasoning"] == pytest.approx(np.mean([100, 100, 100, 0, 100]))


def test_rise_result_file_by_the_official_rule(tmp_path):
    items = load_items(RISE, tmp_path)
    text = RISE.result_files(items, rise_records().judged, "ours", "judge")["ours_judge.csv"]
    rows = {row["-"]: row for row in csv.DictReader(io.StringIO(text))}
    assert float(rows["Overall"]["Accuracy"]) == 0.4
    origin, percentage = (float(rows["Overall"][f"Score-{name}"]) for name in ("Origin", "Percentage"))
    assert percentage == pytest.approx(25 * (origin - 1))
    assert origin == pytest.approx(np.mean([5, 5, 4.7, 1.2, 5]))
    assert float(rows["Temporal"]["Accuracy"]) == 0.5 and rows["Overall_Reasoning"]["Accuracy"] == ""


def test_a_missing_sub_score_is_no_failure(tmp_path):
    items = load_items(RISE, tmp_path)
    records = rise_records()
    del records.all["causal_reasoning/causal_reasoning_1", 0, "quality"]
    figure = next(f for f in RISE.figures(items, records.judged, "fixed") if f.name == "Accuracy")
    assert figure.value == 75 and (figure.got, figure.wanted) == (12, 13)


# -- ImgEdit --


def test_imgedit_rounds_twice_in_strict_alone(tmp_path):
    items = load_items(IMGEDIT, tmp_path)
    strict = figure_values(IMGEDIT, items, imgedit_records().judged, "strict")
    fixed = figure_values(IMGEDIT, items, imgedit_records().judged, "fixed")
    # 13 / 3 = 4.333 and 8 / 3 = 2.667: rounded 4.33 and 2.67, their mean 3.5; rounded again.
    assert strict["add"] == 3.5 and fixed["add"] == pytest.approx(3.5)
    assert strict["Mean of items"] == pytest.approx((4.33 + 2.67 + 1) / 3)
    assert fixed["Mean of items"] == pytest.approx((13 + 8 + 3) / 9)
    records = imgedit_records()
    records.add("1001", "edit", following=3, naturalness=2, integrity=2)  # 2.333: (4.33 + 2.33) / 2
    strict = figure_values(IMGEDIT, items, records.judged, "strict")
    fixed = figure_values(IMGEDIT, items, records.judged, "fixed")
    assert strict["add"] == 3.33 and fixed["add"] == pytest.approx(20 / 6)
    assert strict["Overall"] == pytest.approx((3.33 + 1) / 2) and fixed["Overall"] == pytest.approx((20 / 6 + 1) / 2)


def test_imgedit_result_files_by_the_official_rule(tmp_path):
    items = load_items(IMGEDIT, tmp_path)
    files = {name: json.loads(text)
             for name, text in IMGEDIT.result_files(items, imgedit_records().judged, "m", "j").items()}  # fmt: skip
    averages = {}
    for key, text in files["result.json"].items():
        parts = [line.strip().split(": ") for line in text.splitlines()]
        numbers = [int(part[1]) for part in parts if len(part) == 2 and part[1].isdigit()]
        averages[key] = round(sum(numbers) / len(numbers), 2)
    assert averages == files["average_score.json"] == {"1000": 4.33, "1001": 2.67, "1002": 1.0}
    types = {}
    for item in items:
        types.setdefault(item.category, []).append(averages[item.key])
    official = {kind: round(sum(values) / len(values), 2) for kind, values in types.items()}
    assert official == files["typescore.json"] == {"add": 3.5, "remove": 1.0}


# -- GEdit --


def test_gedit_summary_by_hand(tmp_path):
    items = load_items(GEDIT, tmp_path)
    values = figure_values(GEDIT, items, gedit_records().judged, "fixed")
    assert values["en overall"] == (5 + 9) / 2 and values["cn overall"] == 0
    assert values["en semantics"] == (6 + 9) / 2 and values["en quality"] == (5.5 + 9) / 2
    assert values["en overall (intersection)"] == (6 + 9) / 2
    assert values == figure_values(GEDIT, items, gedit_records().judged, "strict")


def test_gedit_shows_the_edited_image_at_the_size_of_its_source(tmp_path):
    item = load_items(GEDIT, tmp_path)[0]
    semantics, quality = GEDIT.questions(item, 0, "chat")
    assert [shown.path for shown in semantics.pictures] == ["images/0.png", ANSWER]
    assert quality.pictures[0].like == "images/0.png"
    assert GEDIT.image_path(item, 0) == "fullset/color_alter/en/k0.png"


def test_gedit_tables_by_the_official_rule(tmp_path):
    items = load_items(GEDIT, tmp_path)
    files = GEDIT.result_files(items, gedit_records().judged, "ours", "judge")
    assert set(files) == {"ours_color_alter_gpt_score.csv", "ours_subject-add_gpt_score.csv"}
    ours = figure_values(GEDIT, items, gedit_records().judged, "strict")
    for language in ("en", "cn"):
        tasks, shared = [], []
        for text in files.values():
            rows = [r for r in csv.DictReader(io.StringIO(text)) if r["instruction_language"] == language]
            scores = [(math.sqrt(float(r["sementics_score"]) * float(r["quality_score"])), r) for r in rows]
            tasks += [np.mean([score for score, _ in scores])] if scores else []
            both = [score for score, r in scores if r["intersection_exist"] == "True"]
            shared += [np.mean(both)] if both else []
        assert np.mean(tasks) == ours[f"{language} overall"]
        assert np.mean(shared) == ours[f"{language} overall (intersection)"]
