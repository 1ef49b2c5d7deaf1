"""GRPO: groups of trajectories by the model itself, judged, compared inside the group (paper, section on RL).

What the paper leaves open, and what is done here (all in the config):
  * an answer without intermediate text has no R_s: the other weights are rescaled (`reward.renormalise`);
  * rollouts sample the bare policy (temperature 1, no guidance), so the update is on-policy;
  * the reference of the KL term is the checkpoint that the run starts from;
  * the objective is averaged per answer, then over answers (`grpo.normalisation`), and clipped at 0.2.
One sampling contract: the trainer replays the sampler's grammar mask and options (`chain.log_probabilities`), so the
importance ratio before the first update is 1; the run checks that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivr_jax import sharding
from ivr_jax import system as systems
from ivr_jax.config import as_dataclass
from ivr_jax.construct.interfaces import Analyzer, Images
from ivr_jax.data import pipeline
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import Grammar, GrammarOptions, Tables
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.judge import Judged, judge_answers
from ivr_jax.sampling.chain import SamplingOptions
from ivr_jax.sampling.rollout import Rollout, roll_out
from ivr_jax.training.loop import Stage
from ivr_jax.training.losses import GrpoOptions, grpo_loss, token_statistics
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.state import TrainState, place, updated
from ivr_jax.trajectory import Mode, Sample
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.sampler import sample_task

RATIO_TOLERANCE = 1e-3


class Prompt(NamedTuple):
    """A request and the pixels of its sources by name."""

    sample: Sample
    images: Images


@dataclasses.dataclass(frozen=True)
class Options:
    """The typed parts of an rl config."""

    sampling: SamplingOptions
    grammar: GrammarOptions
    reward: reward_functions.RewardOptions
    grpo: GrpoOptions
    group: int
    answer_length: int
    minibatch: int
    buckets: tuple[int, ...]
    updates: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Scored:
    """A rollout with rewards; P prompts, M members.  All arrays [P, M]."""

    judged: list[Judged]
    components: dict[str, np.ndarray]
    images: np.ndarray
    present: np.ndarray
    bonus: np.ndarray
    advantages: np.ndarray
    used: np.ndarray


def score(rollout: Rollout, judged: Sequence[Judged], group: int, options: reward_functions.RewardOptions) -> Scored:
    """Rewards, bonus and advantages of a rollout's answers (P * group of them, groups adjacent)."""

    def grid(values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float32).reshape(-1, group)

    present = grid([j.present for j in judged]).astype(bool)
    has_step = grid([j.step is not None for j in judged]).astype(bool)
    axes = np.asarray([j.scores if j.scores is not None else (1.0,) * 4 for j in judged], np.float32).reshape(
        -1, group, 4
    )
    components = {
        "outcome": np.asarray(reward_functions.outcome(axes)),
        "format": grid([j.format for j in judged]),
        "step": grid([j.step or 0.0 for j in judged]),
        "has_step": has_step,
    }
    total = reward_functions.total(components["outcome"], components["format"], components["step"], has_step, options)
    images = grid([len(a.trajectory.rounds) if a else 0 for a in rollout.answers]).astype(np.int32)
    bonus = reward_functions.complexity_bonus(total, images, present, options)
    advantages, used = reward_functions.advantages(total + bonus, present, options)
    components["total"] = np.asarray(total)
    return Scored(list(judged), components, images, present, *map(np.asarray, (bonus, advantages, used)))


