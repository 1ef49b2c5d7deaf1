"""The rollout engine draws what the plain sampler draws, whatever its slots, windows and order of arrival."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from unittest import mock

import jax
import numpy as np
import pytest
from plain_sampler import plain_sample
from tiny_model import CONFIG, TOKENIZER, noisy_params, prompts_of, requests

from ivr_jax.errors import UserError
from ivr_jax.models import backbone, decode_attention
from ivr_jax.protocol.grammar import ACCEPT, FREE, GRID, Grammar, GrammarOptions, advance, legal_row
from ivr_jax.sampling import decode_loop, slots, speculation
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, Samples, Usage, sample
from ivr_jax.sampling.engine import Engine, EngineOptions, pad_prompts
from ivr_jax.sampling.logits_processors import SamplingOptions

PARAMS = noisy_params()
GRAMMAR = Grammar(TOKENIZER, GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2))
SIZE, LENGTH, GROUP = (2, 2), 96, 4
KEYS = jax.random.split(jax.random.key(0), 24)
SOURCES, IMAGES = requests(6)
PROMPTS = pad_prompts(prompts_of(SOURCES, IMAGES), TOKENIZER.vocab.pad, 32)
NO_QUESTION = pad_prompts(prompts_of(SOURCES, IMAGES, unconditional=True), TOKENIZER.vocab.pad, 32)
NOTHING = pad_prompts(prompts_of(SOURCES, IMAGES, references=False), TOKENIZER.vocab.pad, 32)


def engine(options: SamplingOptions | None = None, others=(), length: int = LENGTH, **how) -> tuple[Samples, Usage]:
    options = RolloutOptions(length, options or SamplingOptions(), EngineOptions(**how), GROUP, SIZE)
    return sample(CONFIG, PARAMS, GRAMMAR, PromptBatch(*PROMPTS, tuple(others)), KEYS, options)


@functools.cache
def plain() -> Samples:
    return jax.tree.map(np.asarray, plain_sample(CONFIG, PARAMS, GRAMMAR, *PROMPTS, SIZE, KEYS, LENGTH, None, GROUP))


def assert_same(found: Samples, expected: Samples) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-5)
    for row, length in enumerate(expected.lengths):
        np.testing.assert_array_equal(found.rows[row, :length], expected.rows[row, :length])
        np.testing.assert_array_equal(found.nodes[row, : length + 1], expected.nodes[row, : length + 1])


ONE_BY_ONE = {"slots": 6, "window": 1, "refill": 0.17, "growth": 1, "shrink": False}  # every token a call of its own
AHEAD = {"slots": 6, "window": 7, "refill": 0.34, "growth": 1, "shrink": False}  # a group may arrive in two parts
MOVING = {"slots": 16, "window": 2, "refill": 0.1, "growth": 1.6}  # a cache that widens, slots that move together


@functools.cache
def drawn(*how: tuple[str, float]) -> tuple[Samples, Usage]:
    return engine(**dict(how))


@pytest.mark.parametrize("how", [ONE_BY_ONE, AHEAD, MOVING], ids=["one by one", "ahead", "moving"])
def test_the_same_tokens_as_one_padded_batch_in_lock_step(how):
    assert len(set(plain().lengths.tolist())) > 3  # answers of one and of two images
    found, usage = drawn(*how.items())
    assert_same(found, plain())
    assert usage.tokens == plain().lengths.sum() - 5 * len(KEYS)  # five forced ones, which the prefill reads


@pytest.mark.parametrize("most", [0, 1 << 30], ids=["stacked", "apart"])
def test_layers_in_arrays_of_their_own_sample_as_stacked_ones_do(monkeypatch, most):
    taken = mock.Mock(side_effect=backbone.unstack_layers)
    monkeypatch.setattr(decode_loop.backbone, "unstack_layers", taken)
    monkeypatch.setattr(decode_loop, "UNSTACK_BYTES", most)
    config = dataclasses.replace(CONFIG, unroll=2, remat="dots" if most else "none")  # programs of their own
    options = RolloutOptions(LENGTH, engine=EngineOptions(**AHEAD), group_size=GROUP, size=SIZE)
    found, _ = sample(config, PARAMS, GRAMMAR, PromptBatch(*PROMPTS), KEYS, options)
    assert_same(found, plain())
    assert taken.called == (most > 0)


def test_speculation_draws_the_same_tokens_in_fewer_calls():
    found, usage = drawn(*{**AHEAD, "window": 4, "speculate": True}.items())
    assert_same(found, plain())
    visual = plain().tokens >= TOKENIZER.vocab.visual_start
    assert usage.image_tokens == visual.sum()
    assert usage.image_calls < usage.image_tokens
    assert 0 < usage.accepted < usage.drafted
    assert usage.metrics()["draft_acceptance"] == (usage.accepted, usage.drafted)
    assert "draft_acceptance" not in drawn(*AHEAD.items())[1].metrics()


def test_an_image_like_the_one_before_takes_one_call():
    """A model that says one code everywhere, and a prompt whose last image consists of it: no guess is wrong."""
    code = TOKENIZER.vocab.visual_start + 2
    prompt = np.append(PROMPTS[0][0, : PROMPTS[1][0]], [code] * 4).astype(np.int32)
    head = np.zeros_like(PARAMS["lm_head"])
    head[0, code] = 5
    args = CONFIG, {**PARAMS, "lm_head": head}, Grammar(TOKENIZER, GrammarOptions(modes=("direct",)))
    how = EngineOptions(2, window=8, speculate=True)
    options = RolloutOptions(11, SamplingOptions(temperature=0.0), how, size=SIZE)  # up to the image's end
    found, usage = sample(*args, PromptBatch(prompt[None], np.array([len(prompt)])), KEYS[:1], options)
    assert (found.tokens == code).sum() == 4
    assert (usage.calls, usage.drafted, usage.accepted) == (1, 4, 4)


def test_guesses_come_from_the_image_before_else_from_the_rows_above():
    """A 2 x 3 image with two cells drawn: the cell itself, then above, then the last one drawn, then the first code."""
    nothing = np.full(6, -1)
    reference = np.array([[14, 12, -1, -1, -1, -1], [14, 12, 20, 21, 22, 23], nothing], np.int32)
    cells = np.array([[2, 3, 4, 5]] * 2 + [[0, 1, 2, -1]], np.int32)
    held = mock.Mock(guesses=mock.Mock(reference=reference), state=mock.Mock(width=np.full(3, 3)))
    guesses = speculation._from_reference(held, cells, 10)
    np.testing.assert_array_equal(guesses[:2], [[12, 14, 12, 12], [20, 21, 22, 23]])
    np.testing.assert_array_equal(guesses[2, :3], [10, 10, 10])


def calls_of_greedy_refilling(lengths: np.ndarray, slots: int) -> int:
    """Model calls when every slot that falls free takes the next answer at once, one token a call."""
    free_at = [0] * slots
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + int(length))
    return max(free_at)


def test_slots_are_kept_busy_and_forced_tokens_cost_no_call():
    (_, one), (_, ahead) = drawn(*ONE_BY_ONE.items()), drawn(*AHEAD.items())
    lock_step = plain().lengths.sum() / (len(KEYS) * plain().lengths.max())
    assert one.utilisation > lock_step + 0.1
    assert one.calls == calls_of_greedy_refilling(plain().lengths - 5, slots=6)  # 5 are forced
    assert one.queued_in_use == one.queued_slot_calls > 0  # while answers wait no slot is empty
    assert one.metrics()["slot_utilisation_queued"] == (one.queued_in_use, one.queued_slot_calls)
    assert one.in_use == one.tokens  # one call a token
    forced = slots.rules_of(GRAMMAR).forced
    choices = sum((forced[plain().rows[row, :length]] < 0).sum() for row, length in enumerate(plain().lengths))
    assert ahead.in_use == choices  # one call a token that the model chooses


def test_a_prompt_is_read_once_for_all_answers_to_it():
    for how in (ONE_BY_ONE, AHEAD, MOVING):
        assert drawn(*how.items())[1].prompts == len(SOURCES) == len(KEYS) / GROUP


def test_forced_ids_are_those_that_the_grammar_leaves_alone():
    forced, tables = slots.rules_of(GRAMMAR).forced, GRAMMAR.tables
    legal = tables.legal[:, tables.class_of]
    for row, ids in enumerate(legal):
        assert forced[row] == (np.flatnonzero(ids)[0] if ids.sum() == 1 else -1)
    assert (forced >= 0).sum() > 20


def test_three_way_guidance_and_truncation_are_the_plain_ones():
    options = SamplingOptions(guidance=2.0, image_guidance=1.5, text_top_k=4, image_top_p=0.9)
    others = (NO_QUESTION, NOTHING)
    expected = plain_sample(CONFIG, PARAMS, GRAMMAR, *PROMPTS, SIZE, KEYS, LENGTH, options, GROUP, others)
    expected = jax.tree.map(np.asarray, expected)
    found, _ = engine(options, others, slots=8, growth=1, shrink=False)
    assert_same(found, expected)
    legal = np.unpackbits(found.kept, axis=-1, count=CONFIG.vocab_size).astype(bool)
    legal &= GRAMMAR.tables.legal[found.rows][..., GRAMMAR.tables.class_of]
    for row, length in enumerate(expected.lengths):  # what a trainer makes of the record
        want = np.unpackbits(expected.kept[row, :length], axis=-1, count=CONFIG.vocab_size).astype(bool)
        np.testing.assert_array_equal(legal[row, :length], want)


def test_an_image_that_no_longer_fits_is_not_begun():
    """Answers are cut in a text or before the cells of an image, never within them."""
    length = 45
    found, _ = engine(length=length, **ONE_BY_ONE)
    tables, cut = GRAMMAR.tables, set()
    for row, answered in enumerate(found.lengths):
        np.testing.assert_array_equal(found.tokens[row, :answered], plain().tokens[row, :answered])
        state = GRAMMAR.initial(np.array([2]), np.array([2]))
        for token in found.tokens[row, :answered]:
            state = advance(tables, state, np.array([token]), np)
        if state.node[0] == ACCEPT:
            continue
        cut.add(bool(tables.kind[state.node[0]] == GRID))
        if tables.kind[state.node[0]] == GRID:
            assert (state.rows_left, state.cells_left) == (2, 2) and answered + 6 > length >= answered
        else:
            assert answered == length
    assert cut


def test_a_size_that_the_model_chooses_draws_the_same_too():
    grammar = Grammar(TOKENIZER, GrammarOptions(modes=("interleaved",), text_cap=4))
    head = np.array(PARAMS["lm_head"])
    ends = [TOKENIZER.vocab.boi, TOKENIZER.vocab.eos]
    head[:, ends] *= 0.3
    head[0, [ord("1"), ord("0"), *ends]] = 40, 50, 0, 0
    args = CONFIG, {**PARAMS, "lm_head": head}, grammar
    expected = plain_sample(*args, *PROMPTS, FREE, KEYS[:6], 150)
    options = RolloutOptions(150, engine=EngineOptions(slots=4, growth=1), size=FREE)
    found, usage = sample(*args, PromptBatch(*PROMPTS), KEYS[:6], options)
    assert usage.calls > 0 and found.lengths.min() < 150
    for row, length in enumerate(found.lengths):
        np.testing.assert_array_equal(found.tokens[row, :length], np.asarray(expected.tokens)[row, :length])


def test_replay_reads_what_the_grammar_reads():
    tokens, state = plain().tokens, GRAMMAR.initial(np.full(24, 2), np.full(24, 2))
    rows, nodes = map(np.asarray, slots.replay(GRAMMAR.tables, state, tokens))
    for t in range(40):
        np.testing.assert_array_equal(rows[:, t], legal_row(GRAMMAR.tables, state, np))
        np.testing.assert_array_equal(nodes[:, t], state.node)
        state = advance(GRAMMAR.tables, state, tokens[:, t], np)


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"window": 0}, {"refill": 0.0}, {"growth": 0.5}])
def test_engine_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        EngineOptions(**wrong)


@pytest.mark.parametrize(("kernel", "expected"), [("plain", [128, 192, 320]), ("pallas", [128, 384, 384])])
def test_caches_are_as_wide_as_the_decode_kernel_needs(kernel, expected):
    config = dataclasses.replace(CONFIG, decode_kernel=kernel)
    made = Engine(config, PARAMS, GRAMMAR, SamplingOptions(), EngineOptions(), length=LENGTH, widest=300)
    widths = [0]
    for needed in (100, 129, 193):
        widths.append(made._wide(widths[-1], needed))
    assert widths[1:] == expected
    assert all(decode_attention.fits(wide, 2) for wide in expected) == (kernel == "pallas")
