"""Sampling: it draws from the distribution it reports, and that is the one that teacher forcing computes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import scipy.stats
from tiny_model import (
    CONFIG,
    TOKENIZER,
    answer_logits,
    legal_mask,
    log_softmax,
    noisy_params,
    prompts_of,
    requests,
    system,
)

from ivr_jax.errors import UserError
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import ACCEPT, VISUAL, Grammar, GrammarOptions, Tables
from ivr_jax.sampling.chain import SamplingOptions, draw, log_probabilities
from ivr_jax.sampling.rollout import draw_first_images, roll_out
from ivr_jax.sampling.sampler import Samples, pad_prompts, sample
from ivr_jax.trajectory import Mode

PARAMS = noisy_params()
GRAMMAR = Grammar(TOKENIZER, GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2))
SIZE = (2, 2)
LENGTH = 96  # an answer is at most 11 + 22 + 8 + 11 + 22 + 1 tokens


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def sampled(prompts: list[list[int]], draws, group: int = 1, free: list[list[int]] | None = None, **options) -> Samples:
    padded, lengths = pad_prompts(prompts, TOKENIZER.vocab.pad, 32)
    unconditional = None if free is None else pad_prompts(free, TOKENIZER.vocab.pad, 32)
    found = sample(CONFIG, PARAMS, GRAMMAR, padded, lengths, SIZE, draws, LENGTH, SamplingOptions(**options), group,
                   unconditional)  # fmt: skip
    return Samples(*map(np.asarray, found))


PROMPTS = prompts_of(*requests(3))


@functools.cache
def group_of_four() -> Samples:
    """Four answers to each of three prompts of different lengths."""
    return sampled(PROMPTS, keys(12), group=4)


def answers(samples: Samples):
    return [samples.tokens[row, : samples.lengths[row]] for row in range(len(samples.lengths))]


def test_reported_log_probabilities_are_those_of_teacher_forcing():
    drawn = group_of_four()
    assert len(set(drawn.lengths.tolist())) > 1  # rows end at different times
    for row, answer in enumerate(answers(drawn)):
        scores = answer_logits(PARAMS, PROMPTS[row // 4], answer)
        masked = np.where(legal_mask(GRAMMAR, answer, SIZE), scores, -np.inf)
        expected = np.take_along_axis(log_softmax(masked), answer[:, None], 1)[:, 0]
        np.testing.assert_allclose(drawn.log_probs[row, : len(answer)], expected, atol=1e-4)
        assert not drawn.log_probs[row, len(answer) :].any()
        assert (drawn.tokens[row, len(answer) :] == TOKENIZER.vocab.pad).all()


def test_every_sampled_answer_is_one_and_the_recorded_nodes_parse_it():
    drawn, (samples, _), modes = group_of_four(), requests(3), set()
    replayed = GRAMMAR.run(drawn.tokens, np.full(12, 2), np.full(12, 2))
    for row, answer in enumerate(answers(drawn)):
        np.testing.assert_array_equal(drawn.nodes[row, : len(answer) + 1], replayed[row, : len(answer) + 1])
        assert drawn.nodes[row, len(answer)] == ACCEPT and answer[-1] == TOKENIZER.vocab.eos
        parsed = codec.parse_answer(GRAMMAR, samples[row // 4], answer, drawn.nodes[row, : len(answer) + 1])
        modes.add(parsed.trajectory.mode)
    assert modes == {Mode.DIRECT, Mode.REFLECTION}


def test_a_row_does_not_depend_on_its_neighbours_nor_on_a_shared_prefill():
    together = group_of_four()
    alone = sampled([p for p in PROMPTS for _ in range(4)], keys(12))
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    np.testing.assert_allclose(alone.log_probs, together.log_probs, atol=1e-5)
    order = np.array([2, 0, 1])
    shuffled = sampled([PROMPTS[i] for i in order], keys(12).reshape(3, 4)[order].reshape(12), group=4)
    np.testing.assert_array_equal(shuffled.tokens.reshape(3, 4, -1), together.tokens.reshape(3, 4, -1)[order])
    np.testing.assert_array_equal(shuffled.lengths.reshape(3, 4), together.lengths.reshape(3, 4)[order])


def test_the_same_keys_draw_the_same_and_others_do_not():
    again, other = sampled(PROMPTS, keys(12), group=4), sampled(PROMPTS, keys(12, seed=1), group=4)
    np.testing.assert_array_equal(again.tokens, group_of_four().tokens)
    assert (other.tokens != again.tokens).any(1).all()


def test_greedy_takes_the_likeliest_legal_id():
    drawn = sampled(PROMPTS, keys(3), temperature=0.0)
    for prompt, answer in zip(PROMPTS, answers(drawn), strict=True):
        masked = np.where(legal_mask(GRAMMAR, answer, SIZE), answer_logits(PARAMS, prompt, answer), -np.inf)
        np.testing.assert_array_equal(masked.argmax(1), answer)


def test_guidance_in_one_batch_equals_two_passes():
    samples, images = requests(2, sources=1)
    prompts, free = prompts_of(samples, images), prompts_of(samples, images, unconditional=True)
    drawn = sampled(prompts, keys(4), group=2, free=free, guidance=3.0)
    assert len(prompts[0]) != len(free[0])
    for row, answer in enumerate(answers(drawn)):
        legal = legal_mask(GRAMMAR, answer, SIZE)
        visual = legal[:, TOKENIZER.vocab.visual_start]
        conditional, unconditional = (
            log_softmax(answer_logits(PARAMS, given[row // 2], answer)) for given in (prompts, free)
        )
        guided = unconditional + 3.0 * (conditional - unconditional)
        masked = np.where(legal, np.where(visual[:, None], guided, conditional), -np.inf)
        expected = np.take_along_axis(log_softmax(masked), answer[:, None], 1)[:, 0]
        np.testing.assert_allclose(drawn.log_probs[row, : len(answer)], expected, atol=1e-4)
    with pytest.raises(ValueError, match="unconditional"):
        sampled(prompts, keys(2), guidance=3.0)


def test_frequencies_follow_the_exact_probabilities():
    """The joint of the first two visual tokens (4 x 4 outcomes) in 4000 draws, by Pearson's chi-square."""
    count, forced = 4000, codec.encode_image(TOKENIZER, np.zeros(SIZE, np.int32))[:5]
    padded, lengths = pad_prompts(PROMPTS[:1], TOKENIZER.vocab.pad, 32)
    warm = SamplingOptions(temperature=1.5)
    drawn = sample(CONFIG, PARAMS, GRAMMAR, padded, lengths, SIZE, keys(count), 7, warm, count)
    tokens = np.asarray(drawn.tokens)
    assert (tokens[:, :5] == forced).all()
    first = TOKENIZER.vocab.visual_start
    visual = slice(first, first + 4)

    def next_visual(answer: list[int]) -> np.ndarray:
        scores = answer_logits(PARAMS, PROMPTS[0], np.array([*answer, 0]))[-1, visual]
        return np.exp(log_softmax(scores / 1.5))

    start = next_visual(forced)
    joint = np.concatenate([start[i] * next_visual([*forced, first + i]) for i in range(4)])
    observed = np.bincount((tokens[:, 5] - first) * 4 + tokens[:, 6] - first, minlength=16)
    kept = joint * count >= 5
    assert kept.sum() >= 6 and observed.sum() == count
    pooled = [np.append(x[kept], x[~kept].sum()) for x in (observed, joint * count)]
    pooled = [x[pooled[1] > 0] for x in pooled]
    assert scipy.stats.chisquare(*pooled).pvalue > 1e-3


