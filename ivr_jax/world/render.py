"""Scenes -> pixels.

An image is a ruler (column letters above, row digits at the left, each 16 px) and one 16x16 tile a cell, so that every
cell is exactly one latent of a factor-16 image tokenizer.  At level 0 a tile of the ruler is one plain colour, and the
board has no grid lines.  Tiles are drawn once, cached, and blitted.

The ruler tells the appearance of the whole image: it takes the background's colour and the tone, and the mark in its
corner is outlined or not like the objects.

A *wobble* (int8 [cells, 3]: right, down, size) moves objects by whole pixels and scales them a little; it is no part
of the scene: two images that differ in wobble alone show the same scene.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import numpy as np

from ivr_jax.world.levels import CELL, level_of
from ivr_jax.world.scene import COLUMN_LETTERS, FOREIGN, POSES, Object, Scene

Appearance: TypeAlias = tuple[str, str, str]  # background, style, tone
Offset: TypeAlias = tuple[int, int, int]  # pixels right, pixels down, size step

RGB = {"red": (216, 48, 44), "green": (44, 160, 66), "blue": (42, 84, 220), "yellow": (238, 196, 30),
       "purple": (150, 56, 176), "teal": (20, 178, 190), "grey": (128, 128, 128)}
GROUND = {"white": (246, 244, 238), "sand": (232, 210, 164), "sky": (176, 214, 246), "checked": (214, 232, 208)}
TABS = ((240, 222, 150), (190, 170, 222), (160, 222, 212), (226, 180, 160), (150, 182, 204), (202, 212, 160),
        (200, 200, 200))  # of the plain ruler: columns, rows, corner
INK = (64, 64, 70)
LIGHT = np.array((246.0, 244.0, 238.0))  # between stripes and in dots
DARK = 0.55  # the factor of the dark tone
SIZE_STEP = 0.06  # relative change of an object's radius for one step of wobble
_RADIUS = {"big": 5.8, "small": 4.0}
_OUTLINE = 1.2  # width of the ink around an object in the outlined style, pixels
_SAMPLES = 4  # sub-samples a pixel and side

_GLYPHS = {  # 5x7 bitmaps, one row a group of five
    "a": "00000 00000 01110 00001 01111 10001 01111", "b": "10000 10000 11110 10001 10001 10001 11110",
    "c": "00000 00000 01111 10000 10000 10000 01111", "d": "00001 00001 01111 10001 10001 10001 01111",
    "e": "00000 00000 01110 10001 11111 10000 01110", "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111", "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010", "5": "11111 10000 11110 00001 00001 10001 01110",
    "A": "01110 10001 10001 11111 10001 10001 10001", "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
}


def render(scene: Scene, level: int, wobble: np.ndarray | None = None) -> np.ndarray:
    """uint8 [height, width, 3] at the size of `level`; `wobble` int8 [cells, 3], or None for objects in place."""
    rules = level_of(level)
    image = _empty_board(level, scene.appearance).copy()
    for place, cell in enumerate(scene.cells):
        if cell is not None:
            offset = (0, 0, 0) if wobble is None else tuple(wobble[place].tolist())
            y, x = divmod(place, rules.columns)
            top, left = CELL * (y + 1), CELL * (x + 1)
            image[top : top + CELL, left : left + CELL] = tile(
                cell, scene.appearance, rules.antialias, offset, rules.ruler != "tabs")
    return image


def render_edit(source: Scene, pixels: np.ndarray, target: Scene, level: int,
                wobble: np.ndarray | None = None) -> np.ndarray:
    """Draws `target` over the image `pixels` of `source`: cells that stay the same keep their very pixels."""
    image = render(target, level, wobble)
    if source.appearance == target.appearance:
        for place, (before, after) in enumerate(zip(source.cells, target.cells, strict=True)):
            if before == after:
                box = cell_box(place, target.columns)
                image[box] = pixels[box]
    return image


def cell_box(place: int, columns: int) -> tuple[slice, slice]:
    """The pixels of a cell: image[cell_box(place, columns)] is its tile."""
    y, x = divmod(place, columns)
    return slice(CELL * (y + 1), CELL * (y + 2)), slice(CELL * (x + 1), CELL * (x + 2))


def random_wobble(rng: np.random.Generator, level: int) -> np.ndarray | None:
    """int8 [cells, 3] within the bounds of `level`; None where objects stand in place."""
    rules = level_of(level)
    if not rules.wobble:
        return None
    offsets = np.array(wobbles(rules.wobble), np.int8)
    return offsets[rng.integers(len(offsets), size=rules.rows * rules.columns)]


def wobbles(bound: int) -> tuple[Offset, ...]:
    """Every offset of an object at a level with shifts of up to `bound` pixels; each shift has its size step."""
    shifts = range(-bound, bound + 1)
    return tuple((right, down, (right + 2 * down + 1) % 3 - 1) for right in shifts for down in shifts)


@functools.lru_cache(maxsize=64)
def _empty_board(level: int, appearance: Appearance) -> np.ndarray:
    rules = level_of(level)
    image = np.empty((rules.height, rules.width, 3), np.uint8)
    labels = [*COLUMN_LETTERS[: rules.columns], *(str(y + 1) for y in range(rules.rows))]
    if rules.ruler == "tabs":
        corner, tiles = _tab(len(labels), appearance), [_tab(i, appearance) for i in range(len(labels))]
    else:
        corner, tiles = _corner(appearance, rules.antialias), [_label(label, appearance) for label in labels]
    image[:CELL, :CELL] = corner
    for x in range(rules.columns):
        image[:CELL, CELL * (x + 1) : CELL * (x + 2)] = tiles[x]
    for y in range(rules.rows):
        image[CELL * (y + 1) : CELL * (y + 2), :CELL] = tiles[rules.columns + y]
    for place in range(rules.rows * rules.columns):
        image[cell_box(place, rules.columns)] = tile(None, appearance, rules.antialias, lines=rules.ruler != "tabs")
    image.flags.writeable = False
    return image


@functools.lru_cache(maxsize=65536)
def tile(content: Object | None, appearance: Appearance, antialias: bool, offset: Offset = (0, 0, 0),
         lines: bool = True) -> np.ndarray:
    """uint8 [16, 16, 3], read-only: one cell, with grid lines or without."""
    background, style, tone = appearance
    pixels = _ground(background, lines)
    if content == FOREIGN:
        y, x = np.indices((CELL, CELL))
        pixels = np.where(((x // 3 + y // 5) % 2)[..., None], (255.0, 0.0, 200.0), (20.0, 30.0, 20.0))
    elif content is not None:
        pixels = _paint(pixels, content, style, antialias, offset)
    return _finish(pixels, tone)


@functools.lru_cache(maxsize=16)
def _ground(background: str, lines: bool = True) -> np.ndarray:
    """float [16, 16, 3], read-only: an empty cell, with the grid line at its top and left if `lines`."""
    pixels = np.broadcast_to(np.array(GROUND[background], np.float64), (CELL, CELL, 3)).copy()
    if background == "checked":
        y, x = np.indices((CELL, CELL))
        pixels[(x // 4 + y // 4) % 2 == 1] -= 26.0
    if lines:
        pixels[0, :] = pixels[:, 0] = np.array(GROUND[background]) * 0.82
    pixels.flags.writeable = False
    return pixels


def _finish(pixels: np.ndarray, tone: str) -> np.ndarray:
    result = np.clip(np.rint(pixels * (DARK if tone == "dark" else 1.0)), 0, 255).astype(np.uint8)
    result.flags.writeable = False
    return result


def _tab(number: int, appearance: Appearance) -> np.ndarray:
    """uint8 [16, 16, 3]: a ruler tile of one plain colour."""
    return _finish(np.broadcast_to(np.array(TABS[number], np.float64), (CELL, CELL, 3)), appearance[2])


def _label(character: str, appearance: Appearance) -> np.ndarray:
    """uint8 [16, 16, 3]: a letter or digit of the ruler."""
    pixels = _ground(appearance[0], lines=False) * 0.92  # a copy
    pixels[_glyph(character, 0, 0) > 0] = INK
    return _finish(pixels, appearance[2])


def _corner(appearance: Appearance, antialias: bool) -> np.ndarray:
    """uint8 [16, 16, 3]: a mark that tells the style, on the background's pattern."""
    background, style, tone = appearance
    pixels = _ground(background) * 0.92
    return _finish(_paint(pixels, Object("diamond", "grey"), style, antialias, (0, 0, 0)), tone)


