"""Losses against independent computations: values, gradients, packing, accumulation, the GRPO objective and update."""

from __future__ import annotations

import asyncio
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from answer_tokens import evaluation, trajectory
from tiny_model import CONFIG, TOKENIZER, all_logits, log_softmax, noisy_params, requests, system

from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar, GrammarOptions, Tables
from ivr_jax.rewards import judge_service
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.rewards.judge import INVALID, Judged, judge_answers
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.training import grpo
from ivr_jax.training.answer_batches import passes
from ivr_jax.training.losses import GrpoOptions, grpo_loss, token_statistics
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import score_rollout, summary
from ivr_jax.training.sft import TrainState, make_step, selective_loss
from ivr_jax.trajectory import Evaluation, Reflection, Step

torch = pytest.importorskip("torch", reason="the independent reference is a test extra")

PARAMS = noisy_params()
GRAMMAR = Grammar(TOKENIZER, GrammarOptions(text_cap=2))


# -- statistics of tokens ---------------------------------------------------------------------------------------------


def statistics_case(with_rows: bool):
    """hidden [2, 6, 8], head [8, V], legal targets, and rows of the legality table or None."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 6, 8)).astype(np.float32)
    head = rng.normal(size=(8, CONFIG.vocab_size)).astype(np.float32)
    useful = np.flatnonzero(GRAMMAR.tables.legal.sum(1) > 0)
    rows = rng.choice(useful, (2, 6)).astype(np.int32)
    legal = GRAMMAR.tables.legal[rows][..., GRAMMAR.tables.class_of]
    if not with_rows:
        rows, legal = None, np.ones((2, 6, CONFIG.vocab_size), bool)
    targets = np.array([[rng.choice(np.flatnonzero(ids)) for ids in row] for row in legal], np.int32)
    return hidden, head, targets, rows, legal


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (5, 1.0), (100, 1.0), (4, 0.7), (5, 0.7)])
def test_statistics_in_chunks_equal_the_whole_in_value_and_gradient(chunk, temperature):
    """5 does not divide 12 tokens; with a temperature the grammar's mask is replayed too."""
    with_rows = temperature != 1.0
    hidden, head, targets, rows, legal = statistics_case(with_rows)
    weights = np.random.default_rng(1).normal(size=(2, 2, 6)).astype(np.float32)

    def ours(hidden, head):
        found = token_statistics(hidden, head, jnp.asarray(targets), chunk, None if rows is None else jnp.asarray(rows),
                                 Tables(*GRAMMAR.tables) if with_rows else None,
                                 SamplingOptions(temperature=temperature))  # fmt: skip
        return (found.log_probs * weights[0] + found.entropy * weights[1]).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(hidden, head)
    h, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head))
    scores = (h @ w).masked_fill(~torch.tensor(legal), -torch.inf) / temperature
    log_probs = torch.log_softmax(scores, -1)
    taken = torch.gather(log_probs, -1, torch.tensor(targets, dtype=torch.int64)[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs.masked_fill(~torch.tensor(legal), 0)).sum(-1)
    (taken * torch.tensor(weights[0]) + entropy * torch.tensor(weights[1])).sum().backward()
    np.testing.assert_allclose(found.log_probs, taken.detach(), atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy.detach(), atol=1e-5)
    np.testing.assert_array_equal(found.correct, (scores.argmax(-1).numpy() == targets).astype(np.float32))
    for ours_, theirs in zip(gradients, (h.grad, w.grad), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=1e-5)


# -- supervised fine-tuning -------------------------------------------------------------------------------------------


def examples() -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and loss masks of one trajectory of each mode."""
    kinds = [([], [True]), ([Reflection("ok", "ok")], [False, True]), ([Step("ok")], [False, True])]
    encoded = []
    for number, (causes, passed) in enumerate(kinds):
        answer = trajectory(causes, passed)
        codes = {name: np.array([[number, 3]]) for name in answer.images}
        encoded.append(codec.encode_trajectory(TOKENIZER, answer, codes))
    return [(e.tokens, e.loss_mask()) for e in encoded]


def row_of(parts, length: int) -> dict[str, np.ndarray]:
    """Examples packed into one row [1, length]."""
    row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    row["loss"], start = np.zeros((1, length), np.uint8), 0
    for number, (tokens, loss) in enumerate(parts, 1):
        where = slice(start, start + len(tokens))
        row["tokens"][0, where], row["loss"][0, where] = tokens, loss
        row["segment_ids"][0, where], row["positions"][0, where] = number, np.arange(len(tokens))
        start += len(tokens)
    return row


def stack(rows):
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@functools.partial(jax.jit, static_argnames="chunk")
def loss_and_gradient(params, batch, chunk=64):
    start = TOKENIZER.vocab.visual_start
    return jax.value_and_grad(lambda p: selective_loss(CONFIG, p, batch, chunk, start), has_aux=True)(params)


def assert_same_tree(a, b, atol: float):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def test_the_loss_is_the_negative_log_likelihood_of_the_selected_tokens():
    expected, count = 0.0, 0
    for tokens, loss in examples():
        log_probs = log_softmax(np.asarray(all_logits(CONFIG, PARAMS, tokens[None]))[0].astype(np.float64))
        chosen = np.flatnonzero(loss)
        expected -= log_probs[chosen - 1, tokens[chosen]].sum()
        count += len(chosen)
    batch = stack([row_of([example], 64) for example in examples()])
    (total, sums), _ = loss_and_gradient(PARAMS, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert sums["loss"][1] == count == 23 + 43 + 40
    assert sums["image_loss"][1] == 2 + 2 + 2  # two codes of each image that is a target: G1, G2, G2
    assert sums["image_loss"][1] + sums["text_loss"][1] == count
    np.testing.assert_allclose(sums["image_loss"][0] + sums["text_loss"][0], total, rtol=1e-5)


def test_packed_equals_unpacked_in_loss_and_gradient():
    parts = examples()
    (apart, sums_apart), gradient_apart = loss_and_gradient(PARAMS, stack([row_of([p], 64) for p in parts]))
    (packed, sums_packed), gradient_packed = loss_and_gradient(PARAMS, row_of(parts, 192))
    np.testing.assert_allclose(packed, apart, rtol=1e-5)
    assert_same_tree(gradient_packed, gradient_apart, 1e-3)  # gradients reach 100 here
    for name in ("loss", "image_loss", "text_loss", "accuracy"):
        np.testing.assert_allclose(sums_packed[name], sums_apart[name], rtol=1e-5)
    other_order = loss_and_gradient(PARAMS, row_of(parts[::-1], 192))[0][0]
    np.testing.assert_allclose(other_order, apart, rtol=1e-5)


def test_a_first_token_of_an_example_is_never_predicted_from_the_one_before():
    """Even if it is marked as a target: nothing in its own segment precedes it."""
    first, second = examples()[0], examples()[2]
    marked = (second[0], np.ones(len(second[0]), bool))
    (_, sums), _ = loss_and_gradient(PARAMS, row_of([first, marked], 192))
    assert sums["loss"][1] == 23 + len(second[0]) - 1


@pytest.mark.parametrize("remat", ["none", "full"])  # with "full" gradients are added in place, layer by layer
def test_accumulated_gradients_equal_those_of_the_whole_batch(remat):
    """Micro-batches have different numbers of targets, so a mean of means would be wrong."""
    config = dataclasses.replace(CONFIG, remat=remat)
    parts = examples()
    batch = stack([row_of([p], 64) for p in (*parts, parts[1])])
    optimizer, start = optax.sgd(0.1), TOKENIZER.vocab.visual_start

    def after(config, count):
        params = jax.tree.map(jnp.copy, PARAMS)
        return make_step(config, optimizer, 64, count, start)(TrainState(params, optimizer.init(params)), batch)

    (whole, whole_metrics), (split, metrics) = after(CONFIG, 1), after(config, 2)
    assert_same_tree(split.params, whole.params, 2e-6)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), whole.params, PARAMS)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for name in whole_metrics:
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-4)


def test_configured_dropout_is_another_one_at_each_step_and_the_same_when_a_step_is_repeated():
    batch = stack([row_of([p], 64) for p in examples()[:2]])
    optimizer, start = optax.sgd(0.1), TOKENIZER.vocab.visual_start
    step = make_step(dataclasses.replace(CONFIG, dropout=0.3), optimizer, 64, 2, start, seed=4)

    def loss_at(number):
        params = jax.tree.map(jnp.copy, PARAMS)
        return float(step(TrainState(params, optimizer.init(params)), batch, number)[1]["loss"][0])

    first, again, other = (loss_at(number) for number in (3, 3, 4))
    assert first == again != other
    without = float(selective_loss(CONFIG, PARAMS, batch, 64, start)[0])
    assert abs(first - without) > 1e-3 * without


# -- GRPO objective ---------------------------------------------------------------------------------------------------


def grpo_case():
    """4 answers of 5 tokens: ratios inside and outside the clip on both sides, one member that takes no part."""
    rng = np.random.default_rng(0)
    old, reference = rng.normal(-2, 1, (2, 4, 5)).astype(np.float32)
    new = old + rng.normal(0, 0.4, (4, 5)).astype(np.float32)
    advantages = np.array([1.5, -0.5, 0.0, -1.0], np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    return new, old, reference, advantages, mask


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_the_grpo_objective_equals_a_torch_one_in_value_and_gradient(loss_type):
    new, old, reference, advantages, mask = grpo_case()
    options = GrpoOptions(clip_low=0.1, clip_high=0.3, beta=0.05, loss_type=loss_type, dr_grpo_length=7)

    def ours(new):
        total, denominator, sums = grpo_loss(new, old, reference, advantages, mask, options)
        return total / denominator, sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(new)
    p = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    answers, clipped, divergence = [], 0, 0.0
    for i in range(3):  # the fourth takes no part
        terms = []
        for t in range(int(mask[i].sum())):
            ratio = torch.exp(p[i, t] - float(old[i, t]))
            gain = torch.minimum(ratio * float(advantages[i]), torch.clamp(ratio, 0.9, 1.3) * float(advantages[i]))
            gap = float(reference[i, t]) - p[i, t]
            kl = torch.exp(gap) - gap - 1
            terms.append(0.05 * kl - gain)
            divergence += kl.item()
            clipped += (advantages[i] > 0 and ratio.item() > 1.3) or (advantages[i] < 0 and ratio.item() < 0.9)
        answers.append(terms)
    if loss_type == "grpo":
        expected = sum(sum(terms) / len(terms) for terms in answers) / 3
    elif loss_type == "bnpo":
        expected = sum(sum(terms) for terms in answers) / 10
    else:
        expected = sum(sum(terms) / 7 for terms in answers) / 3
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, p.grad, atol=1e-6)
    assert clipped > 0 and sums["clipped"] == clipped and sums["tokens"] == 10
    np.testing.assert_allclose(sums["kl"], divergence, rtol=1e-5)


def test_before_the_first_update_the_gradient_is_that_of_the_policy_and_the_ratio_is_one():
    """At ratio 1 and no KL: -A / (tokens of the answer) / 3 answers."""
    _, old, _, advantages, mask = grpo_case()
    loss = lambda new: grpo_loss(new, old, old, advantages, mask, GrpoOptions())  # noqa: E731
    gradient = jax.grad(lambda new: loss(new)[0] / loss(new)[1])(old)
    expected = -advantages[:, None] * mask / np.maximum(mask.sum(1, keepdims=True), 1) / 3
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    sums = loss(old)[2]
    assert sums["max_ratio_deviation"] == sums["kl"] == sums["clipped"] == 0


def test_ratio_deviation_is_the_largest_over_counted_tokens():
    new, old, reference, advantages, mask = grpo_case()
    sums = grpo_loss(new, old, reference, advantages, mask, GrpoOptions())[2]
    expected = np.abs(np.exp(new.astype(float) - old) - 1)[mask > 0].max()
    np.testing.assert_allclose(sums["max_ratio_deviation"], expected, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"loss_type": "mean"}, {"beta": -0.1}, {"dr_grpo_length": 0}, {"clip_low": -1.0}])
def test_objective_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        GrpoOptions(**wrong)


# -- GRPO update ------------------------------------------------------------------------------------------------------


class Judge:
    """Likes images of code 3."""

    async def evaluate(self, sample, images, image):
        score = 1 + 4 * float((image[::16, ::16, 0] == 30).mean())
        return Evaluation(*(dataclasses.replace(axis, score=score) for axis in evaluation(True).axes))

    async def judge_reasoning(self, sample, images, kind, text, previous):
        return 0.5


@functools.cache
def trainer(micro_batch: int = 8, **changes) -> grpo.Trainer:
    grammar = GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2)
    options = RLOptions(grammar, 4, 72, micro_batch, (128,), 64, engine=EngineOptions(growth=1))
    judge = judge_service.JudgeService(judge_service.same(Judge()))
    return grpo.Trainer(system(PARAMS), judge, dataclasses.replace(options, **changes), optax.sgd(0.1))


def fresh_state(optimizer) -> TrainState:
    params = jax.tree.map(jnp.copy, PARAMS)
    return TrainState(params, optimizer.init(params))


@functools.cache
def rolled():
    """Eight answers (two prompts, four each), judged."""
    learner = trainer()
    rollout = learner.collect_rollout(PARAMS, [grpo.Prompt(*p) for p in zip(*requests(2), strict=True)], 5)
    judged = asyncio.run(judge_answers(Judge(), rollout.judgeable()))
    return rollout, score_rollout(rollout, judged, RewardOptions())


def choices(learner: grpo.Trainer, rollout) -> np.ndarray:
    """int [answers]: tokens at which the grammar allows more than one id."""
    tables, samples = learner.grammar.tables, rollout.samples
    legal = np.asarray(tables.legal)[samples.rows][..., tables.class_of].sum(-1)
    return ((legal > 1) & (np.arange(samples.rows.shape[1]) < samples.lengths[:, None])).sum(1)


def test_the_trainer_replays_the_samplers_distribution():
    rollout, scored = rolled()
    learner = trainer()
    _, metrics = learner.update(fresh_state(learner.optimizer), learner.prepare(rollout, scored), check_ratio=True)
    assert float(metrics["max_ratio_deviation"]) < 1e-4
    assert float(metrics["kl"][0]) < 1e-6  # the policy still is the reference
    used = scored.used.reshape(-1)
    chosen = choices(learner, rollout)[used].sum()
    assert float(metrics["loss"][1]) == used.sum() and 0 < chosen < rollout.samples.lengths[used].sum()
    assert float(metrics["kl"][1]) == float(metrics["clip_fraction"][1]) == chosen  # forced tokens do not count


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_packed_rows_replay_the_samplers_distribution(shares_prompts):
    rollout, _ = rolled()
    learner = trainer(packed_rows=2, buckets=(256,))
    batches = list(passes(rollout, np.ones(8, np.float32), np.arange(8), learner.options, shares_prompts))
    counted = 0
    for batch in batches:
        again = learner._logprobs(PARAMS, batch).log_probs
        np.testing.assert_allclose(again * batch["mask"], batch["old"], atol=1e-4)
        counted += int(batch["mask"].sum())
    assert counted == rollout.samples.lengths.sum()
    tokens = sum(int((batch["segments"] > 0).sum()) for batch in batches)
    assert (tokens < rollout.total_lengths.sum()) == shares_prompts


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_packed_rows_with_shared_prompts_give_the_update_of_a_row_an_answer(loss_type):
    rollout, scored = rolled()
    objective = GrpoOptions(loss_type=loss_type, dr_grpo_length=50)
    updates = []
    for changes in ({}, {"packed_rows": 2, "buckets": (256,)}):
        learner = trainer(8, grpo=objective, **changes)
        batches = learner.prepare(rollout, scored)
        state, metrics = learner.update(fresh_state(learner.optimizer), batches, check_ratio=True)
        updates.append((state.params, metrics))
    (one, before), (packed, after) = updates
    size = max(np.abs(np.asarray(a - b)).max() for a, b in zip(*map(jax.tree.leaves, (one, PARAMS)), strict=True))
    assert_same_tree(one, packed, 1e-5 * size)
    for name in ("loss", "kl", "image_entropy", "text_entropy"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-5)


def test_minibatches_add_up_to_the_whole_update():
    rollout, scored = rolled()
    whole, split = trainer(8), trainer(3)
    one, _ = whole.update(fresh_state(whole.optimizer), whole.prepare(rollout, scored), check_ratio=True)
    other, _ = split.update(fresh_state(split.optimizer), split.prepare(rollout, scored), check_ratio=True)
    assert_same_tree(one.params, other.params, 2e-6)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), one.params, PARAMS)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_a_ratio_that_is_not_one_stops_the_run():
    rollout, scored = rolled()
    tampered = rollout.samples._replace(log_probs=rollout.samples.log_probs + np.float32(0.01))
    learner = trainer()
    with pytest.raises(RuntimeError, match=r"9\.9[4-6]e-03"):  # 1 - exp(-0.01)
        batches = learner.prepare(dataclasses.replace(rollout, samples=tampered), scored)
        learner.update(fresh_state(learner.optimizer), batches, check_ratio=True)


def test_scores_of_a_rollout_by_hand():
    """One prompt, four members: direct and best; a reflection with its texts at 0.5; unparsed; a judge's failure."""
    direct, reflected = trajectory([], [True]), trajectory([Reflection("a", "b")], [False, True])
    Parsed = dataclasses.make_dataclass("Parsed", ["trajectory"])
    answers = (Parsed(direct), Parsed(reflected), None, Parsed(direct))
    judged = [Judged((5.0,) * 4, 1.0, None), Judged((5.0,) * 4, 1.0, 0.75), INVALID, Judged(None, 1.0, None)]
    rollout = dataclasses.replace(rolled()[0], answers=answers)
    scored = score_rollout(rollout, judged, RewardOptions())
    # 0.7 + 0.1 rescaled to 1; 0.7 + 0.1 + 0.15 = 0.95, within 0.05 of the best; 0.14 rescaled to 0.175
    np.testing.assert_allclose(scored.components["total"][0, :3], [1.0, 0.95, 0.175], atol=1e-6)
    np.testing.assert_array_equal(scored.images, [[1, 2, 0, 1]])
    np.testing.assert_array_equal(scored.used, [[True, True, True, False]])
    bonus = [1.0, 0.5, 0.0, 0.0]
    np.testing.assert_allclose(scored.bonus, [bonus], atol=1e-6)
    rewards = np.array([2.0, 1.45, 0.175])
    expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
    np.testing.assert_allclose(scored.advantages, [[*expected, 0]], atol=1e-4)


def test_an_update_without_contrast_is_skipped():
    rollout, scored = rolled()
    nobody = dataclasses.replace(scored, used=np.zeros_like(scored.used))
    learner = trainer()
    state = fresh_state(learner.optimizer)
    after, metrics = learner.update(state, learner.prepare(rollout, nobody), check_ratio=True)
    assert after is state and metrics == {"skipped_updates": 1.0}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_a_group_without_contrast_skips_the_passes_and_changes_no_update(loss_type):
    rollout, scored = rolled()
    advantages = np.where(np.arange(2)[:, None] == 1, 0.0, [[1.0, -1.0, 0.5, -0.5]]).astype(np.float32)
    scored = dataclasses.replace(scored, used=np.ones((2, 4), bool), advantages=advantages)
    results = []
    for skip in (True, False):
        learner = trainer(3, grpo=GrpoOptions(beta=0.0, loss_type=loss_type, skip_equal_groups=skip))
        batches = learner.prepare(rollout, scored)
        assert len(batches) == (2 if skip else 3)
        results.append(learner.learn(fresh_state(learner.optimizer), rollout, scored, 0, on_policy=True))
    (skipped, metrics), (whole, expected) = results
    assert_same_tree(skipped.params, whole.params, 1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), skipped.params, PARAMS)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert summary(rollout, scored)["groups_skipped"] == (1.0, 2.0)


