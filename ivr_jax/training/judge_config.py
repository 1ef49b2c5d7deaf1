"""From the `judge` part of an rl config to a `JudgeService`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING, Any

import jax

from ivr_jax.data.pipeline import Indexed
from ivr_jax.errors import UserError
from ivr_jax.interfaces import Analyzer
from ivr_jax.rewards.functions import RewardOptions
from ivr_jax.rewards.judge_service import PARTS, Check, JudgeOptions, JudgeService
from ivr_jax.training.prompts import Prompt
from ivr_jax.world.facts import has_facts

if TYPE_CHECKING:
    from ivr_jax.services.journal import Journal
    from ivr_jax.services.service import Recorded

WORLD = "world"
FOLDER = "judgements"


@functools.cache
def _journal(path: pathlib.Path) -> Journal:
    """The one open journal of a folder in this process."""
    from ivr_jax.services.journal import Journal

    return Journal(path)


@dataclasses.dataclass
class JudgeRecords:
    """`Records` of the judge's services: answers kept in a journal, if any, and their cost so far.

    The journal is opened when it is first needed, by the thread that judges.
    """

    path: pathlib.Path | None = None
    tokens: int = 0
    cost: float = 0.0
    recorded: int = 0

    def call(self, digest: str) -> Recorded | None:
        recorded = _journal(self.path).call(digest) if self.path else None
        self.recorded += recorded is not None
        return recorded

    def record_call(self, digest: str, service: str, answer: Recorded) -> None:
        self.tokens += answer.tokens_in + answer.tokens_out
        self.cost += answer.cost
        if self.path:
            _journal(self.path).record_call(digest, service, answer)

    def image(self, name: str) -> None:
        return None  # a judge generates no images

    async def add_image(self, pixels: Any) -> str:
        raise UserError("a judge was asked to generate an image.", "Name a service that answers in text.")

    def totals(self) -> dict[str, float]:
        """What has been spent since the process started."""
        return {"judge_tokens": float(self.tokens), "judge_cost": self.cost, "judge_recorded": float(self.recorded)}


def make_judge(config: Any, options: RewardOptions, prompts: Indexed, workdir: pathlib.Path) -> JudgeService:
    """The judge that a config names: one analyzer a part, what is checked now and then, and the limits.

    Raises:
      UserError: a setting is wrong, a key is not set, or the micro-world's analyzer is asked to judge other prompts.
    """
    index = jax.process_index()  # a journal belongs to one process
    records = JudgeRecords(workdir / (f"{FOLDER}-{index}" if index else FOLDER))
    unrecorded = JudgeRecords()
    section_of = {part: part if config[part].kind else "outcome" for part in PARTS}
    made = {name: make_analyzer(config, name, prompts, records) for name in set(section_of.values())}
    check = None
    if config.check_every:
        held_out = make_analyzer(config, "held_out", prompts, records) if config.held_out.kind else None
        again = make_analyzer(config, "outcome", prompts, unrecorded)  # answers from the record would not vary
        check = Check(again, config.check_repeats, held_out, config.check_answers)
    limits = JudgeOptions(options, config.every_image, config.concurrency, config.deadline, check)
    analyzers = {part: made[name] for part, name in section_of.items()}
    return JudgeService(analyzers, limits, (records.totals, unrecorded.totals))


def make_analyzer(config: Any, name: str, prompts: Indexed, records: JudgeRecords) -> Analyzer:
    """The analyzer that the section `name` of a judge's config describes."""
    section = config[name]
    if section.kind == WORLD:
        return _world_analyzer(prompts)
    if section.kind not in ("openai", "gateway"):
        raise UserError(f"judge.{name}.kind is {section.kind!r}.", "Use world, openai or gateway.")
    from ivr_jax.services.build import analyzer_from_configs

    return analyzer_from_configs([section], records)


def _world_analyzer(prompts: Indexed) -> Analyzer:
    prompt: Prompt = prompts[0]
    if not has_facts(prompt.sample):
        raise UserError(
            f"the prompt {prompt.sample.key!r} is not of the micro-world, so its exact analyzer cannot judge answers.",
            "Name a service that can: judge.outcome.kind=openai and its settings (docs/how-to/rl.md).",
        )
    from ivr_jax.world.analyzer import WorldAnalyzer

    return WorldAnalyzer()
