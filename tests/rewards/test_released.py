"""The released reward suite against vectors made by the authors' code, and against its definitions, case by case."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivr_jax.errors import UserError
from ivr_jax.rewards.functions import PAPER, RELEASED, RewardOptions
from ivr_jax.rewards.released import calls, format_score, read_score, score_record

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "rewards.json").read_text())
NAMES = ("final", "step", "format", "reflection")
WEIGHTS = dict(zip(NAMES, (0.4, 0.3, 0.1, 0.2), strict=True))
AXIS_WEIGHTS = {"consistency": 0.25, "instruction": 0.40, "quality": 0.20, "knowledge": 0.15}


def record(**changes) -> dict:
    plain = {
        "instruction": "make it red", "source_images": ["a.png"], "explanation": "",
        "assistant_text": "<think>t</think><image>i</image>", "intermediate_steps": [], "final_image": "f.png",
        "reflections": [],
    }  # fmt: skip
    return plain | changes


@pytest.mark.parametrize("number", range(len(CASES)))
def test_totals_components_weights_and_questions_are_those_of_the_released_code(number):
    case = CASES[number]
    expected = iter(case["judge_calls"])

    def judge(prompt, images):
        call = next(expected)
        assert images == call["images"] and f'"{call["score_key"]}"' in prompt
        return call["reply"]

    found = score_record(case["rollout"], judge, worst_for_failures=True)
    assert next(expected, None) is None
    assert found.total == pytest.approx(case["total"], abs=1e-9) and found.missing == ()
    for name in NAMES:
        assert found.components[name] == pytest.approx(case["components"][name], abs=1e-9)
        assert found.effective_weights[name] == pytest.approx(case["effective_weights"][name], abs=1e-9)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_by_default_a_failed_judgement_leaves_the_reward_missing(number):
    """The same replies: where every one is a score from 1 to 5 nothing changes, else there is no reward at all."""
    case = CASES[number]
    scores = [read_score(call["reply"], call["score_key"]) for call in case["judge_calls"]]
    bad = [c["score_key"] for c, s in zip(case["judge_calls"], scores, strict=True) if s is None or not 1 <= s <= 5]
    replies = iter(case["judge_calls"])
    found = score_record(case["rollout"], lambda prompt, images: next(replies)["reply"])
    assert list(found.missing) == bad
    if bad:
        assert found.total is None
    else:
        assert found.total == pytest.approx(case["total"], abs=1e-9)


# -- definitions ------------------------------------------------------------------------------------------------------

scores_ = st.sampled_from([1, 1.5, 2, 3, 4.5, 5])


@given(
    axes=st.tuples(scores_, scores_, scores_, scores_),
    steps=st.lists(st.one_of(st.none(), scores_), max_size=4),
    reflections=st.lists(st.one_of(st.sampled_from(["prev_image", "text", "next_image"]), scores_), max_size=3),
    has_final=st.booleans(),
    skip_empty=st.booleans(),
    text=st.sampled_from(["", "<think>t</think><image>i</image>", "<image>i</image>", "<think>t</think>"]),
)
def test_any_record_is_scored_as_defined(axes, steps, reflections, has_final, skip_empty, text):
    """Absent images and incomplete reflections score 1; with `skip_empty` the weights of absent parts go to 0."""
    items = []
    for value in reflections:
        item = {"prev_image": "p.png", "text": "why", "next_image": "n.png"}
        items.append(item | {value: ""} if isinstance(value, str) else item)
    asked = record(
        assistant_text=text,
        final_image="f.png" if has_final else None,
        intermediate_steps=[{"instruction": "go", "image": None if s is None else "s.png"} for s in steps],
        reflections=items,
    )
    by_axis = dict(zip(AXIS_WEIGHTS, axes, strict=True))
    queues = {
        "step_score": iter([s for s in steps if s is not None]),
        "reflection_score": iter([r for r in reflections if not isinstance(r, str)]),
    }

    def judge(prompt, images):
        key = prompt.rsplit('{"', 1)[1].split('"')[0]
        value = next(queues[key]) if key in queues else by_axis[key.removesuffix("_score")]
        return json.dumps({key: value, "reasoning": "so"})

    found = score_record(asked, judge, RELEASED if skip_empty else RewardOptions(
        **{**RELEASED.__dict__, "renormalise": False}
    ))  # fmt: skip
    unit = lambda s: (s - 1) / 4  # noqa: E731
    expected = {
        "final": sum(AXIS_WEIGHTS[a] * unit(s) for a, s in by_axis.items()) if has_final else 0.0,
        "step": float(np.mean([unit(s or 1) for s in steps])) if steps else 0.0,
        "format": format_score(text),
        "reflection": float(np.mean([0 if isinstance(r, str) else unit(r) for r in reflections])) if items else 0.0,
    }
    weights = dict(WEIGHTS)
    if skip_empty:
        weights |= {name: 0.0 for name, parts in (("step", steps), ("reflection", reflections)) if not parts}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert found.components == pytest.approx(expected, abs=1e-9)
    assert found.effective_weights == pytest.approx(weights, abs=1e-9)
    assert found.total == pytest.approx(sum(weights[n] * expected[n] for n in NAMES), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><image>b</image>", 1.0),
        ("<think>a</think><image>b</image><think>c</think><image>d</image> \n", 1.0),
        ("<think>a\nb</think><image>b</image>", 1.0),
        ("<think>a</think><image>b</image> and more", 0.75),  # does not end with the image
        ("<think>a</think> <image>b</image>", 0.75),  # something between
        ("<think>a</think><image>b</image><image>c</image>", 0.75),
        ("<think>a<think>a</think><image>b</image>", 0.75),  # a tag too many
        ("<image>b</image>", 0.5),
        ("<think>a</think>", 0.5),
        ("<think>a</image>", 0.25),  # nothing but the end
        ("</think><think>", 0.25),  # balanced in number, no block
        ("", 0.25),
        ("words", 0.25),
        ("<image>", 0.0),
    ],
)
def test_format(text, expected):
    assert format_score(text) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"step_score": 4, "reasoning": "so"}', 4.0),
        ('```json\n{"step_score": 2.5}\n```', 2.5),
        ('Well: {"reasoning": "so", "step_score": "3"} indeed', 3.0),
        ('I say "step_score": 5.', 5.0),
        ("step_score: 2 because", 2.0),
        ('{"step_score": null}', None),
        ('{"other": 3}', None),
        ("[4]", None),
        ("four", None),
        ("", None),
        (None, None),
        (b"4", None),
    ],
)
def test_a_score_is_found_however_it_is_wrapped(reply, expected):
    assert read_score(reply, "step_score") == expected


@pytest.mark.parametrize("reply", ["prose", '{"step_score": NaN}', '{"step_score": 9}', '{"step_score": 0}', None])
def test_faults_of_the_judge_are_missing_unless_the_released_rule_is_asked_for(reply):
    asked = record(final_image=None, intermediate_steps=[{"instruction": "go", "image": "s.png"}])
    found = score_record(asked, lambda prompt, images: reply)
    assert found.total is None and found.missing == ("step_score",) and found.components["step"] is None
    ruled = score_record(asked, lambda prompt, images: reply, worst_for_failures=True)
    assert ruled.components["step"] == (1.0 if reply and "9" in reply else 0.0)


def test_a_judge_that_raises_has_failed():
    def judge(prompt, images):
        raise TimeoutError

    assert len(score_record(record(), judge).missing) == 4


def test_a_record_without_a_field_is_refused():
    broken = record()
    del broken["final_image"]
    with pytest.raises(UserError):
        calls(broken)


def test_the_presets_are_those_of_paper_and_code():
    assert (PAPER.outcome_weight, PAPER.format_weight, PAPER.step_weight, PAPER.reflection_weight) == (0.7, 0.1, 0.2, 0)
    assert (PAPER.bonus_weight, PAPER.epsilon, PAPER.step_reward_evals) == (1.0, 0.05, "none")
    assert (RELEASED.outcome_weight, RELEASED.step_weight, RELEASED.format_weight, RELEASED.reflection_weight) == (
        0.4, 0.3, 0.1, 0.2,
    )  # fmt: skip
