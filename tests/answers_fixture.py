"""Answers as an evaluation would record them, made from the micro-world without any model.

Three imagined models ("arms") answer the same held-out tasks: each draws the target, or a scene in which some edits
were forgotten; judges it, sometimes wrongly; and goes on by steps or reflection as its character has it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from answer_tokens import without_scores

from ivr_jax.images import image_name
from ivr_jax.report.answers import EvaluatedAnswer, SegmentRecord, write_answers
from ivr_jax.report.gates import entry_gates, write_gates
from ivr_jax.report.intervals import share
from ivr_jax.report.metrics import evaluate, write_evaluation
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Round, Sample, Step, Trajectory
from ivr_jax.world import language
from ivr_jax.world.edits import run
from ivr_jax.world.render import render, render_edit
from ivr_jax.world.sampler import Task, sample_task
from ivr_jax.world.scene import Scene

IMAGE_TOKENS, EVALUATION_TOKENS, REFLECTION_TOKENS, STEP_TOKENS = 25, 18, 14, 9


@dataclasses.dataclass(frozen=True)
class Character:
    """How often a model gets one edit right, misjudges its last image, and takes steps or reflects after a failure."""

    edit_right: float
    passes_wrong: float
    fails_right: float
    steps: float
    reflects: float


ARMS = {
    "eval_base": Character(0.84, 0.95, 0.02, 0.0, 0.0),
    "eval_sft": Character(0.85, 0.15, 0.10, 0.55, 0.30),
    "eval_rl": Character(0.91, 0.50, 0.02, 0.40, 0.25),
}


class Studio:
    """Makes answers and keeps every image by its name: uint8 [height, width, 3]."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.images: dict[str, np.ndarray] = {}

    def answer(self, task: Task, character: Character, split: str) -> EvaluatedAnswer:
        """One answer to `task`; a failure is mended as `character` has it."""
        rng, total = self.rng, len(task.edits)
        done = total - int((rng.random(total) > character.edit_right).sum())
        causes: list[Reflection | Step | None] = [None]
        scenes = [self.after(task, done)]
        if done < total and (dice := rng.random()) < character.steps + character.reflects:
            if dice < character.steps:
                slipped = int(rng.random() < 0.15)  # the last step changes nothing
                for edit in task.edits[done:]:
                    causes.append(Step(language.step(edit)))
                    scenes.append(self.after(task, min(done + len(causes) - 1, total - slipped)))
            else:
                causes.append(reflection_on(scenes[0], task))
                scenes.append(task.target if rng.random() < 0.6 else scenes[0])
        return self.record(task, causes, scenes, character, split)

    def record(
        self, task: Task, causes: list, scenes: list[Scene], character: Character, split: str
    ) -> EvaluatedAnswer:
        """The answer in which `causes` led to `scenes`; a wrong image may be passed by mistake, but only at the end."""
        self.images |= task.images
        truth = tuple(judge(scene, task) for scene in scenes)
        own = []
        for index, evaluation in enumerate(truth):
            misjudges = character.fails_right if evaluation.passed else character.passes_wrong
            slips = index == len(truth) - 1 and self.rng.random() < misjudges
            own.append(without_scores(flip(evaluation) if slips else evaluation))
        rounds = tuple(Round(cause, self.draw(task, scene), evaluation)
                       for cause, scene, evaluation in zip(causes, scenes, own, strict=True))
        trajectory = Trajectory(task.sample, rounds)
        outcome = sum(truth[-1].scores) / 20
        rewards = {"outcome": outcome, "format": float(own[-1].passed)}
        if len(rounds) > 1:
            rewards["step"] = float(self.rng.choice([0.5, 1.0]))
        step = rewards.get("step", 1.0)
        rewards["total"] = 0.7 * outcome + 0.1 * rewards["format"] + 0.2 * step
        return EvaluatedAnswer(
            task.sample, trajectory, "" if own[-1].passed else "it ends on a failed verdict with rounds left",
            trajectory.images, truth, tuple(scene == task.target for scene in scenes), rewards,
            segments_of(trajectory, trained=False), split, trajectory.mode if own[-1].passed else None,
        )  # fmt: skip

    def garbled(self, task: Task, text: str) -> EvaluatedAnswer:
        """An answer that broke off after one image and some text that is no evaluation."""
        self.images |= task.images
        name = self.draw(task, self.after(task, 0))
        truth = judge(self.after(task, 0), task)
        segments = (SegmentRecord("G1", "", name, IMAGE_TOKENS, False), SegmentRecord("text", text, None, 12, False))
        return EvaluatedAnswer(
            task.sample, None, "token 27: expected <Evaluate>", (name,), (truth,), (False,),
            {"outcome": sum(truth.scores) / 20, "format": 0.0}, segments, "kris/procedural", None,
        )  # fmt: skip

    def training_sample(self, task: Task, mode: Mode) -> EvaluatedAnswer:
        """A constructed training sample of `mode`, with the paper's loss segments."""
        self.images |= task.images
        total = len(task.edits)
        causes: list[Reflection | Step | None] = [None]
        scenes = [task.target if mode is Mode.DIRECT else self.after(task, total - 1)]
        if mode is Mode.REFLECTION:
            causes, scenes = [None, reflection_on(scenes[0], task)], [*scenes, task.target]
        elif mode is Mode.MULTI_STEP:
            scenes = [self.after(task, 0), *(self.after(task, k + 1) for k in range(total))]
            causes = [None, *(Step(language.step(edit)) for edit in task.edits)]
        truth = tuple(judge(scene, task) for scene in scenes)
        rounds = tuple(Round(cause, self.draw(task, scene), without_scores(evaluation))
                       for cause, scene, evaluation in zip(causes, scenes, truth, strict=True))
        trajectory = Trajectory(task.sample, rounds)
        exact = tuple(scene == task.target for scene in scenes)
        return EvaluatedAnswer(
            task.sample, trajectory, "", trajectory.images, truth, exact, {},
            segments_of(trajectory, trained=True), "train", mode,
        )  # fmt: skip

    def after(self, task: Task, edits: int) -> Scene:
        """The scene after the first `edits` edits of `task`."""
        return run(task.edits[:edits], task.facts.canvas, task.facts.sources)

    def draw(self, task: Task, scene: Scene) -> str:
        if task.sample.sources:
            source = task.images[task.sample.sources[0]]
            pixels = render_edit(task.facts.canvas, source, scene, task.facts.level)
        else:
            pixels = render(scene, task.facts.level)
        name = image_name(pixels)
        self.images[name] = pixels
        return name


