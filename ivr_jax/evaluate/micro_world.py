"""Answers of a system to held-out prompts, judged: the input of `metrics.evaluate` and of the report."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ivr_jax.checkpoints.system import System
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.evaluate import typed
from ivr_jax.heartbeat import Heartbeat
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.report.answers import EvaluatedAnswer, make_answer
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.judge import Judged, components, judge_answers
from ivr_jax.sampling.batch import RolloutOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import Answer, Rollout, roll_out
from ivr_jax.trajectory import Reflection, Step, Trajectory
from ivr_jax.world import language
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.draws import Request
from ivr_jax.world.levels import level_of
from ivr_jax.world.sampler import Task, draw_held_out, sample_task
from ivr_jax.world.splits import SPLITS, split_task

_KIND_STREAM = 100  # streams of randomness from here on; those of the benchmark splits are below
MIXTURE = "mixture"  # the split that is drawn like training data


def held_out_tasks(config: Any) -> list[tuple[Task, str]]:
    """(task, split) of every held-out request.

    `config.prompts` of the training mixture with 1 to `config.most_edits` edits in turn, `config.each_split` of each
    benchmark split, and `config.each_kind` of one edit of each kind of the level ("kind/move" ...).  Those of the file
    `config.typed` come last and are not held out.
    """
    most = config.most_edits
    tasks = [
        (sample_task(config.level, config.seed, i, edits=1 + i % most, held_out=True), MIXTURE)
        for i in range(config.prompts)
    ]
    for split in SPLITS:
        tasks += [
            (split_task(split, config.level, config.seed, i), split) for i in range(config.each_split)
        ]
    for kind in level_of(config.level).all_kinds:
        tasks += [(_single_edit(kind, config.level, config.seed, i), f"kind/{kind}") for i in range(config.each_kind)]
    if config.typed:
        tasks += [(task, typed.TYPED) for task in typed.read_tasks(config.typed, config.level)]
    if not tasks:
        raise UserError("there are no prompts.", "Raise config.prompts or config.each_split, or set config.typed.")
    return tasks


def _single_edit(kind: str, level: int, seed: int, index: int) -> Task:
    """A held-out request of one edit of `kind`."""
    rules = level_of(level)
    request = Request(2 if kind in rules.reference_kinds else 1, (((kind, 1.0),),), rules.relational)
    stream = _KIND_STREAM + rules.all_kinds.index(kind)
    return draw_held_out(level, seed, index, f"kind/{kind}", stream, lambda rng, rules: request)


class Evaluated(NamedTuple):
    """Answers to held-out prompts, in order: as records with every image that they name, and as they were drawn.

    `rollout` holds one answer to each of `tasks`; `splits` says which part of the benchmark each belongs to.
    """

    answers: list[EvaluatedAnswer]
    images: dict[str, np.ndarray]
    tasks: list[Task]
    splits: list[str]
    rollout: Rollout


def run(system: System, config: Any) -> Evaluated:
    """Judged answers to `held_out_tasks`."""
    options = as_dataclass(SamplingOptions, config.sampling)
    rewards = as_dataclass(reward_functions.RewardOptions, config.reward)
    grammar = Grammar(system.tokenizer, as_dataclass(GrammarOptions, config.grammar))
    tasks, key = held_out_tasks(config), jax.random.key(config.seed)
    answers, images = [], {}
    with tqdm(total=len(tasks), desc="evaluate", unit="answer") as bar, Heartbeat(bar) as heartbeat:
        heartbeat.begin("drawing")
        rollout = roll_out(
            system,
            grammar,
            [t.sample for t, _ in tasks],
            [t.images for t, _ in tasks],
            key,
            RolloutOptions(config.answer_length, options, as_dataclass(EngineOptions, config.engine)),
            on_ended=bar.update,
        )
    judged = asyncio.run(judge_answers(WorldAnalyzer(), rollout.judgeable(), every_image=True, options=rewards))
    for (task, split), answer, error, verdict in zip(tasks, rollout.answers, rollout.errors, judged, strict=True):
        answers.append(to_answer(task, split, answer, error, verdict, rewards))
        images |= {**task.images, **(answer.images if answer else {})}
    return Evaluated(answers, images, [task for task, _ in tasks], [split for _, split in tasks], rollout)


def to_answer(
    task: Task,
    split: str,
    drawn: Answer | None,
    error: str,
    judged: Judged,
    rewards: reward_functions.RewardOptions,
) -> EvaluatedAnswer:
    """One judged answer as the record that metrics and report read."""
    if drawn is None:
        return EvaluatedAnswer(task.sample, None, error, rewards={"format": 0.0}, split=split)
    trajectory = drawn.trajectory
    parts = {name: value for name, value in components(judged, rewards).items() if value is not None}
    exact = WorldAnalyzer().exact_all(
        [task.sample] * len(trajectory.images), [drawn.images[name] for name in trajectory.images]
    )
    return make_answer(
        trajectory,
        drawn.segments,
        truth=judged.truth,
        exact=exact,
        rewards=parts,
        split=split,
        garbled=garbled_texts(trajectory),
    )


def garbled_texts(trajectory: Trajectory) -> list[str]:
    """Names of the segments ("S2", "R1", "E1") whose text is no sentence of the micro-world's language."""
    garbled = []
    for number, round_ in enumerate(trajectory.rounds, 1):
        cause, observation = round_.cause, round_.evaluation.observation
        if isinstance(cause, Step) and language.parse_step(cause.instruction) is None:
            garbled.append(f"S{number}")
        if isinstance(cause, Reflection):
            faults = language.parse_failure_analysis(cause.failure_analysis)
            if faults is None or language.parse_plan(cause.improvement_plan) is None:
                garbled.append(f"R{number - 1}")
        if observation and language.parse_observation(observation) is None:
            garbled.append(f"E{number}")
    return garbled
