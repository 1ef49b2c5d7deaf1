"""Trajectories longer than the context: known before anything is encoded, an error, or left out and counted."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_fixtures import build

from ivr_jax.data import examples, pipeline
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.world.language import PHRASES

TOKENIZER = PhraseTokenizer(PHRASES, 8)


def encode(images):
    return [np.zeros((image.shape[0] // 2, image.shape[1] // 2), np.int32) for image in images]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TrajectoryDataset:
    return TrajectoryDataset(build(tmp_path_factory.mktemp("examples") / "data", 6))


@pytest.fixture(scope="module")
def lengths(dataset, tmp_path_factory) -> list[int]:
    """Tokens of each trajectory, of examples without a limit."""
    folder = tmp_path_factory.mktemp("all") / "out"
    manifest = examples.make_examples(dataset, TOKENIZER, encode, folder, 10_000, "f", chunk=1)
    assert manifest["dropped"] == 0
    found = []
    for index in range(len(dataset)):
        low, high = 1, manifest["longest"]
        while low < high:
            middle = (low + high) // 2
            over = _over(dataset, middle)
            low, high = (middle + 1, high) if index in over else (low, middle)
        found.append(low)
    return found


def _over(dataset, limit: int) -> frozenset[int]:
    try:
        return examples.too_long(dataset, TOKENIZER, 2, limit, True)
    except UserError:  # all of them
        return frozenset(range(len(dataset)))


def test_lengths_are_those_of_the_tokens(dataset, lengths, tmp_path):
    manifest = examples.make_examples(dataset, TOKENIZER, encode, tmp_path / "out", 10_000, "f")
    assert sum(lengths) == manifest["tokens"] and max(lengths) == manifest["longest"]


def test_too_long_ones_are_an_error_that_counts_them_before_anything_is_encoded(dataset, lengths):
    limit = sorted(lengths)[2]
    with pytest.raises(UserError) as caught:
        examples.too_long(dataset, TOKENIZER, 2, limit, False)
    over = [size for size in lengths if size > limit]
    assert f"{len(over)} of 6" in caught.value.what and str(max(over)) in caught.value.what


def test_too_long_ones_may_be_left_out(dataset, lengths, tmp_path, capsys):
    limit = sorted(lengths)[2]
    left_out = examples.too_long(dataset, TOKENIZER, 2, limit, True)
    assert left_out == {index for index, size in enumerate(lengths) if size > limit}
    assert "left out" in capsys.readouterr().out
    manifest = examples.make_examples(
        dataset, TOKENIZER, encode, tmp_path / "out", limit, "f", chunk=2, left_out=left_out
    )
    assert manifest["dropped"] == len(left_out) and manifest["longest"] <= limit
    assert sum(manifest["counts"].values()) == 6 - len(left_out)
    for part in range(2):
        (tmp_path / "many").mkdir(exist_ok=True)
        examples.write_part(
            dataset, TOKENIZER, encode, tmp_path / "many", limit, part, 2, chunk=2, left_out=left_out
        )
    assert examples.join_parts(tmp_path / "many", "f", limit, 2) == manifest
    mix = {mode: 1.0 for mode in manifest["counts"]}
    assert len(pipeline.stored_examples(tmp_path / "out", mix, limit, 0)) > 0


@pytest.mark.parametrize(("manifest", "drop", "current"), [
    (None, False, False), ({"fingerprint": "other"}, False, False), ({"fingerprint": "f"}, False, True),
    ({"fingerprint": "f", "dropped": 0, "limit": 9}, True, True),
    ({"fingerprint": "f", "dropped": 2, "limit": 5}, True, True),
    ({"fingerprint": "f", "dropped": 2, "limit": 9}, True, False),
    ({"fingerprint": "f", "dropped": 2, "limit": 5}, False, False),
])  # fmt: skip
def test_examples_are_used_again_only_with_the_same_limit(manifest, drop, current):
    assert examples.are_current(manifest, "f", 5, drop) == current
