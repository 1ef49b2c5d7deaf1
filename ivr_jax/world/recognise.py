"""Pixels -> scenes: nearest prototype, cell by cell.

Every tile that the renderer can draw is a prototype.  A cell shows the prototype with the least mean squared error, or
nothing of the world (FOREIGN) when even that error exceeds `REJECT`.  The ruler is read first: it tells the appearance
(background, style, tone), so that cells are compared with tiles of that appearance only.  The measure forgives the
blur and noise of a learned image tokenizer, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from ivr_jax.world.levels import CELL, Level, level_of
from ivr_jax.world.render import DARK, Appearance, render, tile, wobbles
from ivr_jax.world.scene import FOREIGN, LETTERS, Object, Scene

REJECT = 1500.0  # mean squared error of a tile, in squared grey levels, above which it shows nothing known;
# less in dark images, whose differences are smaller
FOREIGN_CODE = -1


@dataclasses.dataclass(frozen=True)
class Reading:
    """What n images of one level show.

    Attributes:
      level: the level whose prototypes were used.
      cells: int32 [n, cells]: index into `contents(level)`, 0 for empty; -1 where nothing known is seen.
      appearance: int32 [n]: index into `appearances(level)`.
      ruler: bool [n]: whether the ruler is intact.
    """

    level: int
    cells: np.ndarray
    appearance: np.ndarray
    ruler: np.ndarray

    def scene(self, i: int) -> Scene:
        """Image `i` as a scene, FOREIGN where nothing known is seen."""
        rules, known = level_of(self.level), contents(self.level)
        cells = tuple(FOREIGN if code < 0 else known[code] for code in self.cells[i].tolist())
        return Scene(rules.rows, rules.columns, cells, *appearances(self.level)[int(self.appearance[i])])


def read(images: np.ndarray, level: int) -> Reading:
    """Reads uint8 [n, height, width, 3] at the image size of `level`."""
    rules = level_of(level)
    if images.ndim != 4 or images.shape[1:] != (rules.height, rules.width, 3):
        raise ValueError(f"level {level} images are [n, {rules.height}, {rules.width}, 3], not {images.shape}")
    tiles = _tiles(images, rules)
    appearance, intact = _read_ruler(tiles, level)
    board = tiles[:, 1:, 1:].reshape(len(images), rules.rows * rules.columns, -1)
    cells = np.empty(board.shape[:2], np.int32)
    for index in np.unique(appearance):
        chosen = appearance == index
        cells[chosen] = _nearest(board[chosen], _prototypes(level, int(index)))
    return Reading(level, cells, appearance, intact)


def classify(images: np.ndarray, level: int) -> np.ndarray:
    """uint8 [n, height, width, 3] -> int32 [n, cells], see `Reading.cells`."""
    return read(images, level).cells


@functools.cache
def contents(level: int) -> tuple[Object | None, ...]:
    """Everything that a cell may hold at a level; empty comes first."""
    rules = level_of(level)
    found: list[Object | None] = [None]
    for shape, colour in itertools.product(rules.shapes, rules.colours):
        if shape in LETTERS:
            found.append(Object(shape, colour))
            continue
        poses = rules.poses if shape == "triangle" else ("up",)
        looks = itertools.product(rules.sizes, rules.textures, poses, rules.defects)
        found += [Object(shape, colour, *look) for look in looks]
    return tuple(found)


@functools.cache
def appearances(level: int) -> tuple[Appearance, ...]:
    """Every (background, style, tone) of a level."""
    rules = level_of(level)
    return tuple(itertools.product(rules.backgrounds, rules.styles, rules.tones))


def _tiles(images: np.ndarray, rules: Level) -> np.ndarray:
    """uint8 [n, height, width, 3] -> float32 [n, rows + 1, columns + 1, 16 * 16 * 3]."""
    n = len(images)
    split = images.reshape(n, rules.rows + 1, CELL, rules.columns + 1, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(n, rules.rows + 1, rules.columns + 1, -1).astype(np.float32)


def _ruler_tiles(tiles: np.ndarray) -> np.ndarray:
    """float32 [n, tiles, pixels]: the corner, the letters, the digits."""
    return np.concatenate([tiles[:, 0], tiles[:, 1:, 0]], 1)


@functools.cache
def _rulers(level: int) -> np.ndarray:
    """float32 [appearances, tiles, pixels]."""
    blank = level_of(level).blank.values[:-3]
    rules = level_of(level)
    images = [render(Scene(rules.rows, rules.columns, blank, *appearance), level) for appearance in appearances(level)]
    return _ruler_tiles(_tiles(np.stack(images), rules))


def _read_ruler(tiles: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest appearance int32 [n], and whether every ruler tile is recognisable bool [n]."""
    seen, rulers = _ruler_tiles(tiles), _rulers(level)
    errors = np.stack([((seen - ruler) ** 2).mean(-1) for ruler in rulers], 1)  # [n, appearances, tiles]
    best = errors.mean(-1).argmin(1)
    reject = np.array([REJECT * (DARK**2 if tone == "dark" else 1) for _, _, tone in appearances(level)])
    intact = (errors[np.arange(len(seen)), best] <= reject[best][:, None]).all(-1)
    return best.astype(np.int32), intact


