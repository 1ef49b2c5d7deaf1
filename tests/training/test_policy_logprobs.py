"""The trainer's policy is the sampler's distribution, whatever is switched on; its gradients are torch's."""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from answer_tokens import evaluation
from tiny_model import CONFIG, answer_logits, legal_mask, log_softmax, noisy_params, requests, system

from ivr_jax.checkpoints import hf
from ivr_jax.compile import rl_programs
from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.rewards import judge_service
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.training import grpo
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.minibatches import split_groups
from ivr_jax.training.policy_logprobs import policy_logprobs
from ivr_jax.training.prompts import Prompt
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.scoring import Scored
from ivr_jax.training.state import TrainState

torch = pytest.importorskip("torch", reason="the independent reference is a test extra")

PARAMS = noisy_params()
GRAMMAR = GrammarOptions(modes=("direct", "reflection"), max_reflections=1, text_cap=2)


class Judge:
    async def evaluate(self, sample, images, image):
        score = 1 + 4 * float((image[::16, ::16, 0] == 30).mean())
        return dataclasses.replace(
            evaluation(True), instruction=dataclasses.replace(evaluation(True).instruction, score=score)
        )

    async def judge_reasoning(self, sample, images, kind, text, previous):
        return 0.5


LEARNT = {
    "bare": (SamplingOptions(), "grpo"),
    "guided": (SamplingOptions(guidance=2.5), "bnpo"),
    "all": (SamplingOptions(0.8, text_top_k=9, image_top_k=3, text_top_p=0.9, image_top_p=0.9, guidance=1.7),
            "dr_grpo"),
}  # fmt: skip
SETTINGS = LEARNT | {
    "temperature": (SamplingOptions(0.6, image_temperature=1.7), "grpo"),
    "top-k": (SamplingOptions(text_top_k=3, image_top_k=2), "grpo"),
    "top-p": (SamplingOptions(text_top_p=0.7, image_top_p=0.7), "grpo"),
    "guided by references": (SamplingOptions(guidance=1.5, image_guidance=2.0), "grpo"),
}


@functools.cache
def trainer(name: str) -> grpo.Trainer:
    sampling, loss_type = SETTINGS[name]
    objective = GrpoOptions(beta=0.3, loss_type=loss_type, dr_grpo_length=50)
    engine = EngineOptions(growth=1, shrink=False)
    options = RLOptions(GRAMMAR, 3, 72, 3, (128, 192), 64, sampling, engine, grpo=objective)
    judge = judge_service.JudgeService(judge_service.same(Judge()))
    return grpo.Trainer(system(PARAMS), judge, options, optax.sgd(0.5))


def state_of(params) -> TrainState:
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, trainer("bare").optimizer.init(params))


def scored_by(rollout, seed: int = 0) -> Scored:
    """Made-up advantages; the last member of each group takes no part."""
    shape = (len(rollout.prompts), rollout.group_size)
    used = np.ones(shape, bool)
    used[:, -1] = False
    gains = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return Scored([], {}, np.ones(shape, np.int32), used, np.zeros(shape), np.where(used, gains, 0), used)


@functools.cache
def drawn(name: str):
    tasks = [Prompt(*pair) for pair in zip(*requests(2, sources=1), strict=True)]
    return trainer(name).collect_rollout(PARAMS, tasks, 5)