class Trainer:
    """The functions of one RL run: rollout, judgement, update.  Holds no state that learning changes."""

    def __init__(
        self,
        system: systems.System,
        analyzer: Analyzer,
        options: Options,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh | None = None,
        placed: TrainState | None = None,
    ):
        """`mesh` and `placed` (shardings of the state): where training goes on, one device by default."""
        self.system, self.analyzer, self.options, self.optimizer = system, analyzer, options, optimizer
        self.grammar = Grammar(system.tokenizer, options.grammar)
        # The format reward judges control flow even where the decoder does not enforce it.
        self.strict = Grammar(system.tokenizer, dataclasses.replace(options.grammar, follow_verdict=True))
        self.reference = system.params
        self.mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
        whole, gradients = sharding.whole(self.mesh), placed and placed.params
        self._statistics = jax.jit(self._statistics_of)
        self._gradient = jax.jit(jax.value_and_grad(self._loss, has_aux=True), out_shardings=(whole, gradients))
        apply = functools.partial(updated, optimizer=optimizer)
        self._apply = jax.jit(apply, donate_argnums=0, out_shardings=(placed, whole))

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(
        self, state: TrainState, tasks: Sequence[Prompt], step: int, key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        """Rolls out, judges and updates once per `options.updates`; returns the metrics of the step."""
        clock = time.perf_counter()
        rollout = self.rollout(state.params, tasks, jax.random.fold_in(key, step))
        rolled = time.perf_counter()
        judged = asyncio.run(judge_answers(self.analyzer, rollout.judgeable()))
        scored = score(rollout, judged, self.options.group, self.options.reward)
        scored_at = time.perf_counter()
        for update in range(self.options.updates):
            state, learned = self.update(state, rollout, scored, check_ratio=update == 0)
        seconds = {
            "rollout_seconds": rolled - clock,
            "judge_seconds": scored_at - rolled,
            "update_seconds": time.perf_counter() - scored_at,
        }
        return state, {**_summary(rollout, scored), **learned, **seconds}

    def rollout(self, params: Any, tasks: Sequence[Prompt], key: jax.Array) -> Rollout:
        """`group` answers to each task by the current policy."""
        system = dataclasses.replace(self.system, params=params)
        options = self.options
        return roll_out(
            system,
            self.grammar,
            [t.sample for t in tasks],
            [t.images for t in tasks],
            key,
            options.answer_length,
            options.sampling,
            options.group,
            strict=self.strict,
        )

    def update(
        self, state: TrainState, rollout: Rollout, scored: Scored, check_ratio: bool
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step over all answers, in minibatches of similar length that add up exactly."""
        used, advantages = scored.used.reshape(-1), scored.advantages.reshape(-1)
        rows = np.flatnonzero(used)
        if len(rows) == 0:
            return state, {"skipped_updates": 1.0}
        rows = rows[np.argsort(rollout.total_lengths[rows], kind="stable")]
        gradients, total, sums = None, None, None
        for start in range(0, len(rows), self.options.minibatch):
            batch = self._batch(rollout, advantages, rows[start : start + self.options.minibatch])
            batch["reference"] = self._statistics(self.reference, batch).log_probs
            (_, (parts, extra)), gradient = self._gradient(state.params, self.grammar.tables, batch)
            if gradients is None:
                gradients, total, sums = gradient, parts, extra
            else:
                add = functools.partial(jax.tree.map, jnp.add)
                deviation = jnp.maximum(sums["ratio_deviation"], extra["ratio_deviation"])
                gradients, total, sums = (
                    add(gradients, gradient),
                    add(total, parts),
                    {**add(sums, extra), "ratio_deviation": deviation},
                )
        if check_ratio and float(sums["ratio_deviation"]) > RATIO_TOLERANCE:
            raise RuntimeError(
                f"importance ratio deviates from 1 by {float(sums['ratio_deviation']):.2e} before the first update: "
                "the trainer does not replay the sampler's distribution"
            )
        state, norm = self._apply(state, gradients, total[1])
        tokens = sums["tokens"]
        return state, {
            "loss": total,
            "kl": (sums["kl"], tokens),
            "clip_fraction": (sums["clipped"], tokens),
            "grad_norm": norm,
            "ratio_deviation": sums["ratio_deviation"],
            "text_entropy": (sums["text_entropy"], sums["text_tokens"]),
            "image_entropy": (sums["image_entropy"], sums["image_tokens"]),
            "skipped_updates": 0.0,
        }

    # -- jitted parts -----------------------------------------------------------------------------------------------

    def _batch(self, rollout: Rollout, advantages: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        """Rows of a rollout as one padded batch: prompt and answer joined without a gap, in the smallest bucket."""
        longest = int(rollout.total_lengths[rows].max())
        fits = [bucket for bucket in self.options.buckets if bucket >= longest]
        if not fits:
            raise UserError(
                f"an answer and its prompt take {longest} tokens; the largest bucket is {max(self.options.buckets)}.",
                "Add a larger bucket to config.buckets, or lower config.answer_length.",
            )
        size, length = self.options.minibatch, min(fits)
        names = ("tokens", "rows", "old", "mask")
        batch = {name: np.zeros((size, length), np.float32 if name in ("old", "mask") else np.int32) for name in names}
        batch["advantages"] = np.zeros(size, np.float32)
        for i, row in enumerate(rows):
            prompt, answer = rollout.prompt(row), rollout.answer_tokens(row)
            a, b = len(prompt), len(prompt) + len(answer)
            batch["tokens"][i, :b] = np.concatenate([prompt, answer])
            batch["rows"][i, a:b] = rollout.samples.rows[row, : b - a]
            batch["old"][i, a:b] = rollout.samples.log_probs[row, : b - a]
            batch["mask"][i, a:b] = 1.0
            batch["advantages"][i] = advantages[row]
        mine = sharding.local_rows(self.mesh, size)
        return sharding.global_batch(self.mesh, {name: x[mine] for name, x in batch.items()}, size)

    def _statistics_of(self, params: Any, batch: dict[str, jax.Array]):
        """Statistics of every token given the ones before it, [B, T]; position 0 means nothing."""
        config, tokens = self.system.config, batch["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = backbone.apply(config, params, tokens, positions)
        head = backbone.lm_head(config, params)
        tables = Tables(*map(jnp.asarray, self.grammar.tables))
        found = token_statistics(
            hidden,
            head,
            jnp.roll(tokens, -1, 1),
            self.options.chunk,
            jnp.roll(batch["rows"], -1, 1),
            tables,
            self.options.sampling,
            vocab_size=config.vocab_size,
        )
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), found)

    def _loss(self, params: Any, tables: Tables, batch: dict[str, jax.Array]):
        found = self._statistics_of(params, batch)
        total, denominator, sums = grpo_loss(
            found.log_probs, batch["old"], batch["reference"], batch["advantages"], batch["mask"], self.options.grpo
        )
        choices = batch["mask"] * (jnp.asarray(tables.legal).sum(1)[batch["rows"]] > 0)
        image = choices * (batch["tokens"] >= self.system.tokenizer.vocab.visual_start)
        text = choices - image
        sums |= {
            "image_entropy": (found.entropy * image).sum(),
            "image_tokens": image.sum(),
            "text_entropy": (found.entropy * text).sum(),
            "text_tokens": text.sum(),
        }
        return total, ((total, denominator), sums)


def _summary(rollout: Rollout, scored: Scored) -> dict[str, Any]:
    """Metrics of one rollout; pairs are (sum, denominator)."""
    present = scored.present
    members = float(present.sum())

    def mean(values: np.ndarray, where: np.ndarray = present) -> tuple[float, float]:
        return float((values * where).sum()), float(where.sum())

    parts = scored.components
    reward = parts["total"] + scored.bonus
    contrast = [np.ptp(r[p]) > 1e-6 if p.sum() > 1 else False for r, p in zip(reward, present, strict=True)]
    modes = [a.trajectory.mode if a else None for a in rollout.answers]
    shares = {f"mode_{mode.value}": (float(sum(m is mode for m in modes)), float(len(modes))) for mode in Mode}
    return {
        "reward": mean(parts["total"]),
        "outcome": mean(parts["outcome"]),
        "images": mean(scored.images),
        "format": mean(parts["format"]),
        "step_reward": mean(parts["step"], present & parts["has_step"]),
        "bonus": mean(scored.bonus),
        **shares,
        "groups_with_contrast": (float(sum(contrast)), float(len(contrast))),
        "work_tokens": float(rollout.samples.lengths.sum()),
        "missing": float(present.size) - members,
        "answer_tokens": (float(rollout.samples.lengths.sum()), float(len(rollout.answers))),
    }


# -- the stage ------------------------------------------------------------------------------------------------------


def prompt_source(config: Any, seed: int) -> pipeline.Indexed:
    """Prompts: tasks of the micro-world (`source` "world"), or the samples of a trajectory dataset."""
    if config.source == "world":
        return pipeline.Indexed(functools.partial(_world_prompt, config.level, seed), config.size)
    dataset = TrajectoryDataset(config.source)
    return pipeline.Indexed(functools.partial(_stored_prompt, dataset), len(dataset))


def _world_prompt(level: int, seed: int, index: int) -> Prompt:
    task = sample_task(level, seed, index)
    return Prompt(task.sample, task.images)


def _stored_prompt(dataset: TrajectoryDataset, index: int) -> Prompt:
    sample = dataset[index].sample
    return Prompt(sample, {name: dataset.image(name) for name in sample.sources})


def build(config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of an rl config."""
    if not config.init:
        raise UserError("rl starts from a trained model.", "Give --config.init=WORKDIR of an sft run.")
    sampling = as_dataclass(SamplingOptions, config.sampling)
    if sampling.passes:
        raise UserError("rl learns from the bare policy, without guidance.", "Give --config.sampling.guidance=1.")
    if jax.process_count() > 1:
        raise UserError("rl runs as one process.", "Start one process that sees all devices of its machine.")
    sharding.check_batch(mesh, config.minibatch, "config.minibatch")
    sharding.check_batch(mesh, config.prompts_per_step * config.group, "config.prompts_per_step x config.group")
    system = systems.load(config.init, config.image_tokenizer or None, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates)
    options = Options(
        sampling,
        as_dataclass(GrammarOptions, config.grammar),
        as_dataclass(reward_functions.RewardOptions, config.reward),
        as_dataclass(GrpoOptions, config.grpo),
        config.group,
        config.answer_length,
        config.minibatch,
        tuple(config.buckets),
        config.updates,
        config.chunk,
    )
    params = jax.tree.map(jnp.copy, system.params)  # the reference stays; the state is donated
    state, (placed, _) = place(mesh, backbone.param_axes(system.config), params, optimizer)
    trainer = Trainer(system, WorldAnalyzer(), options, optimizer, mesh, placed)
    key = jax.random.key(config.seed)
    data = pipeline.indexed_batches(
        prompt_source(config.prompts, config.prompts.seed), config.prompts_per_step, config.seed, collate=list
    )
    meta = {**system.meta, "run": config.to_dict()}
    return Stage(
        state,
        data,
        lambda state, tasks, step: trainer.step(state, tasks, step, key),
        meta,
        zero_gradient=False,
    )