@dataclasses.dataclass(frozen=True)
class _Prototypes:
    """pixels uint8 [prototypes, 768], their sums of squares float32, the code of each int32, the error to reject at."""

    pixels: np.ndarray
    squares: np.ndarray
    codes: np.ndarray
    reject: float


@functools.lru_cache(maxsize=32)
def _prototypes(level: int, appearance: int) -> _Prototypes:
    """What the cells of one appearance may look like.

    Contents at every wobble; where there are textures, each also blurred, since blur would turn one into another.
    """
    rules, look = level_of(level), appearances(level)[appearance]
    tiles, codes = [], []
    for code, content in enumerate(contents(level)):
        offsets = wobbles(rules.wobble) if content is not None else ((0, 0, 0),)
        tiles += [tile(content, look, rules.antialias, offset, rules.ruler != "tabs") for offset in offsets]
        codes += [code] * len(offsets)
    sharp = np.stack(tiles)
    versions = [sharp] if len(rules.textures) == 1 else [sharp, _blurred(sharp)]
    pixels = np.concatenate(versions).reshape(len(versions) * len(tiles), -1)
    squares = (pixels.astype(np.float32) ** 2).sum(-1)
    reject = REJECT * (DARK**2 if look[2] == "dark" else 1)
    return _Prototypes(pixels, squares, np.array(codes * len(versions), np.int32), reject)


def _blurred(tiles: np.ndarray) -> np.ndarray:
    """uint8 [n, 16, 16, 3] -> the same, as a decoder that smooths fine textures would draw them."""
    soft = tiles.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(soft, [(1, 1) if i == axis else (0, 0) for i in range(4)], mode="edge")
        soft = 0.25 * np.take(padded, range(CELL), axis) + 0.5 * soft + 0.25 * np.take(padded, range(2, CELL + 2), axis)
    return np.rint(soft).astype(np.uint8)


def _nearest(board: np.ndarray, prototypes: _Prototypes) -> np.ndarray:
    """float32 [n, cells, pixels] -> int32 [n, cells]."""
    flat = board.reshape(-1, board.shape[-1])
    result = np.empty(len(flat), np.int32)
    known = prototypes.pixels.astype(np.float32)
    for start in range(0, len(flat), 4096):
        part = flat[start : start + 4096]
        distances = prototypes.squares - 2 * part @ known.T
        best = distances.argmin(1)
        error = (distances[np.arange(len(part)), best] + (part**2).sum(-1)) / part.shape[1]
        result[start : start + 4096] = np.where(error <= prototypes.reject, prototypes.codes[best], FOREIGN_CODE)
    return result.reshape(board.shape[:2])