def test_skipping_a_group_without_contrast_is_bit_equal_where_passes_hold_the_same_answers():
    """With one answer a pass, that of an answer without advantage adds exact zeros."""
    rollout, scored = rolled()
    advantages = np.where(np.arange(2)[:, None] == 1, 0.0, [[1.0, -1.0, 0.5, -0.5]]).astype(np.float32)
    scored = dataclasses.replace(scored, used=np.ones((2, 4), bool), advantages=advantages)
    learners = [trainer(1, grpo=GrpoOptions(beta=0.0, skip_equal_groups=skip)) for skip in (True, False)]
    assert [len(learner.prepare(rollout, scored)) for learner in learners] == [4, 8]
    (skipped, metrics), (whole, expected) = (
        learner.learn(fresh_state(learner.optimizer), rollout, scored, 0, on_policy=True) for learner in learners
    )
    for ours, theirs in zip(*map(jax.tree.leaves, (skipped, whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [float(x) for x in metrics["loss"]] == [float(x) for x in expected["loss"]]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a - b)).max(), skipped.params, PARAMS)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_an_answer_longer_than_every_bucket_is_refused():
    rollout, scored = rolled()
    learner = trainer(buckets=(32, 64))
    with pytest.raises(UserError, match="config.buckets"):
        learner.update(fresh_state(learner.optimizer), learner.prepare(rollout, scored), check_ratio=True)


def test_tiny_model_has_a_cache_free_forward():
    """What the references above rely on: logits of a row do not depend on what follows."""
    tokens = np.arange(40, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, 20:] = 7
    before, after = (np.asarray(all_logits(CONFIG, PARAMS, t)) for t in (tokens, changed))
    np.testing.assert_allclose(before[0, :20], after[0, :20], atol=1e-5)
    assert backbone.lm_head(CONFIG, PARAMS).shape == (32, CONFIG.vocab_size)
