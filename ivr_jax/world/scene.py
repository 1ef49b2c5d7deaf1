"""Scenes: what a micro-world image shows, as values that can be compared exactly.

A scene is a board of cells, each empty (None) or one `Object`, and three attributes of the whole image (background,
style, tone).  Cells are named like those of a chess board read from the top: column letter, then row number, so "a1"
is top left and "c3" bottom right of a 3x3 board.  The cells in reading order followed by the three attributes are the
scene's *places*; an edit changes places, and the analyzer judges places one by one.

An object is written in words ("small striped red triangle pointing left"); the words are its JSON form and the form
in which the language speaks of it.  Defaults (big, plain, whole, upright) are left unsaid.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ivr_jax.errors import UserError

COLUMN_LETTERS = "abcde"
MAX_SIDE = len(COLUMN_LETTERS)

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
LETTERS = ("letter A", "letter B", "letter C")
COLOURS = ("red", "green", "blue", "yellow", "purple", "teal")
SIZES = ("big", "small")
TEXTURES = ("plain", "striped", "dotted")
POSES = ("up", "right", "down", "left")  # only triangles show theirs; in clockwise order
DEFECTS = ("whole", "half", "odd")  # half: the right half is missing; odd: the right half is grey

BACKGROUNDS = ("white", "sand", "sky", "checked")
STYLES = ("filled", "outlined")
TONES = ("bright", "dark")
ATTRIBUTES = ("background", "style", "tone")  # the places after the cells


@dataclasses.dataclass(frozen=True, slots=True)
class Object:
    """What stands in one cell."""

    shape: str
    colour: str
    size: str = "big"
    texture: str = "plain"
    pose: str = "up"
    defect: str = "whole"

    @property
    def words(self) -> str:
        """Such as "red circle" or "small dotted half blue triangle pointing left"; see `object_from_words`."""
        parts = [part for part, unsaid in ((self.size, "big"), (self.texture, "plain"), (self.defect, "whole"))
                 if part != unsaid]
        pose = f" pointing {self.pose}" if self.pose != "up" else ""
        return " ".join([*parts, self.colour, self.shape]) + pose

    @property
    def is_letter(self) -> bool:
        """Whether it is a letter."""
        return self.shape in LETTERS


FOREIGN = Object("blot", "unknown")  # what a reader sees in a cell that shows no object of the world

OBJECT_PATTERN = (
    rf"(?:(?:{'|'.join(SIZES[1:])}) )?(?:(?:{'|'.join(TEXTURES[1:])}) )?(?:(?:{'|'.join(DEFECTS[1:])}) )?"
    rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES + LETTERS)})(?: pointing (?:{'|'.join(POSES[1:])}))?"
)
_OBJECT = re.compile(
    rf"(?:(?P<size>{'|'.join(SIZES[1:])}) )?(?:(?P<texture>{'|'.join(TEXTURES[1:])}) )?"
    rf"(?:(?P<defect>{'|'.join(DEFECTS[1:])}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES + LETTERS)})"
    rf"(?: pointing (?P<pose>{'|'.join(POSES[1:])}))?"
)


@functools.cache
def object_from_words(words: str) -> Object:
    """The inverse of `Object.words`; raises UserError on any other text."""
    if words == FOREIGN.words:
        return FOREIGN
    match = _OBJECT.fullmatch(words)
    if match is None or (match["pose"] and match["shape"] != "triangle"):
        raise UserError(f"{words!r} is no object of the micro-world.", "Write it like 'small striped red circle'.")
    return Object(**{name: value for name, value in match.groupdict().items() if value})


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A board of `rows` x `columns` cells in reading order, and the attributes of the whole image."""

    rows: int
    columns: int
    cells: tuple[Object | None, ...]
    background: str = "white"
    style: str = "filled"
    tone: str = "bright"

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= MAX_SIDE and 1 <= self.columns <= MAX_SIDE):
            raise UserError(f"a board of {self.rows}x{self.columns} cells is out of range.", f"Use 1 to {MAX_SIDE}.")
        if len(self.cells) != self.rows * self.columns:
            raise UserError(f"a {self.rows}x{self.columns} scene has {len(self.cells)} cells.",
                            "Give one value a cell.")

    @property
    def appearance(self) -> tuple[str, str, str]:
        """(background, style, tone)."""
        return self.background, self.style, self.tone

    @property
    def values(self) -> tuple[Any, ...]:
        """What every place holds: the cells, then background, style and tone."""
        return (*self.cells, self.background, self.style, self.tone)

    @property
    def places(self) -> tuple[str, ...]:
        """The names of `values`."""
        return place_names(self.rows, self.columns)

    def with_values(self, changes: Mapping[int, Any]) -> Scene:
        """A copy in which place `i` holds `changes[i]`."""
        values = list(self.values)
        for place, value in changes.items():
            values[place] = value
        return Scene(self.rows, self.columns, tuple(values[:-3]), *values[-3:])

    def with_cells(self, cells: Sequence[Object | None]) -> Scene:
        """The same board with other cells, row by row."""
        return Scene(self.rows, self.columns, tuple(cells), self.background, self.style, self.tone)

    def index(self, name: str) -> int:
        """The place of the cell called `name`; raises UserError when the board has no such cell."""
        place = _place_index(self.rows, self.columns).get(name, -1)
        if place < 0 or place >= len(self.cells):
            raise UserError(f"a {self.rows}x{self.columns} board has no cell {name!r}.", "Name a cell like 'b2'.")
        return place


@functools.cache
def place_names(rows: int, columns: int) -> tuple[str, ...]:
    """Cell names in reading order, then the names of the attributes."""
    return (*(f"{COLUMN_LETTERS[x]}{y + 1}" for y in range(rows) for x in range(columns)), *ATTRIBUTES)


@functools.cache
def _place_index(rows: int, columns: int) -> dict[str, int]:
    return {name: i for i, name in enumerate(place_names(rows, columns))}


def blank(rows: int, columns: int) -> Scene:
    """The empty board from which text-to-image starts."""
    return Scene(rows, columns, (None,) * (rows * columns))


def scene_to_json(scene: Scene) -> dict[str, Any]:
    """Plain JSON values; `scene_from_json` is the exact inverse."""
    cells = ["" if cell is None else cell.words for cell in scene.cells]
    return {"rows": scene.rows, "columns": scene.columns, "cells": cells, "background": scene.background,
            "style": scene.style, "tone": scene.tone}


def scene_from_json(value: Mapping[str, Any]) -> Scene:
    """Raises UserError when `value` is not what `scene_to_json` writes."""
    try:
        cells = tuple(object_from_words(words) if words else None for words in value["cells"])
        scene = Scene(value["rows"], value["columns"], cells, value["background"], value["style"], value["tone"])
    except (KeyError, TypeError) as error:
        raise UserError(f"a scene record is damaged ({error}).", "Draw the sample again.") from error
    if scene.background not in BACKGROUNDS or scene.style not in STYLES or scene.tone not in TONES:
        raise UserError(f"a scene record has the unknown appearance {scene.appearance}.", "Draw the sample again.")
    return scene
