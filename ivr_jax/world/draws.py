"""Random scenes, random edits that make sense in them, and random requests.

A `Request` says what to draw: how many images are shown, and which kinds of edits in which number.  Every edit
changes the scene it meets; later edits prefer cells that earlier ones touched, so that they depend on each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ivr_jax.world.edits import COUNTS, DIRECTIONS, KINDS, RELATIONS, Edit, EditError, line_cells
from ivr_jax.world.facts import Facts, make_facts
from ivr_jax.world.levels import Level
from ivr_jax.world.scene import COLUMN_LETTERS, DEFECTS, LETTERS, Object, Scene

Weights = tuple[tuple[str, float], ...]
LONG = ("line", "copy", "exchange", "dye")  # kinds whose clauses are long


@dataclasses.dataclass(frozen=True)
class Request:
    """What a drawn request is like.

    Attributes:
      images: how many source images it shows; 0 for text-to-image.
      kinds: for every edit, the relative frequency of the kinds it may be.
      relational: the share of references made by relation or description.
      dependence: how often an edit prefers touched cells; 1 demands it.
      things: for every edit that adds an object, the object in words, or "" for any.
    """

    images: int
    kinds: tuple[Weights, ...]
    relational: float
    dependence: float = 0.5
    things: tuple[str, ...] = ()


def random_scene(rng: np.random.Generator, level: Level) -> Scene:
    """Between 3 and 7 tenths of the cells hold an object."""
    share = rng.uniform(0.3, 0.7)
    cells = [random_object(rng, level) if rng.random() < share else None for _ in range(level.rows * level.columns)]
    appearance = [values[rng.integers(len(values))] for values in (level.backgrounds, level.styles, level.tones)]
    return Scene(level.rows, level.columns, tuple(cells), *appearance)


def random_object(rng: np.random.Generator, level: Level, whole: bool = False) -> Object:
    """Any object of the level, now and then with a defect where the level has them, unless `whole`."""
    colour, letters = _choice(rng, level.colours), tuple(shape for shape in level.shapes if shape in LETTERS)
    if letters and rng.random() < 0.15:
        return Object(_choice(rng, letters), colour)
    shape = _choice(rng, level.shapes[: len(level.shapes) - len(letters)])
    size = "big" if len(level.sizes) == 1 or rng.random() < 0.7 else _choice(rng, level.sizes)
    texture = "plain" if len(level.textures) == 1 or rng.random() < 0.6 else _choice(rng, level.textures)
    pose = _choice(rng, level.poses) if shape == "triangle" else "up"
    defective = len(level.defects) > 1 and not whole and rng.random() < 0.15
    return Object(shape, colour, size, texture, pose, _choice(rng, DEFECTS[1:]) if defective else "whole")


def draw_request(rng: np.random.Generator, level: Level, request: Request) -> Facts | None:
    """Scenes and edits as `request` says; None when the dice led nowhere (draw again)."""
    sources = tuple(random_scene(rng, level) for _ in range(request.images))
    scene = sources[0] if sources else level.blank
    touched: frozenset[int] = frozenset()
    edits: list[Edit] = []
    long = 0
    for i, weights in enumerate(request.kinds):
        if long >= level.most_long:
            weights = tuple(pair for pair in weights if pair[0] not in LONG)
        thing = request.things[i] if i < len(request.things) else ""
        relational = request.relational if long < level.most_long else 0.0
        artist = _Artist(rng, level, scene, sources, touched, relational, request.dependence, thing)
        edit = artist.draw(weights)
        if edit is None:
            return None
        if request.dependence == 1 and touched and not touched & edit.touched(scene, sources):
            return None
        long += edit.kind in LONG or edit.ref.startswith("the ") or edit.to.startswith("the ")
        touched |= edit.touched(scene, sources)
        scene = edit.apply(scene, sources)
        edits.append(edit)
    facts = make_facts(level.index, sources, tuple(edits))
    return None if facts.target == facts.canvas else facts


def _choice(rng: np.random.Generator, values: Sequence) -> Any:
    return values[rng.integers(len(values))]


@dataclasses.dataclass(frozen=True)
class _Artist:
    """Draws one edit of a given scene."""

    rng: np.random.Generator
    level: Level
    scene: Scene
    sources: Sequence[Scene]
    touched: frozenset[int]
    relational: float
    dependence: float
    thing: str

    def draw(self, weights: Weights) -> Edit | None:
        """An edit that changes the scene, of a kind drawn by `weights`; None when eight tries fail."""
        kinds = [kind for kind, _ in weights]
        shares = np.cumsum([weight for _, weight in weights])
        for _ in range(8):
            kind = kinds[int(np.searchsorted(shares, self.rng.random() * shares[-1], side="right"))]
            edit = _DRAW[kind](self, kind)
            if edit is not None:
                try:
                    if edit.apply(self.scene, self.sources) != self.scene:
                        return edit
                except EditError:
                    continue
        return None

    # -- cells and their names --

    def cells(self, fits: Callable[[Object | None], bool]) -> list[int]:
        return [i for i, cell in enumerate(self.scene.cells) if fits(cell)]

    def pick(self, candidates: Sequence[int]) -> int | None:
        """One of the candidates, by preference a touched one; None when there is none."""
        if self.touched and self.rng.random() < self.dependence:
            candidates = [c for c in candidates if c in self.touched] or candidates
        return _choice(self.rng, candidates) if len(candidates) else None

    def name(self, place: int, scene: Scene | None = None, describe: bool = True) -> str:
        """Words for a cell: its name, or with probability `relational` a relation or description."""
        scene = scene or self.scene
        if self.rng.random() < self.relational and (self.level.describes or not describe):
            content = scene.cells[place]
            alike = [c for c in scene.cells if c and content and (c.colour, c.shape) == (content.colour, content.shape)]
            if describe and len(alike) == 1 and self.rng.random() < 0.6:
                return f"the {content.colour} {content.shape}"
            relation = _choice(self.rng, tuple(RELATIONS))
            rows, columns = RELATIONS[relation]
            y, x = divmod(place, scene.columns)
            y, x = y - rows, x - columns
            if 0 <= y < scene.rows and 0 <= x < scene.columns:
                return f"the cell {relation} {scene.places[y * scene.columns + x]}"
        return scene.places[place]

    # -- the kinds --

    def put(self, kind: str) -> Edit | None:
        place = self.pick(self.cells(lambda c: (c is None) == (kind == "put")))
        if place is None:
            return None
        thing = self.thing or random_object(self.rng, self.level, whole=True).words
        return Edit(kind, ref=self.name(place, describe=kind != "put"), thing=thing)

    def beside(self, _: str) -> Edit | None:
        """Puts an object in an empty cell that is named by the object next to it."""
        neighbour = self.pick(self.cells(bool))
        if neighbour is None:
            return None
        y, x = divmod(neighbour, self.scene.columns)
        free = [relation for relation, (rows, columns) in RELATIONS.items()
                if 0 <= y + rows < self.scene.rows and 0 <= x + columns < self.scene.columns
                and self.scene.cells[(y + rows) * self.scene.columns + x + columns] is None]
        if not free:
            return None
        thing = self.thing or random_object(self.rng, self.level, whole=True).words
        return Edit("put", ref=f"the cell {_choice(self.rng, free)} {self.scene.places[neighbour]}", thing=thing)

    def at_object(self, kind: str) -> Edit | None:
        place = self.pick(self.cells(_ABOUT.get(kind, bool)))
        if place is None:
            return None
        value = _choice(self.rng, self.values(kind)) if self.values(kind) else ""
        return Edit(kind, ref=self.name(place), value=value)

    def values(self, kind: str) -> tuple[str, ...]:
        """The values in use at this level for a kind of edit that sets something."""
        return {"recolour": self.level.colours, "texture": self.level.textures, "resize": self.level.sizes,
                "pose": self.level.poses, "letter": LETTERS, "background": self.level.backgrounds,
                "style": self.level.styles, "tone": self.level.tones, "slide": tuple(DIRECTIONS)}.get(kind, ())

    def two_cells(self, kind: str) -> Edit | None:
        here = self.pick(self.cells(bool))
        if here is None:
            return None
        others = [i for i in range(len(self.scene.cells)) if i != here]
        if kind != "swap":
            others = [i for i in others if self.scene.cells[i] is None]
        there = self.pick(others)
        return None if there is None else Edit(kind, ref=self.name(here), to=self.name(there, describe=kind == "swap"))

    def line(self, kind: str) -> Edit | None:
        rows = self.rng.random() < 0.5
        names = [f"row {i + 1}" for i in range(self.scene.rows)] if rows else \
                [f"column {COLUMN_LETTERS[i]}" for i in range(self.scene.columns)]
        line = _choice(self.rng, names)
        counts = [count for count in COUNTS.values() if count <= len(line_cells(line, self.scene))]
        shapes = [shape for shape in self.level.shapes if shape not in LETTERS]
        thing = self.thing or f"{_choice(self.rng, self.level.colours)} {_choice(self.rng, shapes)}"
        return Edit(kind, thing=thing, line=line, count=_choice(self.rng, counts))

    def whole(self, kind: str) -> Edit:
        return Edit(kind, value=_choice(self.rng, self.values(kind)) if self.values(kind) else "")

    def from_image(self, kind: str) -> Edit | None:
        image = int(self.rng.integers(2, len(self.sources) + 1))
        source = self.sources[image - 1]
        subjects = [i for i, cell in enumerate(source.cells) if cell is not None and cell.defect == "whole"]
        there = self.pick(self.cells(lambda c: (c is None) == (kind == "copy")))
        if not subjects or there is None:
            return None
        subject = _choice(self.rng, subjects)
        if not self.level.describes:
            return Edit(kind, ref=source.places[subject], to=self.scene.places[there], image=image)
        return Edit(kind, ref=self.name(subject, source), to=self.name(there, describe=kind != "copy"), image=image)


_ABOUT: dict[str, Callable[[Object | None], bool]] = {  # the objects that a kind of edit is about; any, if not listed
    "complete": lambda c: c is not None and c.defect == "half",
    "fix": lambda c: c is not None and c.defect == "odd",
    "resize": lambda c: c is not None and not c.is_letter,
    "texture": lambda c: c is not None and not c.is_letter,
    "pose": lambda c: c is not None and c.shape == "triangle",
    "letter": lambda c: c is not None and c.is_letter,
}
_DRAW: dict[str, Callable[[_Artist, str], Edit | None]] = {kind: _Artist.at_object for kind in KINDS} | {
    "put": _Artist.put, "replace": _Artist.put, "beside": _Artist.beside, "line": _Artist.line,
    **{kind: _Artist.two_cells for kind in ("move", "swap", "duplicate")},
    **{kind: _Artist.from_image for kind in ("copy", "exchange", "dye")},
    **{kind: _Artist.whole for kind in ("mirror", "rotate", "slide", "fall", "background", "style", "tone")},
}
