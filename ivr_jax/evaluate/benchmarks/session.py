"""One run of a benchmark, from the command's flags to the files of the run folder."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ivr_jax import cli, distributed, files, sharding
from ivr_jax.checkpoints import system as systems
from ivr_jax.cluster import engine as cluster
from ivr_jax.cluster.part import Part
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import (
    costs,
    datafiles,
    generation,
    judgements,
    judging,
    outputs,
    registry,
    run_folder,
    sanity,
    summary,
)
from ivr_jax.evaluate.benchmarks.detection import TransformersDetector
from ivr_jax.evaluate.benchmarks.interface import MODES, Item, Judged, Judgement, State
from ivr_jax.evaluate.benchmarks.judges import ChatJudge, DetectorJudge, Judge, NoJudge, WorldJudge, label
from ivr_jax.heartbeat import Heartbeat
from ivr_jax.protocol.grammar import INTERLEAVED, Grammar, GrammarOptions
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.layout import LayoutOptions, RolloutLayout, load_sampler
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.config import ServiceConfig
from ivr_jax.services.journal import Journal
from ivr_jax.services.limits import LimitsOf, ProcessLimits
from ivr_jax.trajectory import MAX_REFLECTIONS, MAX_STEPS
from ivr_jax.trajectory import Mode as AnswerMode

CACHE, SCRATCH = "judge_cache", "references"
PARTS = "parts"  # of a run on a cluster: what each part has judged, until it is taken over
COMMAND = "ivr_jax.evaluate.benchmarks.command"
_SMALL = 1 << 20  # bytes up to which a checkpoint's file counts with its content


class Session:
    """See the module.  Reads the prompts at once, so that a wrong folder is told before anything else."""

    def __init__(self, call: cli.Call, judge: Judge | None = None):
        """`judge`: takes the place of the one that the flags name."""
        self.config, self.flags, self.workdir, self._argv = call.config, call.flags, call.workdir, call.argv
        self.engine = cluster.from_call(call)
        wanted = call.flags
        self.benchmark = registry.load(wanted.benchmark)
        if not wanted.data:
            raise UserError("--data is missing.", f"Name the folder of {self.benchmark.title}'s published files.")
        self.modes = _modes(wanted.figures)
        self.retried = _retried(wanted.retry)
        self.data = Path(wanted.data).expanduser()
        scratch = (self.workdir or Path.cwd()) / SCRATCH
        self.items = self.benchmark.items(self.data, scratch.absolute())
        self.hashes = datafiles.fingerprint(self.benchmark.prompt_files(self.data), self.data)
        self.samples = wanted.samples or self.benchmark.samples
        self.prompts = _rewritten(wanted.rewritten, self.items)
        self.own_prompts = Path(wanted.judge_prompts) if wanted.judge_prompts else None
        self._given = judge

    # -- what will be done --

    @property
    def form(self) -> str:
        """The form of judge that the flags name."""
        if self._given is not None:
            return self._given.form
        if self.flags.detector:
            if "detector" not in self.benchmark.judges:
                raise UserError(f"{self.benchmark.title} is not judged by a detector.", "Leave --detector out.")
            return "detector"
        if self.service() is None and not self.benchmark.needs_judge:
            return NoJudge.form
        return "chat" if "chat" in self.benchmark.judges else self.benchmark.judges[0]

    def service(self) -> ServiceConfig | None:
        """The chat judge's settings; None when no model is named."""
        return as_dataclass(ServiceConfig, self.config.judge) if self.config.judge.model else None

    def costs(self) -> costs.Costs:
        """What judging will cost at most, as asked for."""
        return costs.estimate(
            self.benchmark, self.items, self.samples, self.form, self.modes, self.service(), self.own_prompts
        )

    def run(self) -> dict[str, Any] | None:
        """Does what the flags say; returns the summary, if there is one."""
        wanted = self.flags
        if wanted.generate_only and wanted.judge_only:
            raise UserError("--generate_only and --judge_only were both given.", "Give one of them, or neither.")
        if wanted.answers and not wanted.judge_only:
            raise UserError("--answers goes with --judge_only.", "Add --judge_only.")
        distributed.start(wanted)
        primary = distributed.is_primary()
        with files.Lock(self.workdir) if primary else contextlib.nullcontext():
            if not wanted.judge_only:
                self.check_references()
                self._generate(primary)
                distributed.barrier("answers")
            if wanted.generate_only or not primary:
                return None
            return self.judge()

    def check_references(self) -> None:
        """Raises UserError when reference images are missing."""
        missing = [path for item in self.items for path in item.references if not (self.data / path).is_file()]
        if missing:
            raise UserError(f"{len(missing)} reference images of {self.benchmark.title} are missing below {self.data}, "
                            f"the first is {missing[0]}.", "Fetch the whole data set.")

    # -- answers --

    def describe(self, generation_part: dict[str, Any] | None, model: str) -> dict[str, Any]:
        """`run.json` without its judge."""
        return {
            "schema": run_folder.SCHEMA,
            "benchmark": self.benchmark.name,
            "model": self.flags.model or model,
            "samples": self.samples,
            "data": self.hashes,
            "generation": generation_part,
            "answers": str(Path(self.flags.answers).absolute()) if self.flags.answers else None,
            "rewriter": _rewriter(self.flags.rewritten),
            "seed": self.config.seed,
            "judge": None,
            "sanity": None,
        }

    def _generate(self, primary: bool) -> None:
        config, wanted = self.config, self.flags
        if not wanted.checkpoint:
            raise UserError("--checkpoint is missing.", "Name one, or judge images that are there: --judge_only.")
        path = systems.folder_of(wanted.checkpoint)
        plan = self._plan()
        part = {
            "checkpoint": systems.name_of(wanted.checkpoint),
            "checkpoint_hash": checkpoint_hash(path),
            "modes": list(config.modes),
            "text_cap": config.text_cap,
            "image_area": config.image_area,
            "answer_length": config.answer_length,
            "sampling": config.sampling.to_dict(),
            "weights": config.rollout.dtype or "as stored",
            **{name: config.rollout[name] for name in ("weight_dtype", "cache_dtype") if config.rollout[name]},
        }
        described = self.describe(part, Path(wanted.checkpoint).name)
        if primary:
            if (self.workdir / run_folder.RUN).exists():  # the judge's part stays as it is
                known = run_folder.read_run(self.workdir)
                described |= {name: known.get(name) for name in ("judge", "sanity")}
            run_folder.claim(self.workdir, described)
        distributed.barrier("claimed")
        missing = generation.missing_answers(self.workdir, self.items, self.samples)
        if not missing:
            return
        total, done = len(self.items) * self.samples, (len(self.items) - len(missing)) * self.samples
        with (
            tqdm(desc="generate", unit="answer", total=total, initial=done, disable=not primary) as bar,
            Heartbeat(bar) as heartbeat,
        ):
            heartbeat.begin("drawing")
            if self.engine is None:
                self._draw(plan, (jax.process_index(), jax.process_count()), bar)
            else:
                open_ = sorted({number % self.engine.parts for number, _ in missing})
                self.engine.run(f"{COMMAND}:generate_part", self._argv, self.workdir, bar, open_)

    def _plan(self) -> generation.GenerationPlan:
        config = self.config
        return generation.GenerationPlan(
            self.samples, config.seed, config.batch, config.image_area, config.answer_length
        )

    def _draw(self, plan: generation.GenerationPlan, share: tuple[int, int], bar: tqdm) -> None:
        """Draws the missing answers of a share of the items: part i of n."""
        config = self.config
        with self._system() as (system, mesh):
            grammar = Grammar(system.tokenizer, grammar_options(system, tuple(config.modes), config.text_cap))
            generation.generate(
                system, grammar, self.benchmark, self.items, self.data, self.workdir, plan,
                as_dataclass(SamplingOptions, config.sampling), as_dataclass(EngineOptions, config.engine),
                self.prompts, share, mesh, bar.update,
            )  # fmt: skip

    @contextlib.contextmanager
    def _system(self) -> Iterator[tuple[systems.System, jax.sharding.Mesh | None]]:
        """The model on the mesh of rollouts."""
        wanted, config = self.flags, self.config
        if jax.process_count() == 1:
            system = load_sampler(
                wanted.checkpoint, config.mesh, config.rollout, wanted.image_tokenizer, wanted.text_tokenizer
            )
            yield system, system.mesh
            return
        mesh = sharding.mesh_of(config.mesh)
        with jax.set_mesh(mesh):
            system = systems.load(
                wanted.checkpoint, wanted.image_tokenizer, text_tokenizer_path=wanted.text_tokenizer, mesh=mesh
            )
            layout = RolloutLayout(system.config, mesh, as_dataclass(LayoutOptions, config.rollout))
            params = layout(system.params)
        yield dataclasses.replace(system, config=layout.config, params=params, mesh=layout.mesh), layout.mesh

    # -- judgements --

    def make_judge(self, journal: Journal | None, limits: LimitsOf = ProcessLimits) -> Judge:
        """The judge that the flags describe.  Raises UserError for a detector without its models."""
        if self._given is not None:
            return self._given
        if self.form == NoJudge.form:
            return NoJudge()
        if self.form == "world":
            return WorldJudge()
        if self.form == "detector":
            if not self.flags.clip:
                raise UserError("--clip is missing.", "Name the folder of a CLIP model, which tells colours.")
            return DetectorJudge(TransformersDetector(Path(self.flags.detector), Path(self.flags.clip)))
        service = self.service()
        if service is None:
            detector = " or --detector=FOLDER" if "detector" in self.benchmark.judges else ""
            raise UserError("no judge was named.", f"Add --config.judge.model=NAME{detector}.")
        return ChatJudge(
            self.benchmark, service, journal, self.config.judge_version, self.own_prompts, limits=limits
        )

    def judge(self) -> dict[str, Any]:
        """Judges what is there, and writes everything that follows from it."""
        self.check_references()
        run = self._run_to_judge()
        images = Path(self.flags.answers) if self.flags.answers else self.workdir / run_folder.IMAGES
        if not self.flags.answers:
            run_folder.check_drawn(self.workdir, self.items, self.samples)
        found = run_folder.find_images(self.benchmark, images, self.items, self.samples)
        with contextlib.closing(Journal(self.workdir / CACHE)) as journal:
            judge = self.make_judge(journal)
            run = self._with_judge(run, judge)
            results, checked = asyncio.run(self._ask(judge, found, journal))
        run["sanity"] = checked
        run_folder.claim(self.workdir, run)
        if checked not in (sanity.PASSED, sanity.SKIPPED, sanity.NOT_RUN):
            raise UserError(f"the judge's sanity check {checked}.",
                            "Use a judge that passes, or --skip_sanity to judge without a headline figure.")
        known = {judgement.address: judgement for judgement in results.values()}
        judged = Judged(known, found.samples, {at: self._shown_path(path) for at, path in found.paths.items()})
        answers = list(run_folder.read_answers(self.workdir, self.items, self.samples))
        made = summary.summarise(
            self.benchmark, self.items, judged, known.values(), found, answers, run, self.modes, self.flags.partial
        )
        outputs.write_all(self.benchmark, self.items, judged, found, made, self.workdir, self.data, judge.form)
        outputs.show(self.benchmark, made, self.workdir)
        return made

    def _run_to_judge(self) -> dict[str, Any]:
        """`run.json` of what is judged: that of our own answers, or a new one for another model's images."""
        if self.flags.answers:
            return self.describe(None, Path(self.flags.answers).name)
        if not (self.workdir / run_folder.RUN).exists():
            raise UserError(f"{self.workdir} holds no answers.", "Generate them first, or name --answers=FOLDER.")
        run = run_folder.read_run(self.workdir)
        wanted = {"benchmark": self.benchmark.name, "samples": self.samples, "data": self.hashes}
        run_folder.claim(self.workdir, {**run, **wanted})
        return run

    def _with_judge(self, run: dict[str, Any], judge: Judge) -> dict[str, Any]:
        """The run with its judge; the date is that of the first judgement by this judge."""
        described = {**json.loads(json.dumps(dict(judge.identity))), "label": label(judge)}
        if self.form == "chat" and self._given is None:
            described["server"] = self.config.judge.base_url
        known = {}
        if (self.workdir / run_folder.RUN).exists():
            known = run_folder.read_run(self.workdir).get("judge") or {}
        same = known.get("label") == described["label"]
        described["date"] = known["date"] if same else datetime.date.today().isoformat()
        run = {**run, "judge": described}
        run_folder.claim(self.workdir, run)
        return run

    async def _ask(
        self, judge: Judge, found: run_folder.Found, journal: Journal
    ) -> tuple[dict[Any, Judgement], str]:
        """All judgements, and the outcome of the sanity check; nothing is judged when that fails."""
        try:
            checked = sanity.SKIPPED
            if judge.form == NoJudge.form:
                return {}, sanity.NOT_RUN
            if not self.flags.skip_sanity and judge.form != "world":
                folder = Path(self.flags.sanity) if self.flags.sanity else None
                checks = sanity.checks_for(self.benchmark, judge, folder)
                with (
                    tqdm(desc="check the judge", unit="question", total=len(checks), leave=False) as bar,
                    Heartbeat(bar) as heartbeat,
                ):
                    heartbeat.begin("waiting for answers")
                    checked = await sanity.run(checks, judge, bar.update)
                if checked not in (sanity.PASSED, sanity.NOT_RUN):
                    return {}, checked
            elif judge.form == "world":
                checked = sanity.PASSED  # exact by construction
            asked = list(judging.tasks(self.benchmark, self.items, found, judge.form, self.modes))
            with tqdm(desc="judge", unit="call", total=len(asked)) as bar:
                if self.engine is not None:
                    open_ = self._open_parts(asked, label(judge))
                    run = functools.partial(self.engine.run, f"{COMMAND}:judge_part", self._argv, self.workdir, bar)
                    await asyncio.to_thread(run, open_)
                    bar.reset(total=len(asked))
                taken = self._take_parts(journal)
                results = await self._judge_all(asked, judge, self.workdir, self._recorded() | taken, bar)
            shutil.rmtree(self.workdir / PARTS, ignore_errors=True)  # taken
            return results, checked
        finally:
            await judge.close()

    async def _judge_all(
        self, asked: Sequence[judging.Task], judge: Judge, folder: Path, recorded: Mapping[Any, Judgement], bar: tqdm
    ) -> dict[Any, Judgement]:
        try:
            return await judging.judge_all(asked, judge, self.data, folder, recorded, lambda _: bar.update())
        except BaseExceptionGroup as group:
            raise judging.first_error(group) from None

    def _recorded(self) -> dict[Any, Judgement]:
        """Judgements on record that are not asked for again."""
        known = judgements.read(self.workdir)
        return {address: judgement for address, judgement in known.items() if judgement.state not in self.retried}

    # -- parts on a cluster --

    def judge_part(self, part: Part) -> None:
        """Judges the items of one part, into a folder of its own."""
        images = Path(self.flags.answers) if self.flags.answers else self.workdir / run_folder.IMAGES
        if not self.flags.answers:
            run_folder.check_drawn(self.workdir, self.items, self.samples)
        found = run_folder.find_images(self.benchmark, images, self.items, self.samples)
        folder = self.workdir / PARTS / f"{part.index:05d}"
        mine = {item.key for item in self.items[part.index :: part.count]}

        async def ask(judge: Judge) -> None:
            asked = [
                task
                for task in judging.tasks(self.benchmark, self.items, found, judge.form, self.modes)
                if task.item.key in mine
            ]
            part.bar.reset(total=len(asked))
            try:
                await self._judge_all(asked, judge, folder, self._recorded() | judgements.read(folder), part.bar)
            finally:
                await judge.close()

        with contextlib.closing(Journal(folder / CACHE)) as journal:
            asyncio.run(ask(self.make_judge(journal, part.limits)))

    def generate_part(self, part: Part) -> None:
        """Draws the answers of one part."""
        part.bar.reset(total=len(self.items[part.index :: part.count]) * self.samples)
        missing = generation.missing_answers(self.workdir, self.items, self.samples)
        left = sum(number % part.count == part.index for number, _ in missing) * self.samples
        part.bar.update(part.bar.total - left)
        if left:
            self._draw(self._plan(), (part.index, part.count), part.bar)

    def _open_parts(self, asked: Sequence[judging.Task], judge: str) -> list[int]:
        """The parts in which something is not on record."""
        known, numbers = self._recorded(), {item.key: number for number, item in enumerate(self.items)}
        wanted = [(task.item.key, task.sample, task.question.metric, judge) for task in asked]
        return sorted({numbers[address[0]] % self.engine.parts for address in wanted if address not in known})

    def _take_parts(self, journal: Journal) -> dict[Any, Judgement]:
        """Takes over what parts have judged and their services have answered; returns these judgements."""
        taken: dict[Any, Judgement] = {}
        known = judgements.read(self.workdir)
        for folder in sorted((self.workdir / PARTS).glob("*")):
            with contextlib.closing(Journal(folder / CACHE)) as part:
                journal.take(part)
            taken |= judgements.read(folder)
        with judgements.Writer(self.workdir) as writer:
            for address, judgement in taken.items():
                if known.get(address) != judgement:
                    writer.add(judgement)
        return taken

    def _shown_path(self, path: Path) -> str:
        """How result files name an image: below the work directory, or in full."""
        return str(path.relative_to(self.workdir)) if path.is_relative_to(self.workdir) else str(path)


