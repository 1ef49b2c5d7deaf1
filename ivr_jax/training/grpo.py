"""GRPO: groups of trajectories by the model itself, judged, compared inside the group (paper, section on RL).

What the paper leaves open, and what is done here (all in the config):
  * an answer without intermediate text has no R_s: the other weights are rescaled (`reward.renormalise`);
  * rollouts sample the bare policy (temperature 1, no guidance) unless `sampling` says otherwise;
  * the reference of the KL term is the checkpoint that the run starts from;
  * the objective is averaged per answer, then over answers (`grpo.loss_type`), and clipped at 0.2.

One sampling contract: the policy *is* the sampled distribution.  Policy, sampler and reference are all compared under
the sampler's grammar mask and options (`chain.log_probabilities`): guidance runs its second pass, and top-k and top-p
keep the ids that they kept when the answer was drawn.  So the importance ratio before the first update is 1, and the
run checks that.  Where answers are drawn in another precision than they are learnt from (`rollout.dtype`, or a model in
bfloat16), the ratio is taken against the log-probabilities that the policy of then gives in training; how far the
sampler was from them is measured, bounded, and weighed (`grpo.tis_cap`).

With `overlap`, the next rollout is drawn while the judge still looks at the last one.  It then comes from the policy of
one update earlier; the ratio is taken against the log-probabilities stored with it, which is what makes that sound.

With adapters (LoRA) the reference is the policy with its adapters left out: both share every other parameter.

With several processes each draws and judges answers to its own prompts; all of them learn from all answers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivr_jax import distributed, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, lora
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.report.gallery import GalleryItem, GallerySection
from ivr_jax.report.pages import write_report
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.judge_service import Judge, Verdicts
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.layout import RolloutLayout
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import Rollout, roll_out
from ivr_jax.training.judge_config import make_judge
from ivr_jax.training.loop import Stage
from ivr_jax.training.losses import GrpoOptions
from ivr_jax.training.monitor import MonitorOptions, Watch
from ivr_jax.training.multihost_rl import global_rollout, global_verdicts
from ivr_jax.training.optimizer import make_optimizer
from ivr_jax.training.policy_logprobs import Replay, answer_batch, bucket_of
from ivr_jax.training.prompts import Prompt, PromptIterator, SameSize, Tasks, prompt_source
from ivr_jax.training.scoring import Scored, score, shown_answers, summary
from ivr_jax.training.state import TrainState, shard_state, updated

Probe = Callable[[systems.System], Mapping[str, float]]  # gives metrics of a policy; reads it and changes nothing

RATIO_TOLERANCE = 1e-3
SAMPLER_TOLERANCE = 0.05  # nats a token between sampler and trainer, where their precisions differ


@dataclasses.dataclass(frozen=True)
class Options:
    """The typed parts of an rl config.

    Attributes:
      group: M, answers to a prompt.
      answer_length: most tokens of an answer.
      micro_batch: answers in one forward and backward pass; gradients of all passes of an update add up exactly.
      buckets: lengths that answers with their prompts are padded to.
      num_iterations: times that a rollout is learnt from; num_minibatches: optimiser steps each time, on
        disjoint parts of the groups.
      loss_chunk_tokens: tokens for which the vocabulary stands whole.
      overlap: draw the next rollout while the last one is judged.
      check_every: steps between checks of the judge, 0 for none.
      gallery_every, gallery_answers: steps between galleries, 0 for none, and how many answers one shows.
      probe_every: steps between measurements of the policy by the trainer's `probe`, 0 for none.
    """

    sampling: SamplingOptions
    engine: EngineOptions
    grammar: GrammarOptions
    reward: reward_functions.RewardOptions
    grpo: GrpoOptions
    group: int
    answer_length: int
    micro_batch: int
    buckets: tuple[int, ...]
    num_iterations: int
    loss_chunk_tokens: int
    num_minibatches: int = 1
    overlap: bool = False
    check_every: int = 0
    gallery_every: int = 0
    gallery_answers: int = 16
    probe_every: int = 0

    def __post_init__(self) -> None:
        if 0 in (self.sampling.temperature, self.sampling.image_temperature):
            raise UserError("rl cannot learn at temperature 0: nothing is left to chance.", "Give a temperature > 0.")
        if self.group < self.reward.min_valid:
            raise UserError(
                f"config.group is {self.group}: answers are compared within their group, of at least "
                f"reward.min_valid = {self.reward.min_valid}.",
                "Raise config.group.",
            )
        if not self.buckets or min(self.buckets) < 1:
            raise UserError(f"config.buckets {self.buckets} are no lengths.", "Give at least one length in tokens.")
        if min(self.check_every, self.gallery_every) < 0 or self.gallery_answers < 1:
            raise UserError(
                f"judge.check_every {self.check_every}, gallery.every {self.gallery_every} or gallery.answers "
                f"{self.gallery_answers} is out of range.",
                "Steps are >= 0 (0: never), answers >= 1.",
            )


class OverlapState(NamedTuple):
    """A `TrainState` with what was learnt (`lora.split`) before the last update, which drew the next rollout."""

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
    that one again from `OverlapState.previous`.
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
        layout: RolloutLayout | None = None,
        probe: Probe | None = None,
    ):
        """`probe`: measures the policy now and then, as `Options.probe_every` says.

        `mesh` and `placed` (shardings of the state): where training goes on, one device by default; `layout`: where
        answers are drawn, by default on the same devices in the same precision."""
        self.system, self.judge, self.options, self.optimizer = system, judge, options, optimizer
        self.watch = watch or Watch(MonitorOptions(), options.grammar.modes)
        self.gallery, self.steps, self.probe = gallery, steps, probe
        self.grammar = Grammar(system.tokenizer, options.grammar)
        # The format reward judges control flow even where the decoder does not enforce it.
        self.strict = Grammar(system.tokenizer, dataclasses.replace(options.grammar, follow_verdict=True))
        self.reference = system.params  # None with adapters: then it is the policy without them
        self._pending: Pending | None = None
        self.mesh = mesh or sharding.make_mesh({}, jax.devices()[:1])
        self._layout = layout
        whole, trained = sharding.replicated(self.mesh), placed and placed._replace(params=lora.split(placed.params)[0])
        replay = Replay(system.config, self.grammar, options.sampling, options.grpo, options.loss_chunk_tokens)
        self._statistics = jax.jit(replay.statistics)
        gradients = (whole, trained and trained.params)
        self._gradient = jax.jit(jax.value_and_grad(replay.loss, has_aux=True), out_shardings=gradients)
        self._add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0)  # a sum, and not three trees
        apply = functools.partial(updated, optimizer=optimizer)
        donated = () if options.overlap else (0,)  # the parameters stay, to tell a resumed run what drew the rollout
        self._apply = jax.jit(apply, donate_argnums=donated, out_shardings=(trained, whole))

    @property
    def layout(self) -> RolloutLayout:
        """Where and in which precision answers are drawn."""
        if self._layout is None:
            self._layout = RolloutLayout(self.system.config, self.mesh)
        return self._layout

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, state: Any, tasks: Tasks, step: int, key: jax.Array) -> tuple[Any, dict[str, Any]]:
        """Rolls out, judges and updates; returns the step's metrics.  `overlap` makes the state an OverlapState."""
        drew = state.params
        if self.options.overlap:
            drew = lora.join(state.previous, lora.split(state.params)[1])
            pending, mine, began = self._drawn_ahead(state.params, drew, tasks, step, key)
        else:
            pending = self.draw(drew, tasks.now, step, key)
            mine, began = True, time.perf_counter()
        verdicts = global_verdicts(pending.verdicts.result())
        waited = time.perf_counter() - began
        scored = score(pending.rollout, verdicts.judged, self.options.group, self.options.reward)
        gone = int(scored.present.size - scored.present.sum())
        self.watch.count_missing(gone, scored.present.size, verdicts.usage.reasons)
        clock = time.perf_counter()
        learner = TrainState(state.params, state.opt_state)
        previous = lora.split(state.params)[0]
        learner, learned = self.learn(learner, pending.rollout, scored, step, check_ratio=mine, drew=drew)
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
        if self.probe and self.options.probe_every and (step + 1) % self.options.probe_every == 0:
            metrics |= self._probed(learner.params)
        shows = self.gallery and self.options.gallery_every and (step + 1) % self.options.gallery_every == 0
        if shows and distributed.is_primary():
            self._show(pending.rollout, [t.sample for t in tasks.now], scored, step + 1)
        state = OverlapState(learner.params, learner.opt_state, previous) if self.options.overlap else learner
        return state, metrics

    def _probed(self, params: Any) -> dict[str, float]:
        """What `probe` measures of the policy `params`, with the weights that answers are drawn with."""
        system = dataclasses.replace(self.system, config=self.layout.config, params=self.layout(params))
        with jax.set_mesh(self.layout.mesh):
            return dict(self.probe(system))

    def _drawn_ahead(
        self, params: Any, drew: Any, tasks: Tasks, step: int, key: jax.Array
    ) -> tuple[Pending, bool, float]:
        """This step's rollout, after the next one was drawn, whether it is on-policy, and when waiting began."""
        first = self._pending is None
        pending = self.draw(drew, tasks.now, step, key) if first else self._pending
        if first and step:  # off-policy already, so the update cannot check the ratio
            self.check_replay(drew, pending.rollout)
        if self.steps is not None and step + 1 >= self.steps:
            self._pending = None
            return pending, step == 0, time.perf_counter()
        ahead = self.roll(params, tasks.upcoming, step + 1, key)
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
        own = distributed.share(len(rollout.answers), "the number of answers")
        formats = self.formats(rollout)[own.start : own.stop]
        answers = rollout.judgeable()[own.start : own.stop]
        return Pending(rollout, self.judge.submit(answers, formats, checked), seconds)

    def formats(self, rollout: Rollout) -> np.ndarray:
        """R_f float32 [P * M]."""
        free = np.zeros(len(rollout.answers), np.int32)
        start = self.strict.initial(free, free)
        return np.asarray(reward_functions.format_reward(self.strict.tables, start, rollout.samples.tokens))

    def rollout(self, params: Any, tasks: Sequence[Prompt], key: jax.Array) -> Rollout:
        """`group` answers to each task by the policy `params`, drawn by the processes together."""
        system, options = dataclasses.replace(self.system, params=params), self.options
        own = distributed.share(len(tasks), "config.prompts_per_step")
        rollout = roll_out(
            system,
            self.grammar,
            [t.sample for t in tasks[own.start : own.stop]],
            [t.images for t in tasks[own.start : own.stop]],
            key,
            options.answer_length,
            options.sampling,
            options.group,
            engine=options.engine,
            layout=self.layout,
            first=own.start,
        )
        rollout = global_rollout(rollout, system.tokenizer.vocab.pad)
        bucket_of(int(rollout.prompt_lengths.max()) + options.answer_length, options.buckets)  # whatever was answered
        return rollout

    # -- learning ---------------------------------------------------------------------------------------------------

    def learn(
        self, state: TrainState, rollout: Rollout, scored: Scored, step: int, check_ratio: bool, drew: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """`num_iterations` times `num_minibatches` optimiser steps on one rollout by `drew` (default: the state's)."""
        drew = state.params if drew is None else drew
        parts = [self.prepare(rollout, scored, rows, drew) for rows in self._split(scored, step)]
        found: list[dict[str, Any]] = []
        for update in range(self.options.num_iterations):
            for part, batches in enumerate(parts):
                state, metrics = self.update(state, batches, check_ratio and update == part == 0)
                found.append(metrics)
        return state, _joined(found)

    def _split(self, scored: Scored, step: int) -> list[np.ndarray]:
        """The rows that take part, dealt by whole groups into `num_minibatches` parts of about equal size."""
        groups = np.arange(len(scored.used))
        if self.options.num_minibatches > 1:
            groups = np.random.default_rng((step, 0x5011)).permutation(groups)
        rows = np.arange(scored.used.size).reshape(scored.used.shape)
        return [rows[part][scored.used[part]] for part in np.array_split(groups, self.options.num_minibatches)]

    def prepare(
        self, rollout: Rollout, scored: Scored, rows: np.ndarray | None = None, drew: Any = None
    ) -> list[dict[str, Any]]:
        """Minibatches of similar length of the members that take part, with the reference's log-probabilities.

        `drew`: the parameters that drew the rollout; needed with adapters, and where the layout is not exact.
        """
        if self.options.sampling.truncates and rollout.samples.kept is None:
            raise UserError("top-k or top-p is on, but the rollout did not record which ids were kept.",
                            "Switch them off in config.sampling.")
        rows = np.flatnonzero(scored.used.reshape(-1)) if rows is None else rows
        rows = rows[np.argsort(rollout.total_lengths[rows], kind="stable")]
        reference = lora.base(drew) if self.reference is None else self.reference
        batches = []
        for start in range(0, len(rows), self.options.micro_batch):
            batch = self._batch(rollout, scored.advantages.reshape(-1), rows[start : start + self.options.micro_batch])
            batch["reference"] = self._statistics(reference, batch).log_probs
            if not self.layout.exact:
                batch |= {"sampler": batch["old"], "old": self._statistics(drew, batch).log_probs}
            batches.append(batch)
        return batches

    def update(
        self, state: TrainState, batches: Sequence[Mapping[str, Any]], check_ratio: bool
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step over minibatches that add up exactly."""
        if not batches:
            return state, {"skipped_updates": 1.0}
        gradients, total, sums = None, None, None
        trained, frozen = lora.split(state.params)
        for batch in batches:
            (_, (parts, extra)), gradient = self._gradient(trained, frozen, batch)
            if gradients is None:
                gradients, total, sums = gradient, parts, extra
            else:
                deviation = jnp.maximum(sums["max_ratio_deviation"], extra["max_ratio_deviation"])
                gradients, total, sums = self._add((gradients, total, sums), (gradient, parts, extra))
                sums["max_ratio_deviation"] = deviation
        tokens = sums["tokens"]
        if check_ratio:
            _check_ratio(float(sums["max_ratio_deviation"]))
            if "sampler_kl" in sums:
                _check_sampler(float(sums["sampler_kl"] / tokens))
        after, norm = self._apply(TrainState(trained, state.opt_state), gradients, total[1])
        found = {name: (sums[name], tokens) for name in ("sampler_kl",) if name in sums}
        return TrainState(lora.join(after.params, frozen), after.opt_state), found | {
            "loss": total,
            "kl": (sums["kl"], tokens),
            "clip_fraction": (sums["clipped"], tokens),
            "ratio": (sums["ratio"], tokens),
            "approx_kl": (sums["approx_kl"], tokens),
            "grad_norm": (norm, 1.0),
            "max_ratio_deviation": sums["max_ratio_deviation"],
            "text_entropy": (sums["text_entropy"], sums["text_tokens"]),
            "image_entropy": (sums["image_entropy"], sums["image_tokens"]),
            "skipped_updates": 0.0,
        }

    def check_replay(self, params: Any, rollout: Rollout) -> None:
        """Raises RuntimeError when `params`, which drew the rollout, do not give its log-probabilities again."""
        rows = np.arange(min(self.options.micro_batch, len(rollout.answers)))
        batch = self._batch(rollout, np.zeros(len(rollout.answers), np.float32), rows)
        away = (self._statistics(params, batch).log_probs - batch["old"]) * batch["mask"]
        if self.layout.exact:
            _check_ratio(float(jnp.abs(jnp.expm1(away)).max()))
        else:
            _check_sampler(float((jnp.expm1(away) - away).sum() / batch["mask"].sum()))

    def _batch(self, rollout: Rollout, advantages: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        """`replay.answer_batch` on the mesh."""
        size = self.options.micro_batch
        batch = answer_batch(rollout, advantages, rows, size, self.options.buckets)
        mine = sharding.local_rows(self.mesh, size)
        return sharding.global_batch(self.mesh, {name: x[mine] for name, x in batch.items()}, size)

    # -- for people -------------------------------------------------------------------------------------------------

    def _show(self, rollout: Rollout, samples: Sequence[Any], scored: Scored, step: int) -> None:
        """A page with whole groups of this step's answers, rewards and all."""
        count = max(1, self.options.gallery_answers // rollout.group) * rollout.group
        rows = range(min(count, len(rollout.answers) // jax.process_count()))  # pixels are where they were drawn
        answers, images = shown_answers(rollout, samples, scored, rows)
        shown = tuple(GalleryItem(f"member {row % rollout.group + 1}", answers[row], images) for row in rows)
        intro = "Groups of answers that one update compared: rewards as judged, the bonus, and the advantage."
        section = GallerySection(f"Rollouts of step {step}", intro, shown)
        write_report(self.gallery / f"step_{step:06d}.html", f"Rollouts of step {step}", (), {}, (section,), (), ())


def _check_ratio(deviation: float) -> None:
    if not deviation <= RATIO_TOLERANCE:
        raise RuntimeError(
            f"importance ratio deviates from 1 by {deviation:.2e} before the first update: "
            "the trainer does not replay the sampler's distribution"
        )


def _check_sampler(divergence: float) -> None:
    if not divergence <= SAMPLER_TOLERANCE:
        raise RuntimeError(
            f"sampler and trainer are {divergence:.2e} nats a token apart before the first update, more than rounding "
            "explains: the trainer does not replay the sampler's distribution"
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
    largest = [m["max_ratio_deviation"] for m in found if "max_ratio_deviation" in m]
    return joined | ({"ratio_largest": functools.reduce(jnp.maximum, largest)} if len(largest) > 1 else {})


# -- the stage ------------------------------------------------------------------------------------------------------


def _latent_size(codec: Any, prompt: Prompt) -> tuple[int, int]:
    """Latent rows and columns of the images that answer a prompt: those of its first source."""
    if not prompt.sample.sources:
        return (codec.resolution // codec.factor,) * 2
    height, width, _ = prompt.images[prompt.sample.sources[0]].shape
    return height // codec.factor, width // codec.factor


def build(config: Any, workdir: pathlib.Path, mesh: jax.sharding.Mesh, probe: Probe | None = None) -> Stage:
    """The stage of an rl config; `probe` measures the policy every `config.sight.every` steps."""
    if not config.init:
        raise UserError("rl starts from a trained model.", "Give --config.init=WORKDIR of an sft run.")
    distributed.share(config.prompts_per_step, "config.prompts_per_step")
    if config.num_minibatches > config.prompts_per_step:
        raise UserError(
            f"config.num_minibatches is {config.num_minibatches}: the groups of {config.prompts_per_step} prompts "
            "cannot be dealt into so many parts.",
            "Lower config.num_minibatches.",
        )
    sharding.check_batch(mesh, config.micro_batch, "config.micro_batch")
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
        config.micro_batch,
        tuple(config.buckets),
        config.num_iterations,
        config.loss_chunk_tokens,
        config.num_minibatches,
        config.overlap,
        config.judge.check_every,
        config.gallery.every,
        config.gallery.answers,
        config.sight.every,
    )
    adapters = as_dataclass(lora.LoraOptions, config.lora)
    source = prompt_source(config.prompts, config.prompts.seed)
    judge = make_judge(config.judge, options.reward, source, workdir)
    system = systems.load(config.init, config.image_tokenizer or None, mesh=mesh)
    optimizer = make_optimizer(config.optimizer, config.steps * config.num_iterations * config.num_minibatches)
    watch = Watch(as_dataclass(MonitorOptions, config.watch), options.grammar.modes)
    axes, meta = backbone.param_axes(system.config), {**system.meta, "run": config.to_dict()}
    if adapters.rank:
        params, axes = lora.add(system.params, adapters, jax.random.key(config.seed)), lora.axes(axes, adapters)
        system, meta = dataclasses.replace(system, params=None), {**meta, "lora": dataclasses.asdict(adapters)}
    else:
        params = jax.tree.map(jnp.copy, system.params)  # the reference stays; the state is donated
    state, (placed, _) = shard_state(mesh, axes, params, optimizer)
    layout = RolloutLayout(system.config, mesh, config.rollout.tensor, config.rollout.dtype or None)
    gallery = workdir / "gallery"
    trainer = Trainer(system, judge, options, optimizer, mesh, placed, watch, gallery, config.steps, layout, probe)
    key = jax.random.key(config.seed)
    size_of = functools.partial(_latent_size, system.codec.config)
    batches = SameSize(source, config.prompts_per_step, config.seed, size_of)
    return Stage(
        OverlapState(*state, jax.tree.map(jnp.copy, lora.split(state.params)[0])) if options.overlap else state,
        PromptIterator(batches, watch, options.overlap),
        lambda state, tasks, step: trainer.step(state, tasks, step, key),
        meta,
        zero_gradient=False,
    )
