"""Packed tokens a second that one host reads from ArrayRecord, against what it must feed in training.

    python benchmarks/loader.py --step_seconds=7 --hosts=32

Writes made-up token examples of the sizes that Emu3.5 has (1,055 tokens an image, two to six images, and their texts),
and reads them as fine-tuning does: shuffled, mixed, packed best-fit into rows of 8,192 tokens.  A host of `hosts`
reads the streams of its own rows (`data.streams` = 128); the second line reads everything, as with one stream.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

# From here on what lies in the checkout is imported: the path must come first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from array_record.python import array_record_module  # noqa: E402

from ivr_jax.data import pipeline  # noqa: E402
from ivr_jax.data.examples import MANIFEST, pack_example  # noqa: E402

IMAGE, LENGTH, BATCH = 1055, 8192, 128
IMAGES = {"direct": (2, 2), "reflection": (3, 5), "multi_step": (3, 6)}  # source and answers, fewest and most
MIX = {"direct": 1.0, "reflection": 2.0, "multi_step": 2.0}


def write_examples(folder: Path, count: int) -> None:
    """`count` examples of each mode with random ids."""
    rng, longest = np.random.default_rng(0), 0
    for mode, (fewest, most) in IMAGES.items():
        writer = array_record_module.ArrayRecordWriter(str(folder / f"{mode}.array_record"), "group_size:1")
        for _ in range(count):
            size = int(rng.integers(fewest, most + 1)) * IMAGE + int(rng.integers(150, 1200))
            longest = max(longest, size)
            writer.write(pack_example(rng.integers(0, 282_926, size), rng.integers(0, 5, size)))
        writer.close()
    manifest = {"counts": dict.fromkeys(IMAGES, count), "longest": longest}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def measure(folder: Path, streams: int, rows: range, seconds: float) -> tuple[float, float]:
    """(tokens a second without padding, share of the rows that they fill), the first batch not counted."""
    batches = pipeline.packed_batches(pipeline.stored_examples(folder, MIX, LENGTH, 0), BATCH, LENGTH, 0, streams, rows)
    next(batches)
    clock, tokens, cells = time.perf_counter(), 0, 0
    while time.perf_counter() - clock < seconds:
        segments = next(batches)["segment_ids"]
        tokens, cells = tokens + int((segments > 0).sum()), cells + segments.size
    return tokens / (time.perf_counter() - clock), tokens / cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step_seconds", type=float, default=7.0, help="of one training step on all hosts")
    parser.add_argument("--hosts", type=int, default=32, help="of a v5p slice of 128 chips")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure, each time")
    parser.add_argument("--examples", type=int, default=1000, help="of each mode")
    wanted = parser.parse_args()
    need = BATCH * LENGTH / wanted.hosts / wanted.step_seconds
    print(f"a host of {wanted.hosts} consumes {need:,.0f} tokens/s at {wanted.step_seconds} s a step, "
          f"{os.cpu_count()} cores here")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        write_examples(Path(scratch), wanted.examples)
        for streams, rows in ((BATCH, range(BATCH // wanted.hosts)), (1, range(BATCH))):
            rate, fill = measure(Path(scratch), streams, rows, wanted.seconds)
            mine = rate * len(rows) / BATCH if streams == 1 else rate  # of one stream it keeps its rows alone
            mine = mine / wanted.hosts if streams == 1 else mine
            print(f"{streams} streams, {len(rows)} rows: {rate:,.0f} packed tokens/s, rows {fill:.0%} full: "
                  f"{mine / need:,.0f} times what a host consumes")  # fmt: skip


if __name__ == "__main__":
    main()
