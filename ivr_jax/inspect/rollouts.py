"""A group of answers to one request of the micro-world, sampled, judged and compared as an RL step does it."""

from __future__ import annotations

import asyncio
import dataclasses

import jax

from ivr_jax.checkpoints.system import System
from ivr_jax.config import as_dataclass, load_config
from ivr_jax.errors import UserError
from ivr_jax.inspect.sources import Encoded, encode_rollout
from ivr_jax.inspect.tokens import Figures, Inspected, model_figures
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.rewards.judge import judge_answers
from ivr_jax.sampling.rollout import RolloutOptions, roll_out
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.scoring import score_rollout, token_advantages
from ivr_jax.training.stored_rollouts import INVALID, stored_answers
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.sampler import sample_task

CONFIG = "micro_rl"  # whose grammar and reward apply


def inspect_group(system: System, task: int, group_size: int, seed: int) -> list[Inspected]:
    """`group_size` answers to task number `task` of the world, each with its tokens' figures and its reward.

    Log-probabilities are the sampler's, entropies those of the model under the grammar; an answer's advantage is that
    of all its tokens.  Raises UserError for a model that does not speak the micro-world's language.
    """
    if system.meta.get("text_tokenizer") != "micro":
        raise UserError("rollouts are drawn in the micro-world, whose language this model does not speak.",
                        "Name a model trained there, or --checkpoint=micro.")  # fmt: skip
    config = load_config(CONFIG)
    made = sample_task(config.prompts.level, seed, task)
    grammar = Grammar(system.tokenizer, as_dataclass(GrammarOptions, config.grammar))
    options = RolloutOptions(_room(system, config.answer_length), group_size=group_size)
    rollout = roll_out(system, grammar, [made.sample], [made.images], jax.random.key(seed), options)
    reward = as_dataclass(RewardOptions, config.reward)
    judged = asyncio.run(judge_answers(WorldAnalyzer(), rollout.judgeable(), True, reward))
    scored = score_rollout(rollout, judged, reward)
    advantages = token_advantages(rollout, scored, GrpoOptions(), system.tokenizer.vocab.visual_start)
    stored = stored_answers(rollout, [made.sample], scored, advantages, range(group_size))
    found = []
    for number, answer in enumerate(stored):
        item = encode_rollout(answer, system, f"task {task}", number)
        truth = scored.judged[number].truth
        if answer.mode != INVALID:
            right = bool(truth) and truth[-1] is not None and truth[-1].passed
            item = dataclasses.replace(item, values={**item.values, "last image": "right" if right else "wrong"})
        figures = model_figures(system, grammar, item.tokens, item.answer_start, (0, 0))
        found.append(item.inspected(system, figures))
    return found


def _room(system: System, wanted: int) -> int:
    return min(wanted, system.config.max_position_embeddings - 192)  # the longest prompt of the world, rounded up


def with_model_figures(system: System, item: Encoded) -> Figures:
    """Log-probability and entropy of a stored answer under the model."""
    grammar = Grammar(system.tokenizer, dataclasses.replace(GrammarOptions(), follow_verdict=False))
    return model_figures(system, grammar, item.tokens, item.answer_start, (0, 0))
