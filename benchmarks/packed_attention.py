"""A training step of packed rows with blocked and with plain attention, in turns; both learn from the same batches.

    python benchmarks/packed_attention.py --cores=1 [--config=micro_sft] [--turns=6] [--steps=4]

The plain attention computes all scores of a row.  Prints CPU time of both, with compilation first, the ratios of
neighbouring turns and the largest difference of the loss.  Set GLIBC_TUNABLES=glibc.malloc.hugetlb=1 as the demo does.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

KERNELS = ("plain", "blocked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="micro_sft")
    parser.add_argument("--cores", type=int, default=0, help="use only this many cores; 0: all")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    import jax
    from training_profile import OVERRIDES

    from ivr_jax import sharding
    from ivr_jax.config import load_config
    from ivr_jax.train import STAGES

    stages, batches = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for kernel in KERNELS:
            config = load_config(options.config)
            with config.unlocked():
                config.update_from_flattened_dict(OVERRIDES[options.config])
                config.model.attention = kernel
            mesh = sharding.mesh_of(config.mesh)
            jax.set_mesh(mesh)
            stage = importlib.import_module(STAGES[config.stage]).build(config, pathlib.Path(folder) / kernel, mesh)
            batches = batches or [next(stage.data) for _ in range(16)]
            stage.close()
            stages[kernel] = stage
    states: dict[str, Any] = {kernel: stage.state for kernel, stage in stages.items()}
    losses: dict[str, list[float]] = {kernel: [] for kernel in KERNELS}

    def turn(kernel: str, first: int, count: int) -> float:
        """Milliseconds of CPU time a step."""
        before = time.process_time()
        for number in range(first, first + count):
            batch = batches[number % len(batches)]
            states[kernel], metrics = jax.block_until_ready(stages[kernel].step(states[kernel], batch, number))
            losses[kernel].append(float(metrics["loss"][0] / metrics["loss"][1]))
        return 1e3 * (time.process_time() - before) / count

    print("first step, with compilation: " + ", ".join(f"{k} {turn(k, 0, 1) / 1e3:.1f} s" for k in KERNELS))
    found = [[turn(k, 1 + n * options.steps, options.steps) for k in KERNELS] for n in range(options.turns)]
    ratios = [plain / blocked for plain, blocked in found]
    columns = zip(KERNELS, zip(*found, strict=True), strict=True)
    medians = (f"{kernel} {statistics.median(times):.0f} ms" for kernel, times in columns)
    print(f"a step: {', '.join(medians)}; plain / blocked {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"largest difference of the loss: {max(abs(a - b) for a, b in zip(*losses.values(), strict=True)):.1e}")


if __name__ == "__main__":
    main()