def away_from_one(name: str, statistics, without: tuple[str, ...] = ()) -> float:
    """Largest |ratio - 1| over answers of a rollout that `statistics` reads again, some of the record left out."""
    learner, rollout = trainer(name), drawn(name)
    batch = next(learner._passes(rollout, np.zeros(len(rollout.answers), np.float32), np.array([0, 2, 4])))
    again = statistics(PARAMS, {key: value for key, value in batch.items() if key not in without}).log_probs
    return float(jnp.abs(jnp.expm1((again - batch["old"]) * batch["mask"])).max())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_ratio_before_the_first_update_is_one_whatever_is_sampled(name):
    assert away_from_one(name, trainer(name)._logprobs) < 1e-4
    trainer(name).check_logprobs(PARAMS, drawn(name))
    if name != "bare":  # the bare policy is another distribution
        bare = trainer("bare")._logprobs
        assert away_from_one(name, bare, without=("kept_mask", "free_tokens", "shifts")) > 0.01
        return
    grammar = copy.copy(trainer(name).grammar)  # and so is one that is allowed everything everywhere
    grammar.tables = grammar.tables._replace(legal=np.ones_like(grammar.tables.legal))
    options = trainer(name).options
    unmasked = functools.partial(policy_logprobs, CONFIG, grammar=grammar, options=options)
    assert away_from_one(name, jax.jit(unmasked)) > 0.01


@pytest.mark.parametrize("name", LEARNT)
def test_before_the_first_update_the_policy_is_the_reference(name):
    """What the gradient is computed from are the arrays that an ahead-of-time plan counts."""
    learner, rollout = trainer(name), drawn(name)
    batches = learner.prepare(rollout, scored_by(rollout))
    options = dataclasses.replace(learner.options, buckets=(batches[0]["tokens"].shape[1],))
    planned = rl_programs.batch_shapes(CONFIG, learner.placement.mesh, options, learner.placement.layout.exact)
    assert {key: (x.shape, x.dtype) for key, x in batches[0].items()} == {
        key: (x.shape, x.dtype) for key, x in planned.items()
    }
    assert ("kept_mask" in planned) == (name == "all") and ("free_tokens" in planned) == (name != "bare")
    _, metrics = learner.update(state_of(PARAMS), batches, check_ratio=True)
    assert float(metrics["max_ratio_deviation"]) < 1e-4
    assert abs(float(metrics["kl"][0])) < 1e-4


def test_entropies_are_of_the_tokens_that_the_model_chooses_text_and_image_apart():
    learner, rollout = trainer("bare"), drawn("bare")
    scored = scored_by(rollout)
    _, metrics = learner.update(state_of(PARAMS), learner.prepare(rollout, scored), check_ratio=False)
    sums = {"text": [0.0, 0], "image": [0.0, 0]}
    for row in np.flatnonzero(scored.used.reshape(-1)):
        answer = rollout.answer_tokens(row)
        legal = legal_mask(learner.grammar, answer, (2, 2))
        scores = log_softmax(np.where(legal, answer_logits(PARAMS, rollout.prompt(row), answer), -np.inf))
        for token, allowed, log_probs in zip(answer, legal, scores, strict=True):
            if allowed.sum() > 1:
                found = sums["image" if token >= learner.grammar.tokenizer.vocab.visual_start else "text"]
                found[0] -= (np.exp(log_probs[allowed]) * log_probs[allowed]).sum()
                found[1] += 1
    for kind, (total, count) in sums.items():
        assert count > 10 and float(metrics[f"{kind}_entropy"][1]) == count
        np.testing.assert_allclose(metrics[f"{kind}_entropy"][0], total, rtol=1e-4)


def test_a_changed_policy_is_compared_over_the_ids_that_were_kept():
    """Another model would keep other ids: without the record its ratio and KL would be 0 and infinite."""
    learner, rollout = trainer("all"), drawn("all")
    assert rollout.samples.kept is not None
    batches = learner.prepare(rollout, scored_by(rollout))
    _, metrics = learner.update(state_of(noisy_params(seed=1)), batches, check_ratio=False)
    kl = float(metrics["kl"][0]) / float(metrics["kl"][1])
    assert 0 < kl < 1e4 and np.isfinite(float(metrics["loss"][0]))


def test_a_rollout_that_did_not_record_what_was_kept_is_refused():
    learner, rollout = trainer("all"), drawn("all")
    forgot = dataclasses.replace(rollout, samples=rollout.samples._replace(kept=None))
    with pytest.raises(UserError):
        learner.prepare(forgot, scored_by(rollout))