def judge(scene: Scene, task: Task) -> Evaluation:
    """5 - 2 x wrong cells, floor 1: `instruction` for cells that should change, `consistency` for the others."""
    touched, wrong = task.facts.touches(), wrong_places(scene, task.target)
    faults = {"instruction": [p for p in wrong if p in touched], "consistency": [p for p in wrong if p not in touched],
              "quality": [], "knowledge": [p for p in wrong if touched.get(p, 0) > 1]}
    return Evaluation(**{axis: AxisVerdict(not faults[axis],
                                           language.reason([task.target.places[p] for p in faults[axis]]),
                                           float(max(1, 5 - 2 * len(faults[axis])))) for axis in AXES})


def wrong_places(scene: Scene, target: Scene) -> list[int]:
    return [place for place, cell in enumerate(scene.cells) if cell != target.cells[place]]


def flip(evaluation: Evaluation) -> Evaluation:
    """The opposite verdict of the whole: all pass, or the instruction fails."""
    if evaluation.passed:
        return dataclasses.replace(evaluation, instruction=AxisVerdict(False, language.reason(["b2"]), 3.0))
    return Evaluation(*(AxisVerdict(True, language.PASSED, 5.0) for _ in AXES))


def reflection_on(scene: Scene, task: Task) -> Reflection:
    target = task.target
    wrong = wrong_places(scene, target)
    places = [target.places[place] for place in wrong] or ["b2"]
    entries = [(target.places[p], target.cells[p].words if target.cells[p] else "empty") for p in wrong]
    return Reflection(language.failure_analysis({"Under-editing": places}), language.plan(entries))


def segments_of(trajectory: Trajectory, trained: bool) -> tuple[SegmentRecord, ...]:
    """The token stream of `trajectory`; when `trained`, loss on the segments that the paper trains."""
    last, mode = len(trajectory.rounds), trajectory.mode
    segments = []
    for number, round_ in enumerate(trajectory.rounds, start=1):
        late = {Mode.DIRECT: True, Mode.REFLECTION: number >= last - 1, Mode.MULTI_STEP: True}[mode]
        if isinstance(round_.cause, Reflection):
            text = f"{round_.cause.failure_analysis} {round_.cause.improvement_plan}"
            segments.append(SegmentRecord(f"R{number - 1}", text, None, REFLECTION_TOKENS, trained and number == last))
        elif isinstance(round_.cause, Step):
            segments.append(SegmentRecord(f"S{number}", round_.cause.instruction, None, STEP_TOKENS, trained))
        drawn = number == last or (mode is Mode.MULTI_STEP and number > 1)
        segments.append(SegmentRecord(f"G{number}", "", round_.image, IMAGE_TOKENS, trained and drawn))
        reasons = " ".join(verdict.reason for verdict in round_.evaluation.axes)
        segments.append(SegmentRecord(f"E{number}", reasons, None, EVALUATION_TOKENS, trained and late))
    return tuple(segments)


