"""Token examples: a trajectory dataset after one pass of the image tokenizer.

A folder with one ArrayRecord file a mode and `examples.json`; each record is an int32 length T, T int32 tokens and T
uint8 loss flags (0: no target; else 1 + index in `codec.PARTS`), little-endian.  The manifest carries the tokenizer's
fingerprint, so examples are never read with another vocabulary.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from array_record.python import array_record_module
from tqdm import tqdm

from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.trajectory import Mode, Trajectory

EncodeImages = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # uint8 [height, width, 3] -> int [rows, columns]
MANIFEST = "examples.json"


def pack_example(tokens: np.ndarray, loss: np.ndarray) -> bytes:
    """int32 [T], uint8 [T] -> one record."""
    return np.int32(len(tokens)).tobytes() + tokens.astype("<i4").tobytes() + loss.astype(np.uint8).tobytes()


def unpack_example(record: bytes) -> dict[str, np.ndarray]:
    """One record -> tokens int32 [T], loss uint8 [T]."""
    size = int(np.frombuffer(record, "<i4", 1)[0])
    if len(record) != 4 + 5 * size:
        raise UserError("a token example is corrupt.", "Delete the examples folder; it is made anew.")
    return {
        "tokens": np.frombuffer(record, "<i4", size, 4),
        "loss": np.frombuffer(record, np.uint8, size, 4 + 4 * size),
    }


def make_examples(
    dataset: TrajectoryDataset,
    tokenizer: TextTokenizer,
    encode_images: EncodeImages,
    folder: str | os.PathLike,
    longest: int,
    fingerprint: str,
    chunk: int = 256,
) -> dict:
    """Writes the examples of `dataset` into `folder` (renamed into place when complete) and returns the manifest.

    Raises UserError for a trajectory of more than `longest` tokens, naming it.
    """
    folder = pathlib.Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writers = {
        mode: array_record_module.ArrayRecordWriter(str(partial / f"{mode.value}.array_record"), "group_size:1")
        for mode in Mode
    }
    counts, tokens, most = Counter(), 0, 0
    try:
        for start in tqdm(range(0, len(dataset), chunk), desc="tokenise", unit=f"x{chunk}", leave=False):
            trajectories = [dataset[i] for i in range(start, min(start + chunk, len(dataset)))]
            codes = _codes(dataset, trajectories, encode_images)
            for trajectory in trajectories:
                encoded = codec.encode_trajectory(tokenizer, trajectory, codes)
                size = len(encoded.tokens)
                if size > longest:
                    raise UserError(
                        f"trajectory {trajectory.sample.key!r} has {size} tokens; the context holds {longest}.",
                        "Raise data.length (and the model's context), or leave the trajectory out.",
                    )
                writers[trajectory.mode].write(pack_example(encoded.tokens, encoded.target_parts()))
                counts[trajectory.mode.value] += 1
                tokens, most = tokens + size, max(most, size)
        for writer in writers.values():
            writer.close()
        manifest = {"fingerprint": fingerprint, "counts": dict(counts), "tokens": tokens, "longest": most}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:
        for writer in writers.values():
            if writer.is_open():
                writer.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _codes(
    dataset: TrajectoryDataset, trajectories: Sequence[Trajectory], encode_images: EncodeImages
) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(name for t in trajectories for name in (*t.sample.sources, *t.images)))
    return dict(zip(names, encode_images([dataset.image(name) for name in names]), strict=True))


def read_manifest(folder: str | os.PathLike) -> dict | None:
    """The manifest of a finished examples folder, or None."""
    path = pathlib.Path(folder) / MANIFEST
    return json.loads(path.read_text()) if path.exists() else None
