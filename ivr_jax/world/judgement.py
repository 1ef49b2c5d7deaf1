"""Comparing what an image shows with what it should show: the arithmetic behind the exact analyzer.

A *finding* lists the places of an image that are wrong, sorted by axis:

    instruction   places that the edits touch
    consistency   places that no edit touches
    quality       cells that show nothing known, a damaged ruler, a wrong image size
    knowledge     places that several edits touch in turn (getting them right takes the whole chain)

A place can be wrong on several axes at once.  Each axis scores 5 - 2 x wrong places, but never below 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation
from ivr_jax.world import language
from ivr_jax.world.edits import Edit, EditError, changes
from ivr_jax.world.levels import level_of
from ivr_jax.world.recognise import read
from ivr_jax.world.scene import FOREIGN, Object, Scene

BEST, WORST, COST = 5, 1, 2  # scores, and what one wrong place costs


@dataclasses.dataclass(frozen=True)
class View:
    """What an image shows: a scene (None when the image has the wrong size) and whether its ruler is intact."""

    scene: Scene | None
    ruler: bool


@dataclasses.dataclass(frozen=True)
class Finding:
    """Names of the wrong places: in all, in reading order, and by axis."""

    wrong: tuple[str, ...]
    by_axis: Mapping[str, tuple[str, ...]]

    def evaluation(self, thresholds: Mapping[str, float], observation: str = "") -> Evaluation:
        """Scores, verdicts and reasons after an observation; an axis passes at its threshold or above."""
        verdicts = []
        for axis in AXES:
            names = self.by_axis[axis]
            everything = language.SIZE in names
            score = WORST if everything else max(WORST, BEST - COST * len(names))
            verdicts.append(AxisVerdict(score >= thresholds[axis], language.reason(names), float(score)))
        return Evaluation(*verdicts, observation=observation)


def look(image: np.ndarray, level: int) -> View:
    """Reads any array; what is no uint8 image of the level's size shows nothing."""
    return look_at_all([image], level)[0]


def look_at_all(images: Sequence[np.ndarray], level: int) -> list[View]:
    """`look` at many images at once."""
    rules = level_of(level)
    shape = (rules.height, rules.width, 3)
    fits = [isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == shape for image in images]
    views = [View(None, False)] * len(images)
    chosen = [i for i, fit in enumerate(fits) if fit]
    if chosen:
        reading = read(np.stack([images[i] for i in chosen]), level)
        for row, i in enumerate(chosen):
            views[i] = View(reading.scene(row), bool(reading.ruler[row]))
    return views


def compare(view: View, target: Scene, touches: Mapping[int, int]) -> Finding:
    """Findings of an image against the scene it should show; `touches` as `Facts.touches` gives them."""
    if view.scene is None:
        return Finding((language.SIZE,), {axis: (language.SIZE,) for axis in AXES})
    places = target.places
    wrong = changes(target, view.scene)
    foreign = [i for i, cell in enumerate(view.scene.cells) if cell == FOREIGN]
    ruler = () if view.ruler else (language.RULER,)
    by_axis = {
        "instruction": tuple(places[i] for i in wrong if i in touches),
        "consistency": tuple(places[i] for i in wrong if i not in touches),
        "quality": (*(places[i] for i in foreign), *ruler),
        "knowledge": tuple(places[i] for i in wrong if touches.get(i, 0) > 1),
    }
    return Finding((*(places[i] for i in wrong), *ruler), by_axis)


def faults(view: View, canvas: Scene, target: Scene, touches: Mapping[int, int],
           named: Sequence[str]) -> dict[str, list[str]]:
    """Failure type -> names, for the wrong places in `named`."""
    under, wrong_target, over, artefact = language.FAULTS
    found: dict[str, list[str]] = {fault: [] for fault in language.FAULTS}
    places = target.places
    for name in named:
        if view.scene is None or name == language.RULER:
            found[artefact].append(name)
            continue
        i = places.index(name)
        seen, before = view.scene.values[i], canvas.values[i]
        if seen == FOREIGN:
            found[artefact].append(name)
        elif i not in touches:
            found[over].append(name)
        else:
            found[under if seen == before != target.values[i] else wrong_target].append(name)
    return found


