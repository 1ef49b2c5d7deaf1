"""GRPO, one step from top to bottom: roll out, judge, score, learn (paper, section on RL).

What differs from the paper, or is left open there (all of it in the config):
  * an answer without intermediate text has no R_s: the other weights are rescaled (`reward.renormalise`);
  * rollouts sample the bare policy (temperature 1, no guidance) unless `sampling` says otherwise;
  * the reference of the KL term is the checkpoint that the run starts from;
  * the objective is averaged per answer, then over answers (`grpo.loss_type`), and clipped at 0.2;
  * tokens that the grammar forces count nowhere: their probability is 1 under every policy;
  * groups whose answers all earn the same are left out of the passes (`grpo.skip_equal_groups`).

`Trainer.step` calls them in that order; each line leads to the next file to read (`rl_stage.py` makes a trainer of a
config, `refill.py` samples new answers in place of those without a judgement):
  roll out  `Trainer.collect_rollout`: sampling/rollout.py, `roll_out`
  judge     `Trainer.submit`: rewards/judge.py, `judge_answer` (scheduled by rewards/judge_service.py)
  score     scoring.py, `score_rollout`: rewards/functions.py, `score_groups` and `complexity_bonus`
  learn     `Trainer.learn`: policy_logprobs.py, `policy_gradient`, of the objective losses.py, `grpo_loss`

One sampling contract: the policy *is* the sampled distribution.  Policy, sampler and reference are all compared under
the sampler's grammar mask and options (`logits_processors.log_probabilities`): guidance runs its second pass, and top-k
and top-p keep the ids that they kept when the answer was sampled.  So the importance ratio before the first update is
1, and the run checks that.  Where answers are sampled in another precision than they are learnt from (`rollout.dtype`,
or a model in bfloat16), the ratio is taken against the log-probabilities that the parameters which sampled the rollout
give in training's precision; how far the sampler was from them is measured (`sampler_kl`), bounded
(`policy_logprobs.SAMPLER_TOLERANCE`), and corrected for (`grpo.tis_cap`).

With `overlap=n`, rollouts are sampled n steps ahead, while the judge still looks at earlier ones.  They then come from
the policy of n updates earlier; the ratio is taken against the log-probabilities stored with them, which makes that
sound as far as clipping bounds it.

With adapters (LoRA) the reference is the policy with its adapters left out: both share every other parameter.

With several processes each samples and judges answers to its own prompts; all of them learn from all answers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivr_jax import distributed, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.models import fused_attention, lora
from ivr_jax.protocol.grammar import Grammar
from ivr_jax.rewards import functions as reward_functions
from ivr_jax.rewards.judge_service import JudgeResult, JudgeService
from ivr_jax.sampling.drafts import DraftBuffer
from ivr_jax.sampling.rollout import Drafts, Rollout, roll_out, sample_drafts
from ivr_jax.sampling.slots import rules_of
from ivr_jax.training.answer_batches import AXES, passes
from ivr_jax.training.minibatches import context_length, in_passes, join_metrics, left_out, split_groups
from ivr_jax.training.monitor import Monitor, MonitorOptions
from ivr_jax.training.multihost_rl import global_judge_result, global_rollout
from ivr_jax.training.policy_logprobs import (
    PolicyGradient,
    add_gradients,
    assert_on_policy,
    assert_same_distribution,
    policy_gradient,
    policy_logprobs,
)
from ivr_jax.training.prompts import Prompt, Tasks
from ivr_jax.training.refill import refill
from ivr_jax.training.rl_options import RLOptions
from ivr_jax.training.rl_state import (
    OverlapState,
    PendingRollout,
    Placement,
    Probe,
    run_probes,
    sampler_of,
    update_function,
)
from ivr_jax.training.scoring import (
    Scored,
    draft_answers,
    score_rollout,
    separate_drafts,
    shown_answers,
    summary,
    token_advantages,
)
from ivr_jax.training.state import TrainState
from ivr_jax.training.stored_rollouts import stored_answers, write_gallery
from ivr_jax.training.throughput import rl_work

# Folded into a step's key for its drafts, and with the round for new answers.
DRAFTS = 0xD4AF7
REFILL = 0x4EF11


class Trainer:
    """The functions of one RL run.

    It holds nothing that learning changes but `monitor` and, with `overlap`, the rollouts sampled ahead: a resumed run
    samples those again from `OverlapState.previous`.

    Args:
      system: its parameters are the reference; None with adapters, where the reference is the policy without them.
      placement: by default everything on one device.
      gallery: folder for pages of sampled answers.
      drafts: buffer of drafts, where `grpo.draft_source` is "buffer".
      probes: measure the policy now and then.
    """

    def __init__(
        self,
        system: systems.System,
        judge: JudgeService,
        options: RLOptions,
        optimizer: optax.GradientTransformation,
        placement: Placement | None = None,
        monitor: Monitor | None = None,
        gallery: pathlib.Path | None = None,
        drafts: DraftBuffer | None = None,
        probes: Sequence[Probe] = (),
    ):
        self.system, self.judge, self.options, self.optimizer = system, judge, options, optimizer
        self.placement = placement or Placement.on_one_device(system.config)
        self.monitor = monitor or Monitor(MonitorOptions(), options.grammar.modes)
        self.gallery, self.drafts, self.probes = gallery, drafts, tuple(probes)
        self.grammar = Grammar(system.tokenizer, options.grammar)
        # The format reward judges control flow even where the decoder does not enforce it.
        self.strict = Grammar(system.tokenizer, dataclasses.replace(options.grammar, follow_verdict=True))
        self.reference = system.params
        self.activity = ""  # what a step is doing at the moment
        self._key = jax.random.key(options.seed)
        self._pending: collections.deque[PendingRollout] = collections.deque()
        self._forced = rules_of(self.grammar).forced
        self._logprobs = jax.jit(
            functools.partial(policy_logprobs, system.config, grammar=self.grammar, options=options)
        )
        replicated = sharding.replicated(self.placement.mesh)
        trained = self.placement.state  # shardings of what the optimiser updates; None on one device
        if trained is not None:
            trained = trained._replace(params=lora.split(trained.params)[0])
        gradient_shardings = PolicyGradient(None if trained is None else trained.params, replicated, replicated)
        self._gradient = policy_gradient(system.config, self.grammar, options, gradient_shardings)
        self._apply = update_function(optimizer, bool(options.overlap), (trained, replicated))

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self, state: Any, prompts: Tasks, step: int) -> tuple[Any, dict[str, Any]]:
        """Rolls out, judges, scores and learns; returns the state and the step's metrics.

        The state is a `TrainState`, with `overlap` an `OverlapState`.
        """
        options = self.options
        behaviours = self._behaviours(state)
        behaviour = behaviours[0]
        on_policy = not options.overlap or step == 0
        resumed = not on_policy and not self._pending

        # Roll out: this step's answers, unless they were sampled ahead, and those of the `overlap` steps after it.
        for later in range(len(self._pending), min(options.overlap + 1, max(options.steps - step, 1))):
            wanted = (prompts.now, *prompts.upcoming)[later]
            sampled = self.collect_rollout(behaviours[later], wanted, step + later)
            self._pending.append(self.submit(sampled, wanted, step + later))

        # Judge: it has worked since `submit`.
        pending = self._pending.popleft()
        self.activity = "waiting for the judge"
        clock = time.perf_counter()
        judge_result = pending.judge_result.result()
        waited = time.perf_counter() - clock
        mine, judge_result, refilled = self._refilled(pending, judge_result, behaviour, step)
        rollout = global_rollout(mine, self.system.tokenizer.vocab.pad)
        judge_result = global_judge_result(judge_result)
        if resumed:  # its update cannot check the ratio
            self.check_logprobs(behaviour, rollout)

        # Score.
        judged, drafts = separate_drafts(judge_result.judged, rollout)
        scored = score_rollout(rollout, judged, options.reward, options.grpo, drafts)
        missing = sum(not answer.present for answer in scored.judged)
        self.monitor.count_missing(missing, len(scored.judged), judge_result.usage.reasons)

        # Learn.
        self.activity = "learning"
        clock = time.perf_counter()
        learner = TrainState(state.params, state.opt_state)
        learner, learnt = self.learn(learner, rollout, scored, step, on_policy, behaviour)
        jax.block_until_ready(learner)  # or its time would be the next rollout's
        metrics = {
            **summary(rollout, scored),
            **rollout.usage.metrics(),
            **judge_result.usage.metrics(),
            **judge_result.checks,
            **learnt,
            **self._work(rollout, scored),
            "rollout_seconds": rollout.seconds,
            "judge_seconds": judge_result.seconds,
            "judge_wait_seconds": waited,
            "update_seconds": time.perf_counter() - clock,
        }
        if options.grpo.refill:
            metrics["refilled"] = float(sum(distributed.gather(refilled)))
        metrics |= self._observed(metrics, learner, rollout, scored, prompts, step)
        if options.overlap:
            previous = (*state.previous[1:], lora.split(state.params)[0])
            return OverlapState(learner.params, learner.opt_state, previous), metrics
        return learner, metrics

    def _observed(
        self,
        metrics: Mapping[str, Any],
        learner: TrainState,
        rollout: Rollout,
        scored: Scored,
        prompts: Tasks,
        step: int,
    ) -> dict[str, Any]:
        """Alarms, and after some steps probes of the policy and a gallery: further metrics."""
        options = self.options
        further = dict(self.monitor.observe(step + 1, metrics))
        due = [probe for probe in self.probes if (step + 1) % probe.every == 0]
        if due:
            self.activity = "measuring the policy"
            further |= run_probes(due, self.system, self.placement.layout, learner.params, step + 1)
        shows = self.gallery and options.gallery_every and (step + 1) % options.gallery_every == 0
        if shows and distributed.is_primary():
            self._write_gallery(rollout, scored, prompts.now, step + 1)
        self.activity = ""
        return further

    def _behaviours(self, state: Any) -> list[Any]:
        """The parameters that sample the rollouts of this step and of those that are sampled ahead."""
        if not self.options.overlap:
            return [state.params]
        frozen = lora.split(state.params)[1]
        return [*(lora.join(previous, frozen) for previous in state.previous), state.params]

    # -- roll out and judge -----------------------------------------------------------------------------------------

    def collect_rollout(self, params: Any, prompts: Sequence[Prompt], step: int) -> Rollout:
        """`group_size` answers by the policy `params` to each of this process's prompts.

        In draft groups each prompt has several drafts, and each of these `group_size` continuations.
        """
        system = dataclasses.replace(self.system, params=params)
        mine, first = self._mine(prompts)
        key = jax.random.fold_in(self._key, step)
        drafts = None
        if self.options.grpo.group == "draft":
            self.activity = "sampling drafts"
            drafts = self._drafts(system, mine, jax.random.fold_in(key, DRAFTS), first)
        ended, answers = 0, len(mine) * self.options.group_size

        def on_ended(count: int) -> None:
            nonlocal ended
            ended += count
            self.activity = f"rolling out, {ended} of {answers} answers"

        on_ended(0)
        return roll_out(
            system,
            self.grammar,
            [prompt.sample for prompt in mine],
            [prompt.images for prompt in mine],
            key,
            self.options.rollout,
            layout=self.placement.layout,
            first=first,
            drafts=drafts,
            on_ended=on_ended,
        )

    def _mine(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
        """The prompt of every group of this process, and the number of the first among all groups."""
        own = distributed.share(len(prompts), "config.prompts_per_step")
        return self._of_groups(prompts[own.start : own.stop]), own.start * self.options.group_count

    def _of_groups(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompt of every group: each as often as it has drafts."""
        return [prompt for prompt in prompts for _ in range(self.options.group_count)]

    def _drafts(self, system: systems.System, prompts: Sequence[Prompt], key: jax.Array, first: int) -> Drafts:
        """A draft for each of `prompts`, by the policy, or by the checkpoint that the run starts from and stored."""
        samples, images = [p.sample for p in prompts], [p.images for p in prompts]
        keys = [prompt.sample.key for prompt in prompts[:: self.options.group_count]]  # of each distinct prompt
        sampled = functools.partial(
            sample_drafts, grammar=self.grammar, samples=samples, images=images, key=key, options=self.options.rollout,
            layout=self.placement.layout, first=first,
        )  # fmt: skip
        if self.drafts is None:
            return sampled(system)
        # Sampled by all processes together, also by those that have theirs: they move the weights together.
        if any(distributed.gather(self.drafts.read(keys) is None)):
            reference = lora.base(system.params) if self.reference is None else self.reference
            self.drafts.write(keys, sampled(dataclasses.replace(system, params=reference)))
        return self.drafts.read(keys)

    def submit(self, rollout: Rollout, prompts: Sequence[Prompt], step: int) -> PendingRollout:
        """Sends this process's answers to the judge."""
        every = self.options.check_every
        checked = bool(every) and (step + 1) % every == 0
        answers, formats = rollout.judgeable(), list(self.format_rewards(rollout))
        if rollout.draft_length:
            drafts = draft_answers(rollout)
            answers = [*answers, *drafts]
            formats = [*formats, *([1.0] * len(drafts))]  # a draft is one image: it has no format to break
        return PendingRollout(rollout, tuple(prompts), self.judge.submit(answers, formats, checked))

    def _refilled(
        self, pending: PendingRollout, judge_result: JudgeResult, params: Any, step: int
    ) -> tuple[Rollout, JudgeResult, int]:
        """`refill.refill` of this process's answers, by `params`, which sampled them."""
        missing = sum(not judged.present for judged in judge_result.judged)
        if not self.options.grpo.refill or not any(distributed.gather(missing)):
            return pending.rollout, judge_result, 0
        mine, first = self._mine(pending.prompts)
        key = jax.random.fold_in(self._key, step)
        group_size = self.options.group_size
        # Moved by all processes together, also by those that miss nothing.
        sampler = sampler_of(self.system, self.placement.layout, params)

        def answer(numbers: Sequence[int], attempt: int) -> Rollout:
            self.activity = f"rolling out {len(numbers)} answers again"
            asked = [mine[number // group_size] for number in numbers]
            return roll_out(
                sampler, self.grammar, [one.sample for one in asked], [one.images for one in asked],
                jax.random.fold_in(key, REFILL + attempt), dataclasses.replace(self.options.rollout, group_size=1),
                first=[first * group_size + number for number in numbers],
            )  # fmt: skip

        def judge(new: Rollout) -> JudgeResult:
            self.activity = "waiting for the judge"
            return self.judge.submit(new.judgeable(), list(self.format_rewards(new))).result()

        return refill(pending.rollout, judge_result, self.options.grpo.refill, answer, judge)

    def format_rewards(self, rollout: Rollout) -> np.ndarray:
        """R_f float32 [P * M]."""
        any_size = np.zeros(len(rollout.answers), np.int32)
        start = self.strict.initial(any_size, any_size)
        return np.asarray(reward_functions.format_reward(self.strict.tables, start, rollout.samples.tokens))

    # -- learn ------------------------------------------------------------------------------------------------------

    def learn(
        self, state: TrainState, rollout: Rollout, scored: Scored, step: int, on_policy: bool, behaviour: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """`num_iterations` times `num_minibatches` optimiser steps on one rollout.

        Args:
          on_policy: the state sampled the rollout, so that the ratio must be 1 before the first update.
          behaviour: the parameters that sampled it; by default the state's.
        """
        behaviour = state.params if behaviour is None else behaviour
        options = self.options
        minibatches = [
            (self.prepare(rollout, scored, answers, behaviour),
             left_out(rollout, scored, answers, options.grpo, self._forced))
            for answers in split_groups(scored, options.num_minibatches, options.seed, step)
        ]  # fmt: skip
        first = next((number for number, (batches, _) in enumerate(minibatches) if batches), None)
        updates: list[dict[str, Any]] = []
        for iteration in range(options.num_iterations):
            for number, (batches, skipped) in enumerate(minibatches):
                check_ratio = on_policy and iteration == 0 and number == first
                state, metrics = self.update(state, batches, check_ratio, skipped)
                updates.append(metrics)
        return state, join_metrics(updates)

    def prepare(
        self, rollout: Rollout, scored: Scored, answers: np.ndarray | None = None, behaviour: Any = None
    ) -> list[dict[str, Any]]:
        """Micro-batches of the `answers` that learn, with the reference's log-probabilities.

        `behaviour`: the parameters that sampled them; needed with adapters, and where the layout is not exact.
        """
        if self.options.sampling.truncates and rollout.samples.kept is None:
            raise UserError("top-k or top-p is on, but the rollout did not record which ids were kept.",
                            "Switch them off in config.sampling.")
        answers = np.flatnonzero(scored.used.reshape(-1)) if answers is None else answers
        answers = answers[in_passes(scored, self.options.grpo)[answers]]
        reference = lora.base(behaviour) if self.reference is None else self.reference
        advantages = self._token_advantages(rollout, scored)
        batches = []
        for batch in self._passes(rollout, advantages, answers):
            batch["reference"] = self._logprobs(reference, batch).log_probs
            if not self.placement.layout.exact:
                # The ratio is taken in training's precision; the sampler's log-probabilities stay for `tis_cap`.
                batch["sampler"] = batch["old"]
                batch["old"] = self._logprobs(behaviour, batch).log_probs
            batches.append(batch)
        return batches

    def update(
        self, state: TrainState, batches: Sequence[Mapping[str, Any]], check_ratio: bool, skipped: float = 0.0
    ) -> tuple[TrainState, dict[str, Any]]:
        """One optimiser step over micro-batches that add up exactly; `skipped` is added to the denominator."""
        if not batches:
            return state, {"skipped_updates": 1.0}
        trained, frozen = lora.split(state.params)
        total: PolicyGradient | None = None
        for batch in batches:
            total = add_gradients(total, self._gradient(trained, frozen, batch))
        metrics, tokens = total.metrics, total.metrics["tokens"]
        if check_ratio:
            assert_on_policy(float(metrics["max_ratio_deviation"]))
            if "sampler_kl" in metrics:
                assert_same_distribution(float(metrics["sampler_kl"] / tokens))
        loss, denominator = total.loss[0], total.loss[1] + skipped
        after, norm = self._apply(TrainState(trained, state.opt_state), total.gradients, denominator)
        logged_as = {"kl": "kl", "clipped": "clip_fraction", "ratio": "ratio", "approx_kl": "approx_kl"}
        if "sampler_kl" in metrics:
            logged_as["sampler_kl"] = "sampler_kl"
        return TrainState(lora.join(after.params, frozen), after.opt_state), {
            "loss": (loss, denominator),
            **{shown: (metrics[name], tokens) for name, shown in logged_as.items()},
            "grad_norm": (norm, 1.0),
            "max_ratio_deviation": metrics["max_ratio_deviation"],
            "text_entropy": (metrics["text_entropy"], metrics["text_tokens"]),
            "image_entropy": (metrics["image_entropy"], metrics["image_tokens"]),
            "skipped_updates": 0.0,
        }

    def check_logprobs(self, params: Any, rollout: Rollout) -> None:
        """Raises RuntimeError when `params`, which sampled the rollout, do not give its log-probabilities again."""
        answers = np.arange(min(self.options.micro_batch, len(rollout.answers)))
        batch = next(self._passes(rollout, np.zeros(len(rollout.answers), np.float32), answers))
        difference = (self._logprobs(params, batch).log_probs - batch["old"]) * batch["mask"]
        if self.placement.layout.exact:
            assert_on_policy(float(jnp.abs(jnp.expm1(difference)).max()))
        else:
            k3 = jnp.expm1(difference) - difference  # estimate of the KL divergence, nats a token
            assert_same_distribution(float(k3.sum() / batch["mask"].sum()))

    def _passes(self, rollout: Rollout, advantages: np.ndarray, answers: np.ndarray) -> Iterator[dict[str, Any]]:
        """`answer_batches.passes` on the mesh; prompts are shared where attention takes any mask."""
        mesh = self.placement.mesh
        shares_prompts = fused_attention.choose(self.system.config, max(self.options.buckets)) == "plain"
        context = context_length(rollout, self.options.grpo)
        for batch in passes(rollout, advantages, answers, self.options, shares_prompts, context):
            size = len(batch["tokens"])
            mine = sharding.local_rows(mesh, size)
            yield sharding.global_batch(mesh, {name: x[mine] for name, x in batch.items()}, size, AXES)

    def _token_advantages(self, rollout: Rollout, scored: Scored) -> np.ndarray:
        return token_advantages(rollout, scored, self.options.grpo, self.grammar.tokenizer.vocab.visual_start)

    def _work(self, rollout: Rollout, scored: Scored) -> dict[str, float]:
        """`throughput.rl_work` of a step."""
        lengths = rollout.total_lengths
        learnt = lengths[in_passes(scored, self.options.grpo)]
        # The reference, and the old policy in training's precision.
        forward_passes = 1 if self.placement.layout.exact else 2
        sampled = int(rollout.samples.lengths.sum())
        return rl_work(self.system.config, lengths, sampled, learnt, self.options.num_iterations, forward_passes)

    def _write_gallery(self, rollout: Rollout, scored: Scored, prompts: Sequence[Prompt], step: int) -> None:
        count = max(1, self.options.gallery_answers // rollout.group_size) * rollout.group_size
        numbers = range(min(count, len(rollout.answers) // jax.process_count()))  # pixels stay where they were made
        samples = [prompt.sample for prompt in self._of_groups(prompts)]
        stored = stored_answers(rollout, samples, scored, self._token_advantages(rollout, scored), numbers)
        write_gallery(self.gallery, step, stored, *shown_answers(rollout, samples, scored, numbers))

