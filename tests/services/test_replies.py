"""The reader of answers: what is thought, what is an answer, and what is no score."""

from __future__ import annotations

import json

import pytest

from ivr_jax.services.replies import (
    Unusable,
    answer_text,
    as_choice,
    as_score,
    as_text,
    as_texts,
    check_scale,
    read_object,
    read_score,
    read_scored,
    read_scores,
)

TWO = '{"reason": "judged", "score": 2}'
FIVE = '{"reason": "first thought", "score": 5}'


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<think>", "</think>"),
        ("", "</think>"),  # a chat template that opens the thought itself
        ("<think>\n<think>", "</think>"),
        ("<Thinking>", "</ Thinking >"),
        ('<think time="3">', "</think>"),
        ("<thought>", "</thought>"),
        ("<reasoning>", "</reasoning>"),
        ("<analysis>", "</analysis>"),
        ("<scratchpad>", "</scratchpad>"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("[THINK]", "[/THINK]"),
        ("&lt;think&gt;", "&lt;/think&gt;"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("analysisWe look.", "assistantfinal"),
        ("<|channel>thought\n", "<channel|>"),
        ("<inner_monologue>", "</inner_monologue>"),
        ("<mythoughts>", "</mythoughts>"),
        ("<rationale>", "</rationale>"),
        ("<cot>", "</cot>"),
        ('<details type="reasoning">', "</details>"),  # Open WebUI
        ("<think_never_used_51bc>", "</think_never_used_51bc>"),
        ("<|thought_begin|>", "<|thought_end|>"),
        ("<think>", "<\\/think>"),
        ("\\u003cthink\\u003e", "\\u003c/think\\u003e"),
        ("<unused94>thought", "<unused95>"),
        ("Here is my thought process:", "Here is my response:"),
        ("[REASONING]", "[/REASONING]"),
        ("<|think|>", "</|think|>"),
        ("<think\n", "</think\n"),
        ("<notes>", "</notes>"),  # any other name than an answer's
        ("<hidden_work>", "</hidden_work>"),
    ],
)
def test_text_before_the_last_closing_tag_is_thought(opening, closing):
    thought = f"{opening}Let me look. A draft: {FIVE}. Looking again."
    assert read_scored(f"{thought}{closing}\n\n{TWO}") == (2, "judged")
    assert read_scored(f"{thought}{closing}{FIVE}{closing}{TWO}")[0] == 2
    assert read_scored(f"{thought}{closing} Score: 4. The hat is there.") == (4, "Score: 4. The hat is there.")
    with pytest.raises(Unusable):
        read_scored(f"{thought}{closing}  ")
    if opening and opening != "Here is my thought process:":
        with pytest.raises(Unusable):
            read_scored(thought)
        with pytest.raises(Unusable):
            read_scored(f"{thought}{closing}\n{opening} Again: {TWO}")


def test_a_tag_in_a_string_of_the_answer_is_text():
    said = json.dumps({"reason": "The wall says </think> and <think>.", "score": 3})
    assert read_scored(said) == (3, "The wall says </think> and <think>.")
    assert read_scored(f"```json\n{said}\n```")[0] == 3
    assert read_scored(f"<think>{FIVE}</think>{said}") == (3, "The wall says </think> and <think>.")
    with pytest.raises(Unusable):
        read_scored(f"<think>{FIVE}</think>So: {said} That is all.")


@pytest.mark.parametrize("text", [
    f"## Draft\n{FIVE}\n## Final answer\n{TWO}", f"**Draft:** {FIVE}\n\n**Answer:** {TWO}",
    f"### Assessment\n{FIVE}\n### Revised\n{TWO}", f"{FIVE}\n**End of thinking**\n{TWO}",
    f"# Thoughts\n{FIVE}\n# JSON\n{TWO}", f"<notes>{FIVE}</notes><answer>{TWO}</answer>",
    f"# Draft\n{FIVE}\n# Final\nScore: 2",
])  # fmt: skip
def test_what_stands_under_the_heading_of_a_draft_is_none(text):
    assert read_scored(text)[0] == 2


@pytest.mark.parametrize("text", [f"## Draft\n{FIVE}", f"{FIVE}\n## Final answer\nSee above.", f"{FIVE} </notes>"])
def test_a_draft_alone_is_no_answer(text):
    with pytest.raises(Unusable):
        read_scored(text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (TWO, 2),
        (f"{TWO}\n{TWO}", 2),
        (f'{{"note": 1}} {TWO}', 2),
        (f"Use {{brackets}}, as in {{'score': 4}}. {TWO}", 2),
        (f'The form is {{"score": 1 to 5}}. {TWO}', 2),
        (f"{TWO}<|im_end|>", 2),
        (f"{TWO}</s>\n", 2),
        ('{"reason": "two\nlines", "score": "four"}', 4),
        ('{"score": "4 out of 5", "reason": "x"}', 4),
        ('{"score": 4, "max_score": 5, "reason": "x"}', 4),
        ('{"Score": 4, "Reason": "x"}', 4),
        ("On a scale of 1 to 5, the score is 4.", 4),
        ('{"score": 4, "scale": "1-5", "reason": "x"}', 4),
        ("Score: 4. The hat is there.", 4),
        ("**Score:** 4/5\nThe hat is there.", 4),
        ("I would say 3/5: the tail is missing.", 3),
        ("The score is four.", 4),
        ("Score: 4 because the hat is there. So 4/5.", 4),
        ("Overall score = 3.5 - good", 3.5),
        ("Score (1-5): 4", 4),
        ("It has a score of 4.", 4),
        ("Score: 4. One of two cups leans on the third of three books.", 4),
    ],
)
def test_scores_are_read_however_they_are_written(text, score):
    assert read_scored(text)[0] == score


