"""Figures against numbers worked out by hand, and intervals against what they promise."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from answers_fixture import ARMS, Studio, plain_answer, tasks

from ivr_jax.errors import UserError
from ivr_jax.report import intervals
from ivr_jax.report.answers import EvaluatedAnswer
from ivr_jax.report.metrics import evaluate, read_evaluation, write_evaluation
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Reflection, Trajectory


def values(tree):
    """The same tree with every estimate replaced by its value."""
    if isinstance(tree, dict):
        return tree["value"] if "value" in tree else {key: values(branch) for key, branch in tree.items()}
    return tree


def test_wilson_intervals_equal_published_ones():
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)):
        estimate = intervals.share([True] * successes + [False] * (n - successes))
        assert (estimate["low"], estimate["high"]) == pytest.approx((low, high), abs=5e-5)
        assert estimate["n"] == n


def test_the_difference_of_two_shares_equals_the_published_one():
    # Newcombe (1998), the second paper, method 10: 56/70 - 48/80 = 0.2, interval 0.0524 to 0.3339.
    shares = [intervals.share([True] * right + [False] * wrong) for right, wrong in ((56, 14), (48, 32))]
    change = intervals.difference(*shares)
    assert (change["value"], change["low"], change["high"]) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_the_bootstrap_agrees_with_the_normal_interval_and_depends_on_seed_and_name_only():
    sample = np.random.default_rng(0).normal(3.0, 1.0, 900).tolist()
    estimate = intervals.mean(sample, 0, "images")
    half = 1.96 * np.std(sample) / 30
    assert estimate["value"] == pytest.approx(np.mean(sample))
    assert estimate["low"] == pytest.approx(np.mean(sample) - half, abs=0.006)
    assert estimate["high"] == pytest.approx(np.mean(sample) + half, abs=0.006)
    assert intervals.mean(sample[::-1], 0, "images") == pytest.approx(estimate)
    assert intervals.mean(sample, 1, "images")["low"] != estimate["low"]
    assert intervals.mean(sample, 0, "tokens")["low"] != estimate["low"]


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [e["low"] <= 2.0 <= e["high"] for e in
               (intervals.mean(rng.choice([1, 2, 3], 60).tolist(), trial, "x") for trial in range(300))]
    assert 0.90 <= np.mean(covered) <= 0.99


def test_nothing_observed_has_no_value_and_one_observation_no_interval():
    assert intervals.share([]) == intervals.mean([], 0, "x") == {"value": None, "low": None, "high": None, "n": 0}
    assert intervals.mean([2.0], 0, "x") == {"value": 2.0, "low": None, "high": None, "n": 1}
    change = intervals.difference(intervals.mean([2.0], 0, "x"), intervals.mean([1.0, 3.0], 0, "x"))
    assert change == {"value": 0.0, "low": None, "high": None, "n": 1}
    assert intervals.difference(intervals.share([]), intervals.share([True]))["value"] is None


def test_a_small_evaluation_worked_out_by_hand():
    answers = [
        plain_answer(1, exact=True, key="a", edits=1, split="kris/x"),  # direct, right
        plain_answer(1, exact=False, key="b", edits=1, split="kris/x"),  # direct, wrong, passes itself
        plain_answer(3, exact=True, key="c", edits=4, split="kris/y"),  # multi-step, right in the end
        EvaluatedAnswer(plain_answer(key="d", edits=4).sample, None, "no image at all", split="plain"),
    ]
    answers[1] = dataclasses.replace(answers[1], rewards={"format": 0.0, "total": 0.5})
    answers[2] = dataclasses.replace(answers[2], rewards={"total": 1.0})
    result = evaluate(answers)
    overall = values(result["overall"])
    assert overall["answers"] == 4
    assert overall["exact"] == overall["right"] == 0.5
    assert overall["first_exact"] == 0.25  # only the first answer was right at once
    assert overall["gain"] == 0.25
    assert overall["images"] == (1 + 1 + 3 + 0) / 4
    assert overall["modes"] == {"direct": 0.5, "reflection": 0.0, "multi_step": 0.25, "invalid": 0.25}
    assert overall["valid"] == 0.5  # `b` has a mode, but the format reward says no
    assert overall["rewards"] == {"format": 0.0, "total": 0.75}
    # Final images score 5 5 5 5, 1 5 5 5, 5 5 5 5, and no image counts 0 on every axis.
    assert overall["axes"] == {"instruction": 11 / 4, "consistency": 15 / 4, "quality": 15 / 4, "knowledge": 15 / 4}
    assert overall["outcome"] == pytest.approx((1.0 + 0.8 + 1.0 + 0.0) / 4)
    # Images judged by the model: a (right, passed), b (wrong, passed), c (wrong, failed) twice, then (right, passed).
    calibration = overall["calibration"]["images"]
    assert calibration["counts"] == {"right_passed": 2, "right_failed": 0, "wrong_passed": 1, "wrong_failed": 2}
    assert (calibration["pass_given_right"], calibration["pass_given_wrong"]) == (1.0, 1 / 3)
    assert (calibration["right_given_pass"], calibration["accuracy"]) == (2 / 3, 0.8)
    assert calibration["axes"] == {"instruction": 0.8, "consistency": 1.0, "quality": 1.0, "knowledge": 1.0}
    assert overall["calibration"]["final"]["counts"] == {
        "right_passed": 2, "right_failed": 0, "wrong_passed": 1, "wrong_failed": 0}
    # Benchmark splits are left out: their edits are of other kinds than the mixture's.
    assert {group: s["answers"] for group, s in result["by_edits"].items()} == {"4": 1}
    assert {group: s["answers"] for group, s in result["by_split"].items()} == {"kris/x": 2, "kris/y": 1, "plain": 1}
    assert {group: s["answers"] for group, s in result["by_suite"].items()} == {"kris": 3}


def test_a_judge_that_failed_is_missing_and_not_a_bad_score():
    answers = [plain_answer(key="a"), dataclasses.replace(plain_answer(key="b"), truth=(None,), exact=())]
    overall = evaluate(answers)["overall"]
    assert overall["outcome"] == {"value": 1.0, "low": None, "high": None, "n": 1}
    assert overall["exact"]["n"] == overall["right"]["n"] == overall["calibration"]["final"]["accuracy"]["n"] == 1
    verdict_only = Evaluation(*(AxisVerdict(True, "fine") for _ in AXES))  # no scores
    answer = dataclasses.replace(plain_answer(), truth=(verdict_only,))
    overall = evaluate([answer])["overall"]
    assert overall["outcome"]["value"] is None
    assert overall["calibration"]["final"]["accuracy"]["value"] == 1.0


def test_where_no_target_is_known_nothing_is_exact_and_no_answer_wrong_by_default():
    blank = EvaluatedAnswer(plain_answer(key="z").sample, None, "nothing drawn")
    overall = evaluate([dataclasses.replace(plain_answer(), exact=()), blank])["overall"]
    assert overall["exact"]["n"] == overall["gain"]["n"] == 0
    assert overall["right"]["value"] == 0.5


def test_edits_are_ordered_by_size():
    result = evaluate([plain_answer(key=str(n), edits=n) for n in (10, 2, 1)])
    assert list(result["by_edits"]) == ["1", "2", "10"]


def test_the_result_is_json_and_the_same_for_the_same_answers(tmp_path):
    studio = Studio(seed=2)
    answers = [studio.answer(task, ARMS["eval_rl"], "kris/factual") for task in tasks(30)]
    result = evaluate(answers, seed=7, about={"temperature": 1.0})
    write_evaluation(tmp_path / "eval_rl", result)
    assert read_evaluation(tmp_path / "eval_rl") == result == evaluate(answers, seed=7, about={"temperature": 1.0})
    assert result["about"] == {"temperature": 1.0} and result["seed"] == 7
    shuffled = evaluate(answers[::-1], seed=7)["overall"]
    assert shuffled["exact"] == result["overall"]["exact"]
    assert shuffled["outcome"] == pytest.approx(result["overall"]["outcome"])


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError):
        evaluate([])
    for text in (None, "{", json.dumps({"schema": "older"})):
        if text is not None:
            (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(UserError) as caught:
            read_evaluation(tmp_path)
        assert str(tmp_path / "evaluation.json") in caught.value.what


def test_a_verdict_that_reads_the_prompt_alone_is_what_the_blind_rule_reaches():
    """One edit: all right and passed. Two edits: all wrong; a quarter passed."""
    easy = [plain_answer(1, exact=True, key=f"e{i}", passes=True, edits=1) for i in range(6)]
    hard = [plain_answer(1, exact=False, key=f"h{i}", passes=i == 0, edits=2) for i in range(4)]
    calibration = evaluate([*easy, *hard])["overall"]["calibration"]["images"]
    assert calibration["pass_given_right"]["value"] == calibration["blind"]["pass_given_right"]["value"] == 1.0
    assert calibration["pass_given_wrong"]["value"] == calibration["blind"]["pass_given_wrong"]["value"] == 0.25
    assert calibration["accuracy"]["value"] == 0.9 and calibration["blind"]["accuracy"]["value"] == 1.0


def test_a_verdict_that_follows_the_image_differs_from_the_blind_rule():
    answers = [plain_answer(1, exact=i < 5, key=str(i), passes=i < 5, edits=2) for i in range(10)]
    calibration = evaluate(answers)["overall"]["calibration"]["images"]
    assert (calibration["pass_given_right"]["value"], calibration["pass_given_wrong"]["value"]) == (1.0, 0.0)
    assert {name: estimate["value"] for name, estimate in calibration["blind"].items()} == {
        "pass_given_right": 0.5, "pass_given_wrong": 0.5, "accuracy": 0.5}
    nothing = evaluate([dataclasses.replace(answers[0], truth=())])["overall"]["calibration"]["images"]["blind"]
    assert nothing["accuracy"]["value"] is None and nothing["pass_given_right"]["n"] == 0


def test_garbled_texts_are_counted_among_all_texts():
    spoilt = dataclasses.replace(plain_answer(2, key="b"), garbled=("S2",))
    answers = [plain_answer(3, key="a"), spoilt, plain_answer(1)]
    garbled = evaluate(answers)["overall"]["garbled"]
    assert (garbled["value"], garbled["n"]) == (pytest.approx(1 / 3), 3)


def test_a_repair_is_a_right_second_image_after_a_critique_of_a_wrong_one():
    def reflecting(key: str, second: bool, first: bool = False) -> EvaluatedAnswer:
        answer = plain_answer(2, key=key)
        one, two = answer.trajectory.rounds
        trajectory = Trajectory(answer.sample, (one, dataclasses.replace(two, cause=Reflection("a", "b"))))
        return dataclasses.replace(answer, trajectory=trajectory, mode=trajectory.mode, exact=(first, second))

    fine_before = reflecting("c", True, first=True)
    answers = [reflecting("a", True), reflecting("b", False), fine_before, plain_answer(2, key="d")]
    assert evaluate(answers)["overall"]["repaired"]["value"] == 0.5
    assert evaluate(answers)["overall"]["repaired"]["n"] == 2
