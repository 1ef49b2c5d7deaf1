"""Token examples: a trajectory dataset after one pass of the image tokenizer.

A folder with one ArrayRecord file a mode and `examples.json`; each record is an int32 length T, T int32 tokens and T
uint8 loss flags (0: no target; else 1 + index in `codec.PARTS`), little-endian.  The manifest carries the tokenizer's
fingerprint, so examples are never read with another vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Container, Sequence

import numpy as np
from array_record.python import array_record_module
from PIL import Image
from tqdm import tqdm

from ivr_jax import files
from ivr_jax.data.store import TrajectorySource
from ivr_jax.errors import UserError
from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.trajectory import Mode, Trajectory

EncodeImages = Callable[[Sequence[np.ndarray]], list[np.ndarray]]  # uint8 [height, width, 3] -> int [rows, columns]
MANIFEST = "examples.json"
CHUNK = 256  # trajectories that are encoded together


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


def source_fingerprint(dataset: TrajectorySource, tokenizer: TextTokenizer, image_tokenizer: str) -> str:
    """What token examples were made of; `image_tokenizer`: the fingerprint of its parameters."""
    return f"parts-{tokenizer.fingerprint}-{image_tokenizer}-{dataset.fingerprint}"


def make_examples(
    dataset: TrajectorySource,
    tokenizer: TextTokenizer,
    encode_images: EncodeImages,
    folder: str | os.PathLike,
    longest: int,
    fingerprint: str,
    chunk: int = CHUNK,
    left_out: Container[int] = (),
) -> dict:
    """Writes the examples of `dataset` into `folder` (renamed into place when complete) and returns the manifest.

    Raises UserError for a trajectory of more than `longest` tokens that is not `left_out` (see `too_long`), naming it.
    """
    with files.NewFolder(folder, overwrite=True) as partial:
        write_part(dataset, tokenizer, encode_images, partial, longest, chunk=chunk, left_out=left_out)
        return join_parts(partial, fingerprint, longest)


def too_long(
    dataset: TrajectorySource, tokenizer: TextTokenizer, factor: int, longest: int, drop: bool
) -> frozenset[int]:
    """Indices of the trajectories of more than `longest` tokens, known before any image is encoded.

    Args:
      factor: pixels a side of a latent cell; sizes are read from the images' headers.
      drop: whether they may be left out.

    Raises:
      UserError: there are some, and not `drop`; or there is nothing else.
    """
    found: dict[int, int] = {}
    shapes: dict[str, np.ndarray] = {}
    for index in tqdm(range(len(dataset)), desc="lengths", unit="trajectory", leave=False):
        trajectory = dataset[index]
        for name in (*trajectory.sample.sources, *trajectory.images):
            if name not in shapes:
                width, height = Image.open(io.BytesIO(dataset.png(name))).size
                shapes[name] = np.zeros((height // factor, width // factor), np.int32)
        size = len(codec.encode_trajectory(tokenizer, trajectory, shapes).tokens)
        if size > longest:
            found[index] = size
    if not found:
        return frozenset()
    worst = max(found, key=lambda index: found[index])
    what = (f"{len(found)} of {len(dataset)} trajectories have more than {longest} tokens, the most "
            f"{dataset[worst].sample.key!r} with {found[worst]}.")
    if not drop or len(found) == len(dataset):
        raise UserError(what, "Raise data.length (and the model's context), or leave them out: data.too_long=drop.")
    print(f"examples: {what} They are left out.")
    return frozenset(found)


def write_part(
    dataset: TrajectorySource,
    tokenizer: TextTokenizer,
    encode_images: EncodeImages,
    partial: pathlib.Path,
    longest: int,
    part: int = 0,
    parts: int = 1,
    chunk: int = CHUNK,
    left_out: Container[int] = (),
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """Writes part `part` of `parts` into `partial`: the chunks part, part + parts, ... of `chunk` trajectories each.

    The file `part.<part>` comes last, and whole.  `on_chunk` is called with the number of trajectories just written; it
    replaces the bar that part 0 shows.

    Raises UserError for a trajectory of more than `longest` tokens that is not `left_out`, naming it.
    """
    writers = {
        mode: array_record_module.ArrayRecordWriter(str(partial / f"{mode.value}.{part}"), "group_size:1")
        for mode in Mode
    }
    chunks: list[Counter[str]] = []
    tokens, most, dropped = 0, 0, 0
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        starts = range(part * chunk, len(dataset), parts * chunk)
        hidden = part > 0 or on_chunk is not None
        chosen = [range(start, min(start + chunk, len(dataset))) for start in starts]
        total = sum(map(len, chosen))
        bar = stack.enter_context(tqdm(total=total, desc="tokenise", unit="trajectory", leave=False, disable=hidden))
        for indices in chosen:
            trajectories = [dataset[i] for i in indices if i not in left_out]
            dropped += len(indices) - len(trajectories)
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
                tokens, most = tokens + size, max(most, size)
            chunks.append(Counter(t.mode.value for t in trajectories))
            bar.update(len(indices))
            if on_chunk is not None:
                on_chunk(len(indices))
    counts = {"chunks": chunks, "tokens": tokens, "longest": most, "dropped": dropped}
    files.write_json(part_file(partial, part), counts)


def part_file(partial: pathlib.Path, part: int) -> pathlib.Path:
    """The file of a part that is written last."""
    return partial / f"part.{part}"


def join_parts(partial: pathlib.Path, fingerprint: str, limit: int, parts: int = 1) -> dict:
    """Joins all parts in the folder `partial` and returns the manifest; the bytes do not depend on `parts`.

    `limit`: most tokens of a trajectory that was not left out.
    """
    told = [json.loads(part_file(partial, part).read_text()) for part in range(parts)]
    order = [told[i % parts]["chunks"][i // parts] for i in range(sum(len(part["chunks"]) for part in told))]
    for mode in Mode:
        target = partial / f"{mode.value}.array_record"
        sources = [partial / f"{mode.value}.{part}" for part in range(parts)]
        if parts > 1:
            _interleave(sources, [counts.get(mode.value, 0) for counts in order], target)
        else:
            sources[0].rename(target)
    for leftover in partial.glob("*.[0-9]*"):
        leftover.unlink()
    manifest = {
        "fingerprint": fingerprint,
        "counts": dict(sum(map(Counter, order), Counter())),
        "tokens": sum(part["tokens"] for part in told),
        "longest": max(part["longest"] for part in told),
        "dropped": sum(part["dropped"] for part in told),
        "limit": limit,
    }
    files.write_json(partial / MANIFEST, manifest)
    return manifest


def _interleave(sources: Sequence[pathlib.Path], counts: Sequence[int], target: pathlib.Path) -> None:
    """Copies records into `target`: counts[0] of the first source, counts[1] of the second, ..., and round again."""
    totals = [sum(counts[part :: len(sources)]) for part in range(len(sources))]
    readers = [
        array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0") if total else None
        for file, total in zip(sources, totals, strict=True)
    ]
    writer, position = array_record_module.ArrayRecordWriter(str(target), "group_size:1"), [0] * len(sources)
    for i, count in enumerate(counts):
        part = i % len(sources)
        if count:
            for record in readers[part].read(list(range(position[part], position[part] + count))):
                writer.write(record)
            position[part] += count
    writer.close()


def _codes(
    dataset: TrajectorySource, trajectories: Sequence[Trajectory], encode_images: EncodeImages
) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(name for t in trajectories for name in (*t.sample.sources, *t.images)))
    return dict(zip(names, encode_images([dataset.image(name) for name in names]), strict=True))


def are_current(manifest: dict | None, fingerprint: str, longest: int, drop: bool) -> bool:
    """Whether the examples that a manifest describes are those of this dataset, these tokenizers and this limit."""
    if manifest is None or manifest["fingerprint"] != fingerprint:
        return False
    return not manifest.get("dropped") or (drop and manifest["limit"] == longest)


def read_manifest(folder: str | os.PathLike) -> dict | None:
    """The manifest of a finished examples folder; None when there is none, or a damaged one."""
    try:
        return json.loads((pathlib.Path(folder) / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
