"""Rewards, bonus and advantages against numbers computed by hand; a judge that fails leaves no score behind."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from answer_tokens import micro, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from ivr_jax.config import as_dataclass, load_config
from ivr_jax.errors import UserError
from ivr_jax.interfaces import ServiceFailed
from ivr_jax.protocol.grammar import ACCEPT, Grammar, GrammarOptions, advance, legal_row
from ivr_jax.rewards.functions import (
    PAPER,
    RELEASED,
    Components,
    DraftTruth,
    RewardOptions,
    advantages,
    complexity_bonus,
    format_reward,
    improvement,
    outcome,
    score_draft_groups,
    score_groups,
    total,
)
from ivr_jax.rewards.judge import INVALID, Judged, judge_answer, judge_answers
from ivr_jax.trajectory import AxisVerdict, Evaluation, Reflection, Step


def array(values, dtype=np.float32) -> np.ndarray:
    return np.array(values, dtype)


# -- reward -----------------------------------------------------------------------------------------------------------


def test_outcome_is_a_twentieth_of_the_sum_of_scores():
    scores = array([[5, 5, 5, 5], [1, 1, 1, 1], [5, 3, 4, 2], [4.5, 5, 5, 3.5]])
    np.testing.assert_allclose(outcome(scores), [1.0, 0.2, 0.7, 0.9], atol=1e-6)


@pytest.mark.parametrize(
    ("outcome_reward", "valid", "step", "has_step", "renormalise", "expected"),
    [
        (1.0, 1, 1.0, True, True, 1.0),
        (0.8, 1, 0.5, True, True, 0.76),  # 0.56 + 0.1 + 0.1
        (0.8, 1, 0.0, True, True, 0.66),
        (0.2, 0, 0.0, True, True, 0.14),
        (1.0, 1, 0.0, False, True, 1.0),  # 0.8 of 0.8, rescaled to 1
        (0.8, 1, 0.0, False, True, 0.825),  # 0.66 / 0.8
        (0.2, 0, 0.0, False, True, 0.175),  # 0.14 / 0.8
        (0.8, 1, 0.0, False, False, 0.86),  # 0.66 + 0.2
        (0.2, 0, 0.0, False, False, 0.34),
        (0.8, 1, 0.5, True, False, 0.76),  # the rule only matters without texts
    ],
)
def test_total(outcome_reward, valid, step, has_step, renormalise, expected):
    options = RewardOptions(renormalise=renormalise)
    found = total(array([outcome_reward]), array([valid]), array([step]), array([has_step], bool), options)
    np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_total_with_other_weights():
    """1, 1 and 2: 0.5 + 1 + 2 * 0.25 = 2; without texts (0.5 + 1) * 4 / 2 = 3."""
    options = RewardOptions(outcome_weight=1, format_weight=1, step_weight=2)
    found = total(array([0.5, 0.5]), array([1, 1]), array([0.25, 0.25]), array([True, False], bool), options)
    np.testing.assert_allclose(found, [2.0, 3.0], atol=1e-6)


# -- bonus ------------------------------------------------------------------------------------------------------------

BONUS = {
    # rewards, images, valid, expected
    "the fewest take all, more take a share": ([0.9, 0.88, 0.86, 0.5], [3, 1, 2, 1], [1] * 4, [1 / 3, 1, 0.5, 0]),
    "the best alone": ([1.0, 0.9, 0.8, 0.7], [4, 1, 1, 1], [1] * 4, [1, 0, 0, 0]),
    "ties share": ([0.7] * 4, [2, 2, 4, 2], [1] * 4, [1, 1, 0.5, 1]),
    "a fewer-images member that is not competitive does not count": ([1.0, 0.97, 0.2, 0.2], [4, 2, 1, 1], [1] * 4,
                                                                     [0.5, 1, 0, 0]),
    "a missing member sets neither the best nor the fewest": ([1.0, 0.5, 0.46, 0.1], [1, 3, 2, 6], [0, 1, 1, 1],
                                                              [0, 2 / 3, 1, 0]),
    "no image, no bonus, and no standard": ([1.0, 0.5, 0.48, 0.3], [0, 2, 4, 1], [1] * 4, [0, 1, 0.5, 0]),
    "nobody is there": ([1.0, 0.5, 0.48, 0.3], [1, 2, 4, 1], [0] * 4, [0] * 4),
    "nobody drew": ([0.175] * 4, [0] * 4, [1] * 4, [0] * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", BONUS)
def test_complexity_bonus(name):
    rewards, images, valid, expected = BONUS[name]
    found = complexity_bonus(array([rewards]), array([images], np.int32), array([valid], bool), PAPER)
    np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_the_bonus_of_several_groups_at_once_weight_and_epsilon():
    rewards, images, valid, expected = (np.array(column) for column in zip(*BONUS.values(), strict=True))
    group = array(rewards), array(images, np.int32), valid.astype(bool)
    np.testing.assert_allclose(complexity_bonus(*group, PAPER), expected, atol=1e-6)
    half = complexity_bonus(*group, RewardOptions(bonus_weight=0.5))
    np.testing.assert_allclose(half, expected / 2, atol=1e-6)
    assert not np.asarray(complexity_bonus(*group, RewardOptions(bonus_weight=0))).any()
    pair = array([[1.0, 0.75]]), array([[2, 1]], np.int32), array([[1, 1]], bool)
    loose = complexity_bonus(*pair, RewardOptions(epsilon=0.3))
    np.testing.assert_allclose(loose, [[0.5, 1]], atol=1e-6)


def test_the_bonus_may_be_kept_for_flawless_images():
    group = array([[1.0, 0.97, 0.98]]), array([[4, 1, 2]], np.int32), array([[1, 1, 1]], bool)
    flawless = array([[1.0, 0.95, 0.99999999]])
    found = complexity_bonus(*group, RewardOptions(bonus_min_outcome=1.0), flawless)
    np.testing.assert_allclose(found, [[0.5, 0, 1]], atol=1e-6)
    nobody = complexity_bonus(*group, RewardOptions(bonus_min_outcome=1.0), array([[0.9, 0.9, 0.9]]))
    assert not np.asarray(nobody).any()
    np.testing.assert_allclose(complexity_bonus(*group, PAPER, flawless), [[0.25, 1, 0.5]], atol=1e-6)


# -- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_with_and_without_the_standard_deviation():
    """Mean 0.5; deviations -0.3, -0.1, 0.1, 0.3; sample variance 0.2 / 3."""
    rewards, valid = array([[0.2, 0.4, 0.6, 0.8]]), np.ones((1, 4), bool)
    plain, used = advantages(rewards, valid, RewardOptions(divide_by_std=False))
    np.testing.assert_allclose(plain, [[-0.3, -0.1, 0.1, 0.3]], atol=1e-6)
    assert np.asarray(used).all()
    scaled, _ = advantages(rewards, valid, PAPER)
    np.testing.assert_allclose(scaled, [[-1.161895, -0.387298, 0.387298, 1.161895]], atol=1e-4)


def test_a_missing_member_leaves_the_statistics_alone():
    """Present: 0.2, 0.6, 0.7, mean 0.5, sample variance (0.09 + 0.01 + 0.04) / 2 = 0.07."""
    rewards, valid = array([[0.2, 9.0, 0.6, 0.7]]), array([[1, 0, 1, 1]], bool)
    plain, used = advantages(rewards, valid, RewardOptions(divide_by_std=False))
    np.testing.assert_allclose(plain, [[-0.3, 0, 0.1, 0.2]], atol=1e-6)
    scaled, _ = advantages(rewards, valid, PAPER)
    np.testing.assert_allclose(scaled, [[-1.133893, 0, 0.377964, 0.755929]], atol=1e-4)
    assert np.asarray(used).tolist() == [[True, False, True, True]]
    silent, _ = advantages(array([[0.2, np.nan, 0.6, 0.7]]), valid, PAPER)
    np.testing.assert_array_equal(silent, scaled)


def test_a_group_with_too_few_present_members_takes_no_part():
    rewards = array([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    valid = array([[1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
    found, used = advantages(rewards, valid, PAPER)
    assert np.asarray(used).tolist() == [[False] * 3, [True, True, False], [True] * 3]
    np.testing.assert_allclose(found[:2], [[0, 0, 0], [-0.707107, 0.707107, 0]], atol=1e-4)
    _, used = advantages(rewards, valid, RewardOptions(min_valid=3))
    assert np.asarray(used).tolist() == [[False] * 3, [False] * 3, [True] * 3]


@given(reward=st.floats(0, 2, width=32), count=st.integers(2, 9))
@settings(max_examples=30)
def test_equal_rewards_teach_nothing(reward, count):
    """Not even through the rounding of their mean, which the division by their spread would blow up."""
    found, _ = advantages(np.full((1, count), reward, np.float32), np.ones((1, count), bool), PAPER)
    assert not np.asarray(found).any()


@given(rewards=st.lists(st.floats(0, 2, width=32), min_size=2, max_size=8), shift=st.floats(-1, 1))
@settings(max_examples=30)
def test_advantages_sum_to_nothing_and_forget_the_level(rewards, shift):
    valid = np.ones((1, len(rewards)), bool)
    options = RewardOptions(divide_by_std=False)
    found, _ = advantages(array([rewards]), valid, options)
    np.testing.assert_allclose(np.asarray(found).sum(), 0, atol=1e-5)
    moved, _ = advantages(array([rewards]) + np.float32(shift), valid, options)
    np.testing.assert_allclose(moved, found, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"outcome_weight": 0}, {"epsilon": -0.1}, {"min_valid": 1}, {"bonus_weight": -1.0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        RewardOptions(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"score_map": "tenth"}, {"intermediate": "words"}, {"step_reward_evals": "some"}, {"axis_weights": (1.0, 1.0)}],
)
def test_unknown_rules_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        RewardOptions(**wrong)


def test_the_configs_hold_the_presets():
    assert as_dataclass(RewardOptions, load_config("micro_rl").reward) == PAPER
    assert as_dataclass(RewardOptions, load_config("micro_rl_released").reward) == RELEASED


# -- all at once ------------------------------------------------------------------------------------------------------


def components(rng, shape, **changes) -> Components:
    parts = dict(
        scores=array(rng.uniform(1, 5, (*shape, 4))), format=array(rng.integers(0, 2, shape)),
        step=array(rng.uniform(0, 1, shape)), has_step=rng.random(shape) < 0.5,
        reflection=array(rng.uniform(0, 1, shape)), has_reflection=rng.random(shape) < 0.5,
    )  # fmt: skip
    return Components(**parts | changes)


def by_hand(parts, images, present, options, p):
    """Rewards, bonus and advantages of group p in plain Python over the members that are there."""
    members = [m for m in range(len(images[p])) if present[p, m]]
    rewards = {}
    for m in members:
        values = [s / 5 if options.score_map == "div5" else (s - 1) / 4 for s in map(float, parts.scores[p, m])]
        found = {"o": (options.outcome_weight, float(np.dot(values, options.axis_weights) / sum(options.axis_weights))),
                 "f": (options.format_weight, float(parts.format[p, m]))}  # fmt: skip
        for name, weight, value, has in (("s", options.step_weight, parts.step, parts.has_step),
                                         ("r", options.reflection_weight, parts.reflection, parts.has_reflection)):
            if has[p, m] or not options.renormalise:
                found[name] = (weight, float(value[p, m]) if has[p, m] else options.missing_value)
        full = options.outcome_weight + options.format_weight + options.step_weight + options.reflection_weight
        rewards[m] = sum(w * v for w, v in found.values()) * full / sum(w for w, _ in found.values())
    drew = [m for m in members if images[p, m]]
    close = [m for m in drew if rewards[m] >= max(rewards[d] for d in drew) - options.epsilon]
    bonus = {m: options.bonus_weight * min(images[p, c] for c in close) / images[p, m] for m in close}
    final = [rewards[m] + bonus.get(m, 0.0) for m in members]
    if len(members) < options.min_valid:
        return rewards, bonus, {}
    spread = np.std(final, ddof=1) if options.divide_by_std else 1.0
    return rewards, bonus, {m: (f - np.mean(final)) / max(spread, 1e-12) for m, f in zip(members, final, strict=True)}


UNSCALED = RewardOptions(renormalise=False, divide_by_std=False, min_valid=4)


@pytest.mark.parametrize("options", [PAPER, RELEASED, UNSCALED])
def test_groups_are_scored_as_by_hand_and_missing_members_never_matter(options):
    rng = np.random.default_rng(0)
    parts, images = components(rng, (6, 5)), rng.integers(0, 4, (6, 5)).astype(np.int32)
    present = rng.random((6, 5)) < 0.7
    found = score_groups(parts, images, present, options)
    for p in range(6):
        rewards, bonus, expected = by_hand(parts, images, present, options, p)
        for m in range(5):
            assert bool(found.used[p, m]) == (m in expected)
            np.testing.assert_allclose(found.total[p, m], rewards.get(m, 0.0), atol=1e-5)
            np.testing.assert_allclose(found.bonus[p, m], bonus.get(m, 0.0), atol=1e-5)
            np.testing.assert_allclose(found.advantages[p, m], expected.get(m, 0.0), atol=2e-3)
    poison = Components(*(np.where(present[..., None] if x.ndim == 3 else present, x, np.nan) if x.dtype == np.float32
                          else x for x in parts))  # fmt: skip
    again = score_groups(poison, images, present, options)
    for name in ("total", "bonus", "advantages", "used"):
        np.testing.assert_array_equal(np.asarray(getattr(again, name)), np.asarray(getattr(found, name)))


def test_the_format_reward_is_the_grammars_verdict():
    tokenizer = micro()
    strict = Grammar(tokenizer, GrammarOptions(text_cap=3))
    rng, rows = np.random.default_rng(0), []
    for _ in range(6):
        state, tokens = strict.initial(np.array([1]), np.array([2])), []
        while state.node[0] != ACCEPT:
            legal = strict.tables.legal[legal_row(strict.tables, state, np)[0]][strict.tables.class_of]
            tokens.append(int(rng.choice(np.flatnonzero(legal))))
            state = advance(strict.tables, state, np.array(tokens[-1:]), np)
        rows.append(tokens)
    width = max(map(len, rows)) + 2
    padded = np.array([r + [tokenizer.vocab.pad] * (width - len(r)) for r in rows], np.int32)
    padded = np.concatenate([padded, np.roll(padded, 1, axis=1), padded * (np.arange(width) < 9)])
    state = strict.initial(np.full(18, 1), np.full(18, 2))
    found = np.asarray(format_reward(strict.tables, state, padded))
    np.testing.assert_array_equal(found, [1.0] * 6 + [0.0] * 12)


# -- judge ------------------------------------------------------------------------------------------------------------

WHITE = np.full((2, 2, 3), 255, np.uint8)


class Judge:
    """Scores an image by its first pixel, and rates texts by a table; "broken" in either makes it fail."""

    def __init__(self, ratings: dict | None = None):
        self.ratings, self.asked = ratings or {}, []

    async def evaluate(self, sample, images, image):
        mark = int(image[0, 0, 0])
        if mark == 0:
            raise ServiceFailed("the judge answered nonsense.", "Ask again.")
        return Evaluation(*(AxisVerdict(mark >= 5, "seen", score) for score in (mark, 5, 5, 4)))

    async def judge_reasoning(self, sample, images, kind, text, previous):
        self.asked.append((kind, text, [int(p[0, 0, 0]) for p in previous]))
        if self.ratings[text] == "broken":
            raise ServiceFailed("the judge answered nonsense.", "Ask again.")
        return self.ratings[text]


def drawn(*marks: int) -> dict[str, np.ndarray]:
    """Images G1, G2 ... whose pixels say how they will be scored."""
    return {f"G{k}": np.full((2, 2, 3), mark, np.uint8) for k, mark in enumerate(marks, 1)}


def judged(judge, answer, images, **options) -> Judged:
    return asyncio.run(judge_answer(judge, answer, images, **options))


def test_a_direct_answer_is_judged_by_its_image_and_has_no_step_reward():
    found = judged(Judge(), trajectory([], [True]), drawn(3))
    assert (found.scores, found.format, found.step, found.present) == ((3.0, 5.0, 5.0, 4.0), 1.0, None, True)


def test_only_the_final_image_counts_and_every_text_is_rated_with_the_images_before_it():
    judge = Judge({"why": 1.0, "how": 0.5, "why again": 0.0, "how now": 0.5})
    causes = [Reflection("why", "how"), Reflection("why again", "how now")]
    found = judged(judge, trajectory(causes, [False, False, True]), drawn(1, 2, 5))
    assert found.scores == (5.0, 5.0, 5.0, 4.0) and found.step == 0.5 and len(found.truth) == 1
    assert sorted(judge.asked) == [
        ("failure_analysis", "why", [1]),
        ("failure_analysis", "why again", [1, 2]),
        ("improvement_plan", "how", [1]),
        ("improvement_plan", "how now", [1, 2]),
    ]
    every = judged(judge, trajectory(causes, [False, False, True]), drawn(1, 2, 5), every_image=True)
    assert [e.instruction.score for e in every.truth] == [1, 2, 5] and every.scores == found.scores


def test_steps_are_rated_too():
    judge = Judge({"one": 1.0, "two": 0.0})
    found = judged(judge, trajectory([Step("one"), Step("two")], [False, False, True]), drawn(1, 2, 5))
    assert found.step == 0.5
    assert sorted(judge.asked) == [("step", "one", [1]), ("step", "two", [1, 2])]


@pytest.mark.parametrize(
    ("step_reward_evals", "passes", "expected"),
    [
        ("none", (False, True), 0.75),  # the two texts alone
        ("final", (False, True), (1.5 + 1) / 3),
        ("final", (False, False), (1.5 + 0) / 3),
        ("all", (False, True), (1.5 + 2) / 4),
        ("all", (True, True), (1.5 + 1) / 4),
    ],
)
def test_evaluations_may_count_as_steps(step_reward_evals, passes, expected):
    """The judge finds the first image wrong and the second right."""
    judge = Judge({"why": 1.0, "how": 0.5})
    answer = trajectory([Reflection("why", "how")], list(passes))
    found = judged(judge, answer, drawn(1, 5), options=RewardOptions(step_reward_evals=step_reward_evals))
    assert found.step == pytest.approx(expected)
    direct = judged(
        judge, trajectory([], [False]), drawn(5), options=RewardOptions(step_reward_evals=step_reward_evals)
    )
    assert direct.step == (None if step_reward_evals == "none" else 0.0)


def test_an_evaluation_that_cannot_be_checked_is_missing_only_where_it_counts():
    judge = Judge({"why": 1.0, "how": 0.5})
    answer = trajectory([Reflection("why", "how")], [False, True])
    counted = judged(judge, answer, drawn(0, 5), options=RewardOptions(step_reward_evals="all"))
    assert counted.step_failed and not counted.present
    shown = judged(judge, answer, drawn(0, 5), every_image=True)
    assert shown.present and shown.step == 0.75 and shown.truth[0] is None


def test_the_released_rules_judge_images_and_reflections():
    judge = Judge({"why": 1.0, "how": 0.5})

    async def evaluate_step(sample, images, instruction, previous, image):
        judge.asked.append((instruction, [int(p[0, 0, 0]) for p in previous], int(image[0, 0, 0])))
        return await judge.evaluate(sample, images, image)

    judge.evaluate_step = evaluate_step
    steps = trajectory([Step("one"), Step("two")], [False, False, True])
    found = judged(judge, steps, drawn(1, 3, 5), options=RELEASED)
    assert judge.asked == [("one", [], 3), ("two", [3], 5)]
    # axes 3 5 5 4 and 5 5 5 4: means 4.25 and 4.75, of which (s - 1) / 4
    assert found.step == pytest.approx((3.25 / 4 + 3.75 / 4) / 2) and found.reflection is None
    reflected = judged(judge, trajectory([Reflection("why", "how")], [False, True]), drawn(1, 5), options=RELEASED)
    assert reflected.reflection == 0.75 and reflected.step is None


def test_a_judge_that_fails_on_the_image_leaves_the_answer_missing():
    found = judged(Judge(), trajectory([], [True]), drawn(0))
    assert found.scores is None and not found.present and found.format == 1.0


@pytest.mark.parametrize("rating", ["broken", 1.5, -0.1, float("nan")])
def test_a_judge_that_fails_on_a_text_leaves_the_answer_missing(rating):
    judge = Judge({"one": 1.0, "two": rating})
    found = judged(judge, trajectory([Step("one"), Step("two")], [False, False, True]), drawn(1, 2, 5))
    assert found.step is None and found.step_failed and not found.present
    assert found.scores == (5.0, 5.0, 5.0, 4.0)


def test_another_error_of_the_judge_is_not_swallowed():
    with pytest.raises(KeyError):
        judged(Judge({}), trajectory([Step("unheard of")], [False, True]), drawn(1, 5))


def test_an_answer_that_does_not_parse_is_at_the_floor_and_present():
    answers = [None, (trajectory([], [True]), drawn(5)), (trajectory([], [True]), drawn(0))]
    found = asyncio.run(judge_answers(Judge(), answers))
    assert found[0] is INVALID
    assert (INVALID.scores, INVALID.format, INVALID.step, INVALID.present) == ((1.0,) * 4, 0.0, None, True)
    assert [j.present for j in found] == [True, True, False]


# -- continuations of drafts ------------------------------------------------------------------------------------------


def draft_case():
    """One prompt, two drafts, three continuations each; scores are the same on all axes.

    The first draft is right (5, R_o 1), the second wrong (2, R_o .4).  First draft: stops; draws again and stays right;
    draws again and spoils it (3, R_o .6).  Second: stops wrongly; draws again and is right; has no judgement.
    """
    final = np.array([[5, 5, 3], [2, 5, 1]], np.float32)
    parts = Components(
        np.repeat(final[..., None], 4, -1), np.ones((2, 3)), np.zeros((2, 3)), np.zeros((2, 3), bool),
        np.zeros((2, 3)), np.zeros((2, 3), bool),
    )  # fmt: skip
    images, present = np.array([[1, 2, 2], [1, 2, 2]]), np.array([[True] * 3, [True, True, False]])
    return parts, images, present, DraftTruth(np.array([1.0, 0.4]), np.array([True, False]), np.ones(2, bool))


def test_a_continuation_earns_its_improvement_and_stopping_what_it_is_worth():
    parts, images, present, truth = draft_case()
    gain = improvement(np.array([[1, 1, 0.6], [0.4, 1, 0.2]]), images, truth)
    np.testing.assert_allclose(gain, [[1, 0, -0.4], [0, 0.6, -0.2]], atol=1e-6)


def test_draft_groups_by_hand():
    """R = improvement alone here: advantages within a draft's group, and of drafts by the mean of their outcomes."""
    options = RewardOptions(outcome_weight=1.0, format_weight=0.0, step_weight=0.0)
    parts, images, present, truth = draft_case()
    found = score_draft_groups(parts, images, present, truth, 2, options)
    np.testing.assert_allclose(found.total, [[1, 0, -0.4], [0, 0.6, 0]], atol=1e-6)
    np.testing.assert_array_equal(found.used, present)
    np.testing.assert_array_equal(found.bonus, np.zeros((2, 3)))
    first = np.array([1, 0, -0.4])
    second = np.array([0, 0.6])
    expected = (first - first.mean()) / first.std(ddof=1), (second - second.mean()) / second.std(ddof=1)
    np.testing.assert_allclose(found.advantages[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found.advantages[1], [*expected[1], 0], atol=1e-4)
    np.testing.assert_allclose(found.image_advantages, found.advantages, atol=1e-4)
    values = np.array([(1 + 1 + 0.6) / 3, (0.4 + 1) / 2])  # of those that are judged
    between = (values - values.mean()) / values.std(ddof=1)
    np.testing.assert_allclose(found.draft_advantages, np.repeat(between[:, None], 3, 1), atol=1e-4)


def test_a_draft_without_a_judgement_leaves_its_group_out():
    parts, images, present, truth = draft_case()
    unknown = truth._replace(present=np.array([True, False]))
    found = score_draft_groups(parts, images, present, unknown, 2, RewardOptions())
    assert found.used[0].all() and not found.used[1].any() and not np.asarray(found.advantages[1]).any()
    assert not np.asarray(found.draft_advantages).any()  # nothing to compare the other draft with


def test_image_advantages_compare_outcomes_alone():
    """Two answers of equal outcome and different steps: the images are equally good, the texts are not."""
    parts = Components(
        np.full((1, 2, 4), 5.0), np.ones((1, 2)), np.array([[1.0, 0.0]]), np.ones((1, 2), bool), np.zeros((1, 2)),
        np.zeros((1, 2), bool),
    )  # fmt: skip
    found = score_groups(parts, np.array([[2, 2]]), np.ones((1, 2), bool), RewardOptions(bonus_weight=0.0))
    assert found.advantages[0, 0] > 0.5 > -0.5 > found.advantages[0, 1]
    np.testing.assert_array_equal(found.image_advantages, [[0, 0]])
