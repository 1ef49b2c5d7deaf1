"""Sampling: it draws from the distribution it reports, and that is the one that teacher forcing computes."""

from __future__ import annotations

import dataclasses
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
from ivr_jax.protocol.grammar import ACCEPT, FREE, VISUAL, Grammar, GrammarOptions, Tables
from ivr_jax.protocol.interleaved import parse_interleaved
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, Samples, sample
from ivr_jax.sampling.engine import EngineOptions, pad_prompts
from ivr_jax.sampling.logits_processors import (
    MASKED,
    Context,
    GrammarMask,
    SamplingOptions,
    TopK,
    TopP,
    log_probabilities,
    sample_ids,
)
from ivr_jax.sampling.rollout import draw_first_images, roll_out
from ivr_jax.trajectory import Mode

PARAMS = noisy_params()
GRAMMAR = Grammar(TOKENIZER, GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2))
SIZE = (2, 2)
FLAT = EngineOptions(growth=1, shrink=False)  # one program to compile; the engine's own tests vary it
LENGTH = 96  # an answer is at most 11 + 22 + 8 + 11 + 22 + 1 tokens


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def sampled(prompts: list[list[int]], draws, group_size: int = 1, others: tuple = (), **options) -> Samples:
    padded, lengths = pad_prompts(prompts, TOKENIZER.vocab.pad, 32)
    unconditional = tuple(pad_prompts(other, TOKENIZER.vocab.pad, 32) for other in others)
    how = RolloutOptions(LENGTH, SamplingOptions(**options), FLAT, group_size, SIZE)
    return sample(CONFIG, PARAMS, GRAMMAR, PromptBatch(padded, lengths, unconditional), draws, how)[0]


PROMPTS = prompts_of(*requests(3))


@functools.cache
def group_of_four() -> Samples:
    """Four answers to each of three prompts of different lengths."""
    return sampled(PROMPTS, keys(12), group_size=4)


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
    shuffled = sampled([PROMPTS[i] for i in order], keys(12).reshape(3, 4)[order].reshape(12), group_size=4)
    np.testing.assert_array_equal(shuffled.tokens.reshape(3, 4, -1), together.tokens.reshape(3, 4, -1)[order])
    np.testing.assert_array_equal(shuffled.lengths.reshape(3, 4), together.lengths.reshape(3, 4)[order])


def test_the_same_keys_draw_the_same_and_others_do_not():
    again, other = sampled(PROMPTS, keys(12), group_size=4), sampled(PROMPTS, keys(12, seed=1), group_size=4)
    np.testing.assert_array_equal(again.tokens, group_of_four().tokens)
    assert (other.tokens != again.tokens).any(1).all()


def test_greedy_takes_the_likeliest_legal_id():
    drawn = sampled(PROMPTS, keys(3), temperature=0.0)
    for prompt, answer in zip(PROMPTS, answers(drawn), strict=True):
        masked = np.where(legal_mask(GRAMMAR, answer, SIZE), answer_logits(PARAMS, prompt, answer), -np.inf)
        np.testing.assert_array_equal(masked.argmax(1), answer)


GUIDED = requests(2, sources=1)
PASSES = tuple(prompts_of(*GUIDED, **without) for without in ({}, {"unconditional": True}, {"references": False}))
FULL_CHAIN = {
    "temperature": 0.8, "image_temperature": 1.7, "text_top_k": 12, "image_top_k": 3, "text_top_p": 0.9,
    "image_top_p": 0.95, "guidance": 2.5, "image_guidance": 1.5,
}  # fmt: skip


def plain_chain(answer, row: int, options: SamplingOptions) -> np.ndarray:
    """float64 [A, V] probabilities: one pass after the other, no cache, no batch, one position at a time."""
    legal = legal_mask(GRAMMAR, answer, SIZE)
    visual = legal[:, TOKENIZER.vocab.visual_start]
    with_all, references, nothing = (answer_logits(PARAMS, passes[row], np.array(answer)) for passes in PASSES)
    scores = with_all.copy()
    for t in np.flatnonzero(visual):
        c, n, a = (log_softmax(x[t]) for x in (with_all, references, nothing))
        if options.image_guidance is None:
            scores[t] = n + options.guidance * (c - n)
        else:
            scores[t] = a + options.image_guidance * (n - a) + options.guidance * (c - n)
    return plain_reference(scores, legal, visual, options)


