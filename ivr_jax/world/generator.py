"""The GENERATOR: draws what it is told, with faults at a settable rate.

It reads its sources from pixels and its instruction from text, like any other model: the whole prompt, or one step.
When a reflection comes with the request, its improvement plan is carried out too.  Text outside the language leaves
the source as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.images import Pixels
from ivr_jax.trajectory import Reflection, Sample
from ivr_jax.world import judgement, language
from ivr_jax.world.draws import random_object
from ivr_jax.world.edits import changes
from ivr_jax.world.facts import facts_of, has_facts
from ivr_jax.world.levels import level_of
from ivr_jax.world.render import random_wobble, render, render_edit
from ivr_jax.world.scene import ATTRIBUTES, BACKGROUNDS, FOREIGN, STYLES, TONES, Object, Scene, object_from_words

_VALUES = {"background": BACKGROUNDS, "style": STYLES, "tone": TONES}


class WorldGenerator:
    """Draws scenes of the micro-world.

    Args:
      fault_rate: the share of calls in [0, 1] whose result is spoilt in one or two cells; may be set at any time.
      step_fault_rate: the same for calls that ask for one step, not for the whole prompt; None means `fault_rate`.
      seed: with key, instruction, reflection and attempt it decides which calls those are.
      level: the level of samples that do not say theirs.
    """

    def __init__(self, fault_rate: float = 0.0, seed: int = 0, level: int = 0, step_fault_rate: float | None = None):
        for rate in (fault_rate, step_fault_rate):
            if rate is not None and not 0 <= rate <= 1:
                raise UserError(f"a fault rate of {rate} is out of range.", "Give a number from 0 to 1.")
        self.fault_rate, self.step_fault_rate = fault_rate, step_fault_rate
        self.seed, self.level = seed, level_of(level).index

    async def generate(self, sample: Sample, instruction: str, sources: Sequence[Pixels],
                       reflection: Reflection | None = None, attempt: int = 0) -> Pixels:
        """See `Generator.generate`."""
        return self.generate_sync(sample, instruction, sources, reflection, attempt)

    def generate_sync(self, sample: Sample, instruction: str, sources: Sequence[Pixels],
                      reflection: Reflection | None = None, attempt: int = 0) -> Pixels:
        """uint8 [height, width, 3] at the size of the sample's level.  Raises UserError for sources of another size."""
        facts = facts_of(sample) if has_facts(sample) else None
        level = facts.level if facts else self.level
        rules = level_of(level)
        views = [view.scene for view in judgement.look_at_all(sources, level)]
        if None in views:
            raise UserError(f"a source of sample {sample.key!r} is no image of {rules.height}x{rules.width} pixels.",
                            f"Level {level} of the micro-world draws no others.")
        canvas = views[0] if views else rules.blank
        references = facts.sources if facts and len(facts.sources) > len(views) else tuple(views)
        edits = language.parse_prompt(instruction)
        if edits is None and facts and instruction == sample.prompt:
            edits = facts.edits
        scene = judgement.apply_safely(edits or (), canvas, references)
        plan = reflection.improvement_plan if reflection else ""
        scene = follow_plan(scene, plan)
        rng = np.random.default_rng(_digest(self.seed, sample.key, instruction, plan, attempt))
        whole = self.step_fault_rate is None or instruction == sample.prompt
        if rng.random() < (self.fault_rate if whole else self.step_fault_rate):
            scene = spoil(rng, scene, canvas, level)
        pixels = sources[0] if len(sources) else render(canvas, level)
        return render_edit(canvas, pixels, scene, level, random_wobble(rng, level))


def follow_plan(scene: Scene, plan: str) -> Scene:
    """The scene after carrying out an improvement plan, as far as it is one and its places exist."""
    contents: dict[int, Object | str | None] = {}
    for name, words in language.parse_plan(plan) or ():
        if name in ATTRIBUTES and words in _VALUES[name]:
            contents[scene.places.index(name)] = words
        elif name in scene.places and name not in ATTRIBUTES:
            try:
                contents[scene.index(name)] = None if words == language.EMPTY else object_from_words(words)
            except UserError:  # a style where an object belongs, say
                continue
    return scene.with_values(contents)


def spoil(rng: np.random.Generator, scene: Scene, canvas: Scene, level: int) -> Scene:
    """A scene that differs from `scene` in one or two cells, by preference in cells that were edited.

    The faults are those of real models: an edit left out, a wrong object, an object too many or lost, an artefact.
    """
    edited = [i for i in changes(canvas, scene) if i < len(scene.cells)]
    count = 1 + int(rng.integers(2))
    places = [int(i) for i in rng.permutation(len(scene.cells))]
    if edited and rng.random() < 0.7:
        places.insert(0, edited[rng.integers(len(edited))])
    result = {}
    for place in list(dict.fromkeys(places))[:count]:
        dice, old = rng.random(), scene.cells[place]
        choices = [FOREIGN] if dice < 0.1 else [canvas.cells[place], None] if dice < 0.6 else []
        choices += [random_object(rng, level_of(level), whole=True) for _ in range(8)]
        result[place] = next(choice for choice in choices if choice != old)
    return scene.with_values(result)


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