def observe(view: View, canvas: Scene, edits: Sequence[Edit], references: Sequence[Scene], level: int) -> str:
    """What can be said of an image before it is judged: each edit and what it changes, then place by place what the
    request wants there, what the image shows, and whether they agree (`language.Observation` in words).

    Attributes of the whole image are places where the level has several values of them.
    """
    rules, said, scene = level_of(level), [], canvas
    for edit in edits:
        after = edit.apply(scene, references)
        changed = tuple((after.places[i], value_words(after.values[i])) for i in changes(scene, after))
        said.append((language.clause(edit), changed))
        scene = after
    if view.scene is None:
        return language.observation(language.Observation(tuple(said), (), (language.SIZE,)))
    count = len(scene.cells)
    shown = [*range(count), *(count + i for i, values in enumerate((rules.backgrounds, rules.styles, rules.tones))
                              if len(values) > 1)]
    pairs = [(scene.values[i], view.scene.values[i]) for i in shown]
    places = tuple((value_words(wanted), value_words(seen), wanted == seen) for wanted, seen in pairs)
    broken = () if view.ruler else (language.RULER,)
    return language.observation(language.Observation(tuple(said), places, broken))


def content_words(target: Scene, name: str) -> str:
    """What a place should hold, as a plan says it."""
    if name in (language.RULER, language.SIZE):
        return language.REDRAWN
    return value_words(target.values[target.places.index(name)])


def value_words(value: Object | str | None) -> str:
    """A place's content in words."""
    if value is None:
        return language.EMPTY
    return value if isinstance(value, str) else language.BLOT if value == FOREIGN else value.words


def f1(named: Sequence[str], truth: Sequence[str]) -> float:
    """Agreement of two sets in [0, 1]: 1 when equal, also when both are empty."""
    a, b = set(named), set(truth)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def plan_value(entries: Sequence[tuple[str, str]], target: Scene, wrong: Sequence[str]) -> float:
    """The share of wrong places that a plan repairs, less what it would spoil, in [0, 1]."""
    if not wrong:
        return float(not entries)
    right = {name for name, content in entries if name in wrong and content == content_words(target, name)}
    harm = {name for name, content in entries
            if name not in wrong and name in target.places and content != content_words(target, name)}
    return max(0.0, (len(right) - len(harm)) / len(wrong))


def apply_safely(edits: Sequence[Edit], scene: Scene, references: Sequence[Scene]) -> Scene:
    """The scene after those of the edits that make sense at their turn."""
    for edit in edits:
        try:
            scene = edit.apply(scene, references)
        except EditError:
            continue
    return scene


def step_value(edit: Edit, state: Scene, remaining: Sequence[Edit], target: Scene,
               references: Sequence[Scene]) -> float:
    """How well `edit` continues from `state` when the edits `remaining` are still to do, in [0, 1].

    1: it does the next edit, or another remaining one whose order does not matter.  Otherwise, the share of the damage
    it repairs, when doing the rest from `state` would not reach the target; else half the share of its changes that
    bring places to their final content.  0 when it makes no sense, changes nothing, or spoils the result.
    """
    if remaining and edit == remaining[0]:
        return 1.0
    try:
        after = edit.apply(state, references)
    except EditError:
        return 0.0
    if after == state:
        return 0.0
    goal = apply_safely(remaining, state, references)
    for k, other in enumerate(remaining):
        rest = (*remaining[:k], *remaining[k + 1 :])
        if apply_safely([other], state, references) == after and apply_safely(rest, after, references) == goal:
            return 1.0
    wrong_before = len(changes(goal, target))
    wrong_after = len(changes(apply_safely(remaining, after, references), target))
    if wrong_after < wrong_before:
        return (wrong_before - wrong_after) / wrong_before
    if wrong_after > wrong_before:
        return 0.0
    progress = len(changes(state, target)) - len(changes(after, target))
    return 0.5 * max(0, progress) / len(changes(state, after))
