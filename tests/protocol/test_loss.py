"""The selective loss mask of every mode, with the token positions written out by hand.

One-cell-high images of two cells and one-byte texts make the lengths easy to check: a prompt "x" has 5 tokens
(BOS, system, x, ASSISTANT, BSS), an image 8 (BOI 1 * 2 IMG c c EOI), an evaluation 14 (<Evaluate>, four times axis
name, verdict, reason, and </Evaluate>), a reflection 6 (both parts with their two markers), a step 3.
"""

from __future__ import annotations

import numpy as np
import pytest
from answer_tokens import evaluation, micro, trajectory

from ivr_jax.protocol import codec
from ivr_jax.trajectory import Reflection, Round, Step

REFLECT, STEP = Reflection("a", "b"), Step("s")
TOKENIZER = micro()


def targets(causes, passed, sources=()) -> tuple[list[int], int]:
    """Positions of the targets, and the number of tokens."""
    answer = trajectory(causes, passed, sources)
    codes = {name: np.array([[0, 1]]) for name in (*sources, *answer.images)}
    encoded = codec.encode_trajectory(TOKENIZER, answer, codes)
    mask = encoded.loss_mask()
    assert mask.dtype == bool and mask.shape == encoded.tokens.shape
    return np.flatnonzero(mask).tolist(), len(mask)


def test_direct():
    """G1 at 5-12, E1 at 13-26, EOS at 27: all of them."""
    expected = [5, 6, 7, 8, 9, 10, 11, 12] + [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26] + [27]
    assert targets([], [True]) == (expected, 28)


def test_a_lone_image_that_failed_teaches_its_evaluation_only():
    """E1 at 13-26; neither G1 nor EOS."""
    assert targets([], [False]) == ([13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26], 28)


def test_references_shift_the_answer_and_carry_no_loss():
    """Two references of 8 tokens stand in the prompt: G1 at 21-28, E1 at 29-42, EOS at 43."""
    assert targets([], [True], ("p", "q")) == (list(range(21, 44)), 44)


def test_one_reflection():
    """G1 5-12 | E1 13-26, R1 27-32, G2 33-40, E2 41-54, EOS 55."""
    expected = [*range(13, 27), *range(27, 33), *range(33, 41), *range(41, 55), 55]
    assert targets([REFLECT], [False, True]) == (expected, 56)


def test_only_the_last_reflection_is_a_target():
    """G1 5-12, E1 13-26, R1 27-32, G2 33-40 | E2 41-54, R2 55-60, G3 61-68, E3 69-82, EOS 83."""
    assert targets([REFLECT] * 2, [False, False, True]) == ([*range(41, 84)], 84)
    """One more round is 28 tokens more: E3 69-82, R3 83-88, G4 89-96, E4 97-110, EOS 111."""
    assert targets([REFLECT] * 3, [False] * 3 + [True]) == ([*range(69, 112)], 112)


def test_a_last_reflection_that_failed_teaches_no_image_and_no_end():
    """E3 69-82 and R3 83-88, not G4 89-96, E4 97-110, not EOS 111."""
    assert targets([REFLECT] * 3, [False] * 4) == ([*range(69, 89), *range(97, 111)], 112)


def test_multi_step():
    """G1 5-12 | E1 13-26, S2 27-29, G2 30-37, E2 38-51, S3 52-54, G3 55-62, E3 63-76, EOS 77."""
    assert targets([STEP], [False, True]) == ([*range(13, 53)], 53)
    assert targets([STEP] * 2, [False, False, True]) == ([*range(13, 78)], 78)


@pytest.mark.parametrize(
    ("causes", "passed", "parts"),
    [
        ([], [True], "G1 E1"),
        ([], [False], "E1"),
        ([REFLECT], [False, True], "E1 R1 G2 E2"),
        ([REFLECT] * 3, [False, False, False, True], "E3 R3 G4 E4"),
        ([REFLECT] * 3, [False] * 4, "E3 R3 E4"),
        ([STEP], [False, True], "E1 S2 G2 E2"),
        ([STEP] * 5, [False] * 5 + [True], "E1 S2 G2 E2 S3 G3 E3 S4 G4 E4 S5 G5 E5 S6 G6 E6"),
    ],
)
def test_the_selected_parts_are_the_papers(causes, passed, parts):
    answer = trajectory(causes, passed)
    codes = {name: np.array([[0, 1]]) for name in answer.images}
    _, segments = codec.encode_answer(TOKENIZER, answer, codes)
    assert " ".join(s.name for s in segments if s.loss) == parts


def test_the_mode_decides_not_the_verdicts_of_single_axes():
    """One failed axis fails the image, so it is no target."""
    answer = trajectory([], [True])
    failed = type(answer)(answer.sample, (Round(None, "G1", evaluation([True, True, True, False])),))
    encoded = codec.encode_trajectory(TOKENIZER, failed, {"G1": np.array([[0, 1]])})
    assert np.flatnonzero(encoded.loss_mask()).tolist() == [*range(13, 27)]
