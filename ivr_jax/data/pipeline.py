"""Grain pipelines.  Every iterator has `get_state()` / `set_state()`, plain JSON values, for exact resumption."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from ivr_jax import distributed
from ivr_jax.data.examples import read_manifest, unpack_example
from ivr_jax.errors import UserError

PACKED_TOGETHER = 64  # least number of rows that a stream fills at the same time: more rows, less padding
_AHEAD, _THREADS, _MOST_AHEAD = 8, 16, 500  # batches read ahead, by how many threads, and the most elements of them


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A random-access source made of a function: element i is `make(i)`, for i in [0, size)."""

    make: Callable[[int], object]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> object:
        return self.make(int(index))


class PackedBatches:
    """Endless batches whose rows come from independent streams; each process reads the streams of its own rows.

    Stream s of S packs the examples s, s + S, s + 2 S, … of the shuffled mix, and fills rows s B/S … (s + 1) B/S - 1 of
    a batch of B rows.  So the batches depend on S alone, not on how many processes there are.
    """

    def __init__(self, streams: Mapping[int, grain.DatasetIterator], rows_each: int, rows: Sequence[int]):
        self._streams, self._rows_each, self._rows = streams, rows_each, np.asarray(rows)

    def __next__(self) -> dict[str, np.ndarray]:
        parts = {number: next(stream) for number, stream in self._streams.items()}
        owner, within = self._rows // self._rows_each, self._rows % self._rows_each
        names = next(iter(parts.values()))
        return {name: np.stack([parts[s][name][r] for s, r in zip(owner, within, strict=True)]) for name in names}

    def get_state(self) -> dict[str, Any]:
        """All streams' positions, those of other processes included."""
        return distributed.union({str(number): stream.get_state() for number, stream in self._streams.items()})

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to positions that `get_state` gave, in a run of any number of processes."""
        for number, stream in self._streams.items():
            stream.set_state(state[str(number)])


def stored_examples(folder: str | os.PathLike, mix: Mapping[str, float], length: int, seed: int) -> grain.MapDataset:
    """The token examples of a folder, shuffled and mixed without end.

    Args:
      mix: mode -> weight of its samples; a mode without examples must not be weighted.
      length: no example may be longer.
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
    held = ", ".join(f"{mode} {count}" for mode, count in manifest["counts"].items())
    if not modes:
        raise UserError(f"data.mix weights nothing; the dataset holds {held}.", "Give one of them a positive weight.")
    if missing:
        raise UserError(
            f"data.mix gives weight to {' and '.join(missing)}, of which the dataset holds no example: {held}.",
            f"Add {' '.join(f'--config.data.mix.{mode}=0' for mode in missing)}, or data of that mode.",
        )
    sources = []
    for number, mode in enumerate(modes):
        source = grain.sources.ArrayRecordDataSource(str(pathlib.Path(folder) / f"{mode}.array_record"))
        sources.append(grain.MapDataset.source(source).shuffle(seed=seed + number).repeat().map(unpack_example))
    return grain.MapDataset.mix(sources, [mix[mode] for mode in modes]) if len(sources) > 1 else sources[0]


def made_examples(source: Any, length: int) -> grain.MapDataset:
    """The examples of a random-access source in order, without end; those of more than `length` tokens are left out."""
    return grain.MapDataset.source(source).repeat().filter(lambda example: len(example["tokens"]) <= length)


def packed_batches(
    examples: grain.MapDataset,
    batch: int,
    length: int,
    seed: int,
    streams: int = 1,
    rows: Sequence[int] | np.ndarray | None = None,
) -> PackedBatches:
    """Endless packed batches of token examples.

    Args:
      examples: dicts of tokens int32 [T'] and loss uint8 [T'].
      length: T; whole examples are packed best-fit into rows of T tokens, never split.
      streams: a divisor of `batch`; as many as there are rows let each process read no more than its share.
      rows: the rows of each batch that this process wants, all of them by default.

    Yields dicts of int32 [batch, T]: tokens, segment_ids (0 is padding, 1 ... the packed examples), positions
    (restart in each example), and loss uint8 [batch, T] (1 where the token is a target).
    """
    if batch % streams:
        raise UserError(f"{batch} rows do not come from {streams} streams in equal parts.",
                        "Make data.streams a divisor of config.batch.")
    each, rows = batch // streams, range(batch) if rows is None else rows

    def stream(number: int) -> grain.DatasetIterator:
        part = examples.slice(slice(number, None, streams)) if streams > 1 else examples
        packed = grain_experimental.BestFitPackIterDataset(
            part.to_iter_dataset(_reading(each)), length_struct={"tokens": length, "loss": length},
            num_packing_bins=max(4 * each, PACKED_TOGETHER), seed=seed + number,
        )  # fmt: skip
        return iter(packed.map(_rename).batch(each, drop_remainder=True))

    return PackedBatches({s: stream(s) for s in sorted({int(row) // each for row in rows})}, each, rows)


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
    options = {"batch_fn": collate} if collate else {}
    return iter(dataset.to_iter_dataset(_reading(batch)).batch(batch, drop_remainder=True, **options))


def _reading(batch: int) -> grain.ReadOptions:
    """Some batches are read ahead, not Grain's 500 elements whatever their number: a run would begin with making those.

    An element can be dear: a lesson is rendered, and a shuffled index of very few takes milliseconds.
    """
    ahead = min(max(_AHEAD * batch, _THREADS), _MOST_AHEAD)
    return grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
