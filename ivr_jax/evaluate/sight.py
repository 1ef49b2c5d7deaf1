"""Sight as a metric of training: the paired verdict test of the model as it is now, on a fixed set of prompts."""

from __future__ import annotations

import dataclasses

import jax

from ivr_jax.checkpoints.system import System
from ivr_jax.cloud import inputs
from ivr_jax.config import Count, Positive, Section
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.evaluate.paired import paired_test, reads_request, world_cases
from ivr_jax.evaluate.swap import known_pairs, swap_cases
from ivr_jax.evaluate.verdicts import VerdictScorer
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling.batch import RolloutOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.rollout import roll_out
from ivr_jax.trajectory import Mode
from ivr_jax.world.levels import level_of
from ivr_jax.world.sampler import sample_task

METRICS = ("sight", "sight_fault", "pass_exact", "pass_fault", "pass_own_wrong")


@dataclasses.dataclass(frozen=True)
class SightOptions(Section, name="sight"):
    """When and on what sight is measured during training.

    Attributes:
      every: steps between two measurements; 0 for none.
      prompts: how many.
      data: a dataset with images known to be right and wrong (the swap test); "" for held-out tasks of the micro-world,
        whose first images the model draws anew each time.
      level: of these tasks.
    """

    every: Count = 0
    prompts: Positive = 64
    data: str = ""
    level: int = 0


class SightProbe:
    """Measures a system's sight: `probe(system)` gives `METRICS` by name, those that could be measured.

    Args:
      grammar: of the run's answers.
      answer_length: most tokens of an answer.
      seed: of tasks and drawings, the same at every measurement.
    """

    def __init__(self, options: SightOptions, grammar: GrammarOptions, answer_length: int, seed: int):
        self._options, self._grammar, self._length, self._seed = options, grammar, answer_length, seed
        self._pairs = None
        if options.data:
            dataset = TrajectoryDataset(inputs.local(options.data))
            self._pairs = dataset, known_pairs(dataset, options.prompts)
        else:
            most = level_of(options.level).most_edits
            self._tasks = [
                sample_task(options.level, seed, i, edits=1 + i % most, held_out=True) for i in range(options.prompts)
            ]

    def __call__(self, system: System) -> dict[str, float]:
        if self._pairs is not None:
            cases = swap_cases(system, *self._pairs)
        else:
            direct = dataclasses.replace(self._grammar, modes=(Mode.DIRECT.value,), force=False)
            rollout = roll_out(
                system,
                Grammar(system.tokenizer, direct),
                [task.sample for task in self._tasks],
                [task.images for task in self._tasks],
                jax.random.key(self._seed),
                RolloutOptions(self._length, engine=EngineOptions(slots=len(self._tasks))),
            )
            cases = world_cases(system, self._tasks, rollout, range(len(self._tasks)), self._seed, reads_request)
        overall = paired_test(cases, VerdictScorer(system, self._grammar, self._length), self._seed)["overall"]
        return {name: overall[name]["value"] for name in METRICS if overall[name]["value"] is not None}
