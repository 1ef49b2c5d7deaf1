"""Grain pipelines.  Every iterator has `get_state()` / `set_state()`, plain JSON values, for exact resumption."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import grain
import numpy as np
from grain import experimental as grain_experimental

from ivr_jax.data.examples import read_manifest, unpack_example
from ivr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A random-access source made of a function: element i is `make(i)`, for i in [0, size)."""

    make: Callable[[int], object]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> object:
        return self.make(int(index))


def packed_examples(
    folder: str | os.PathLike, mix: Mapping[str, float], batch: int, length: int, seed: int
) -> grain.DatasetIterator:
    """Endless packed batches from token examples.

    Args:
      mix: mode -> weight of its samples; a mode without examples must not be weighted.
      length: T; whole examples are packed first-fit into rows of T tokens, never split.

    Yields dicts of int32 [batch, T]: tokens, segment_ids (0 is padding, 1 ... the packed examples), positions
    (restart in each example), and loss uint8 [batch, T] (1 where the token is a target).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no token examples.", "Run the training command again; it makes them.")
    if manifest["longest"] > length:
        raise UserError(
            f"the longest example has {manifest['longest']} tokens, a row holds {length}.", "Raise data.length."
        )
    modes = [mode for mode, weight in mix.items() if weight > 0]
    missing = [mode for mode in modes if not manifest["counts"].get(mode)]
    if missing or not modes:
        raise UserError(
            f"data.mix weights {missing or 'nothing'}, but the dataset holds {manifest['counts']}.",
            "Set the weights of absent modes to 0 and give one that is there a positive weight.",
        )
    sources = []
    for number, mode in enumerate(modes):
        source = grain.sources.ArrayRecordDataSource(str(pathlib.Path(folder) / f"{mode}.array_record"))
        sources.append(grain.MapDataset.source(source).shuffle(seed=seed + number).repeat().map(unpack_example))
    mixed = grain.MapDataset.mix(sources, [mix[mode] for mode in modes]) if len(sources) > 1 else sources[0]
    packed = grain_experimental.FirstFitPackIterDataset(
        mixed.to_iter_dataset(), length_struct={"tokens": length, "loss": length}, num_packing_bins=4 * batch, seed=seed
    )
    return iter(packed.map(_rename).batch(batch, drop_remainder=True))


def _rename(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "tokens": row["tokens"],
        "loss": row["loss"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
    }


def indexed_batches(source: Indexed, batch: int, seed: int, collate: Callable | None = None) -> grain.DatasetIterator:
    """Endless shuffled batches of `source`'s elements; arrays are stacked unless `collate` (list -> batch) is given."""
    if len(source) < 1:
        raise UserError("the dataset is empty.", "Add at least one sample.")
    dataset = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    return iter(
        dataset.to_iter_dataset().batch(batch, drop_remainder=True, **({"batch_fn": collate} if collate else {}))
    )
