"""Tasks: samples of the micro-world with their images and exact targets.

Every task is a pure function of (level, seed, index, options).  An eighth of all tasks, picked by a hash of prompt and
sources, is *held out*: training draws never return one, benchmark draws return nothing else, so that no benchmark
task can have been trained on whatever the seeds are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.trajectory import Sample
from ivr_jax.world import language
from ivr_jax.world.draws import Request, draw_request
from ivr_jax.world.edits import KINDS, SUBCATEGORIES, Edit
from ivr_jax.world.facts import Facts, facts_to_json
from ivr_jax.world.levels import Level, level_of
from ivr_jax.world.render import random_wobble, render, render_edit
from ivr_jax.world.scene import Scene, scene_to_json

REQUESTS = ("t2i", "edit", "references")
_T2I = 0.10  # share of training requests; `Level.references` show several images, the rest edits one
_TRAINING, _BENCHMARK = 0, 1  # streams of randomness
_HELD_OUT = 8  # every eighth task
_LIMIT = 5000


@dataclasses.dataclass(frozen=True)
class Task:
    """A sample and what the world knows about it.

    Attributes:
      sample: the request, with facts for the exact analyzer.
      images: name -> uint8 [height, width, 3] of every source.
      facts: scenes, edits and target as values.
      target_image: uint8 [height, width, 3], the exact answer.
    """

    sample: Sample
    images: dict[str, np.ndarray]
    facts: Facts
    target_image: np.ndarray

    @property
    def target(self) -> Scene:
        """The one right answer."""
        return self.facts.target

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that the prompt asks for, in order."""
        return self.facts.edits


def categories(level: int) -> tuple[str, ...]:
    """The paper's sub-categories that a level can express, in the order of the taxonomy."""
    known = {KINDS[kind].category for kind in level_of(level).all_kinds}
    return tuple(name for name in SUBCATEGORIES if name in known)


def sample_task(level: int, seed: int, index: int, *, subset: str | None = None, edits: int | None = None,
                held_out: bool = False) -> Task:
    """One task.

    Args:
      level: difficulty, see `ivr_jax.world.levels`.
      seed, index: choose the task; everything else being equal they determine it.
      subset: "t2i", "edit" or "references" for one kind of request; a sub-category for requests whose first edit is
        of it; None for the training mixture (10% t2i, `Level.references` with several images).
      edits: the number of edits; None for 1 to the level's most, evenly.
      held_out: draw from the held-out eighth instead of the rest.
    Raises UserError for a level, subset or number of edits that does not exist.
    """
    rules = level_of(level)
    if subset is not None and subset not in REQUESTS + categories(level):
        raise UserError(f"level {level} of the micro-world has no subset {subset!r}.",
                        f"Choose one of {', '.join(REQUESTS + categories(level))}.")
    if edits is not None and not 1 <= edits <= rules.most_edits:
        raise UserError(f"level {level} of the micro-world has no tasks of {edits} edits.",
                        f"Choose 1 to {rules.most_edits}.")
    choices = (REQUESTS + SUBCATEGORIES).index(subset) + 1 if subset else 0
    rng = np.random.default_rng([_TRAINING, seed, index, level, choices, edits or 0, held_out])
    key = f"world{level}-{seed}-{index}"
    return _draw(rng, rules, lambda: _training_request(rng, rules, subset, edits), key, "", held_out)


def _training_request(rng: np.random.Generator, rules: Level, subset: str | None, edits: int | None) -> Request:
    dice = rng.random()
    kind = "t2i" if dice < _T2I else "references" if dice < _T2I + rules.references else "edit"
    first = None
    if subset in REQUESTS:
        kind = subset
    elif subset is not None:
        first = tuple((name, 1.0) for name in rules.all_kinds if KINDS[name].category == subset)
        references = first[0][0] in rules.reference_kinds
        kind = "references" if references else "edit"
    number = edits or int(rng.integers(1, rules.most_edits + 1))
    if kind == "t2i":
        return t2i_request(rules, number)
    images = 1
    if kind == "references":
        images = int(rng.integers(2, rules.most_images + 1))
        number = number if edits else min(number, 1 + int(rng.integers(2)) if rules.index == 0 else number)
        first = first or tuple((name, 1.0) for name in rules.reference_kinds)
    return Request(images, ((first or rules.kinds), *[rules.kinds] * (number - 1)), rules.relational)


