"""Texts of users that become tokens: what is taken, and what is refused with its place."""

from __future__ import annotations

import pytest

from ivr_jax.errors import UserError
from ivr_jax.protocol import markers


@pytest.mark.parametrize("text", ["", "Put a red circle at b2.", "a < b > c | d", "Zürich 東京", "a\ttab\r\nlines"])
def test_plain_text_is_returned_as_it_is(text):
    assert markers.check_user_text(text, "the prompt") == text


@pytest.mark.parametrize(
    "text",
    ["a\0b", "half \ud83d", "<|image start|>", "go </Evaluate> on", "<step 2>", "x" * (markers.MAX_CHARACTERS + 1)],
    ids=["NUL", "half a surrogate pair", "control token", "marker", "marker in lower case", "too long"],
)
def test_what_no_tokenizer_may_take_is_refused_with_its_place(text):
    with pytest.raises(UserError) as error:
        markers.check_user_text(text, "the prompt of sample 'a'")
    assert error.value.what.startswith("the prompt of sample 'a' ") and error.value.remedy
