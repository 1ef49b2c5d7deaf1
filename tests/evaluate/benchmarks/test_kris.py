"""KRIS-Bench: what the judge sees, the four quirks, and the summary, by hand and by an independent implementation."""

from __future__ import annotations

import json
import shutil

import pytest
from benchmark_fixtures import Records, figure_values, kris_records, load_items, metrics

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import prompts, registry
from ivr_jax.evaluate.benchmarks.interface import ANSWER, State
from ivr_jax.evaluate.benchmarks.suites.kris import DIMENSIONS, LEVELS, official_score

KRIS = registry.load("kris")


@pytest.fixture
def items(tmp_path):
    return load_items(KRIS, tmp_path)


def of(items, category):
    return next(item for item in items if item.category == category)


def shown(question):
    return [(picture.label, picture.path) for picture in question.pictures]


def test_published_counts_add_up():
    assert sum(sum(categories.values()) for categories in DIMENSIONS.values()) == KRIS.count == 1267
    assert sum(len(categories) for categories in DIMENSIONS.values()) == 20


def test_the_questions_of_a_category_with_knowledge(items):
    questions = {question.metric: question for question in KRIS.questions(of(items, "chemistry"), 0, "chat")}
    assert set(questions) == {"quality", "consistency", "consistency (strict)", "instruction", "instruction (strict)"}
    assert shown(questions["quality"]) == [("Edited image", ANSWER)]
    assert shown(questions["instruction"]) == [("Original image", "chemistry/1.png"), ("Edited image", ANSWER)]
    assert questions["instruction"].scores == ("instruction_score", "knowledge_score")
    fields = questions["instruction"].fields
    assert fields == {"instruction": "Edit of chemistry 1.", "explanation": "Facts on chemistry."}
    assert (questions["quality"].low, questions["quality"].high) == (1, 5)


def test_strict_asks_with_an_empty_instruction_as_official_commits_do(items):
    questions = {question.metric: question for question in KRIS.questions(of(items, "humanities"), 0, "chat")}
    for metric in ("consistency", "instruction"):
        assert questions[metric].modes == ("fixed",) and questions[f"{metric} (strict)"].modes == ("strict",)
        assert questions[f"{metric} (strict)"].fields == {"instruction": "", "explanation": ""}
    assert questions["quality"].modes == ("strict", "fixed")


def test_the_anomaly_prompt_is_dead_in_strict_alone(items):
    questions = {q.metric: q for q in KRIS.questions(of(items, "anomaly_correction"), 0, "chat")}
    assert questions["instruction"].template == "kris_instruction_anomaly"
    assert questions["instruction (strict)"].template == "kris_instruction"
    assert "Facts on anomaly_correction." in prompts.render(questions["instruction"])


def test_what_is_shown_of_several_references_frames_and_viewpoints(items):
    several = {q.metric: q for q in KRIS.questions(of(items, "multi-element_composition"), 0, "chat")}
    assert [path for _, path in shown(several["consistency"])] == [
        "multi-element_composition/1-a.png", "multi-element_composition/1-b.png", ANSWER,
    ]  # fmt: skip
    frames = {q.metric: q for q in KRIS.questions(of(items, "temporal_prediction"), 0, "chat")}
    assert shown(frames["instruction"]) == [
        ("Frame 1 (reference)", "temporal_prediction/1-1.png"), ("Frame 2 (reference)", "temporal_prediction/1-2.png"),
        ("Frame 3 (generated)", ANSWER), ("Frame 4 (reference)", "temporal_prediction/1-4.png"),
    ]  # fmt: skip
    assert frames["instruction"].fields["frame"] == "3"
    viewpoint = {q.metric: q for q in KRIS.questions(of(items, "viewpoint_change"), 0, "chat")}
    assert [path for _, path in shown(viewpoint["instruction"])] == [
        "viewpoint_change/1.png", ANSWER, "viewpoint_change/1-gt.png",
    ]  # fmt: skip
    assert [path for _, path in shown(viewpoint["consistency"])] == ["viewpoint_change/1.png", ANSWER]


def test_every_prompt_of_every_question_can_be_filled_in(items):
    for item in items:
        for question in KRIS.questions(item, 0, "chat"):
            text = prompts.render(question)
            assert all(f'"{name}"' in text for name in question.scores)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"consistency_score": 4, "reasoning": "x"}', 4),
        ("Consistency score: 2, since the hat is gone", 2),
        ("I give 3/5", 3),
        ("I give 3 out of 5", 3),
        ("There are 4 cups, so it is bad", 4),  # a lone digit anywhere
        ("There are 12 cups", None),
        ('{"consistency_score": "five"}', None),
        ("", None),
    ],
)
def test_the_official_parser(text, score):
    assert official_score(text, "consistency_score") == score


def test_a_lone_digit_is_a_score_in_strict_alone(items):
    item = of(items, "color_change")
    records = Records()
    records.add(item.key, "quality", state=State.UNPARSABLE, _strict={"quality_score": 4}, _value={})
    question = next(q for q in KRIS.questions(item, 0, "chat") if q.metric == "quality")
    assert KRIS.read_strict(question, "I count 4 flaws") == {"quality_score": 4}
    assert figure_values(KRIS, items, records.judged, "strict")["metric quality"] == 75
    assert figure_values(KRIS, items, records.judged, "fixed")["metric quality"] is None


