"""Pixels and back: rendering, recognition under blur and noise, and everything that is no image of the world."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from world_scenes import encode_scene, read_scene

from ivr_jax.errors import UserError
from ivr_jax.world.draws import random_scene
from ivr_jax.world.levels import LEVELS, level_of
from ivr_jax.world.recognise import appearances, classify, contents, read
from ivr_jax.world.render import cell_box, random_wobble, render, render_edit
from ivr_jax.world.scene import FOREIGN, Scene, object_from_words

LEVEL_0 = level_of(0)


def gallery(level: int, count: int, seed: int = 0) -> tuple[list[Scene], np.ndarray]:
    """Random scenes and their images uint8 [count, height, width, 3], wobbling where the level does."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, level_of(level)) for _ in range(count)]
    return scenes, np.stack([render(scene, level, random_wobble(rng, level)) for scene in scenes])


def spoilt(images: np.ndarray, blur: float, noise: float) -> np.ndarray:
    soft = gaussian_filter(images.astype(np.float64), (0, blur, blur, 0)) if blur else images.astype(np.float64)
    return np.clip(np.rint(soft + np.random.default_rng(1).normal(0, noise, images.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("level, size", [(0, 64), (1, 80), (2, 80), (3, 96)])
def test_image_sizes(level, size):
    rules = level_of(level)
    assert (rules.height, rules.width) == (size, size)
    assert render(rules.blank, level).shape == (size, size, 3)


def test_an_unknown_level_is_a_user_error():
    with pytest.raises(UserError, match="0 to 3"):
        level_of(4)


def test_every_cell_is_one_tile():
    scene = LEVEL_0.blank.with_values({4: object_from_words("red circle")})
    different = (render(scene, 0) != render(LEVEL_0.blank, 0)).any(-1)
    assert cell_box(4, 3) == (slice(32, 48), slice(32, 48))
    assert different[cell_box(4, 3)].sum() > 80
    different[cell_box(4, 3)] = False
    assert not different.any()


def test_level_0_is_crisp():
    scenes, images = gallery(0, 20)
    assert len(np.unique(images.reshape(-1, 3), axis=0)) <= 11  # ground, three colours, seven tabs of the ruler


def test_colours_and_shapes_of_level_0_are_far_apart():
    tiles = np.stack([render(LEVEL_0.blank.with_values({0: content}), 0)[cell_box(0, 3)] for content in contents(0)])
    flat = tiles.reshape(len(tiles), -1).astype(np.float64)
    distances = ((flat[:, None] - flat[None]) ** 2).mean(-1)
    assert distances[~np.eye(len(tiles), dtype=bool)].min() > 1500


@given(st.integers(0, 3), st.integers(0, 2**20))
@settings(max_examples=30)
def test_what_is_drawn_is_recognised(level, seed):
    scenes, images = gallery(level, 1, seed)
    assert read_scene(images[0], level) == (scenes[0], True)


@pytest.mark.parametrize("level", (0, 1, 2, 3))
@pytest.mark.parametrize("blur, noise", [(0.0, 10.0), (0.7, 0.0), (0.6, 10.0)])
def test_light_blur_and_noise_change_nothing(level, blur, noise):
    scenes, images = gallery(level, 60 if level < 2 else 12)
    reading = read(spoilt(images, blur, noise), level)
    assert reading.ruler.all()
    assert [reading.scene(i) for i in range(len(scenes))] == scenes


def test_level_0_bears_heavy_blur():
    scenes, images = gallery(0, 40)
    assert (classify(spoilt(images, 1.2, 0.0), 0) == np.stack([encode_scene(s, 0)[0] for s in scenes])).all()


@pytest.mark.parametrize("level", (0, 1, 2, 3))
def test_noise_and_blots_are_foreign(level):
    scenes, images = gallery(level, 8)
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    reading = read(noise, level)
    assert (reading.cells == -1).all() and not reading.ruler.any()
    blotted = [scene.with_values({0: FOREIGN}) for scene in scenes]
    cells = classify(np.stack([render(scene, level) for scene in blotted]), level)
    assert (cells[:, 0] == -1).all()
    assert (cells[:, 1:] == np.stack([encode_scene(s, level)[0] for s in scenes])[:, 1:]).all()


def test_objects_of_other_levels_are_foreign_at_level_0():
    for words in ("half red circle", "striped blue square", "purple circle", "teal cross", "red letter A"):
        image = render(LEVEL_0.blank.with_values({4: object_from_words(words)}), 0)
        assert classify(image[None], 0)[0, 4] == -1, words


def test_a_smeared_ruler_is_seen():
    _, images = gallery(0, 1)
    images[0, 0:16, 16:32] = 0
    reading = read(images, 0)
    assert not reading.ruler[0]
    assert (reading.cells >= 0).all()


def test_every_appearance_is_recognised():
    for level in (1, 2):
        for index, appearance in enumerate(appearances(level)):
            rules = level_of(level)
            scene = Scene(rules.rows, rules.columns, rules.blank.cells, *appearance)
            reading = read(render(scene, level)[None], level)
            assert reading.appearance[0] == index and reading.scene(0) == scene


def test_an_edit_keeps_the_pixels_of_what_stays():
    scenes, images = gallery(3, 1)
    target = scenes[0].with_values({3: None, 7: object_from_words("red circle")})
    edited = render_edit(scenes[0], images[0], target, 3, random_wobble(np.random.default_rng(5), 3))
    for place in range(25):
        same = (edited[cell_box(place, 5)] == images[0][cell_box(place, 5)]).all()
        assert same == (scenes[0].cells[place] == target.cells[place])


@pytest.mark.parametrize("level", (0, 3))
def test_only_level_3_wobbles(level):
    wobble = random_wobble(np.random.default_rng(0), level)
    assert (wobble is None) == (LEVELS[level].wobble == 0)


def test_reading_images_of_another_size_is_refused():
    with pytest.raises(ValueError, match="64"):
        classify(np.zeros((1, 80, 80, 3), np.uint8), 0)
