"""Edits: what a request asks for, one at a time.

An `Edit` is a kind and its arguments; arguments are words, so that an edit is plain JSON and speaks for itself:

    Edit("put", thing="red circle", ref="b2")            Edit("swap", ref="the red circle", to="c3")
    Edit("copy", ref="a1", image=2, to="the cell left of b2")

Cell references (`ref`, `to`) are names ("b2"), relations ("the cell left of b2") or descriptions ("the red circle",
which must fit exactly one object); they are resolved in the scene as it is when the edit's turn comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.world.scene import ATTRIBUTES, COLUMN_LETTERS, FOREIGN, POSES, Object, Scene, object_from_words

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows, columns
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5}

TAXONOMY: dict[str, tuple[str, ...]] = {  # the paper's 21 sub-categories in their six groups
    "object manipulation": ("addition", "removal", "replacement", "part completion"),
    "attribute": ("colour", "material", "size", "count", "anomaly correction"),
    "spatial and viewpoint": ("viewpoint", "pose", "arrangement"),
    "global and style": ("background", "style transfer", "tone/lighting"),
    "dynamics and logic": ("motion", "temporal evolution", "text modification"),
    "multi-image": ("composition", "object replacement", "reference transfer"),
}
SUBCATEGORIES = tuple(name for group in TAXONOMY.values() for name in group)


class EditError(UserError):
    """An edit that makes no sense in a scene: a cell off the board, a description that fits none or several."""

    def __init__(self, what: str):
        super().__init__(what, "Name cells of the board, and objects that stand on it exactly once.")


@dataclasses.dataclass(frozen=True, slots=True)
class Edit:
    """One change.  Arguments that a kind does not use stay empty.

    Attributes:
      kind: a key of `KINDS`.
      ref: the cell that is changed, or copied from.
      to: the cell that is moved, copied or swapped to.
      thing: an object in words.
      value: a colour, size, texture, direction, letter, background, style or tone.
      line: "row 2" or "column b".
      count: how many objects.
      image: the number of a reference image, from 1.
    """

    kind: str
    ref: str = ""
    to: str = ""
    thing: str = ""
    value: str = ""
    line: str = ""
    count: int = 0
    image: int = 0

    def apply(self, scene: Scene, references: Sequence[Scene] = ()) -> Scene:
        """The scene after this edit.  `references[k - 1]` is image k.  Raises EditError when it makes no sense.

        An edit of something that is not there (recolouring an empty cell, say) changes nothing.
        """
        return KINDS[self.kind].apply(self, scene, references)

    def touched(self, scene: Scene, references: Sequence[Scene] = ()) -> frozenset[int]:
        """The places (indices into `Scene.values`) that this edit names as its object, or changes."""
        named = {resolve(words, scene) for words in KINDS[self.kind].named(self) if words}
        named |= set(line_cells(self.line, scene)) if self.line else set()
        after = self.apply(scene, references)
        return frozenset(named | set(changes(scene, after)))


def changes(before: Scene, after: Scene) -> tuple[int, ...]:
    """The places at which two scenes of one size differ."""
    return tuple(i for i, (a, b) in enumerate(zip(before.values, after.values, strict=True)) if a != b)


def run(edits: Sequence[Edit], scene: Scene, references: Sequence[Scene] = ()) -> Scene:
    """The scene after all edits in order."""
    for edit in edits:
        scene = edit.apply(scene, references)
    return scene


def touches(edits: Sequence[Edit], scene: Scene, references: Sequence[Scene] = ()) -> dict[int, int]:
    """How many of the edits touch each place: {place: count}, counts from 1."""
    counts: dict[int, int] = {}
    for edit in edits:
        for place in edit.touched(scene, references):
            counts[place] = counts.get(place, 0) + 1
        scene = edit.apply(scene, references)
    return counts


def resolve(words: str, scene: Scene) -> int:
    """The cell that a reference means in `scene`; raises EditError when it means none or several."""
    if words.startswith("the cell "):
        relation, name = words[len("the cell ") :].rsplit(" ", 1)
        rows, columns = RELATIONS[relation]
        y, x = divmod(_cell(name, scene), scene.columns)
        y, x = y + rows, x + columns
        if not (0 <= y < scene.rows and 0 <= x < scene.columns):
            raise EditError(f"{words} is off the board.")
        return y * scene.columns + x
    if words.startswith("the "):
        colour, shape = words[len("the ") :].split(" ", 1)
        found = [i for i, cell in enumerate(scene.cells) if cell and (cell.colour, cell.shape) == (colour, shape)]
        if len(found) != 1:
            raise EditError(f"{words} fits {len(found)} objects.")
        return found[0]
    return _cell(words, scene)


def _cell(name: str, scene: Scene) -> int:
    try:
        return scene.index(name)
    except UserError as error:
        raise EditError(error.what) from error


def _source(edit: Edit, references: Sequence[Scene]) -> Scene:
    if not 1 <= edit.image <= len(references):
        raise EditError(f"the request has no image {edit.image}.")
    return references[edit.image - 1]


# -- what each kind does ----------------------------------------------------------------------------------------------


def _put(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    return scene.with_values({resolve(edit.ref, scene): object_from_words(edit.thing)})


def _clear(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    return scene.with_values({resolve(edit.ref, scene): None})


def _set(name: str) -> Callable[[Edit, Scene, Sequence[Scene]], Scene]:
    """Sets one attribute of an object to the edit's value."""

    def apply(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
        return _mend(scene, edit.ref, name, edit.value)

    return apply


def _mend(scene: Scene, ref: str, name: str, value: str, only: str = "") -> Scene:
    """Sets attribute `name` of the object at `ref`, where it has one (and now holds `only`, if given)."""
    place = resolve(ref, scene)
    content = scene.cells[place]
    fits = content is not None and content != FOREIGN and (not only or getattr(content, name) == only)
    if fits and name == "pose":
        fits = content.shape == "triangle"
    elif fits and name != "colour":
        fits = content.is_letter == (name == "shape")
    return scene.with_values({place: dataclasses.replace(content, **{name: value})}) if fits else scene


def _move(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    here, there = resolve(edit.ref, scene), resolve(edit.to, scene)
    if scene.cells[here] is None or here == there:
        return scene
    return scene.with_values({there: scene.cells[here], here: None})


def _swap(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    here, there = resolve(edit.ref, scene), resolve(edit.to, scene)
    return scene.with_values({there: scene.cells[here], here: scene.cells[there]})


def _duplicate(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    content = scene.cells[resolve(edit.ref, scene)]
    return scene if content is None else scene.with_values({resolve(edit.to, scene): content})


def _copy(edit: Edit, scene: Scene, references: Sequence[Scene]) -> Scene:
    source = _source(edit, references)
    content = source.cells[resolve(edit.ref, source)]
    return scene if content is None else scene.with_values({resolve(edit.to, scene): content})


def _dye(edit: Edit, scene: Scene, references: Sequence[Scene]) -> Scene:
    source = _source(edit, references)
    content = source.cells[resolve(edit.ref, source)]
    return scene if content is None else _mend(scene, edit.to, "colour", content.colour)


def _keep(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    place = resolve(edit.ref, scene)
    return scene.with_cells([cell if i == place else None for i, cell in enumerate(scene.cells)])


def line_cells(line: str, scene: Scene) -> tuple[int, ...]:
    """The cells of "row 2" or "column b", from the left or from the top; raises EditError off the board."""
    kind, name = line.split(" ")
    index = int(name) - 1 if kind == "row" else COLUMN_LETTERS.index(name)
    if index >= (scene.rows if kind == "row" else scene.columns):
        raise EditError(f"{line} is off the board.")
    if kind == "row":
        return tuple(index * scene.columns + x for x in range(scene.columns))
    return tuple(y * scene.columns + index for y in range(scene.rows))


def _line(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    """`count` equal objects in the first cells of the line; the rest of the line becomes empty."""
    cells = line_cells(edit.line, scene)
    if edit.count > len(cells):
        raise EditError(f"{edit.line} has no room for {edit.count} objects.")
    thing = object_from_words(edit.thing)
    return scene.with_values({cell: thing if i < edit.count else None for i, cell in enumerate(cells)})


def _board(permute: Callable[[int, int, Scene], tuple[int, int]], turn: Callable[[str], str]) -> Callable:
    """Moves every object: the cell (row, column) receives what stood at `permute(row, column)`, turned."""

    def apply(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
        cells = []
        for i in range(len(scene.cells)):
            y, x = permute(*divmod(i, scene.columns), scene)
            content = scene.cells[y * scene.columns + x]
            turns = content is not None and content.shape == "triangle"
            cells.append(dataclasses.replace(content, pose=turn(content.pose)) if turns else content)
        return scene.with_cells(cells)

    return apply


def _slide(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    """Everything moves one cell; what leaves the board comes back on the other side."""
    rows, columns = DIRECTIONS[edit.value]

    def origin(y: int, x: int, board: Scene) -> tuple[int, int]:
        return (y - rows) % board.rows, (x - columns) % board.columns

    return _board(origin, lambda pose: pose)(edit, scene, ())


def _fall(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
    """Gravity: the objects of every column come to rest on each other at its foot."""
    cells: list[Object | None] = [None] * len(scene.cells)
    for x in range(scene.columns):
        stack = [scene.cells[y * scene.columns + x] for y in range(scene.rows)]
        stack = [content for content in stack if content is not None]
        for i, content in enumerate(stack):
            cells[(scene.rows - len(stack) + i) * scene.columns + x] = content
    return scene.with_cells(cells)


def _attribute(name: str) -> Callable[[Edit, Scene, Sequence[Scene]], Scene]:
    def apply(edit: Edit, scene: Scene, _: Sequence[Scene]) -> Scene:
        return scene.with_values({len(scene.cells) + ATTRIBUTES.index(name): edit.value})

    return apply


# -- the table of kinds -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of edit does, which references name the cells it is about, and its sub-category."""

    apply: Callable[[Edit, Scene, Sequence[Scene]], Scene]
    category: str
    named: Callable[[Edit], tuple[str, ...]] = lambda edit: (edit.ref,)


def _both(edit: Edit) -> tuple[str, ...]:
    return edit.ref, edit.to


def _target(edit: Edit) -> tuple[str, ...]:
    return (edit.to,)


def _nothing(edit: Edit) -> tuple[str, ...]:
    return ()


_MIRRORED = {"up": "up", "right": "left", "down": "down", "left": "right"}

KINDS: dict[str, Kind] = {
    "put": Kind(_put, "addition"),
    "clear": Kind(_clear, "removal"),
    "keep": Kind(_keep, "removal"),
    "replace": Kind(_put, "replacement"),
    "complete": Kind(lambda e, s, _: _mend(s, e.ref, "defect", "whole", only="half"), "part completion"),
    "recolour": Kind(_set("colour"), "colour"),
    "texture": Kind(_set("texture"), "material"),
    "resize": Kind(_set("size"), "size"),
    "line": Kind(_line, "count", _nothing),
    "fix": Kind(lambda e, s, _: _mend(s, e.ref, "defect", "whole", only="odd"), "anomaly correction"),
    "mirror": Kind(_board(lambda y, x, s: (y, s.columns - 1 - x), _MIRRORED.__getitem__), "viewpoint", _nothing),
    "rotate": Kind(_board(lambda y, x, s: (s.rows - 1 - x, y), lambda pose: POSES[(POSES.index(pose) + 1) % 4]),
                   "viewpoint", _nothing),
    "pose": Kind(_set("pose"), "pose"),
    "move": Kind(_move, "arrangement", _both),
    "swap": Kind(_swap, "arrangement", _both),
    "duplicate": Kind(_duplicate, "addition", _target),
    "background": Kind(_attribute("background"), "background", _nothing),
    "style": Kind(_attribute("style"), "style transfer", _nothing),
    "tone": Kind(_attribute("tone"), "tone/lighting", _nothing),
    "slide": Kind(_slide, "motion", _nothing),
    "fall": Kind(_fall, "temporal evolution", _nothing),
    "letter": Kind(_set("shape"), "text modification"),
    "copy": Kind(_copy, "composition", _target),
    "exchange": Kind(_copy, "object replacement", _target),
    "dye": Kind(_dye, "reference transfer", _target),
}


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """Plain JSON values: the kind and the arguments in use."""
    return {name: value for name in Edit.__slots__ if (value := getattr(edit, name))}


def edit_from_json(value: dict[str, Any]) -> Edit:
    """The inverse of `edit_to_json`; raises UserError for an unknown kind or argument."""
    try:
        edit = Edit(**value)
    except TypeError as error:
        raise UserError(f"an edit record is damaged ({error}).", "Draw the sample again.") from error
    if edit.kind not in KINDS:
        raise UserError(f"the micro-world has no edit {edit.kind!r}.", f"Known: {', '.join(KINDS)}.")
    return edit
