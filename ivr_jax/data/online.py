"""Token examples without a dataset: lessons of the micro-world (`ivr_jax.world.practice`), made when they are read.

They are equal to what `ivr_jax.data.examples` makes of the same trajectories with rendered images.  Rendering and
encoding every image would cost as much as training on it, so the codes of a scene are put together from those of its
cells; `SceneCodes` makes sure that the image tokenizer allows it.
"""

from __future__ import annotations

import numpy as np

from ivr_jax.data.examples import EncodeImages
from ivr_jax.errors import UserError
from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.world.draws import random_scene
from ivr_jax.world.levels import level_of
from ivr_jax.world.practice import PracticeOptions, draw_lesson
from ivr_jax.world.render import render
from ivr_jax.world.scene import Object, Scene

DRAWING = 1 + codec.PARTS.index("G")
SCENES, CHECKED = 256, 128  # scenes from which codes are learnt, and on which they are checked


class SceneCodes:
    """Codes of scenes: those that the image tokenizer gives the rendered scene, looked up cell by cell.

    Where the code of a cell also depends on what stands around it, scenes are rendered and encoded one by one.

    Attributes:
      by_cell: whether cells are looked up.
    """

    def __init__(self, encode_images: EncodeImages, level: int, seed: int = 0):
        self._encode, self._level, rules = encode_images, level, level_of(level)
        rng = np.random.default_rng(seed)
        scenes = [random_scene(rng, rules) for _ in range(SCENES + CHECKED)]
        codes = np.stack(encode_images([render(scene, level) for scene in scenes]))
        if codes.shape[1:] != (rules.rows + 1, rules.columns + 1):
            raise UserError(f"the image tokenizer gives a board of level {level} codes of shape {codes.shape[1:]}.",
                            "Use one whose latent cells are as large as the world's, 16 pixels a side.")
        self._grid = codes[0].astype(np.int32)
        self._codes: dict[tuple[int, Object | None], int] = {}
        for scene, grid in zip(scenes[:SCENES], codes, strict=False):
            self._codes |= dict(zip(enumerate(scene.cells), grid[1:, 1:].ravel().tolist(), strict=True))
        looked_up = [self._look_up(scene) for scene in scenes]
        self.by_cell = all(found is not None and (found == grid).all()
                           for found, grid in zip(looked_up, codes, strict=True))

    def __call__(self, scene: Scene) -> np.ndarray:
        """int32 [rows + 1, columns + 1]."""
        found = self._look_up(scene) if self.by_cell else None
        return np.asarray(self._encode([render(scene, self._level)])[0], np.int32) if found is None else found

    def _look_up(self, scene: Scene) -> np.ndarray | None:
        """None for a scene with a cell or an appearance that was not among the first."""
        found = [self._codes.get(pair) for pair in enumerate(scene.cells)]
        if None in found or scene.appearance != level_of(self._level).blank.appearance:
            return None
        grid = self._grid.copy()
        grid[1:, 1:] = np.array(found, np.int32).reshape(scene.rows, scene.columns)
        return grid


def lesson_example(tokenizer: TextTokenizer, codes: SceneCodes, options: PracticeOptions, seed: int,
                   index: int) -> dict[str, np.ndarray]:
    """Lesson `index` as tokens int32 [T] and loss uint8 [T], see `examples.unpack_example`."""
    lesson = draw_lesson(options, seed, index)
    encoded = codec.encode_trajectory(tokenizer, lesson.trajectory, {n: codes(s) for n, s in lesson.scenes.items()})
    loss = encoded.target_parts()
    if not lesson.drawn:
        loss[loss == DRAWING] = 0
    return {"tokens": encoded.tokens, "loss": loss}
