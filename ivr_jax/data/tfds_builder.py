"""A finished dataset for TensorFlow Datasets: two tables with the same split names, images stored once.

    images         name, image                          every picture, in the order of the dataset
    trajectories   key, prompt, ..., sources, rounds    pictures as positions in `images`, and which parts carry loss

    tfds.data_source("ivr_trajectories/images", data_dir=OUT, split="train")      array_record: no TensorFlow at all
    tfds.load("ivr_trajectories/trajectories", data_dir=OUT, split="train")       tfrecord: tf.data

Both tables come from `write_tfds` (`python -m ivr_jax.export DATASET --format=tfds --out=OUT`).  The kind of file
decides how they are read, because the library offers no tf.data over ArrayRecord files: `tfds.load` wants TFRecord
files, and writing those imports TensorFlow; ArrayRecord files are written and read without it, since pictures are
passed on as the PNG bytes that the dataset holds.  Rows are not shuffled, so row i of `images` is position i.  `json`
holds the exact record, for `trajectory_from_json`.  This is the only module that imports `tensorflow_datasets`; nothing
imports it but that command.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

import ivr_jax
from ivr_jax import files
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.protocol.codec import loss_parts
from ivr_jax.trajectory import Reflection, Step, Trajectory, trajectory_to_json

NAME = "ivr_trajectories"
SPLIT = "train"
_TEXT, _POSITION = tfds.features.Text(), tfds.features.Scalar(np.int64)
_FEATURES = {
    "images": {"name": _TEXT, "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")},
    "trajectories": {
        "key": _TEXT,
        "prompt": _TEXT,
        "explanation": _TEXT,
        "category": _TEXT,
        "mode": tfds.features.ClassLabel(names=["direct", "reflection", "multi_step"]),
        "sources": tfds.features.Sequence(_POSITION),
        "rounds": tfds.features.Sequence(
            {
                "image": _POSITION,
                "failure_analysis": _TEXT,
                "improvement_plan": _TEXT,
                "step": _TEXT,
                "passed": tfds.features.Tensor(shape=(4,), dtype=np.bool_),
                "scores": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                "cause_loss": np.bool_,
                "image_loss": np.bool_,
                "evaluation_loss": np.bool_,
            }
        ),
        "json": _TEXT,
    },
}


class IvrTrajectories(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds one of the two tables (`config="images"` or `"trajectories"`) from the dataset folder `source`."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=table) for table in _FEATURES]

    def __init__(self, *, source: str | os.PathLike, **options: Any):
        self.dataset = TrajectoryDataset(source)
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Interleaved reasoning trajectories, written by ivr_jax {ivr_jax.__version__}.",
            features=tfds.features.FeaturesDict(_FEATURES[self.builder_config.name]),
            disable_shuffling=True,
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        names = self.dataset.image_names
        if self.builder_config.name == "images":
            for index, name in enumerate(names):
                yield index, {"name": name, "image": self.dataset.png(name)}
        else:
            positions = {name: position for position, name in enumerate(names)}
            for index, trajectory in enumerate(self.dataset):
                yield index, example(trajectory, positions)


def example(trajectory: Trajectory, positions: Mapping[str, int]) -> dict[str, Any]:
    """One row of `trajectories`; `positions` maps image names to rows of `images`.

    A round's `passed` and `scores` are in the order of `AXES`; a missing score is NaN, a missing text is "".
    """
    selected = loss_parts(trajectory)
    sample, rounds = trajectory.sample, []
    for number, r in enumerate(trajectory.rounds, 1):
        reflection = r.cause if isinstance(r.cause, Reflection) else None
        rounds.append(
            {
                "image": positions[r.image],
                "failure_analysis": reflection.failure_analysis if reflection else "",
                "improvement_plan": reflection.improvement_plan if reflection else "",
                "step": r.cause.instruction if isinstance(r.cause, Step) else "",
                "passed": [axis.passed for axis in r.evaluation.axes],
                "scores": [np.nan if score is None else score for score in r.evaluation.scores],
                "cause_loss": ("S", number) in selected or ("R", number) in selected,
                "image_loss": ("G", number) in selected,
                "evaluation_loss": ("E", number) in selected,
            }
        )
    return {
        "key": sample.key,
        "prompt": sample.prompt,
        "explanation": sample.explanation,
        "category": sample.category,
        "mode": trajectory.mode.value,
        "sources": [positions[name] for name in sample.sources],
        "rounds": rounds,
        "json": json.dumps(trajectory_to_json(trajectory), ensure_ascii=False),
    }


def write_tfds(source: str | os.PathLike, out: str | os.PathLike, file_format: str = "array_record") -> Path:
    """Writes both tables of the dataset folder `source` to `out/ivr_trajectories/`, and returns that folder.

    Args:
      file_format: "array_record", or "tfrecord" (imports TensorFlow).

    Raises:
      UserError: `source` is no dataset, `out` holds the tables already, or TensorFlow is needed and missing.
    """
    if file_format == "tfrecord" and importlib.util.find_spec("tensorflow") is None:
        raise UserError("writing TFRecord files needs TensorFlow.", "pip install tensorflow-cpu, or use array_record.")
    target = Path(out) / NAME
    with files.NewFolder(target) as partial:
        for config in _FEATURES:
            options = {"config": config, "data_dir": os.fspath(partial), "file_format": file_format}
            builder = IvrTrajectories(source=source, **options)
            with tempfile.TemporaryDirectory() as unused:  # the library makes a folder for downloads, wanted or not
                builder.download_and_prepare(download_dir=unused)
        for table in (partial / NAME).iterdir():
            table.rename(partial / table.name)
        (partial / NAME).rmdir()
    return target
