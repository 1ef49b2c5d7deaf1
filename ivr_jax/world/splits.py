"""Benchmark splits of the micro-world, in the manner of the paper's three benchmarks.

| split | request | asks for |
| --- | --- | --- |
| geneval/single | text | one object |
| geneval/two_objects | text | two different shapes of one colour |
| geneval/counting | text | a line of several equal objects |
| geneval/colours | text | two objects of one shape in two colours |
| geneval/position | text | an object, and another in relation to it |
| geneval/attribution | text | two objects that differ in shape and colour |
| kris/factual | one image | one edit of what is seen |
| kris/conceptual | one image | what needs a concept: relations, counts, likeness; at higher levels defects, motion |
| kris/procedural | one image | three edits or more, each building on the ones before |
| omnicontext/single | one image | its subject again, elsewhere |
| omnicontext/multiple | two or three | subjects of the other images brought into the first |
| omnicontext/scene | two or three | a subject brought into the first image, whose scene is edited too |

All targets are exact, all tasks are held out from training draws.
"""

from __future__ import annotations

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.world.draws import Request, Weights
from ivr_jax.world.levels import Level
from ivr_jax.world.sampler import Task, draw_held_out
from ivr_jax.world.scene import LETTERS

SPLITS = (
    "geneval/single", "geneval/two_objects", "geneval/counting", "geneval/colours", "geneval/position",
    "geneval/attribution", "kris/factual", "kris/conceptual", "kris/procedural", "omnicontext/single",
    "omnicontext/multiple", "omnicontext/scene",
)

_PUT: Weights = (("put", 1.0),)
_FACTUAL = ("put", "clear", "recolour", "replace", "texture", "resize", "pose", "background", "style", "tone", "letter")
_CONCEPTUAL = ("line", "duplicate", "keep", "complete", "fix", "mirror", "rotate", "slide", "fall")


def split_task(split: str, level: int, seed: int, index: int) -> Task:
    """A held-out task of one of `SPLITS`; raises UserError for any other split."""
    if split not in SPLITS:
        raise UserError(f"the micro-world has no benchmark split {split!r}.", f"Choose one of {', '.join(SPLITS)}.")
    benchmark, name = split.split("/")
    request = {"geneval": _geneval, "kris": _kris, "omnicontext": _omnicontext}[benchmark]
    return draw_held_out(level, seed, index, split, SPLITS.index(split), lambda rng, rules: request(name, rng, rules))


def _geneval(name: str, rng: np.random.Generator, rules: Level) -> Request:
    shapes = [shape for shape in rules.shapes if shape not in LETTERS]
    shape, other_shape = (shapes[i] for i in rng.permutation(len(shapes))[:2])
    colour, other_colour = (rules.colours[i] for i in rng.permutation(len(rules.colours))[:2])
    first = f"{colour} {shape}"
    second = {"two_objects": f"{colour} {other_shape}", "colours": f"{other_colour} {shape}",
              "attribution": f"{other_colour} {other_shape}", "position": f"{other_colour} {other_shape}"}.get(name)
    if name == "counting":
        return Request(0, ((("line", 1.0),),), 0.0)
    if second is None:
        return Request(0, (_PUT,), 0.0, things=(first,))
    if name == "position":
        return Request(0, (_PUT, (("beside", 1.0),)), 0.0, things=(first, second))
    return Request(0, (_PUT, _PUT), 0.0, dependence=0.0, things=(first, second))


def _kris(name: str, rng: np.random.Generator, rules: Level) -> Request:
    if name == "factual":
        return Request(1, (_only(rules, _FACTUAL),), 0.0)
    if name == "conceptual":
        first = (("beside", 2.0), *_only(rules, _CONCEPTUAL))
        return Request(1, (first, *[rules.kinds] * int(rng.integers(2))), rules.relational)
    kinds = tuple(pair for pair in rules.kinds if pair[0] not in ("line", "keep"))
    number = int(rng.integers(3, rules.most_edits + 1))
    return Request(1, (kinds,) * number, 0.0, dependence=1.0)


def _omnicontext(name: str, rng: np.random.Generator, rules: Level) -> Request:
    reference: Weights = tuple((kind, 1.0) for kind in rules.reference_kinds)
    if name == "single":
        return Request(1, ((("duplicate", 1.0),),), 0.0)
    images = int(rng.integers(2, rules.most_images + 1))
    if name == "multiple":
        return Request(images, (reference, reference), 0.0, dependence=0.0)
    return Request(images, (reference, rules.kinds), 0.0)


def _only(rules: Level, kinds: tuple[str, ...]) -> Weights:
    return tuple(pair for pair in rules.kinds if pair[0] in kinds)