def test_unconditional_prompts_drop_task_and_question_and_then_the_references():
    for given, references, nothing in zip(*PASSES, strict=True):
        image = codec.encode_image(TOKENIZER, np.zeros((2, 2), np.int32))
        blocks = [sum(token == TOKENIZER.vocab.boi for token in prompt) for prompt in (given, references, nothing)]
        assert blocks == [1, 1, 0] and len(given) > len(references) == len(nothing) + len(image)


@pytest.mark.parametrize("options", [{"guidance": 3.0}, {"guidance": 1.0, "image_guidance": 0.5}, FULL_CHAIN], ids=str)
def test_the_chain_in_one_batch_equals_separate_unbatched_passes(options):
    chosen = SamplingOptions(**options)
    drawn = sampled(PASSES[0], keys(4), 2, PASSES[1 : 1 + chosen.passes], **options)
    for row, answer in enumerate(answers(drawn)):
        expected = plain_chain(answer, row // 2, chosen)[np.arange(len(answer)), answer]
        np.testing.assert_allclose(np.exp(drawn.log_probs[row, : len(answer)]), expected, atol=1e-4)
        parsed = codec.parse_answer(GRAMMAR, GUIDED[0][row // 2], answer)
        assert all(grid.shape == SIZE for grid in parsed.codes.values())


@pytest.mark.parametrize("image_guidance", [None, 1.5])
def test_greedy_with_guidance_is_the_plain_references_answer(image_guidance):
    """Each token is the reference's likeliest after the same tokens, so the whole answers are identical."""
    options = {"temperature": 0.0, "guidance": 3.0, "image_guidance": image_guidance}
    passes = SamplingOptions(**options).passes
    drawn = sampled(PASSES[0], keys(2), 1, PASSES[1 : 1 + passes], **options)
    assert not drawn.log_probs.any()  # the likeliest id has all the probability
    for row, answer in enumerate(answers(drawn)):
        expected = plain_chain(answer, row, SamplingOptions(**options | {"temperature": 1.0}))
        np.testing.assert_array_equal(expected.argmax(1), answer)


def test_greedy_text_may_go_with_sampled_images():
    drawn = sampled(PROMPTS[:1], keys(16), group_size=16, temperature=0.0, image_temperature=1.0)
    first = [answer[5:10] for answer in answers(drawn)]  # the first grid
    assert len({tuple(grid) for grid in first}) > 1
    for answer in answers(drawn)[:4]:
        legal = legal_mask(GRAMMAR, answer, SIZE)
        likeliest = np.where(legal, answer_logits(PARAMS, PROMPTS[0], answer), -np.inf).argmax(1)
        text = ~legal[:, TOKENIZER.vocab.visual_start]
        np.testing.assert_array_equal(likeliest[text], answer[text])


@pytest.mark.parametrize(("options", "passes"), [({"guidance": 3.0}, ()), ({"image_guidance": 2.0}, PASSES[1:2])])
def test_guidance_without_its_unconditional_prompts_is_refused(options, passes):
    with pytest.raises(ValueError):
        sampled(PASSES[0], keys(2), 1, passes, **options)


def test_a_switched_off_processor_is_not_in_the_chain():
    names = [type(processor).__name__ for processor in SamplingOptions(**FULL_CHAIN).chain]
    assert names == ["Guidance", "GrammarMask", "Temperature", "TopK", "TopP"]
    assert SamplingOptions().chain == (GrammarMask(),) == SamplingOptions(image_guidance=1.0).chain


@functools.cache
def free_sized() -> Samples:
    """Interleaved answers of a size that the model chooses, with and without an end."""
    grammar = Grammar(TOKENIZER, GrammarOptions(modes=("interleaved",), text_cap=4))
    prompts, lengths = pad_prompts(PROMPTS[:1], TOKENIZER.vocab.pad, 32)
    vocab, head = TOKENIZER.vocab, np.array(PARAMS["lm_head"])
    head[:, [vocab.boi, vocab.eos]] *= 0.3
    head[0, [ord("1"), ord("0"), vocab.boi, vocab.eos]] = 40, 50, 0, 0  # images of about 10 x 10 cells
    params = {**PARAMS, "lm_head": head}
    options = RolloutOptions(200, engine=FLAT, group_size=64, size=FREE)
    return sample(CONFIG, params, grammar, PromptBatch(prompts, lengths), keys(64), options)[0]


def test_a_free_size_is_two_digits_a_side_and_every_image_block_parses():
    drawn, blocks, finished = free_sized(), 0, 0
    for row, answer in enumerate(answers(drawn)):
        parts, ended = parse_interleaved(TOKENIZER, answer)
        assert ended == (drawn.nodes[row, len(answer)] == ACCEPT)
        finished += ended
        shapes = [part.codes.shape for part in parts if part.kind == "image"]
        blocks += len(shapes)
        assert all(10 <= side <= 99 for shape in shapes for side in shape) and len(set(shapes)) <= 1
        for place in np.flatnonzero(answer[:-6] == TOKENIZER.vocab.boi):
            digits = TOKENIZER.decode(answer[place + 1 : place + 6])
            assert digits[2] == "*" and "0" not in (digits[0], digits[3]) and answer[place + 6] == TOKENIZER.vocab.img
    assert blocks > 0 and 0 < finished < 64


@pytest.mark.parametrize(
    "options, how",
    [({"temperature": 1.5}, {}), (FULL_CHAIN, {}), ({"temperature": 1.5}, {"speculate": True, "window": 4})],
    ids=["temperature", "full chain", "speculation"],
)
def test_frequencies_follow_the_exact_probabilities(options, how):
    """The joint of the first two visual tokens (4 x 4 outcomes) in 4000 draws, by Pearson's chi-square."""
    chosen, count = SamplingOptions(**options), 4000
    forced = codec.encode_image(TOKENIZER, np.zeros(SIZE, np.int32))[:5]
    padded, *others = (pad_prompts(passes[:1], TOKENIZER.vocab.pad, 32) for passes in PASSES[: 1 + chosen.passes])
    wide = dataclasses.replace(FLAT, slots=4096, **how)
    rollout = RolloutOptions(11, chosen, wide, count, SIZE)
    drawn, usage = sample(CONFIG, PARAMS, GRAMMAR, PromptBatch(*padded, tuple(others)), keys(count), rollout)
    tokens = drawn.tokens
    assert not how or 0 < usage.accepted < usage.drafted
    assert (tokens[:, :5] == forced).all()
    first = TOKENIZER.vocab.visual_start

    def next_visual(answer: list[int]) -> np.ndarray:
        return plain_chain([*answer, first], 0, chosen)[-1, first : first + 4]

    start = next_visual(forced)
    joint = np.concatenate([start[i] * next_visual([*forced, first + i]) for i in range(4)])
    observed = np.bincount((tokens[:, 5] - first) * 4 + tokens[:, 6] - first, minlength=16)
    kept = joint * count >= 5
    assert kept.sum() >= 5 and observed.sum() == count and not observed[joint == 0].any()
    pooled = [np.append(x[kept], x[~kept].sum()) for x in (observed, joint * count)]
    pooled = [x[pooled[1] > 0] for x in pooled]
    assert scipy.stats.chisquare(*pooled).pvalue > 1e-3


def test_what_does_not_fit_the_context_is_refused():
    padded, lengths = pad_prompts(PROMPTS, TOKENIZER.vocab.pad)
    with pytest.raises(UserError, match="256"):
        sample(CONFIG, PARAMS, GRAMMAR, PromptBatch(padded, lengths), keys(3), RolloutOptions(250, size=SIZE))


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
        image = options.temperature if options.image_temperature is None else options.image_temperature
        probabilities = np.exp(log_softmax(scores[ids] / (image if is_visual else options.temperature)))
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
        SamplingOptions(temperature=0.5, image_temperature=2.0),
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


def contains_sort(jaxpr) -> bool:
    """Whether a program, its inner ones included, sorts."""
    for equation in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in equation.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        if equation.primitive.name == "sort" or any(map(contains_sort, inner)):
            return True
    return False


@pytest.mark.parametrize("chosen", [TopK(7, 3), TopP(0.4, 0.9)], ids=str)
def test_truncation_keeps_the_ids_that_sorting_keeps_without_sorting(chosen):
    """Many ids, ties among them, some masked; every second position is visual."""
    rng = np.random.default_rng(1)
    scores = np.round(rng.normal(0, 2, (6, 5000)), 2).astype(np.float32)
    scores[:, ::7] = MASKED
    visual = (np.arange(6) % 2 == 1)[:, None]
    context = Context(None, visual, ())
    kept = np.asarray(chosen(scores, context)) > MASKED / 2
    assert not contains_sort(jax.make_jaxpr(lambda x: chosen(x, context))(scores).jaxpr)
    for row, is_visual, found in zip(scores.astype(np.float64), visual[:, 0], kept, strict=True):
        limit, ordered = (chosen.image if is_visual else chosen.text), np.sort(row)[::-1]
        if isinstance(chosen, TopK):
            threshold = ordered[limit - 1]
        else:
            probabilities = np.exp(log_softmax(ordered))
            threshold = ordered[np.flatnonzero(np.cumsum(probabilities) - probabilities < limit)[-1]]
        np.testing.assert_array_equal(found, row >= threshold)


def test_a_draw_is_one_of_the_kept_ids():
    scores = np.log(np.array([[0.5, 0.5, 1e-30], [1e-30, 1e-30, 1.0]], np.float32))
    found = [np.asarray(sample_ids(scores, keys(2, seed), SamplingOptions())) for seed in range(20)]
    assert {int(f[0]) for f in found} == {0, 1} and {int(f[1]) for f in found} == {2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("guidance", float("inf")),
        ("image_guidance", -1.0),
        ("image_temperature", -0.1),
        ("text_top_k", -1),
        ("text_top_p", 0.0),
        ("image_top_p", 1.5),
        ("image_top_p", float("nan")),
    ],
)
def test_options_that_no_distribution_has_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        SamplingOptions(**{field: value})


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_returns_parsed_answers_with_their_pixels_and_says_why_one_is_missing():
    samples, images = requests(2, sources=1)
    free = Grammar(TOKENIZER, GrammarOptions(modes=("direct",), text_cap=2))
    found = roll_out(system(PARAMS), free, samples, images, jax.random.key(0), RolloutOptions(48, group_size=4))
    short = roll_out(system(PARAMS), free, samples, images, jax.random.key(0), RolloutOptions(20, group_size=4))
    for row, (answer, error) in enumerate(zip(found.answers, found.errors, strict=True)):
        spoken = found.answer_tokens(row)
        assert error == "" and answer.trajectory.sample == samples[row // 4]
        (name,) = answer.trajectory.images
        assert answer.images[name].shape == (32, 32, 3) and set(images[row // 4]) <= set(answer.images)
        codes = system(PARAMS).image_codec.encode([answer.images[name]])[0]
        assert codec.encode_image(TOKENIZER, codes) == spoken[:11].tolist()
    assert short.answers == (None,) * 8 and all("at token 20 of 20" in error for error in short.errors)
    assert found.total_lengths.tolist() == [len(found.prompt(r)) + len(found.answer_tokens(r)) for r in range(8)]


def test_first_images_are_those_that_the_answers_would_begin_with():
    samples, images = requests(2)
    greedy, key = SamplingOptions(temperature=0.0), jax.random.key(3)
    drawn = draw_first_images(system(PARAMS), samples, images, key, greedy)
    whole = roll_out(system(PARAMS), GRAMMAR, samples, images, key, RolloutOptions(LENGTH, greedy))
    for image, answer in zip(drawn, whole.answers, strict=True):
        np.testing.assert_array_equal(image, answer.images[answer.trajectory.images[0]])


def test_requests_for_different_sizes_need_separate_batches():
    samples, images = requests(2, sources=1)
    images[1] = {name: np.zeros((16, 32, 3), np.uint8) for name in images[1]}
    with pytest.raises(UserError):
        roll_out(system(PARAMS), GRAMMAR, samples, images, jax.random.key(0), RolloutOptions(32))
