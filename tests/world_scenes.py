"""One image as a scene, and one scene as the codes that a clean image of it reads as."""

from __future__ import annotations

import numpy as np

from ivr_jax.world.recognise import FOREIGN_CODE, appearances, contents, read
from ivr_jax.world.scene import FOREIGN, Scene


def read_scene(image: np.ndarray, level: int) -> tuple[Scene, bool]:
    """uint8 [height, width, 3] -> the scene, and whether its ruler is intact."""
    reading = read(image[None], level)
    return reading.scene(0), bool(reading.ruler[0])


def encode_scene(scene: Scene, level: int) -> tuple[np.ndarray, int]:
    """What `read` returns for a clean image of `scene`: int32 [cells], index of the appearance."""
    known = contents(level)
    codes = [FOREIGN_CODE if cell == FOREIGN else known.index(cell) for cell in scene.cells]
    return np.array(codes, np.int32), appearances(level).index(scene.appearance)