def grammar_options(system: systems.System, modes: tuple[str, ...], text_cap: int) -> GrammarOptions:
    """Which answers are legal: all modes of a model that was trained on trajectories, else texts and images freely."""
    if not modes:
        trained_here = "vocabulary" in system.meta
        modes = tuple(mode.value for mode in AnswerMode) if trained_here else (INTERLEAVED,)
    cap = text_cap or system.longest_text
    return GrammarOptions(modes=modes, max_reflections=MAX_REFLECTIONS, max_steps=MAX_STEPS, text_cap=cap)


def checkpoint_hash(path: Path) -> str:
    """Identifies a checkpoint: names and sizes of its files, and the content of the small ones; 16 characters."""
    content = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        size = file.stat().st_size
        content.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        if size <= _SMALL:
            content.update(file.read_bytes())
    return content.hexdigest()[:16]


def _modes(named: list[str]) -> tuple[str, ...]:
    if not named or not set(named) <= set(MODES):
        raise UserError(f"--figures is {','.join(named)!r}.", f"Name {' or '.join(MODES)}, or both with a comma.")
    return tuple(mode for mode in MODES if mode in named)


def _retried(named: list[str]) -> set[State]:
    allowed = {State.REFUSED.value, State.UNPARSABLE.value}
    if not set(named) <= allowed:
        raise UserError(f"--retry is {','.join(named)!r}.", "Name refused, unparsable, or both with a comma.")
    return {State(name) for name in named}


def _rewritten(path: str | None, items: list[Item]) -> dict[str, str]:
    """Rewritten prompts by item key."""
    if not path:
        return {}
    prompts = datafiles.read_json(Path(path))
    keys = {item.key for item in items}
    right = isinstance(prompts, dict) and all(isinstance(text, str) and text.strip() for text in prompts.values())
    if not right or set(prompts) - keys:
        raise UserError(f"{path} is no JSON object of item keys and rewritten prompts.",
                        f"Keys are those of the benchmark, such as {items[0].key!r}.")
    return prompts


def _rewriter(path: str | None) -> str | None:
    """Identifies a file of rewritten prompts: its name and hash."""
    if not path:
        return None
    return f"{Path(path).name}#{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"