def test_temperature_zero_is_refused():
    with pytest.raises(UserError):
        dataclasses.replace(trainer("bare").options, sampling=SamplingOptions(temperature=0))


def torch_models(folder):
    """The tiny decoder as transformers has it, twice."""
    hf.export_backbone(CONFIG, jax.tree.map(np.asarray, PARAMS), folder, model_type="qwen3")
    return [transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)]


def torch_objective(model, reference, name: str, scored: Scored):
    """The objective over a rollout's answers, written out one answer at a time."""
    options, loss_type = SETTINGS[name]
    learner, rollout = trainer(name), drawn(name)
    terms, tokens = [], 0
    tables, samples = learner.grammar.tables, rollout.samples
    for row in np.flatnonzero(scored.used.reshape(-1)):
        answer = torch.tensor(rollout.answer_tokens(row).astype(np.int64))
        legal = torch.tensor(np.asarray(tables.legal)[samples.rows[row, : len(answer)]][:, tables.class_of])
        visual = torch.tensor(np.asarray(tables.legal)[samples.rows[row, : len(answer)], 2])

        def log_probs(net, row=row, answer=answer, legal=legal, visual=visual):
            def scores(prompt):
                ids = torch.cat([torch.tensor(prompt.astype(np.int64)), answer])
                return net(ids[None]).logits[0, len(prompt) - 1 : -1]

            found = scores(rollout.prompt(row))
            for free, lengths in rollout.unconditional:
                p = row // rollout.group_size
                c, u = (torch.log_softmax(s, -1) for s in (found, scores(free[p, : lengths[p]])))
                found = torch.where(visual[:, None], u + options.guidance * (c - u), found)
            kept = legal
            if samples.kept is not None:
                bits = np.unpackbits(samples.kept[row, : len(answer)], axis=-1, count=CONFIG.vocab_size)
                kept = legal & torch.tensor(bits.astype(bool))
            found = torch.log_softmax((found / options.temperature).masked_fill(~kept, -torch.inf), -1)
            return torch.gather(found, 1, answer[:, None])[:, 0]

        new, old = log_probs(model), torch.tensor(samples.log_probs[row, : len(answer)])
        with torch.no_grad():
            gap = log_probs(reference)
        gap = gap - new
        gain = float(scored.advantages.reshape(-1)[row])
        ratio = torch.exp(new - old)
        per_token = 0.3 * (torch.exp(gap) - gap - 1) - torch.minimum(ratio * gain, torch.clamp(ratio, 0.8, 1.2) * gain)
        free = (legal.sum(1) > 1).float()  # tokens that the grammar forces do not count
        terms.append((per_token * free).sum() / {"grpo": free.sum(), "bnpo": 1, "dr_grpo": 50}[loss_type])
        tokens += free.sum()
    return sum(terms) / (tokens if loss_type == "bnpo" else len(terms))