def tasks(count: int, seed: int = 3) -> list[Task]:
    """Held-out tasks with 1, 2, 3, 4 edits in turn."""
    return [sample_task(0, seed, index, edits=1 + index % 4, held_out=True) for index in range(count)]


def plain_answer(images: int = 1, exact: bool = True, key: str = "k", passes: bool = True, edits: int | None = None,
                 split: str = "") -> EvaluatedAnswer:
    """A bare answer of a given shape, for figures that can be worked out by hand: only the last image may be right."""
    good = Evaluation(*(AxisVerdict(True, "fine", 5.0) for _ in AXES))
    bad = dataclasses.replace(good, instruction=AxisVerdict(False, "wrong", 1.0))
    sample = Sample(key, "Do it.", facts={} if edits is None else {"edits": edits})
    own = (*[bad] * (images - 1), good if passes else bad)
    rounds = tuple(Round(Step("Go on.") if i else None, f"{key}-{i}", own[i]) for i in range(images))
    right = tuple(i == images - 1 and exact for i in range(images))
    trajectory = Trajectory(sample, rounds)
    truth = tuple(good if r else bad for r in right)
    return EvaluatedAnswer(
        sample, trajectory, "", trajectory.images, truth, right, {}, split=split, mode=trajectory.mode
    )


def write_workdir(root: Path, count: int, seed: int = 3) -> None:
    """A whole run as `ivr_jax.report.collect` expects it: four stages, three arms, training samples, gates."""
    splits = ("mixture", "kris/factual", "kris/procedural", "geneval/colours", "omnicontext/single")
    results = {}
    for arm, character in ARMS.items():
        studio = Studio(seed)
        answers = [studio.answer(task, character, splits[index % len(splits)])
                   for index, task in enumerate(tasks(count, seed))]
        answers[1] = studio.garbled(tasks(2, seed)[1], "<script>alert('pwned')</script> & so on <b>bold</b>")
        write_answers(root / arm, answers, studio.images)
        results[arm] = evaluate(answers, about={"checkpoint": f"{arm.removeprefix('eval_')}/400", "temperature": 1.0})
        write_evaluation(root / arm, results[arm])
    studio = Studio(seed + 1)
    samples = [studio.training_sample(sample_task(0, seed + 1, i, edits=2 + i % 3), mode)
              for i, mode in enumerate([*Mode, *Mode])]
    write_answers(root / "sft" / "training_samples", samples, studio.images)
    probed = results["eval_sft"] | {"probes": {"step_text": share([True] * 52 + [False]), "critique": share([])}}
    write_gates(root, entry_gates({"base": results["eval_base"], "sft": probed}))
    rng = np.random.default_rng(seed)
    for stage, last in (("image_tokenizer", 800), ("base", 400), ("sft", 700), ("rl", 90)):
        (root / stage).mkdir(parents=True, exist_ok=True)
        config = {"seed": seed, "steps": last, "optimizer": {"learning_rate": 1.5e-3, "schedule": "cosine"}}
        (root / stage / "config.json").write_text(json.dumps(config))
        with (root / stage / "metrics.jsonl").open("w") as file:
            for step in range(1, last + 1, max(1, last // 100)):
                fall = math.exp(-3 * step / last)
                row = {"step": step, "loss": 0.2 + 2 * fall + 0.08 * rng.normal(), "learning_rate": 1e-3 * fall,
                       "grad_norm": 1 + abs(rng.normal()), "accuracy": 1 - 0.7 * fall + 0.02 * rng.normal(),
                       "seconds_per_step": 0.3 + 0.01 * rng.normal()}
                if stage == "rl":
                    row |= {"reward/total": 0.9 - 0.3 * fall + 0.03 * rng.normal(), "images": 1.3 + fall}
                    row["kl"] = 0.02 * rng.random()
                file.write(json.dumps(row) + "\n")