def _glyph(character: str, right: int, down: int) -> np.ndarray:
    """float [16, 16]: a bitmap at twice its size."""
    bits = np.array([[int(bit) for bit in row] for row in _GLYPHS[character].split()], np.float64)
    mask = np.zeros((CELL, CELL))
    mask[1 + down : 15 + down, 3 + right : 13 + right] = bits.repeat(2, 0).repeat(2, 1)
    return mask


def _paint(pixels: np.ndarray, content: Object, style: str, antialias: bool, offset: Offset) -> np.ndarray:
    """float [16, 16, 3]: an object over a ground, with an ink line around it in the outlined style."""
    right, down, step = offset
    visible = np.ones((1, CELL))
    if content.defect == "half":
        visible = (np.arange(CELL) <= CELL // 2 + right)[None, :].astype(np.float64)
    radius = _RADIUS[content.size] * (1 + SIZE_STEP * step)
    glyph = _glyph(content.shape[-1], right, down) if content.is_letter else None
    if style == "outlined":
        wide = radius + _OUTLINE
        ink = _shape(content.shape, content.pose, wide, antialias, right, down) if glyph is None else _around(glyph)
        pixels = pixels + (ink * visible)[..., None] * (np.array(INK) - pixels)
    shape = _shape(content.shape, content.pose, radius, antialias, right, down) if glyph is None else glyph
    colour = np.array(RGB[content.colour], np.float64)
    if content.defect == "odd":
        colour = np.where((np.arange(CELL) > CELL // 2 + right)[None, :, None], RGB["grey"], colour)
    colour = LIGHT + _texture(content.texture, right, down)[..., None] * (colour - LIGHT)
    return pixels + (shape * visible)[..., None] * (colour - pixels)


def _around(mask: np.ndarray) -> np.ndarray:
    """float [16, 16]: a bitmap grown by one pixel to all sides."""
    padded = np.pad(mask, 1)
    return np.max([padded[y : y + CELL, x : x + CELL] for y in range(3) for x in range(3)], axis=0)


@functools.lru_cache(maxsize=256)
def _texture(texture: str, right: int, down: int) -> np.ndarray:
    """float [16, 16]: 1 where an object shows its colour, 0 where it shows light stripes or dots."""
    y, x = np.indices((CELL, CELL))
    if texture == "striped":
        return np.where((y - down) % 4 < 2, 1.0, 0.0)
    if texture == "dotted":
        return np.where(((y - down) % 4 < 2) & ((x - right) % 4 < 2), 0.0, 1.0)
    return np.ones((CELL, CELL))


@functools.lru_cache(maxsize=4096)
def _shape(shape: str, pose: str, radius: float, antialias: bool, right: int, down: int) -> np.ndarray:
    """float [16, 16]: the share of each pixel inside the shape (0 or 1 without anti-aliasing)."""
    samples = _SAMPLES if antialias else 1
    points = (np.arange(CELL * samples) + 0.5) / samples - (CELL + 1) / 2
    x, y = (points[None, :] - right) / radius, (points[:, None] - down) / radius
    for _ in range(POSES.index(pose)):  # a quarter turn each
        x, y = y, -x
    inside = _INSIDE[shape](x, y)
    return inside.astype(np.float64).reshape(CELL, samples, CELL, samples).mean((1, 3))


_INSIDE = {  # x right and y down in units of the radius
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 1.85) & (y <= 0.85),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.05,
}