@pytest.mark.parametrize(
    "text",
    [
        None, "", "  ", "<html>4</html>", "Lovely!", "null", "[4]", "{", '{"score": 4, "reason": "x"',
        f"{FIVE} Looking again: {TWO}",  # which one is meant
        f'{TWO} And then {{"score": 5, "rea',
        f'{TWO} No: {{"score": 5,}}',
        f'{{"draft": {FIVE}, "score": 2, "rea',
        f'[{FIVE}, {TWO}]',
        '{"score": 5, "score": 2, "reason": "x"}', '{"score": 5, "Score": 2, "reason": "x"}',
        '{"reason": "x", "score": 4, "also": {"a": 1, "a": 2}}',
        '{"score": "4/10", "reason": "x"}', '{"score": "4 of ten", "reason": "x"}', '{"score": "3-4", "reason": "x"}',
        '{"score": "not a 5/5", "reason": "x"}', '{"score": "80%", "reason": "x"}', '{"score": 7, "reason": "x"}',
        '{"score": 0, "reason": "x"}', '{"score": NaN, "reason": "x"}', '{"score": 1e999, "reason": "x"}',
        '{"score": true, "reason": "x"}', '{"score": null, "reason": "x"}', '{"score": [4], "reason": "x"}',
        '{"score": 4, "max_score": 10, "reason": "x"}', '{"score": 4, "scale": "1 to 10", "reason": "x"}',
        '{"score": 4, "reason": ""}', '{"score": 4}',
        "Score: 4/10. Most of it is missing.", "Score: 4 out of 10.", "Score: 4 of ten", "Score: 3-4.", "Score: 3 – 4.",
        "Score: 3 to 4.", "Score: 3 or 4", "Score: 80%", "Score: 4+", "Score (1-5): good", "This is not a 5/5.",
        "It isn't a 5/5.", "A score of less than 3.", "Between 3/5 and 4/5.", "I rate it 3/5, or 4/5.", "At most 4/5.",
        "Score: 7. Good.", "Score: 2, or score: 4.", "Score: 4. That makes 8/10.", "The scale goes from 1 to 5.",
        "Score: -4", "Score: 4.5.1", "The score is not 5.", "The highest score is 5.", "2024/5",
        "It could be 4/5.", "A score of 5 would need a hat.",
        "Score: 3 (out of 4)", "Score: 4 (out of 10)", "Score: 4 on a scale of 10", "Score: 4 on a 10-point scale",
        "The previous image had a score of 5.", '{"score": 4, "total": 10, "reason": "x"}',
        "Score: 4. The scale is 1 to 10.", "Score: 4 points of 10", "Score: 4 [of 10]", "Score: 4 (scale: 0-10)",
        "Score (0-10): 4",
        "Score: 4 images", "Score: 3 correct objects of the request.",
        "Score 1: 4", "Score: 4, maybe 5", "Score: 4?", "between 3 and 4", "Score: between 3 and 4", "7/10",
        '{"score": 4, "out of": 10, "reason": "x"}', '{"score": 4, "maxScore": 10, "reason": "x"}',
        '{"score": 4, "range": "1-10", "reason": "x"}', '{"score": "4.", "score ": 5, "reason": "x"}',
        '{"score": "between 3 and 4", "reason": "x"}', '{"score": "7/10", "reason": "x"}',
    ],
)  # fmt: skip
def test_what_is_no_clear_score_is_no_answer(text):
    with pytest.raises(Unusable):
        read_scored(text)


def test_other_keys_and_scales():
    assert read_scores('{"a": 9, "b": "7/10"}', ("a", "b"), 0, 10) == {"a": 9.0, "b": 7.0}
    assert read_score('{"step_score": 2.5}', "step_score") == 2.5
    assert read_score("step_score: 2 because", "step_score") == 2
    assert read_score('"step_score": 5.', "step_score") == 5
    assert as_score("ten", 0, 10) == 10 and as_score(0, 0, 1) == 0
    for call in (
        lambda: read_scores('{"a": 9}', ("a", "b"), 0, 10),
        lambda: read_scores('{"a": 9, "b": "7/5"}', ("a", "b"), 0, 10),
        lambda: read_score('{"other": 3}', "step_score"),
        lambda: as_score(2, 0, 1),
        lambda: check_scale({"score": 4, "Max": 10}),
        lambda: check_scale({"scale": "0-10"}),
    ):
        with pytest.raises(Unusable):
            call()


def test_control_tokens_do_not_enter_a_text():
    assert as_text(" The hat is there.<|im_end|>", "reason") == "The hat is there."
    assert as_text("A \ud800 half", "reason") == "A ? half"
    for text in ("The <|im_start|> is there", "<|im_end|>", "a </Evaluate> b", "  ", 4, None):
        with pytest.raises(Unusable):
            as_text(text, "reason")


def test_objects_texts_and_choices():
    assert read_object('x {"a": {"b": [1, {"c": 2}]}} y', ("a",)) == {"a": {"b": [1, {"c": 2}]}}
    assert as_choice("Prompt too-complex.", ["prompt_too_complex"], "cause") == "prompt_too_complex"
    assert answer_text("plain words") == "plain words"
    for call in (
        lambda: as_texts("one", "steps"),
        lambda: as_texts([], "steps"),
        lambda: as_texts(["a", 1], "steps"),
        lambda: as_choice(["x"], ["x"], "cause"),
        lambda: read_object("{" * 100_000, ("a",)),
        lambda: read_object('{"a": ' * 3000, ("a",)),
    ):
        with pytest.raises(Unusable):
            call()
