"""A benchmark as a metric of training: the model as it is now, on a fixed part of the prompts, every so many steps."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from ivr_jax import distributed, files
from ivr_jax.checkpoints.system import System
from ivr_jax.cloud import inputs
from ivr_jax.config import Count, Positive, Section
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import (
    datafiles,
    generation,
    judgements,
    judging,
    registry,
    run_folder,
    sanity,
    summary,
)
from ivr_jax.evaluate.benchmarks.interface import FIXED, Item, Judged, Judgement
from ivr_jax.evaluate.benchmarks.judges import ChatJudge, Judge, WorldJudge
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.journal import Journal

METRICS = ("held_out", "held_out_images", "held_out_coverage")


@dataclasses.dataclass(frozen=True)
class HeldOutOptions(Section, name="held_out"):
    """Which benchmark is measured during training, and when.

    Attributes:
      every: steps between two measurements; 0 for none.
      benchmark: its name.
      data: folder of its published files; for the micro-world it is made when it is missing.
      prompts: how many, spread evenly over all; 0 for all.
      batch: answers that are drawn together.
    """

    every: Count
    benchmark: str
    data: str
    prompts: Count
    batch: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every and not self.data:
            raise UserError("config.held_out.data is empty.", "Name the folder with the benchmark's published files.")


class HeldOutBenchmark:
    """Measures a system: called with it and the step, it gives metrics by name.

    Args:
      judge: the service that judges; None for the micro-world, which is judged exactly.
      answer_length: most tokens of an answer.
      seed: of the answers, the same at every measurement.
      workdir: each measurement leaves its run folder in it, named by the step.
    """

    def __init__(
        self, options: HeldOutOptions, judge: ServiceConfig | None, grammar: GrammarOptions, sampling: SamplingOptions,
        engine: EngineOptions, answer_length: int, seed: int, workdir: Path,
    ):  # fmt: skip
        self._benchmark = registry.load(options.benchmark)
        if judge is None and "world" not in self._benchmark.judges:
            raise UserError(f"nobody judges the held-out prompts of {self._benchmark.title}.",
                            "Set config.held_out.judge.kind and model.")
        self._data, self._workdir, self._judge, self._seed = inputs.local(options.data), workdir, judge, seed
        self._items = spread(self._benchmark.items(self._data, (workdir / "references").absolute()), options.prompts)
        self._hashes = datafiles.fingerprint(self._benchmark.prompt_files(self._data), self._data)
        self._grammar, self._sampling, self._engine = grammar, sampling, engine
        self._plan = generation.GenerationPlan(1, seed, options.batch, 0, answer_length)

    def __call__(self, system: System, step: int) -> dict[str, float]:
        """`held_out` (the headline figure as fixed, over what was judged), `held_out_images` (an answer), and
        `held_out_coverage` (judgements got, of those wanted); on every process the same."""
        folder = self._workdir / f"{step:06d}"
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        generation.generate(
            system, Grammar(system.tokenizer, self._grammar), self._benchmark, self._items, self._data, folder,
            self._plan, self._sampling, self._engine, {}, (jax.process_index(), jax.process_count()),
        )  # fmt: skip
        distributed.barrier(f"held out {step}")
        return distributed.gather(self._judged(folder) if distributed.is_primary() else None)[0]

    def _judged(self, folder: Path) -> dict[str, float]:
        answers = list(run_folder.read_answers(folder, self._items, 1))
        drawn = [record.images for _, record in answers if record.images]
        metrics = {"held_out_images": sum(drawn) / len(drawn)} if drawn else {}
        if not drawn:
            return {"held_out_coverage": 0.0}
        found = run_folder.find_images(self._benchmark, folder / run_folder.IMAGES, self._items, 1)
        with contextlib.closing(Journal(self._workdir / "judge_cache")) as journal:
            judge: Judge = WorldJudge()
            if self._judge is not None:
                judge = ChatJudge(self._benchmark, self._judge, journal)
            known = asyncio.run(self._ask(judge, found, folder))
        judged = Judged({judgement.address: judgement for judgement in known.values()}, found.samples)
        run = {"seed": self._seed, "data": self._hashes, "judge": dict(judge.identity), "sanity": sanity.PASSED}
        made = summary.summarise(
            self._benchmark, self._items, judged, known.values(), found, answers, run, (FIXED,), True
        )
        files.write_json(folder / run_folder.SUMMARY, made)
        headline = made["figures"][self._benchmark.headline][FIXED]
        got, wanted = headline["coverage"]["judgements"]
        if headline["value"] is not None:
            metrics["held_out"] = headline["value"]
        return {**metrics, "held_out_coverage": got / wanted}

    async def _ask(self, judge: Judge, found: run_folder.Found, folder: Path) -> Mapping[judging.Address, Judgement]:
        try:
            if judge.form != "world":
                checked = await sanity.run(sanity.checks_for(self._benchmark, judge, None), judge)
                if checked != sanity.PASSED:
                    raise UserError(f"the sanity check of the held-out judge {checked}.", "Use a judge that passes.")
            asked = list(judging.tasks(self._benchmark, self._items, found, judge.form, (FIXED,)))
            return await judging.judge_all(asked, judge, self._data, folder, judgements.read(folder))
        except BaseExceptionGroup as group:
            raise judging.first_error(group) from None
        finally:
            await judge.close()


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items, evenly spaced over all of them; all when `count` is 0 or more than there are."""
    if not count or count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]
