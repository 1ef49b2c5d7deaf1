"""GRPO: groups of trajectories by the model itself, judged, compared inside the group (paper, section on RL).

What the paper leaves open, and what is done here (all in the config):
  * an answer without intermediate text has no R_s: the other weights are rescaled (`reward.renormalise`);
  * rollouts sample the bare policy (temperature 1, no guidance) unless `sampling` says otherwise;
  * the reference of the KL term is the checkpoint that the run starts from;
  * the objective is averaged per answer, then over answers (`grpo.normalisation`), and clipped at 0.2.

One sampling contract: the policy *is* the sampled distribution.  Policy, sampler and reference are all compared under
the sampler's grammar mask and options (`chain.log_probabilities`): guidance runs its second pass, and top-k and top-p
keep the ids that they kept when the answer was drawn.  So the importance ratio before the first update is 1, and the
run checks that.

With `overlap`, the next rollout is drawn while the judge still looks at the last one.  It then comes from the policy of
one update earlier; the ratio is taken against the log-probabilities stored with it, which is what makes that sound.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivr_jax import sharding
from ivr_jax import system as systems
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.evaluation.gallery import Shelf, Shown
from ivr_jax.evaluation.report import write_report
from ivr_jax.models import backbone
from ivr_jax.protocol.grammar import Grammar, GrammarOptions, Tables
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.panel import Judge, Verdicts
from ivr_jax.sampling.chain import SamplingOptions
from ivr_jax.sampling.rollout import Rollout, roll_out
from ivr_jax.sampling.sampler import EngineOptions
from ivr_jax.training.loop import Stage
from ivr_jax.training.losses import GrpoOptions, grpo_loss, token_statistics
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.prompts import Prompt, PromptIterator, SameSize, Tasks, prompt_source
from ivr_jax.training.referee import make_judge
from ivr_jax.training.scoring import Scored, score, shown_answers, summary
from ivr_jax.training.state import TrainState, place, updated
from ivr_jax.training.watch import Watch, WatchOptions

RATIO_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
    """The typed parts of an rl config.

    Attributes:
      group: M, answers to a prompt.
      answer_length: most tokens of an answer.
      minibatch: answers in one forward and backward pass; gradients of all passes of an update add up exactly.
      buckets: lengths that answers with their prompts are padded to.
      updates: times that a rollout is learnt from; splits: optimiser steps each time, on disjoint parts of the groups.
      chunk: tokens for which the vocabulary stands whole.
      overlap: draw the next rollout while the last one is judged.
      check_every: steps between checks of the judge, 0 for none.
      gallery_every, gallery_answers: steps between galleries, 0 for none, and how many answers one shows.
    """

    sampling: SamplingOptions
    engine: EngineOptions
    grammar: GrammarOptions
    reward: reward_functions.RewardOptions
    grpo: GrpoOptions
    group: int
    answer_length: int
    minibatch: int
    buckets: tuple[int, ...]
    updates: int
    chunk: int
    splits: int = 1
    overlap: bool = False
    check_every: int = 0
    gallery_every: int = 0
    gallery_answers: int = 16

    def __post_init__(self) -> None:
        if 0 in (self.sampling.temperature, self.sampling.image_temperature):
            raise UserError("rl cannot learn at temperature 0: nothing is left to chance.", "Give a temperature > 0.")


class AheadState(NamedTuple):
    """A `TrainState` with the parameters before the last update, which drew the rollout that is learnt from next."""

    params: Any
    opt_state: Any
    previous: Any


class Pending(NamedTuple):
    """A rollout whose judgement is on its way."""

    rollout: Rollout
    verdicts: concurrent.futures.Future[Verdicts]
    seconds: float


class Trainer:
    """The functions of one RL run: rollout, judgement, update.

    It holds nothing that learning changes but `watch` and, with `overlap`, the rollout drawn ahead: a resumed run draws
    that one again from `AheadState.previous`.
    """

    def __init__(
        self,
        system: systems.System,
        judge: Judge,
        options: Options,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh | None = None,
        placed: TrainState | None = None,
        watch: Watch | None = None,
        gallery: pathlib.Path | None = None,
        steps: int | None = None,
    ):
        """`mesh` and `placed` (shardings of the state): where training goes on, one device by default."""
        self.system, self.judge, self.options, self.optimizer = system, judge, options, optimizer
        self.watch = watch or Watch(WatchOptions(), options.grammar.modes)
        self.gallery, self.steps = gallery, steps
        self.grammar = Grammar(system.tokenizer, options.grammar)
        # The format reward judges control flow even where the decoder does not enforce it.
        self.strict = Grammar(system.tokenizer, dataclasses.replace(options.grammar, follow_verdict=True))
        self.reference = system.params
        self._pending: Pending | None = None
        self.mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
        whole, gradients = sharding.whole(self.mesh), placed and placed.params
        self._statistics = jax.jit(self._statistics_of)
        self._gradient = jax.jit(jax.value_and_grad(self._loss, has_aux=True), out_shardings=(whole, gradients))
        apply = functools.partial(updated, optimizer=optimizer)
        donated = () if options.overlap else (0,)  # the parameters stay, to tell a resumed run what drew the rollout
        self._apply = jax.jit(apply, donate_argnums=donated, out_shardings=(placed, whole))

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, state: Any, tasks: Tasks, step: int, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        """Rolls out, judges and updates; returns the metrics of the step.  `overlap` makes the state an AheadState."""
        if self.options.overlap:
            pending, mine, began = self._drawn_ahead(state, tasks, step, key)
        else:
            pending = self.draw(state.params, tasks.now, step, key)
            mine, began = True, time.perf_counter()
        verdicts = pending.verdicts.result()
        waited = time.perf_counter() - began
        scored = score(pending.rollout, verdicts.judged, self.options.group, self.options.reward)
        gone = int(scored.present.size - scored.present.sum())
        self.watch.count_missing(gone, scored.present.size, verdicts.usage.reasons)
        clock = time.perf_counter()
        learner = TrainState(state.params, state.opt_state)
        previous = state.params
        learner, learned = self.learn(learner, pending.rollout, scored, step, check_ratio=mine)
        metrics = {
            **summary(pending.rollout, scored),
            **pending.rollout.usage.metrics(),
            **verdicts.usage.metrics(),
            **verdicts.checks,
            **learned,
            "rollout_seconds": pending.seconds,
            "judge_seconds": verdicts.seconds,
            "judge_wait_seconds": waited,
            "update_seconds": time.perf_counter() - clock,
        }
        metrics |= self.watch.observe(step + 1, metrics)
        if self.gallery and self.options.gallery_every and (step + 1) % self.options.gallery_every == 0:
            self._show(pending.rollout, [t.sample for t in tasks.now], scored, step + 1)
        state = AheadState(learner.params, learner.opt_state, previous) if self.options.overlap else learner
        return state, metrics

    def _drawn_ahead(self, state: AheadState, tasks: Tasks, step: int, key: jax.Array) -> tuple[Pending, bool, float]:
        """This step's rollout, after the next one was drawn, whether it is on-policy, and when waiting began."""
        first = self._pending is None
        pending = self.draw(state.previous, tasks.now, step, key) if first else self._pending
        if first and step:  # off-policy already, so the update cannot check the ratio
            self.check_replay(state.previous, pending.rollout)
        if self.steps is not None and step + 1 >= self.steps:
            self._pending = None
            return pending, step == 0, time.perf_counter()
        ahead = self.roll(state.params, tasks.upcoming, step + 1, key)
        began = time.perf_counter()
        pending.verdicts.result()  # one submission at a time
        self._pending = self._submit(*ahead, step + 1)
        return pending, step == 0, began

    def draw(self, params: Any, tasks: Sequence[Prompt], step: int, key: jax.Array) -> Pending:
        """The rollout of `step`, on its way to the judge."""
        return self._submit(*self.roll(params, tasks, step, key), step)

    def roll(self, params: Any, tasks: Sequence[Prompt], step: int, key: jax.Array) -> tuple[Rollout, float]:
        """The rollout of `step`, and how long it took."""
        clock = time.perf_counter()
        rollout = self.rollout(params, tasks, jax.random.fold_in(key, step))
        return rollout, time.perf_counter() - clock

    def _submit(self, rollout: Rollout, seconds: float, step: int) -> Pending:
        every = self.options.check_every
        checked = bool(every) and (step + 1) % every == 0
        return Pending(rollout, self.judge.submit(rollout.judgeable(), self.formats(rollout), checked), seconds)

    def formats(self, rollout: Rollout) -> np.ndarray:
        """R_f float32 [P * M]."""
        free = np.zeros(len(rollout.answers), np.int32)
        start = self.strict.initial(free, free)
        return np.asarray(reward_functions.format_reward(self.strict.tables, start, rollout.samples.tokens))

    def rollout(self, params: Any, tasks: Sequence[Prompt], key: jax.Array) -> Rollout:
        """`group` answers to each task by the policy `params`."""
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
            engine=options.engine,
        )

    # -- learning ---------------------------------------------------------------------------------------------------

    def learn(
        self, state: TrainState, rollout: Rollout, scored: Scored, step: int, check_ratio: bool
    ) -> tuple[TrainState, dict[str, Any]]:
        """`updates` times `splits` optimiser steps on one rollout."""
        parts = [self.prepare(rollout, scored, rows) for rows in self._split(scored, step)]
        found: list[dict[str, Any]] = []
        for update in range(self.options.updates):
            for part, batches in enumerate(parts):
                state, metrics = self.update(state, batches, check_ratio and update == part == 0)
                found.append(metrics)
        return state, _joined(found)

    def _split(self, scored: Scored, step: int) -> list[np.ndarray]:
        """The rows that take part, dealt by whole groups into `splits` parts of about equal numbers of groups."""
        groups = np.arange(len(scored.used))
        if self.options.splits > 1:
            groups = np.random.default_rng((step, 0x5011)).permutation(groups)
        rows = np.arange(scored.used.size).reshape(scored.used.shape)
        return [rows[part][scored.used[part]] for part in np.array_split(groups, self.options.splits)]

    def prepare(self, rollout: Rollout, scored: Scored, rows: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Minibatches of similar length of the members that take part, with the reference's log-probabilities."""
        if self.options.sampling.truncates and rollout.samples.kept is None:
            raise UserError("top-k or top-p is on, but the rollout did not record which ids were kept.",
                            "Switch them off in config.sampling.")
        rows = np.flatnonzero(scored.used.reshape(-1)) if rows is None else rows
        rows = rows[np.argsort(rollout.total_lengths[rows], kind="stable")]
        batches = []
        for start in range(0, len(rows), self.options.minibatch):
            batch = self._batch(rollout, scored.advantages.reshape(-1), rows[start : start + self.options.minibatch])
            batch["reference"] = self._statistics(self.reference, batch).log_probs
            batches.append(batch)
        return batches

    def update(
        self, state: TrainState, batches: Sequence[Mapping[str, Any]], check_ratio: bool
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step over minibatches that add up exactly."""
        if not batches:
            return state, {"skipped_updates": 1.0}
        gradients, total, sums = None, None, None
        for batch in batches:
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
        if check_ratio:
            _check_ratio(float(sums["ratio_deviation"]))
        state, norm = self._apply(state, gradients, total[1])
        tokens = sums["tokens"]
        return state, {
            "loss": total,
            "kl": (sums["kl"], tokens),
            "clip_fraction": (sums["clipped"], tokens),
            "ratio": (sums["ratio"], tokens),
            "old_kl": (sums["old_kl"], tokens),
            "grad_norm": (norm, 1.0),
            "ratio_deviation": sums["ratio_deviation"],
            "text_entropy": (sums["text_entropy"], sums["text_tokens"]),
            "image_entropy": (sums["image_entropy"], sums["image_tokens"]),
            "skipped_updates": 0.0,
        }

    def check_replay(self, params: Any, rollout: Rollout) -> None:
        """Raises RuntimeError when `params`, which drew the rollout, do not give its log-probabilities again."""
        rows = np.arange(min(self.options.minibatch, len(rollout.answers)))
        batch = self._batch(rollout, np.zeros(len(rollout.answers), np.float32), rows)
        again = self._statistics(params, batch).log_probs
        _check_ratio(float((jnp.abs(jnp.exp(again - batch["old"]) - 1) * batch["mask"]).max()))

    # -- jitted parts -----------------------------------------------------------------------------------------------

    def _batch(self, rollout: Rollout, advantages: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        """Rows of a rollout as one padded batch: prompt and answer joined without a gap, in the smallest bucket."""
        samples, passes = rollout.samples, rollout.unconditional
        prompts = np.max([rollout.prompt_lengths, *(lengths for _, lengths in passes)], axis=0)
        longest = int((prompts[rows // rollout.group] + samples.lengths[rows]).max())
        fits = [bucket for bucket in self.options.buckets if bucket >= longest]
        if not fits:
            raise UserError(
                f"an answer and its prompt take {longest} tokens; the largest bucket is {max(self.options.buckets)}.",
                "Add a larger bucket to config.buckets, or lower config.answer_length.",
            )
        size, length = self.options.minibatch, min(fits)
        kinds = {"tokens": np.int32, "rows": np.int32, "old": np.float32, "mask": np.float32}
        batch = {name: np.zeros((size, length), kind) for name, kind in kinds.items()}
        batch["advantages"] = np.zeros(size, np.float32)
        if passes:  # the same answer after each unconditional prompt, and how much earlier or later it begins there
            batch["free_tokens"] = np.zeros((size, len(passes), length), np.int32)
            batch["shifts"] = np.zeros((size, len(passes)), np.int32)
        if samples.kept is not None:
            batch["kept"] = np.zeros((size, length, samples.kept.shape[-1]), np.uint8)
        for i, row in enumerate(rows):
            prompt, answer = rollout.prompt(row), rollout.answer_tokens(row)
            a, b = len(prompt), len(prompt) + len(answer)
            batch["tokens"][i, :b] = np.concatenate([prompt, answer])
            batch["rows"][i, a:b] = samples.rows[row, : b - a]
            batch["old"][i, a:b] = samples.log_probs[row, : b - a]
            batch["mask"][i, a:b] = 1.0
            batch["advantages"][i] = advantages[row]
            if samples.kept is not None:
                batch["kept"][i, a:b] = samples.kept[row, : b - a]
            for k, (free, lengths) in enumerate(passes):
                f = int(lengths[row // rollout.group])
                batch["free_tokens"][i, k, : f + len(answer)] = np.append(free[row // rollout.group, :f], answer)
                batch["shifts"][i, k] = f - a
        mine = sharding.local_rows(self.mesh, size)
        return sharding.global_batch(self.mesh, {name: x[mine] for name, x in batch.items()}, size)

    def _statistics_of(self, params: Any, batch: dict[str, jax.Array]):
        """Statistics of every token given the ones before it, [B, T]; position 0 means nothing."""
        config, tokens = self.system.config, batch["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = backbone.apply(config, params, tokens, positions)
        others = []
        for k in range(batch["shifts"].shape[1] if "shifts" in batch else 0):
            free, _ = backbone.apply(config, params, batch["free_tokens"][:, k], positions)
            index = jnp.clip(positions + batch["shifts"][:, k, None], 0, tokens.shape[1] - 1)
            others.append(jnp.take_along_axis(free, index[..., None], axis=1))
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
            others=tuple(others),
            kept=jnp.roll(batch["kept"], -1, 1) if "kept" in batch else None,
            vocab_size=config.vocab_size,
            gathered=config.gather_tensor,
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

    # -- for people -------------------------------------------------------------------------------------------------

    def _show(self, rollout: Rollout, samples: Sequence[Any], scored: Scored, step: int) -> None:
        """A page with whole groups of this step's answers, rewards and all."""
        count = max(1, self.options.gallery_answers // rollout.group) * rollout.group
        rows = range(min(count, len(rollout.answers)))
        answers, images = shown_answers(rollout, samples, scored, rows)
        shown = tuple(Shown(f"member {row % rollout.group + 1}", answers[row], images) for row in rows)
        intro = "Groups of answers that one update compared: rewards as judged, the bonus, and the advantage."
        shelf = Shelf(f"Rollouts of step {step}", intro, shown)
        write_report(self.gallery / f"step_{step:06d}.html", f"Rollouts of step {step}", (), {}, (shelf,), (), ())


def _check_ratio(deviation: float) -> None:
    if not deviation <= RATIO_TOLERANCE:
        raise RuntimeError(
            f"importance ratio deviates from 1 by {deviation:.2e} before the first update: "
            "the trainer does not replay the sampler's distribution"
        )


def _joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of several updates: pairs add up, skipped updates too; the ratio's deviation is that of the first."""
    joined: dict[str, Any] = {}
    for metrics in found:
        for name, value in metrics.items():
            if name not in joined:
                joined[name] = value
            elif isinstance(value, tuple):
                joined[name] = tuple(a + b for a, b in zip(joined[name], value, strict=True))
            elif name == "skipped_updates":
                joined[name] += value
    largest = [m["ratio_deviation"] for m in found if "ratio_deviation" in m]
    return joined | ({"ratio_largest": functools.reduce(jnp.maximum, largest)} if len(largest) > 1 else {})


# -- the stage ------------------------------------------------------------------------------------------------------


def _latent_size(codec: Any, prompt: Prompt) -> tuple[int, int]:
    """Latent rows and columns of the images that answer a prompt: those of its first source."""
    if not prompt.sample.sources:
        return (codec.resolution // codec.factor,) * 2
    height, width, _ = prompt.images[prompt.sample.sources[0]].shape
    return height // codec.factor, width // codec.factor


def build(config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of an rl config."""
    if not config.init:
        raise UserError("rl starts from a trained model.", "Give --config.init=WORKDIR of an sft run.")
    if jax.process_count() > 1:
        raise UserError("rl runs as one process.", "Start one process that sees all devices of its machine.")
    sharding.check_batch(mesh, config.minibatch, "config.minibatch")
    sharding.check_batch(mesh, config.prompts_per_step * config.group, "config.prompts_per_step x config.group")
    sampling = as_dataclass(SamplingOptions, config.sampling)
    options = Options(
        sampling,
        as_dataclass(EngineOptions, config.engine),
        as_dataclass(GrammarOptions, config.grammar),
        as_dataclass(reward_functions.RewardOptions, config.reward),
        as_dataclass(GrpoOptions, config.grpo),
        config.group,
        config.answer_length,
        config.minibatch,
        tuple(config.buckets),
        config.updates,
        config.chunk,
        config.splits,
        config.overlap,
        config.judge.check_every,
        config.gallery.every,
        config.gallery.answers,
    )
    source = prompt_source(config.prompts, config.prompts.seed)
    judge = make_judge(config.judge, options.reward, source, workdir)
    system = systems.load(config.init, config.image_tokenizer or None, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates * config.splits)
    watch = Watch(as_dataclass(WatchOptions, config.watch), options.grammar.modes)
    params = jax.tree.map(jnp.copy, system.params)  # the reference stays; the state is donated
    state, (placed, _) = place(mesh, backbone.param_axes(system.config), params, optimizer)
    trainer = Trainer(system, judge, options, optimizer, mesh, placed, watch, workdir / "gallery", config.steps)
    key = jax.random.key(config.seed)
    size_of = functools.partial(_latent_size, system.codec.config)
    batches = SameSize(source, config.prompts_per_step, config.seed, size_of)
    meta = {**system.meta, "run": config.to_dict()}
    return Stage(
        AheadState(*state, jax.tree.map(jnp.copy, state.params)) if options.overlap else state,
        PromptIterator(batches, watch, options.overlap),
        lambda state, tasks, step: trainer.step(state, tasks, step, key),
        meta,
        zero_gradient=False,
    )
