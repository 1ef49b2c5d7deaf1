"""Packed rows of answers, written out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.sampling.batch import Samples
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.training.answer_batches import bucket_of, pack_answers, packed_batch, passes
from ivr_jax.training.rl_options import RLOptions

PROMPTS = np.array([[11, 12, 13], [21, 22, 0]], np.int32)
ANSWERS = np.array([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9], [9, 0, 0, 0]], np.int32)  # two to each prompt


def rollout(group: int = 2) -> Rollout:
    lengths = (ANSWERS > 0).sum(1).astype(np.int32)
    samples = Samples(ANSWERS, ANSWERS + 50, np.zeros((4, 5), np.int32), -ANSWERS / 10, lengths)
    return Rollout(PROMPTS, np.array([3, 2], np.int32), samples, (None,) * 4, ("",) * 4, group)


def test_a_row_holds_a_prompt_once_and_its_last_token_before_every_answer():
    made = rollout()
    rows = pack_answers(made, np.array([0, 1, 2]), 15, shares_prompts=True)
    assert [row.groups for row in rows] == [{0: [0, 1], 1: [2]}] and rows[0].free == 0
    batch = packed_batch(made, np.arange(4.0, dtype=np.float32), rows, 2, 15, True, context_length=1)
    expected = {
        "tokens":    [11, 12, 13, 1, 2, 3, 13, 4, 5, 21, 22, 6, 7, 8, 9],
        "segments":  [1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 5, 5, 5, 5],
        "prefixes":  [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 4, 4, 4, 4, 4],
        "positions": [0, 1, 2, 3, 4, 5, 2, 3, 4, 0, 1, 2, 3, 4, 5],
        "rows":      [0, 0, 0, 51, 52, 53, 0, 54, 55, 0, 0, 56, 57, 58, 59],
        "mask":      [0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1],
        "advantages": [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 2, 2, 2, 2],
    }  # fmt: skip
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row, [0] * 15], err_msg=name)
    np.testing.assert_allclose(batch["old"][0, 3:6], [-0.1, -0.2, -0.3])


def test_without_sharing_a_segment_is_a_prompt_and_its_answer():
    made = rollout()
    rows = pack_answers(made, np.array([1, 3]), 8, shares_prompts=False)
    batch = packed_batch(made, np.zeros((4, 4), np.float32), rows, 1, 8, False)
    np.testing.assert_array_equal(batch["tokens"], [[11, 12, 13, 4, 5, 21, 22, 9]])
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1, 1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 4, 0, 1, 2]])
    assert "prefixes" not in batch


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_no_row_is_overfull_and_every_answer_is_in_one(shares_prompts):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 48).astype(np.int32)
    zeros = np.zeros((48, 60), np.int32)
    samples = Samples(zeros, zeros, zeros, zeros, lengths)
    made = Rollout(np.zeros((6, 20), np.int32), rng.integers(1, 20, 6), samples, (None,) * 48, ("",) * 48, 8)
    rows = pack_answers(made, np.arange(48), 100, shares_prompts)
    found = sorted(number for row in rows for numbers in row.groups.values() for number in numbers)
    assert found == list(range(48))
    for row in rows:
        times = {g: 1 if shares_prompts else len(n) for g, n in row.groups.items()}
        prompts = [(made.prompt_lengths[g] - 1) * count for g, count in times.items()]
        used = sum(prompts) + sum(lengths[n] + 1 for numbers in row.groups.values() for n in numbers)
        assert used + row.free == 100 and row.free >= 0
    assert len(rows) <= 1.15 * (100 * len(rows) - sum(row.free for row in rows)) / 100


def test_an_answer_that_no_bucket_holds_is_refused():
    assert bucket_of(100, (320, 128)) == 128
    with pytest.raises(UserError):
        bucket_of(321, (320, 128))


def test_answers_are_packed_where_rows_are_asked_for_and_guidance_has_no_passes():
    grammar = GrammarOptions(modes=("direct",), text_cap=2)
    options = RLOptions(grammar, 2, 4, 3, (16,), 64, packed_rows=2)
    guided = dataclasses.replace(options, sampling=SamplingOptions(guidance=2.0))
    plain = dataclasses.replace(options, packed_rows=0)
    assert options.packs and options.rows_option == "packed_rows"
    for other in (guided, plain):
        assert not other.packs and other.rows_option == "micro_batch"
    made, nothing = rollout(), np.zeros(4, np.float32)
    free = dataclasses.replace(made, unconditional=((made.prompts, made.prompt_lengths),))
    shapes = [
        next(passes(some, nothing, np.arange(4), how, False))["tokens"].shape
        for some, how in ((made, options), (free, guided), (made, plain))
    ]
    assert shapes == [(2, 16), (3, 16), (3, 16)]
    with pytest.raises(UserError) as caught:
        dataclasses.replace(options, packed_rows=-1)
    assert "packed_rows" in caught.value.what
