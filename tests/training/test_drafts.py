"""Draft groups: continuations of one first image are compared, drafts are stored, and the ratio starts at 1."""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import noisy_params, requests, system

from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.rewards.judge_service import JudgeService, same
from ivr_jax.sampling.drafts import DraftBuffer
from ivr_jax.sampling.rollout import Drafts
from ivr_jax.training import grpo, scoring
from ivr_jax.training.answer_batches import answer_batch
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.minibatches import context_length
from ivr_jax.training.prompts import Prompt, Tasks
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import Scored, draft_answers, separate_drafts, token_advantages
from ivr_jax.training.state import TrainState
from ivr_jax.trajectory import AxisVerdict, Evaluation

PARAMS = noisy_params()
PROMPTS = [Prompt(*pair) for pair in zip(*requests(2), strict=True)]
GRAMMAR = GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2)
VISUAL = system(PARAMS).tokenizer.vocab.visual_start


class Judge:
    """Likes images of code 3."""

    async def evaluate(self, sample, images, image):
        score = 1 + 4 * float((image[::16, ::16, 0] == 30).mean())
        return Evaluation(*(AxisVerdict(score > 2, "seen", score) for _ in range(4)))

    async def judge_reasoning(self, sample, images, kind, text, previous):
        return 0.5


def options(**changes) -> RLOptions:
    return RLOptions(GRAMMAR, 2, 72, 8, (128,), 64, grpo=GrpoOptions(group="draft", drafts=2, **changes))


@functools.cache
def trainer() -> grpo.Trainer:
    return grpo.Trainer(system(PARAMS), JudgeService(same(Judge())), options(), optax.sgd(0.05))


@functools.cache
def rollout():
    return trainer().collect_rollout(PARAMS, PROMPTS, 0)


def fresh_state() -> TrainState:
    params = jax.tree.map(jnp.copy, PARAMS)
    return TrainState(params, trainer().optimizer.init(params))


def scored(used=None, **arrays) -> Scored:
    used = np.ones((4, 2), bool) if used is None else used
    gains = np.arange(8, dtype=np.float32).reshape(4, 2)
    return Scored([], {}, used, used, np.zeros((4, 2)), gains, used, **arrays)


def test_continuations_share_their_draft_and_the_ratio_is_one_on_all_tokens():
    """Two prompts, two drafts each, two continuations of each draft."""
    made = rollout()
    length = made.draft_length
    tokens, log_probs = made.samples.tokens.reshape(4, 2, -1), made.samples.log_probs.reshape(4, 2, -1)
    assert len(made.answers) == 8 and (tokens[:, 0, :length] >= 0).all()
    np.testing.assert_array_equal(tokens[:, 0, :length], tokens[:, 1, :length])
    np.testing.assert_array_equal(log_probs[:, 0, :length], log_probs[:, 1, :length])
    assert (log_probs[..., :length] < 0).any(-1).all()  # as they were when the draft was sampled
    assert any((a[length:] != b[length:]).any() for a, b in tokens)  # the continuations are their own
    assert len({tuple(row) for row in tokens[:, 0, :length].tolist()}) > 1  # and so are the drafts
    trainer().check_logprobs(PARAMS, made)
    first = draft_answers(made)
    for group, draft in enumerate(first):
        [image] = draft[0].images
        assert all(a is None or a.trajectory.images[0] == image for a in made.answers[2 * group : 2 * group + 2])


def test_a_step_learns_and_its_ratio_starts_at_one():
    state, metrics = trainer().step(fresh_state(), Tasks(tuple(PROMPTS)), 0)
    assert float(metrics["max_ratio_deviation"]) < 1e-4 and metrics["reward"][1] == 8
    assert metrics["judge_calls"] >= 8 + 4  # every answer, and every draft once
    assert metrics["work_flops"] > metrics["work_tokens"] > 0  # from which the loop logs MFU and tokens a second
    again, _ = trainer().step(fresh_state(), Tasks(tuple(PROMPTS)), 0)
    moved = 0.0
    for a, b, old in zip(*map(jax.tree.leaves, (state.params, again.params, PARAMS)), strict=True):
        np.testing.assert_array_equal(a, b)
        moved = max(moved, float(jnp.abs(a - old).max()))
    assert moved > 1e-5


def test_token_advantages_by_hand():
    made = rollout()
    image = made.samples.tokens >= VISUAL
    in_draft = np.arange(image.shape[1]) < made.draft_length
    own, of_images = np.arange(8.0), 100 + np.arange(8.0)
    drafts = np.repeat([[10.0], [20.0], [30.0], [40.0]], 2, axis=1)
    plain = token_advantages(made, scored(), GrpoOptions(), VISUAL)
    np.testing.assert_array_equal(plain, np.broadcast_to(own[:, None], image.shape))
    local = token_advantages(made, scored(draft_advantages=drafts), GrpoOptions(credit="local"), VISUAL)
    np.testing.assert_array_equal(local, np.where(in_draft, drafts.reshape(-1, 1), own[:, None]))
    spread = token_advantages(made, scored(draft_advantages=drafts), GrpoOptions(credit="broadcast"), VISUAL)
    np.testing.assert_array_equal(spread, drafts.reshape(-1, 1) + own[:, None] + 0 * image)
    apart = token_advantages(made, scored(image_advantages=of_images.reshape(4, 2)), GrpoOptions(), VISUAL)
    np.testing.assert_array_equal(apart, np.where(image, of_images[:, None], own[:, None]))


