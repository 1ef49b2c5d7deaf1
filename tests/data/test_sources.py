"""Datasets of both kinds read alike: our folders, and TFDS tables in ArrayRecord files."""

from __future__ import annotations

import pickle
import shutil
import sys

import grain
import numpy as np
import pytest
from dataset_fixtures import build

from ivr_jax.data import examples
from ivr_jax.data.sources import TfdsDataset, open_dataset
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.data.tfds_builder import write_tfds
from ivr_jax.errors import UserError
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.world.language import PHRASES


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same trajectories in both kinds of storage."""
    root = tmp_path_factory.mktemp("sources")
    folder = build(root / "data", 7)
    return open_dataset(folder), open_dataset(write_tfds(folder, root / "out"))


def test_tfds_tables_hold_what_the_folder_holds(both):
    folder, tables = both
    assert isinstance(folder, TrajectoryDataset) and isinstance(tables, TfdsDataset)
    assert list(tables) == list(folder) and tables.image_names == folder.image_names
    assert tables.fingerprint == folder.fingerprint and "tensorflow" not in sys.modules
    for name in folder.image_names:
        assert np.array_equal(tables.image(name), folder.image(name)) and tables.png(name) == folder.png(name)
    with pytest.raises(UserError):
        tables.image("none of them")


def test_tfds_tables_are_a_source_for_grain(both):
    _, tables = both
    copy = pickle.loads(pickle.dumps(tables))
    keys = [t.sample.key for t in grain.MapDataset.source(copy).shuffle(seed=1)]
    assert sorted(keys) == [f"key/{i}" for i in range(7)]


def test_token_examples_of_both_are_the_same_bytes(both, tmp_path):
    tokenizer = PhraseTokenizer(PHRASES, 8)

    def encode(images):
        return [np.full((1, 2), int(image.sum()) % 8, np.int32) for image in images]

    made = []
    for number, dataset in enumerate(both):
        fingerprint = examples.source_fingerprint(dataset, tokenizer, "images")
        examples.make_examples(dataset, tokenizer, encode, tmp_path / str(number), 10_000, fingerprint)
        made.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert made[0] == made[1]


def test_damaged_tables_are_named(both, tmp_path):
    _, tables = both
    copy = shutil.copytree(tables.path, tmp_path / "copy")
    (copy / "trajectories" / "1.0.0" / "dataset_info.json").unlink()
    with pytest.raises(UserError) as caught:
        open_dataset(copy)
    assert str(copy / "trajectories") in caught.value.what
    with pytest.raises(UserError) as caught:
        open_dataset(tmp_path)
    assert str(tmp_path) in caught.value.what
