"""Practice: endless trajectories made of scenes alone, without pixels, for a base model that understands.

A lesson is a trajectory (`ivr_jax.trajectory`) with the scene of each of its images, and which of them are given:
judged, but no targets of drawing.  Faults are made up, and there are many of them at once in some images: a model
learns to compare cell by cell from boards that are wrong in every second place much sooner than from boards that are
wrong in one.

    direct       the exact answer, drawn and judged
    judge        an image that is given, right or wrong, and its evaluation
    reflection   a wrong image, its evaluation, the critique, and the exact answer; or, given, other wrong images first
    multi_step   a wrong image, its evaluation, and one step an edit; or, given, a wrong image after some of the steps

Without given images in later rounds a model learns that the second image always passes, whatever it shows.

Lessons are drawn by index, independent of each other; none is a held-out task of `ivr_jax.world.sampler`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.trajectory import Reflection, Round, Sample, Step, Trajectory
from ivr_jax.world import judgement, language
from ivr_jax.world.analyzer import WorldAnalyzer, step_edits
from ivr_jax.world.draws import random_object
from ivr_jax.world.edits import Edit
from ivr_jax.world.facts import Facts
from ivr_jax.world.levels import Level, level_of
from ivr_jax.world.sampler import sample_facts
from ivr_jax.world.scene import Scene

LESSONS = ("direct", "judge", "reflection", "multi_step")
SOURCE, DRAWN = "source", "G"  # names of images: source1, source2, ..., G1, G2, ...
_STREAM = 2  # of randomness, beside those of `sampler`


@dataclasses.dataclass(frozen=True)
class PracticeOptions:
    """What lessons are about.

    Attributes:
      level: difficulty, see `ivr_jax.world.levels`.
      lessons: relative frequency of each of `LESSONS`.
      drawn_edits, read_edits: relative frequency of 1, 2, 3 ... edits in a request that is drawn in one go, and in
        those of the other lessons.  A base that mostly draws one edit, and reads any number, is better at judging than
        at drawing.
      right: share of the images to judge that are right.
      dense, misread: shares of the wrong images in which many cells are redrawn at random, and in which edits were left
        out or misunderstood; the others are wrong in one or two cells.
      later_wrong: probability that a second or third image of a reflection lesson, or a step's image, is wrong, given
        to be judged.
      kinds: relative frequency of kinds of edits where it differs from the level's own.
    """

    level: int = 0
    lessons: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(LESSONS, 1.0))
    drawn_edits: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    read_edits: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    right: float = 0.2
    dense: float = 0.5
    misread: float = 0.3
    later_wrong: float = 0.2
    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = level_of(self.level)
        for name, known, weights in (
            ("lessons", LESSONS, self.lessons),
            ("kinds", rules.all_kinds, self.kinds),
            ("drawn_edits", range(rules.most_edits), dict(enumerate(self.drawn_edits))),
            ("read_edits", range(rules.most_edits), dict(enumerate(self.read_edits))),
        ):
            if not set(weights) <= set(known) or min([0.0, *weights.values()]) < 0:
                raise UserError(f"practice.{name} is {weights!r}.", f"Give weights of at least 0 to: {list(known)}.")
        if not any(self.lessons.values()) or not any(self.drawn_edits) or not any(self.read_edits):
            raise UserError("practice has nothing to draw.", "Give a lesson and a number of edits a weight above 0.")
        if min(self.right, self.dense, self.misread) < 0 or max(self.right, self.dense + self.misread) > 1:
            raise UserError("practice.right, dense and misread are shares of images.",
                            "Let each be at least 0, and right and dense + misread 1 at most.")
        if not 0 <= self.later_wrong <= 1:
            raise UserError(f"practice.later_wrong is {self.later_wrong}.", "Give a probability from 0 to 1.")
        if self.lessons.get("multi_step") and not any(self.read_edits[1:]):
            raise UserError("steps need several edits.", "Give practice.read_edits weights for two edits or more.")

    @property
    def rules(self) -> Level:
        """The level, with the kinds of edits weighed as asked."""
        rules = level_of(self.level)
        weights = dict(rules.kinds) | dict(self.kinds)
        kinds = tuple((kind, weight) for kind, weight in weights.items() if kind not in rules.reference_kinds)
        return dataclasses.replace(rules, kinds=kinds)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A trajectory, the scene of each image by name, and the names of those drawn images that are no targets."""

    trajectory: Trajectory
    scenes: dict[str, Scene]
    given: frozenset[str]


@dataclasses.dataclass(frozen=True)
class _Image:
    """An image of a lesson: what led to it, what it shows, and whether it is given rather than a target."""

    cause: Reflection | Step | None
    scene: Scene
    given: bool