def test_drafts_of_a_buffer_are_context_and_the_same_in_a_resumed_run(tmp_path):
    def buffered() -> grpo.Trainer:
        judge = JudgeService(same(Judge()))
        buffer = DraftBuffer(tmp_path / "drafts", "of the first checkpoint")
        return grpo.Trainer(system(PARAMS), judge, options(draft_source="buffer"), optax.sgd(0.05), drafts=buffer)

    learner = buffered()
    made = learner.collect_rollout(noisy_params(seed=1), PROMPTS, 0)  # the policy has moved; the drafts are old
    length = made.draft_length
    again = buffered().collect_rollout(noisy_params(seed=2), PROMPTS, 5)  # another step and policy: the same drafts
    np.testing.assert_array_equal(made.samples.tokens[:, :length], again.samples.tokens[:, :length])
    context = context_length(made, learner.options.grpo)
    batch = answer_batch(made, np.zeros(8, np.float32), np.arange(8), 8, (128,), context)
    for row, prompt in enumerate(np.repeat(made.prompt_lengths, 2)):
        assert not batch["mask"][row, : prompt + length].any() and batch["mask"][row, prompt + length] == 1
    with pytest.raises(UserError, match="drafts"):
        DraftBuffer(tmp_path / "drafts", "of another checkpoint")


@pytest.mark.parametrize("others_miss", [False, True])
def test_drafts_are_sampled_by_all_processes_together(monkeypatch, tmp_path, others_miss):
    """Sampling moves the weights, which is a program of all processes; one that has its drafts keeps them."""
    made, keys = rollout(), [prompt.sample.key for prompt in PROMPTS]
    first = slice(None, None, made.group_size), slice(made.draft_length)
    drafts = Drafts(made.samples.tokens[first], made.samples.log_probs[first])
    buffer = DraftBuffer(tmp_path / "drafts", "a")
    buffer.write(keys, drafts)
    learner = copy.copy(trainer())
    learner.options, learner.drafts, calls = options(draft_source="buffer"), buffer, []

    def sampled(*_, **__):
        calls.append(1)
        return dataclasses.replace(drafts, tokens=drafts.tokens + 1)

    monkeypatch.setattr(grpo, "sample_drafts", sampled)
    monkeypatch.setattr(grpo, "roll_out", lambda *_, drafts, **__: drafts)
    monkeypatch.setattr(grpo.distributed, "gather", lambda value: [value, others_miss])
    found = learner.collect_rollout(PARAMS, PROMPTS, 0)
    assert len(calls) == others_miss
    np.testing.assert_array_equal(found.tokens, drafts.tokens)


def test_a_buffer_keeps_what_truncation_kept_and_tells_what_it_lacks(tmp_path):
    buffer = DraftBuffer(tmp_path / "drafts", "a")
    rng = np.random.default_rng(0)
    drafts = Drafts(rng.integers(0, 9, (4, 3)), rng.normal(size=(4, 3)).astype("f4"), rng.integers(0, 9, (4, 3, 2)))
    assert buffer.read(["one", "two"]) is None
    buffer.write(["one", "two"], drafts)
    found = buffer.read(["two", "one"])
    np.testing.assert_array_equal(found.tokens, drafts.tokens[[2, 3, 0, 1]])
    np.testing.assert_array_equal(found.kept, drafts.kept[[2, 3, 0, 1]])
    assert buffer.read(["one", "three"]) is None
    later = dataclasses.replace(drafts, tokens=drafts.tokens + 1)
    buffer.write(["one", "three"], later)  # a prompt that comes again beside a new one keeps its drafts
    found = buffer.read(["one", "three"])
    np.testing.assert_array_equal(found.tokens, np.concatenate([drafts.tokens[:2], later.tokens[2:]]))


def test_judgements_of_answers_and_drafts_of_two_processes_are_told_apart(monkeypatch):
    """Each process submits its answers, then its drafts: four and two of them here."""
    monkeypatch.setattr(scoring.jax, "process_count", lambda: 2)
    judged = ["a0", "a1", "a2", "a3", "d0", "d1", "a4", "a5", "a6", "a7", "d2", "d3"]
    answers, drafts = separate_drafts(judged, rollout())
    assert answers == [f"a{i}" for i in range(8)] and drafts == [f"d{i}" for i in range(4)]
    trajectories = dataclasses.replace(rollout(), draft_length=0)
    assert separate_drafts(judged, trajectories) == (judged, None)


@pytest.mark.parametrize("grammar", [{"modes": ("direct",)}, {"max_reflections": 0}])
def test_draft_groups_need_a_grammar_that_reflects(grammar):
    with pytest.raises(UserError, match="grpo.group"):
        dataclasses.replace(options(), grammar=dataclasses.replace(GRAMMAR, **grammar))


@pytest.mark.parametrize("wrong", [{"credit": "both"}, {"draft_source": "disk"}, {"drafts": 0}, {"group": "pair"}])
def test_draft_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        GrpoOptions(**wrong)
