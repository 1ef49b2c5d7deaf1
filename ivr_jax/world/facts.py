"""What the exact analyzer knows about a sample: `Sample.facts` of the micro-world, as values.

    facts = {"world": {"level": 0, "sources": [scene, ...], "edits": [edit, ...], "target": scene},
             "edits": 3, "split": "kris/procedural"}          # "split" only for benchmark tasks

Everything is plain JSON, so a stored sample can be judged without the program that drew it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.trajectory import Sample
from ivr_jax.world.edits import Edit, edit_from_json, edit_to_json, run, touches
from ivr_jax.world.levels import Level, level_of
from ivr_jax.world.scene import Scene, scene_from_json, scene_to_json


@dataclasses.dataclass(frozen=True)
class Facts:
    """A task of the micro-world: scenes of the source images, edits in order, and the scene they lead to."""

    level: int
    sources: tuple[Scene, ...]
    edits: tuple[Edit, ...]
    target: Scene

    @property
    def rules(self) -> Level:
        """The level's rules."""
        return level_of(self.level)

    @property
    def canvas(self) -> Scene:
        """The scene that is edited: the first source, or the empty board."""
        return self.sources[0] if self.sources else self.rules.blank

    def touches(self) -> dict[int, int]:
        """How many of the edits touch each place; places that no edit touches are absent."""
        return touches(self.edits, self.canvas, self.sources)


def make_facts(level: int, sources: tuple[Scene, ...], edits: tuple[Edit, ...]) -> Facts:
    """Works out the target.  Raises EditError when an edit makes no sense at its turn."""
    canvas = sources[0] if sources else level_of(level).blank
    return Facts(level, sources, edits, run(edits, canvas, sources))


def facts_to_json(facts: Facts, split: str = "") -> dict[str, Any]:
    """The value of `Sample.facts`."""
    world = {"level": facts.level, "sources": [scene_to_json(scene) for scene in facts.sources],
             "edits": [edit_to_json(edit) for edit in facts.edits], "target": scene_to_json(facts.target)}
    return {"world": world, "edits": len(facts.edits)} | ({"split": split} if split else {})


def has_facts(sample: Sample) -> bool:
    """Whether the sample comes from the micro-world."""
    return isinstance(sample.facts.get("world"), Mapping)


def facts_of(sample: Sample) -> Facts:
    """Reads `Sample.facts`; raises UserError when the sample is not of the micro-world."""
    if not has_facts(sample):
        raise UserError(f"sample {sample.key!r} is not of the micro-world: it has no facts to judge by.",
                        "Use an analyzer that looks at images, or draw samples with ivr_jax.world.")
    world = sample.facts["world"]
    try:
        return Facts(world["level"], tuple(scene_from_json(s) for s in world["sources"]),
                     tuple(edit_from_json(e) for e in world["edits"]), scene_from_json(world["target"]))
    except (KeyError, TypeError) as error:
        raise UserError(f"the facts of sample {sample.key!r} are damaged ({error}).",
                        "Draw the sample again.") from error
