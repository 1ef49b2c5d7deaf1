"""The paired verdict test: 0 for a verdict that ignores the image, 1 for one that knows the exact one."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_model import noisy_params, prompts_of, requests, system

from ivr_jax.evaluate.paired import EXACT, FAULT, MASKED, OWN, Case, one_wrong_cell, paired_test
from ivr_jax.evaluate.verdicts import JudgedImage, Verdict, VerdictScorer
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.sampler import sample_task


def cases(count: int = 12) -> list[Case]:
    """Requests whose exact image is all 3; the own image is wrong in two of three."""
    samples, held = requests(count)
    found = []
    for number, prompt in enumerate(prompts_of(samples, held)):
        exact = np.full((2, 2), 3, np.int32)
        own = exact if number % 3 == 0 else np.array([[3, number % 2], [3, 3]], np.int32)
        images = {OWN: own, EXACT: exact, FAULT: np.array([[2, 3], [3, 3]], np.int32), MASKED: np.zeros_like(exact)}
        groups = {"by_edits": (str(1 + number % 2),), "by_kind": ("put", "swap")[: 1 + number % 2], "by_round": ("1",),
                  "by_mode": ("first image",)}  # fmt: skip
        context = np.array(prompt, np.int32)
        found.append(Case(context, images, number % 3 == 0, groups, reads=lambda text: {"all": True}.get(text)))
        if number < 2:
            later = np.concatenate([context, [5]]).astype(np.int32)
            found.append(Case(later, images, number == 0, groups | {"by_round": ("2",)}, first=False))
    return found


def oracle(images):
    return [Verdict(float((image.codes == 3).all())) for image in images]


def test_an_oracle_sees():
    result = paired_test(cases(), oracle)
    overall = result["overall"]
    assert overall["cases"] == 12 and overall["own_wrong"] == 8
    ones = ("sight", "sight_fault", "pass_exact", "pass_own_right", "accuracy")
    assert {overall[name]["value"] for name in ones} == {1.0}
    assert overall["pass_fault"]["value"] == overall["pass_own_wrong"]["value"] == 0.0
    assert overall["accuracy_constant"]["value"] == 8 / 12
    assert overall["read_right"]["n"] == 0 and overall["sight"]["n"] == 8
    assert {group: summary["cases"] for group, summary in result["by_round"].items()} == {"1": 12, "2": 2}
    assert {group: summary["cases"] for group, summary in result["by_kind"].items()} == {"put": 12, "swap": 6}


def test_a_model_made_blind_has_no_sight_whatever_it_answers():
    scorer = VerdictScorer(system(noisy_params()), GrammarOptions(text_cap=4), 60, batch=8)

    def blind(images):
        return scorer([image._replace(codes=np.zeros_like(image.codes)) for image in images])

    overall = paired_test(cases(4), blind)["overall"]
    assert overall["sight"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    assert overall["sight_fault"]["value"] == 0.0
    assert 0 < overall["pass_exact"]["value"] < 1, "the model has an opinion: it is the image that does not count"
    assert overall["accuracy"] == overall["accuracy_masked"]


def test_a_rule_that_reads_the_prompt_alone_agrees_with_the_truth_and_sees_nothing():
    """All prompts of two edits are answered wrong, all of one right: a constant verdict for each is always right."""
    rows = [
        Case(case.context, case.images | {OWN: case.images[EXACT if number % 2 == 0 else FAULT]}, number % 2 == 0,
             {"by_edits": (str(1 + number % 2),), "by_round": ("1",)})
        for number, case in enumerate(c for c in cases() if c.first)
    ]  # fmt: skip
    hard = {case.context.tobytes() for case in rows if case.groups["by_edits"] == ("2",)}


    def by_prompt(images):
        return [Verdict(float(image.context.tobytes() not in hard)) for image in images]

    overall = paired_test(rows, by_prompt)["overall"]
    assert overall["accuracy"]["value"] == overall["accuracy_constant"]["value"] == 1.0
    assert overall["sight"]["value"] == overall["sight_fault"]["value"] == 0.0


def test_reading_is_counted_where_it_can_be_read():
    result = paired_test(cases(3), lambda images: [Verdict(0.5, "all" if i % 2 else "") for i in range(len(images))])
    assert result["overall"]["read_right"]["value"] in (None, 1.0)


@pytest.mark.parametrize("level", [0, 2])
def test_a_fault_is_one_cell(level):
    for index in range(6):
        task = sample_task(level, 3, index, held_out=True)
        analyzer, image = WorldAnalyzer(), one_wrong_cell(task, 0, index)
        assert not analyzer.is_exact(task.sample, image)
        assert np.array_equal(image, one_wrong_cell(task, 0, index))
        different = (image != task.target_image).any(-1)
        rows, columns = np.nonzero(different)
        assert 0 < np.ptp(rows) < 16 and 0 < np.ptp(columns) < 16


def test_equal_images_are_scored_once():
    scorer = VerdictScorer(system(noisy_params()), GrammarOptions(text_cap=4), 60, batch=4)
    image = JudgedImage(np.array([3, 7, 1], np.int32), np.zeros((2, 2), np.int32))
    first, second = scorer([image, image])
    assert first == second
