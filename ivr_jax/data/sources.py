"""Where trajectories are read from: our own dataset folders, or TFDS tables in ArrayRecord files.

`open_dataset` tells them apart, so that every command that reads a dataset takes both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivr_jax.cloud import inputs
from ivr_jax.data.store import TrajectoryDataset, TrajectorySource
from ivr_jax.errors import UserError

TABLES = ("images", "trajectories")
_SPLIT = "train"
_AGAIN = "Export it again: python -m ivr_jax.export DATASET --format=tfds --out=FOLDER."


def open_dataset(path: str | os.PathLike) -> TrajectorySource:
    """The dataset at `path`: a folder of `TrajectoryWriter`, or the folder `ivr_trajectories` of an export to TFDS.

    One in a bucket is copied to this machine once.  Raises UserError when it is neither.
    """
    path = inputs.local(path)
    return TfdsDataset(path) if all((path / table).is_dir() for table in TABLES) else TrajectoryDataset(path)


class TfdsDataset(TrajectorySource):
    """The two tables of `data.tfds_builder`, read with `tfds.data_source`, without TensorFlow.

    Its fingerprint is that of the dataset from which the tables were made.

    Raises:
      UserError: tensorflow-datasets is missing, or the tables are damaged, empty or not in ArrayRecord files.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not len(self):
            raise UserError(f"the dataset {self.path} is empty.", _AGAIN)

    def __len__(self) -> int:
        return len(self._trajectories)

    @functools.cached_property
    def image_names(self) -> tuple[str, ...]:
        return tuple(self._images[i]["name"].decode() for i in range(len(self._images)))

    def _record(self, index: int) -> bytes:
        return self._trajectories[index]["json"]

    def _png(self, position: int) -> bytes:
        return self._images[position]["image"]

    @functools.cached_property
    def _trajectories(self) -> Sequence[Any]:
        return self._open("trajectories")

    @functools.cached_property
    def _images(self) -> Sequence[Any]:
        return self._open("images", "image")

    def _open(self, table: str, *encoded: str) -> Sequence[Any]:
        """The rows of a table; columns that are `encoded` stay as they are in the file."""
        try:
            import tensorflow_datasets as tfds  # seconds to import, and an extra
        except ImportError:
            raise UserError(f"reading {self.path} needs tensorflow-datasets.",
                            "pip install tensorflow-datasets importlib_resources.") from None
        try:
            version = max(folder for folder in (self.path / table).iterdir() if folder.is_dir())
            builder = tfds.builder_from_directory(version)
            decoders = {column: tfds.decode.SkipDecoding() for column in encoded}
            return builder.as_data_source(split=_SPLIT, decoders=decoders)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"the table {self.path / table} cannot be read: {reason}.", _AGAIN) from error