def t2i_request(rules: Level, number: int) -> Request:
    """Mostly objects put on the empty board, sometimes lines of them and edits of what was put."""
    first = (("put", 0.85), ("line", 0.15))
    other = tuple((kind, share * 0.25) for kind, share in rules.kinds if kind not in ("put", "line"))
    later = (("put", 4.0), ("line", 0.3), *other)
    return Request(0, (first, *[later] * (number - 1)), max(rules.relational, 0.15), dependence=0.3)


def sample_facts(rng: np.random.Generator, rules: Level, edits: int) -> tuple[Facts, str]:
    """A request of the training mixture without pixels: its facts and its prompt.

    Args:
      rules: the level, whose kinds of edits may be weighed otherwise than it says.
    """
    return _draw_facts(rng, rules, lambda: _training_request(rng, rules, None, edits), "", held_out=False)


def _draw(rng: np.random.Generator, rules: Level, request: Callable[[], Request], key: str, split: str,
          held_out: bool) -> Task:
    return make_task(rng, *_draw_facts(rng, rules, request, key, held_out), key, split)


def _draw_facts(rng: np.random.Generator, rules: Level, request: Callable[[], Request], key: str,
                held_out: bool) -> tuple[Facts, str]:
    """Draws until a request makes sense and falls on the right side of the held-out line."""
    for _ in range(_LIMIT):
        facts = draw_request(rng, rules, request())
        if facts is None:
            continue
        prompt = language.prompt(facts.edits, rng.integers(0, 12, len(facts.edits)).tolist())
        if is_held_out(prompt, facts.sources) == held_out:
            return facts, prompt
    raise UserError(f"no task {key!r} could be drawn in {_LIMIT} tries.", "Choose another subset or more edits.")


def is_held_out(prompt: str, sources: tuple[Scene, ...]) -> bool:
    """Whether a task belongs to the held-out eighth, which is for benchmarks only."""
    content = json.dumps([prompt, [scene_to_json(scene) for scene in sources]])
    return hashlib.sha256(content.encode()).digest()[0] % _HELD_OUT == 0


def make_task(rng: np.random.Generator, facts: Facts, prompt: str, key: str, split: str) -> Task:
    """The task of a request that is worked out, its images drawn; where the level lets objects stand off the middle of
    their cells, `rng` says where."""
    images: dict[str, np.ndarray] = {}
    names, pixels, wobble = [], None, None
    for scene in facts.sources:
        drawn_wobble = random_wobble(rng, facts.level)
        drawn = render(scene, facts.level, drawn_wobble)
        names.append(image_name(drawn))
        images[names[-1]] = drawn
        if pixels is None:
            pixels, wobble = drawn, drawn_wobble
    if pixels is None:
        target_image = render(facts.target, facts.level, random_wobble(rng, facts.level))
    else:
        target_image = render_edit(facts.canvas, pixels, facts.target, facts.level, wobble)
    chained = [facts.target.places[place] for place, count in sorted(facts.touches().items()) if count > 1]
    sample = Sample(
        key=key, prompt=prompt, sources=tuple(names), category=KINDS[facts.edits[0].kind].category,
        explanation=f"Edits build on one another at {' '.join(chained)}." if chained else "",
        facts=facts_to_json(facts, split))
    return Task(sample, images, facts, target_image)


def draw_held_out(level: int, seed: int, index: int, split: str, stream: int,
                   request: Callable[[np.random.Generator, Level], Request]) -> Task:
    """A held-out task for a benchmark split (see `ivr_jax.world.splits`); `stream` keeps splits apart."""
    rules = level_of(level)
    rng = np.random.default_rng([_BENCHMARK, seed, index, level, stream])
    key = f"{split.replace('/', '-')}-world{level}-{seed}-{index}"
    return _draw(rng, rules, lambda: request(rng, rules), key, split, held_out=True)