def test_what_does_not_fit_the_context_is_refused():
    padded, lengths = pad_prompts(PROMPTS, TOKENIZER.vocab.pad)
    with pytest.raises(UserError, match="do not fit a context of 256"):
        sample(CONFIG, PARAMS, GRAMMAR, padded, lengths, SIZE, keys(3), 250)


def test_prompts_are_padded_on_the_right_to_a_multiple():
    padded, lengths = pad_prompts([[1, 2, 3], [4]], 9, multiple=4)
    assert padded.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]] and lengths.tolist() == [3, 1]
    assert padded.dtype == lengths.dtype == np.int32


# -- the distribution -------------------------------------------------------------------------------------------------


def plain_reference(logits, legal, visual, options: SamplingOptions) -> np.ndarray:
    """One position at a time: mask, temperature, top-k, top-p over sorted probabilities; float64 [positions, V]."""
    rows = []
    for scores, allowed, is_visual in zip(logits.astype(np.float64), legal, visual, strict=True):
        top_k = options.image_top_k if is_visual else options.text_top_k
        top_p = options.image_top_p if is_visual else options.text_top_p
        ids = [int(i) for i in np.argsort(-scores) if allowed[i]]
        probabilities = np.exp(log_softmax(scores[ids] / options.temperature))
        if top_k:
            ids, probabilities = ids[:top_k], probabilities[:top_k]
            probabilities = probabilities / probabilities.sum()
        count = 1
        while probabilities[:count].sum() < top_p - 1e-12 and count < len(ids):
            count += 1
        row = np.zeros(len(scores))
        row[ids[:count]] = probabilities[:count] / probabilities[:count].sum()
        rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.5),
        SamplingOptions(text_top_k=3, image_top_k=2),
        SamplingOptions(image_top_k=1),
        SamplingOptions(text_top_p=0.5, image_top_p=0.7),
        SamplingOptions(text_top_p=0.9),
        SamplingOptions(temperature=0.7, text_top_k=5, image_top_k=3, text_top_p=0.6, image_top_p=0.8),
        SamplingOptions(text_top_k=10_000, image_top_k=10_000),
    ],
    ids=str,
)
def test_the_chain_equals_a_plain_reference(options):
    """At a text, a visual, and a forced position of the grammar."""
    text_row = next(i for i, row in enumerate(GRAMMAR.tables.legal) if row[1] and not row[VISUAL])
    visual_row = next(i for i, row in enumerate(GRAMMAR.tables.legal) if row[VISUAL])
    rows = np.array([text_row, visual_row, GRAMMAR.start] * 4, np.int32)
    logits = np.random.default_rng(0).normal(0, 2, (12, CONFIG.vocab_size)).astype(np.float32)
    legal = GRAMMAR.tables.legal[rows][:, GRAMMAR.tables.class_of]
    found = np.exp(np.asarray(log_probabilities(logits, Tables(*GRAMMAR.tables), rows, options)))
    np.testing.assert_allclose(found, plain_reference(logits, legal, legal[:, -1], options), atol=2e-6)
    assert found[2].max() == 1.0