@pytest.mark.parametrize("name", LEARNT)
def test_the_updates_gradient_is_torchs_through_the_whole_model(tmp_path, name):
    """An SGD step moves the parameters by minus the rate times the gradient of the objective.

    Ours comes of minibatches of three answers, the last not full; torch takes all answers at once.
    """
    learner, rollout = trainer(name), drawn(name)
    scored = scored_by(rollout)
    assert len(learner.prepare(rollout, scored)) == 2
    policy = noisy_params(seed=0)
    policy["embed"] = policy["embed"] + 0.02 * np.random.default_rng(1).normal(size=policy["embed"].shape).astype("f4")
    after, _ = learner.update(state_of(policy), learner.prepare(rollout, scored), check_ratio=False)
    moved = (np.asarray(policy["embed"]) - np.asarray(after.params["embed"])) / 0.5

    model, reference = torch_models(tmp_path / "model")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor(np.asarray(policy["embed"])[: CONFIG.vocab_size]))
    torch_objective(model, reference, name, scored).backward()
    expected = model.model.embed_tokens.weight.grad.numpy()
    np.testing.assert_allclose(moved[: CONFIG.vocab_size], expected, atol=2e-5 + 1e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-4


def test_a_rollout_is_learnt_from_twice(tmp_path, name="guided"):
    """Two steps of torch's SGD against two updates, the second of them with ratios that are not 1."""
    learner, rollout = copy.copy(trainer(name)), drawn(name)
    learner.options = dataclasses.replace(learner.options, num_iterations=2)
    scored = scored_by(rollout)
    after, metrics = learner.learn(state_of(PARAMS), rollout, scored, 0, on_policy=True)
    assert float(metrics["max_ratio_deviation"]) < 1e-4 < float(metrics["ratio_largest"])  # the second is off-policy
    model, reference = torch_models(tmp_path / "model")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch_objective(model, reference, name, scored).backward()
        optimizer.step()
    head = model.lm_head.weight.detach().numpy().T
    moved = head - np.asarray(PARAMS["lm_head"])[:, : CONFIG.vocab_size]
    found = np.asarray(after.params["lm_head"])[:, : CONFIG.vocab_size]
    np.testing.assert_allclose(found, head, atol=1e-5 + 2e-3 * np.abs(moved).max())
    assert np.abs(moved).max() > 1e-3


def test_rollouts_of_lower_precision_are_learnt_from_by_the_trainers_own_numbers(monkeypatch):
    """The ratio is 1 before the first update nevertheless; how far the sampler was away is measured and bounded."""
    learner = copy.copy(trainer("bare"))
    layout = RolloutLayout(CONFIG, learner.placement.mesh, LayoutOptions(dtype="bfloat16"))
    learner.placement = learner.placement._replace(layout=layout)
    assert trainer("bare").placement.layout.exact and not layout.exact
    tasks = [Prompt(*pair) for pair in zip(*requests(2), strict=True)]
    rollout = learner.collect_rollout(PARAMS, tasks, 5)
    learner.check_logprobs(PARAMS, rollout)
    _, metrics = learner.learn(state_of(PARAMS), rollout, scored_by(rollout), 0, on_policy=True)
    assert float(metrics["max_ratio_deviation"]) < 1e-4
    assert 1e-7 < float(metrics["sampler_kl"][0]) / float(metrics["sampler_kl"][1]) < 0.01
    batch = learner.prepare(rollout, scored_by(rollout), behaviour=PARAMS)[0]
    own = np.abs((np.asarray(batch["sampler"]) - np.asarray(batch["old"])) * batch["mask"]).max()
    assert 1e-4 < own < 0.5
    with pytest.raises(RuntimeError):  # weights that are no rounding of the policy's
        learner.check_logprobs(noisy_params(seed=1), rollout)
    monkeypatch.setattr("ivr_jax.training.policy_logprobs.SAMPLER_TOLERANCE", 1e-9)
    with pytest.raises(RuntimeError):
        learner.learn(state_of(PARAMS), rollout, scored_by(rollout), 0, on_policy=True)


def test_splits_deal_whole_groups_and_every_one_once():
    learner, rollout = copy.copy(trainer("bare")), drawn("bare")
    learner.options = dataclasses.replace(learner.options, num_minibatches=2)
    scored = scored_by(rollout)
    parts = split_groups(scored, 2, seed=0, step=3)
    assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(scored.used.reshape(-1)).tolist()
    assert all(len(set(part // rollout.group_size)) == 1 for part in parts)
    orders = set()
    for seed in range(8):  # the order of groups depends on the seed of the run
        orders.add(tuple(part[0] for part in split_groups(scored, 2, seed, step=3)))
    assert len(orders) == 2
    _, metrics = learner.learn(state_of(PARAMS), rollout, scored, 3, on_policy=True)
    assert float(metrics["loss"][1]) == scored.used.sum() and float(metrics["grad_norm"][1]) == 2
    assert float(metrics["ratio_largest"]) > float(metrics["max_ratio_deviation"])

