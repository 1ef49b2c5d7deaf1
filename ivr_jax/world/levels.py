"""Difficulty levels: which boards, objects, edits and appearances a task may use.

| level | board, image | objects | what is new |
| --- | --- | --- | --- |
| 0 | 3x3, 64 px | 3 shapes x 3 colours | cell references, crisp sprites in place, plain ruler: learnt in minutes |
| 1 | 4x4, 80 px | 4 shapes x 4 colours | places by relation and description, anti-aliasing, attribute transfer |
| 2 | 4x4, 80 px | 5 shapes, 3 letters, 6 colours, sizes, textures, poses, defects | all sub-categories |
| 3 | 5x5, 96 px | the same | objects wobble in place and size, patterned background, up to 5 edits |
"""

from __future__ import annotations

import dataclasses
import functools

from ivr_jax.errors import UserError
from ivr_jax.world.scene import BACKGROUNDS, COLOURS, LETTERS, SHAPES, STYLES, TEXTURES, TONES, Scene, blank

CELL = 16  # pixels a side: one latent of a factor-16 image tokenizer


@dataclasses.dataclass(frozen=True)
class Level:
    """What a difficulty level allows.

    Attributes:
      index: the number by which users name the level.
      rows, columns: size of the board in cells.
      shapes, colours, sizes, textures, poses, defects, backgrounds, styles, tones: values in use; letters count as
        shapes.
      antialias: whether sprites have smooth edges.
      ruler: "glyphs" (column letters, row digits) on a board with grid lines, or "tabs": one plain colour a row and
        column and no lines, which a small image tokenizer learns in minutes.
      wobble: objects stand up to this many pixels off their cell's centre, and vary a little in size, when > 0.
      kinds: relative frequency of every kind of edit (`ivr_jax.world.edits.KINDS`) in ordinary requests.
      most_edits: requests have 1 to this many edits.
      relational: the share of cell references made by relation ("the cell left of b2") or description ("the red
        circle") instead of by name.
      describes: whether descriptions are in use (else relations alone, and only for where to put an object).
      reference_kinds: edits that look at a second image.
      references: the share of training requests that show several images.
      most_images: requests show at most this many images.
      most_long: at most this many clauses of a request are long (a relation, a line of objects), so that prompts
        stay short.
    """

    index: int
    rows: int
    columns: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    kinds: tuple[tuple[str, float], ...]
    most_edits: int = 4
    relational: float = 0.3
    describes: bool = True
    reference_kinds: tuple[str, ...] = ("copy", "exchange", "dye")
    references: float = 0.07
    most_images: int = 3
    most_long: int = 5
    sizes: tuple[str, ...] = ("big",)
    textures: tuple[str, ...] = ("plain",)
    poses: tuple[str, ...] = ("up",)
    defects: tuple[str, ...] = ("whole",)
    backgrounds: tuple[str, ...] = ("white",)
    styles: tuple[str, ...] = ("filled",)
    tones: tuple[str, ...] = ("bright",)
    antialias: bool = False
    ruler: str = "glyphs"
    wobble: int = 0

    @property
    def height(self) -> int:
        """Image height in pixels: a ruler above the board, then its rows."""
        return CELL * (self.rows + 1)

    @property
    def width(self) -> int:
        """Image width in pixels: a ruler left of the board, then its columns."""
        return CELL * (self.columns + 1)

    @property
    def all_kinds(self) -> tuple[str, ...]:
        """Every kind of edit that requests of this level may contain."""
        return (*(kind for kind, _ in self.kinds), *self.reference_kinds)

    @property
    def blank(self) -> Scene:
        """The empty board from which text-to-image starts."""
        return blank(self.rows, self.columns)


_BASIC = (("put", 1.0), ("clear", 1.0), ("recolour", 1.0), ("replace", 0.7), ("move", 1.0), ("swap", 1.0))
# Edits that look in one cell for what to draw in another are rare at level 0: half a million parameters learn the
# others in two minutes, and these not in ten.
_LEVEL_0 = (("put", 1.0), ("clear", 1.0), ("recolour", 1.0), ("replace", 0.7), ("move", 0.12), ("swap", 0.08),
            ("line", 0.1), ("duplicate", 0.05))
_LEVEL_1 = (*_BASIC, ("line", 0.5), ("duplicate", 0.5), ("keep", 0.3))
_ALL = (*_LEVEL_1, ("complete", 0.8), ("texture", 0.8), ("resize", 0.8), ("fix", 0.8), ("mirror", 0.4),
        ("rotate", 0.4), ("pose", 0.8), ("background", 0.5), ("style", 0.5), ("tone", 0.5), ("slide", 0.5),
        ("fall", 0.5), ("letter", 0.8))
_RICH = {"shapes": SHAPES + LETTERS, "colours": COLOURS, "kinds": _ALL, "sizes": ("big", "small"),
         "textures": TEXTURES, "poses": ("up", "right", "down", "left"), "defects": ("whole", "half", "odd"),
         "styles": STYLES, "tones": TONES, "antialias": True}

LEVELS = (
    Level(0, 3, 3, SHAPES[:3], COLOURS[:3], _LEVEL_0, relational=0.05, describes=False, reference_kinds=("copy",),
          references=0.03, most_images=2, most_long=2, ruler="tabs"),
    Level(1, 4, 4, SHAPES[:4], COLOURS[:4], _LEVEL_1, antialias=True),
    Level(2, 4, 4, backgrounds=BACKGROUNDS[:3], **_RICH),
    Level(3, 5, 5, backgrounds=BACKGROUNDS, most_edits=5, wobble=1, **_RICH),
)


@functools.cache
def level_of(index: int) -> Level:
    """The level called `index`; raises UserError when there is none."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(LEVELS):
        raise UserError(f"the micro-world has no level {index!r}.", f"Choose a level from 0 to {len(LEVELS) - 1}.")
    return LEVELS[index]