def test_knowledge_is_one_when_the_instruction_failed_in_fixed_alone(items):
    item = of(items, "physics")
    records = Records()
    for metric in ("instruction", "instruction (strict)"):
        records.add(item.key, metric, instruction_score=2, knowledge_score=4)
    assert figure_values(KRIS, items, records.judged, "strict")["metric knowledge"] == 75
    assert figure_values(KRIS, items, records.judged, "fixed")["metric knowledge"] == 0


def by_hand(items, records, mode) -> dict[str, list[float]]:
    """(score - 1) x 25 of every single score, by category, written out once more from the contract."""
    found: dict[str, list[float]] = {}
    for item in items:
        suffix = " (strict)" if mode == "strict" else ""
        scores = {
            "quality": records.all[item.key, 0, "quality"].value["scores"]["quality_score"],
            "consistency": records.all[item.key, 0, f"consistency{suffix}"].value["scores"]["consistency_score"],
            **{k.removesuffix("_score"): v
               for k, v in records.all[item.key, 0, f"instruction{suffix}"].value["scores"].items()},
        }  # fmt: skip
        if mode == "fixed" and "knowledge" in scores and scores["instruction"] <= 2:
            scores["knowledge"] = 1
        found.setdefault(item.category, []).extend((score - 1) * 25 for score in scores.values())
    return found


@pytest.mark.parametrize("mode", ["strict", "fixed"])
def test_the_summary_is_a_flat_mean_over_single_scores(items, mode):
    records = kris_records(items)
    values, scores = figure_values(KRIS, items, records.judged, mode), by_hand(items, records, mode)
    every = [score for group in scores.values() for score in group]
    assert len(every) == 21 * 3 + 11  # four scores for Social, Natural and Logical, three else
    assert values["Overall"] == pytest.approx(sum(every) / len(every), abs=1e-12)
    for level, dimensions in LEVELS.items():
        within = [s for dimension in dimensions for c in DIMENSIONS[dimension] for s in scores[c]]
        assert values[level] == pytest.approx(sum(within) / len(within), abs=1e-12)
    assert values["chemistry"] == pytest.approx(sum(scores["chemistry"]) / 8)  # two items of four scores


def test_two_scores_worked_out_on_paper(items):
    records = Records()
    item = of(items, "biology")
    records.add(item.key, "quality", quality_score=5)  # 100
    records.add(item.key, "consistency", consistency_score=2)  # 25
    records.add(item.key, "instruction", instruction_score=3, knowledge_score=1)  # 50, 0
    values = figure_values(KRIS, items, records.judged, "fixed")
    assert values["Natural"] == values["Conceptual"] == values["Overall"] == (100 + 25 + 50 + 0) / 4
    assert values["Factual"] is None
    overall = next(f for f in KRIS.figures(items, records.judged, "fixed") if f.name == "Overall")
    assert (overall.got, overall.wanted) == (4, 21 * 3 + 11)


def test_result_files_hold_whole_numbers_that_summarise_to_the_same_figure(items):
    records = kris_records(items)
    files = KRIS.result_files(items, records.judged, "ours", "judge")
    assert len(files) == 20
    chemistry = json.loads(files["ours/chemistry/metrics.json"])
    assert list(chemistry) == ["1", "2"]
    assert chemistry["1"]["instruction"] == "Edit of chemistry 1." and chemistry["1"]["explain"]
    flat = [
        (value - 1) * 25
        for text in files.values()
        for record in json.loads(text).values()
        for name, value in record.items()
        if name.endswith("_score") and isinstance(value, int)
    ]
    # The official files carry what the judge said; "knowledge = 1" is not applied to them.
    expected = [score for group in by_hand(items, records, "raw").values() for score in group]
    assert sorted(flat) == sorted(expected) and len(flat) == 74


def test_a_missing_category_and_a_wrong_folder_are_told(tmp_path):
    load_items(KRIS, tmp_path)
    shutil.rmtree(tmp_path / "physics")
    with pytest.raises(UserError) as error:
        KRIS.items(tmp_path, tmp_path)
    assert "physics" in str(error.value)
    with pytest.raises(UserError):
        KRIS.items(tmp_path / "biology", tmp_path)


def test_frames_must_be_three_of_four(tmp_path):
    load_items(KRIS, tmp_path)
    path = tmp_path / "temporal_prediction/annotation.json"
    record = json.loads(path.read_text())
    record["1"]["ori_img"] = ["1-1.png", "1-2.png"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError):
        KRIS.items(tmp_path, tmp_path)


def test_half_of_the_questions_is_left_out_when_only_fixed_is_asked_for(items):
    from ivr_jax.evaluate.benchmarks.interface import for_mode

    asked = for_mode(KRIS.questions(of(items, "geography"), 0, "chat"), ["fixed"])
    assert metrics(asked) == ["quality", "consistency", "instruction"]