def draw_lesson(options: PracticeOptions, seed: int, index: int) -> Lesson:
    """Lesson `index` of a run with `seed`."""
    rng = np.random.default_rng([_STREAM, seed, index, options.level])
    kind = _weighted(rng, options.lessons)
    weights = dict(enumerate(options.drawn_edits if kind == "direct" else options.read_edits, 1))
    if kind == "multi_step":
        weights[1] = 0.0
    facts, prompt = sample_facts(rng, options.rules, _weighted(rng, weights))
    if kind == "direct" or kind == "judge" and rng.random() < options.right:
        images = [_Image(None, facts.target, kind == "judge")]
    else:
        images = [_Image(None, wrong_scene(rng, facts, options), True)]
    if kind == "reflection":
        images += _reflections(rng, facts, images[0].scene, options)
    elif kind == "multi_step":
        images += _steps(rng, facts, options)
    sources = tuple(f"{SOURCE}{i + 1}" for i in range(len(facts.sources)))
    sample = Sample(f"practice{options.level}-{seed}-{index}", prompt, sources)
    names = [f"{DRAWN}{k}" for k in range(1, len(images) + 1)]
    rounds = tuple(
        Round(image.cause, name, ANALYZER.evaluate_view(facts, judgement.View(image.scene, ruler=True)))
        for name, image in zip(names, images, strict=True)
    )
    scenes = dict(zip(sources, facts.sources, strict=True))
    scenes |= {name: image.scene for name, image in zip(names, images, strict=True)}
    given = frozenset(name for name, image in zip(names, images, strict=True) if image.given)
    return Lesson(Trajectory(sample, rounds), scenes, given)


ANALYZER = WorldAnalyzer(observe=True)


def _reflections(rng: np.random.Generator, facts: Facts, first: Scene, options: PracticeOptions) -> list[_Image]:
    """Up to two images after `first`, each with the critique of the one before; they end with the first right one."""
    images: list[_Image] = []
    for _ in range(2):
        last = images[-1].scene if images else first
        critique = ANALYZER.reflect_view(facts, judgement.View(last, ruler=True))
        wrong = rng.random() < options.later_wrong
        images.append(_Image(critique, wrong_scene(rng, facts, options) if wrong else facts.target, wrong))
        if not wrong:
            break
    return images


def _steps(rng: np.random.Generator, facts: Facts, options: PracticeOptions) -> list[_Image]:
    """The steps from the source to the target; they end as soon as the target is reached.

    A wrong image of a step differs in one or two cells from what the step asks for, and the steps continue from it.
    """
    scene, images = facts.canvas, []
    for edit in step_edits(facts):
        scene = judgement.apply_safely([edit], scene, facts.sources)
        wrong = rng.random() < options.later_wrong
        if wrong:
            spoilt = _few_wrong(rng, scene, options.rules)
            wrong = spoilt != scene
            scene = spoilt
        images.append(_Image(Step(language.step(edit)), scene, wrong))
        if scene == facts.target:
            break
    return images


def wrong_scene(rng: np.random.Generator, facts: Facts, options: PracticeOptions) -> Scene:
    """A scene that is not the target."""
    rules = options.rules
    for _ in range(100):
        dice = rng.random()
        if dice < options.dense:
            scene = _redraw(rng, facts.target, rules, rng.uniform(0.15, 0.9))
        elif dice < options.dense + options.misread:
            scene = judgement.apply_safely(_misread(rng, facts.edits, rules), facts.canvas, facts.sources)
        else:
            scene = _few_wrong(rng, facts.target, rules)
        if scene != facts.target:
            return scene
    raise UserError("no wrong image could be made up.", "Use a level with more than one kind of object.")


def _few_wrong(rng: np.random.Generator, scene: Scene, rules: Level) -> Scene:
    """One or two cells are drawn anew."""
    places = rng.permutation(len(scene.cells))[: 1 + int(rng.integers(2))]
    return scene.with_values({int(place): _content(rng, rules) for place in places})


def _redraw(rng: np.random.Generator, scene: Scene, rules: Level, rate: float) -> Scene:
    """Every cell is drawn anew with probability `rate`."""
    return scene.with_cells([_content(rng, rules) if rng.random() < rate else cell for cell in scene.cells])


def _content(rng: np.random.Generator, rules: Level) -> Any:
    return None if rng.random() < 0.4 else random_object(rng, rules, whole=True)


def _misread(rng: np.random.Generator, edits: tuple[Edit, ...], rules: Level) -> tuple[Edit, ...]:
    """The edits with one or two of them left out, changed in one word, or all in another order."""
    result = list(edits)
    for _ in range(1 + int(rng.random() < 0.3)):
        if not result:
            break
        place, dice = int(rng.integers(len(result))), rng.random()
        if dice < 0.4:
            del result[place]
        elif dice < 0.5 and len(result) > 1:
            rng.shuffle(result)
        else:
            result[place] = _another_word(rng, result[place], rules)
    return tuple(result)


def _another_word(rng: np.random.Generator, edit: Edit, rules: Level) -> Edit:
    """The edit with another cell, object or colour; kinds without any of these stay as they are."""
    names = rules.blank.places[: rules.rows * rules.columns]
    choices: dict[str, Any] = {name: names[rng.integers(len(names))] for name in ("ref", "to") if getattr(edit, name)}
    if edit.thing and edit.kind != "line":
        choices["thing"] = random_object(rng, rules, whole=True).words
    if edit.value and edit.kind == "recolour":
        choices["value"] = rules.colours[rng.integers(len(rules.colours))]
    if not choices:
        return edit
    name = list(choices)[rng.integers(len(choices))]
    return dataclasses.replace(edit, **{name: choices[name]})


def _weighted(rng: np.random.Generator, weights: Mapping[Any, float]) -> Any:
    shares = np.cumsum([float(weight) for weight in weights.values()])
    return list(weights)[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
