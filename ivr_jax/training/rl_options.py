"""The typed options of an rl config, made in one place for the trainer and for the ahead-of-time plan."""

from __future__ import annotations

import dataclasses
from typing import Any

from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import RolloutOptions
from ivr_jax.training.losses import GrpoOptions


@dataclasses.dataclass(frozen=True)
class RLOptions:
    """The typed parts of an rl config.

    Attributes:
      grammar: that answers are sampled under; reward, grpo, sampling, engine: see their classes.
      group_size: M, answers to a prompt.
      answer_length: most tokens of an answer.
      micro_batch: answers in one forward and backward pass; gradients of all passes of an update add up exactly.
      buckets: lengths that rows of answers with their prompts are padded to.
      packed_rows: rows of one pass, into which answers are packed without guidance, prompts shared where attention is
        plain; 0: each answer has a row of its own, `micro_batch` of them a pass.
      loss_chunk_tokens: tokens whose logits over the vocabulary exist at a time.
      steps: steps of the run, each with one rollout; seed: of rollouts and of the order of groups.
      num_iterations: times that a rollout is learnt from; num_minibatches: optimiser steps each time, on
        disjoint parts of the groups.
      overlap: steps that rollouts are sampled ahead of learning, while earlier ones are judged; 0: none.
      check_every: steps between checks of the judge, 0 for none.
      gallery_every, gallery_answers: steps between galleries, 0 for none, and how many answers one shows.
    """

    grammar: GrammarOptions
    group_size: int
    answer_length: int
    micro_batch: int
    buckets: tuple[int, ...]
    loss_chunk_tokens: int
    sampling: SamplingOptions = SamplingOptions()
    engine: EngineOptions = EngineOptions()
    reward: RewardOptions = RewardOptions()
    grpo: GrpoOptions = GrpoOptions()
    seed: int = 0
    steps: int = 1
    num_iterations: int = 1
    num_minibatches: int = 1
    packed_rows: int = 0
    overlap: int = 0
    check_every: int = 0
    gallery_every: int = 0
    gallery_answers: int = 16

    def __post_init__(self) -> None:
        if 0 in (self.sampling.temperature, self.sampling.image_temperature):
            raise UserError("rl cannot learn at temperature 0: its answers do not vary.", "Give a temperature > 0.")
        if self.group_size < self.reward.min_valid:
            raise UserError(
                f"config.group_size is {self.group_size}: answers are compared within their group, of at least "
                f"reward.min_valid = {self.reward.min_valid}.",
                "Raise config.group_size.",
            )
        if self.packed_rows < 0:
            raise UserError(f"config.packed_rows is {self.packed_rows}.", "Rows are 1 or more; 0: none are packed.")
        if not self.buckets or min(self.buckets) < 1:
            raise UserError(f"config.buckets {self.buckets} are no lengths.", "Give at least one length in tokens.")
        if min(self.check_every, self.gallery_every) < 0 or self.gallery_answers < 1:
            raise UserError(
                f"judge.check_every {self.check_every}, gallery.every {self.gallery_every} or gallery.answers "
                f"{self.gallery_answers} is out of range.",
                "Steps are >= 0 (0: never), answers >= 1.",
            )

        if self.overlap < 0:
            raise UserError(f"config.overlap is {self.overlap}.", "Rollouts run 0 or more steps ahead.")
        if self.grpo.group == "draft" and self.grpo.refill:
            raise UserError("grpo.refill replaces single answers, but those of draft groups share a draft.",
                            "Set grpo.refill to 0, or use grpo.group=prompt.")
        if self.grpo.group == "draft" and not self.may_reflect:
            raise UserError(
                "grpo.group is draft, but the grammar lets no answer reflect on its first image.",
                'Add "reflection" to grammar.modes with max_reflections of at least 1, or use grpo.group=prompt.',
            )

    @property
    def may_reflect(self) -> bool:
        """Whether the grammar allows a reflection."""
        return "reflection" in self.grammar.modes and self.grammar.max_reflections > 0

    @property
    def group_count(self) -> int:
        """Groups a prompt: its drafts, or one."""
        return self.grpo.drafts if self.grpo.group == "draft" else 1

    @property
    def packs(self) -> bool:
        """Whether answers are packed: with guidance, which has further prompts, each has a row of its own."""
        return self.packed_rows > 0 and not self.sampling.passes

    @property
    def rows_option(self) -> str:
        """Which option, "packed_rows" or "micro_batch", says how many rows one pass has."""
        return "packed_rows" if self.packs else "micro_batch"

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run, for the schedule."""
        return self.steps * self.num_iterations * self.num_minibatches

    @property
    def rollout(self) -> RolloutOptions:
        """How a rollout is sampled."""
        return RolloutOptions(self.answer_length, self.sampling, self.engine, self.group_size)


_SECTIONS = {
    "sampling": SamplingOptions,
    "engine": EngineOptions,
    "grammar": GrammarOptions,
    "reward": RewardOptions,
    "grpo": GrpoOptions,
}
_KEYS = (
    "seed", "steps", "group_size", "answer_length", "micro_batch", "num_iterations", "num_minibatches", "overlap",
    "loss_chunk_tokens", "packed_rows",
)  # fmt: skip


def rl_options(config: Any) -> RLOptions:
    """The options of an rl config.  Raises UserError for a value out of range or a section with a wrong key."""
    if config.num_minibatches > config.prompts_per_step:
        raise UserError(
            f"config.num_minibatches is {config.num_minibatches}, more than the groups of a step "
            f"(config.prompts_per_step = {config.prompts_per_step}).",
            "Lower config.num_minibatches.",
        )
    return RLOptions(
        buckets=tuple(config.buckets),
        check_every=config.judge.check_every,
        gallery_every=config.gallery.every,
        gallery_answers=config.gallery.answers,
        **{name: config[name] for name in _KEYS},
        **{name: as_dataclass(kind, config[name]) for name, kind in _SECTIONS.items()},
    )
