"""The swap test: pairs of known images from a dataset, and one error for a dataset that has none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from answers_fixture import Studio, tasks
from tiny_model import TOKENIZER, FlatCodec

from ivr_jax.checkpoints.system import System
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.evaluate.paired import EXACT, OWN, paired_test
from ivr_jax.evaluate.swap import known_pairs, swap_cases
from ivr_jax.evaluate.verdicts import Verdict
from ivr_jax.report.swaps import read_swap, write_swap
from ivr_jax.trajectory import Mode


class SmallCodec(FlatCodec):
    """Codes that the small vocabulary holds: the sum of an image's pixels decides all four."""

    def encode(self, images):
        return [np.full((2, 2), int(image.sum()) % 4, np.int32) for image in images]


def dataset(path, modes):
    studio = Studio(seed=2)
    with TrajectoryWriter(path) as writer:
        for number, task in enumerate(tasks(4 * len(modes))[3::4]):
            trajectory = studio.training_sample(task, modes[number]).trajectory
            writer.add(trajectory, {name: studio.images[name] for name in (*task.sample.sources, *trajectory.images)})
    return TrajectoryDataset(path)


def test_the_first_image_is_the_wrong_one_and_the_last_the_right_one(tmp_path):
    stored = dataset(tmp_path / "d", [Mode.DIRECT, Mode.REFLECTION, Mode.MULTI_STEP])
    chosen = known_pairs(stored, 8)
    assert [trajectory.mode for trajectory in chosen] == [Mode.REFLECTION, Mode.MULTI_STEP]
    assert len(known_pairs(stored, 1)) == 1
    image_codec = SmallCodec()
    cases = swap_cases(System(None, None, TOKENIZER, image_codec, {}), stored, chosen)
    for case, trajectory in zip(cases, chosen, strict=True):
        images = stored.images(trajectory)
        right, wrong = (image_codec.encode([images[trajectory.images[i]]])[0] for i in (-1, 0))
        assert np.array_equal(case.images[EXACT], right) and np.array_equal(case.images[OWN], wrong)
        assert not case.own_right and case.groups["by_mode"] == (trajectory.mode.value,)
    result = paired_test(
        [dataclasses.replace(c, images={EXACT: np.ones((2, 2)), OWN: np.zeros((2, 2))}) for c in cases],
        lambda images: [Verdict(float(image.codes.all())) for image in images],
    )
    assert result["overall"]["sight"]["value"] == 1.0 and set(result["by_mode"]) == {"reflection", "multi_step"}
    write_swap(tmp_path / "out", {"about": {}, **result})
    assert read_swap(tmp_path / "out")["overall"] == result["overall"]


def test_a_dataset_without_known_wrong_images_is_one_clear_error(tmp_path):
    with pytest.raises(UserError) as caught:
        known_pairs(dataset(tmp_path / "direct", [Mode.DIRECT, Mode.DIRECT]), 8)
    assert str(tmp_path / "direct") in caught.value.what