def test_a_draw_is_one_of_the_kept_ids():
    scores = np.log(np.array([[0.5, 0.5, 1e-30], [1e-30, 1e-30, 1.0]], np.float32))
    found = [np.asarray(draw(scores, keys(2, seed), SamplingOptions())) for seed in range(20)]
    assert {int(f[0]) for f in found} == {0, 1} and {int(f[1]) for f in found} == {2}


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"text_top_p": 0.0}, {"image_top_p": 1.1}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="out of range"):
        SamplingOptions(**wrong)


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_returns_parsed_answers_with_their_pixels_and_says_why_one_is_missing():
    samples, images = requests(2, sources=1)
    free = Grammar(TOKENIZER, GrammarOptions(modes=("direct",), text_cap=2))
    strict = Grammar(TOKENIZER, GrammarOptions(modes=("reflection",), max_reflections=1, text_cap=2))
    found = roll_out(system(PARAMS), free, samples, images, jax.random.key(0), 48, group=4, strict=strict)
    short = roll_out(system(PARAMS), free, samples, images, jax.random.key(0), 20, group=4)
    passes = TOKENIZER.marker("pass: ")[0]
    for row, (answer, error) in enumerate(zip(found.answers, found.errors, strict=True)):
        spoken = found.answer_tokens(row)
        if (spoken == passes).sum() == 4:  # ends on pass, which both grammars allow
            assert error == "" and answer.trajectory.sample == samples[row // 4]
            (name,) = answer.trajectory.images
            assert answer.images[name].shape == (32, 32, 3) and set(images[row // 4]) <= set(answer.images)
            codes = system(PARAMS).codec.encode([answer.images[name]])[0]
            assert codec.encode_image(TOKENIZER, codes) == spoken[:11].tolist()
        else:  # ends on fail, where the strict one would go on
            assert answer is None and "does not go on as its verdict says" in error
    assert 0 < sum(answer is None for answer in found.answers) < 8  # both happen here
    assert short.answers == (None,) * 8 and all("at token 20 of 20" in error for error in short.errors)
    assert found.total_lengths.tolist() == [len(found.prompt(r)) + len(found.answer_tokens(r)) for r in range(8)]


def test_first_images_are_those_that_the_answers_would_begin_with():
    samples, images = requests(2)
    greedy, key = SamplingOptions(temperature=0.0), jax.random.key(3)
    drawn = draw_first_images(system(PARAMS), samples, images, key, greedy)
    whole = roll_out(system(PARAMS), GRAMMAR, samples, images, key, LENGTH, greedy)
    for image, answer in zip(drawn, whole.answers, strict=True):
        np.testing.assert_array_equal(image, answer.images[answer.trajectory.images[0]])


def test_requests_for_different_sizes_need_separate_batches():
    samples, images = requests(2, sources=1)
    images[1] = {name: np.zeros((16, 32, 3), np.uint8) for name in images[1]}
    with pytest.raises(UserError, match="different sizes"):
        roll_out(system(PARAMS), GRAMMAR, samples, images, jax.random.key(0), 32)
