"""Loss, KL, clip fraction and advantages against the code of TRL's GRPO trainer on the same numbers.

TRL's trainer needs a model, a tokenizer and a dataset to be built; here its own methods run on stand-ins that supply
the numbers alone.
"""

from __future__ import annotations

import collections
import inspect
import textwrap
import types

import jax
import numpy as np
import pytest

from ivr_jax.rewards.functions import RewardOptions, advantages
from ivr_jax.training.losses import GrpoOptions, grpo_loss

torch = pytest.importorskip("torch", reason="the independent reference is a test extra")

CLIP_LOW, CLIP_HIGH, KL, LONGEST, CAP = 0.15, 0.3, 0.04, 9, 1.1
LOSSES = ("grpo", "bnpo", "dr_grpo")


def trl() -> types.ModuleType:
    """Imported by the tests that need it: it takes seconds, which whoever runs other tests need not wait for."""
    return pytest.importorskip("trl.trainer.grpo_trainer", reason="the independent reference is a test extra")


def numbers():
    """6 answers of up to 9 tokens, every one taking part: ratios inside and outside the clip on both sides."""
    rng = np.random.default_rng(3)
    old, reference = rng.normal(-2, 1, (2, 6, LONGEST)).astype(np.float32)
    new = old + rng.normal(0, 0.35, (6, LONGEST)).astype(np.float32)
    mask = (np.arange(LONGEST) < np.array([9, 1, 4, 7, 2, 9])[:, None]).astype(np.float32)
    return new, old, reference, rng.normal(0, 1, 6).astype(np.float32), mask


class Accelerator:
    """One process."""

    num_processes, sync_gradients = 1, True
    gather = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def sampler_numbers() -> np.ndarray:
    """What a sampler of lower precision noted; some tokens weigh more than CAP."""
    _, old, _, _, mask = numbers()
    return (old + np.random.default_rng(5).normal(0, 0.2, old.shape) * mask).astype(np.float32)


def theirs(loss_type: str, corrected: bool = False):
    """Loss of `GRPOTrainer._compute_loss`, its gradient by the log-probabilities, and the metrics that it logged."""
    new, old, reference, gains, mask = (torch.tensor(x) for x in numbers())
    new.requires_grad_(True)
    metrics = {"train": collections.defaultdict(list)}
    stand_in = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=KL, loss_type=loss_type, epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH, use_vllm=corrected, vllm_importance_sampling_correction=corrected,
        max_completion_length=LONGEST, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=metrics, accelerator=Accelerator(), model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )  # fmt: skip
    prompt = torch.zeros((6, 2), dtype=torch.int64)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": torch.zeros(6, LONGEST).long(),
        "completion_mask": mask, "advantages": gains, "old_per_token_logps": old, "ref_per_token_logps": reference,
    }  # fmt: skip
    if corrected:  # as `_generate_and_score_completions` makes it in the mode "token_truncate"
        inputs["importance_sampling_ratio"] = torch.exp((old - torch.tensor(sampler_numbers())) * mask).clamp(max=CAP)
    loss = trl().GRPOTrainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    return loss.item(), new.grad.numpy(), metrics["train"]


@pytest.mark.parametrize("corrected", [False, True], ids=["", "sampler of lower precision"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradient_kl_and_clip_fraction_are_trls(loss_type, corrected):
    options = GrpoOptions(CLIP_LOW, CLIP_HIGH, KL, loss_type, LONGEST, CAP)
    new, old, reference, gains, mask = numbers()
    sampler = sampler_numbers() if corrected else None

    def ours(new):
        total, denominator, sums = grpo_loss(new, old, reference, gains, mask, options, sampler)
        return total / denominator, sums

    (loss, sums), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(new)
    expected, expected_gradient, metrics = theirs(loss_type, corrected)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    np.testing.assert_allclose(sums["kl"] / sums["tokens"], metrics["kl"][0], atol=1e-5)
    clipped = metrics["clip_ratio/region_mean"][0]
    assert clipped > 0
    np.testing.assert_allclose(sums["clipped"] / sums["tokens"], clipped, atol=1e-6)


def their_advantages(rewards: np.ndarray, scale: str) -> np.ndarray:
    """TRL's own lines between the rewards of all functions and the advantages, run on one function's rewards.

    NaN is a reward that is missing.
    """
    source = inspect.getsource(trl().GRPOTrainer._generate_and_score_completions)
    start = source.index("        unscorable_mask = torch.isnan")
    end = source.index("advantages = torch.nan_to_num(advantages, nan=0.0)")
    trainer = types.SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", reward_weights=torch.ones(1), scale_rewards=scale
    )
    names = {"torch": torch, "nanstd": trl().nanstd, "self": trainer, "device": "cpu",
             "num_generations": rewards.shape[1], "rewards_per_func": torch.tensor(rewards).reshape(-1, 1)}  # fmt: skip
    exec(textwrap.dedent(source[start:end]), names)
    return torch.nan_to_num(names["advantages"], nan=0.0).numpy().reshape(rewards.shape)


@pytest.mark.parametrize(("divide", "scale"), [(True, "group"), (False, "none")])
def test_advantages_are_trls_also_where_judgements_are_missing(divide, scale):
    rng = np.random.default_rng(0)
    rewards = rng.uniform(0, 2, (5, 8)).astype(np.float32)
    rewards[1, [0, 3, 4]] = np.nan
    rewards[2] = 0.5  # no contrast; 0.5 has an exact mean there too (ours is exact for any value)
    present = ~np.isnan(rewards)
    options = RewardOptions(divide_by_std=divide, std_floor=1e-4)
    found, used = advantages(np.where(present, rewards, 5.0).astype(np.float32), present, options)
    np.testing.assert_allclose(found, their_advantages(rewards, scale), atol=1e-5)
    np.testing.assert_array_equal(used, present)
