"""Decoding with each layer's kernels and cache in arrays of its own, against stacked ones: the same tokens, CPU time.

    python benchmarks/unstacked_decoding.py --slots=1,16,64

Answers to the training mixture by the model that the package carries (or `--checkpoint`).  Both take turns in one
process, after a turn that compiles; a ratio above 1 says that arrays of their own are faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from unittest import mock

import jax
import numpy as np
from speculation import LENGTH, timed, workload

from ivr_jax.checkpoints import system as systems
from ivr_jax.sampling import decode_loop
from ivr_jax.sampling.batch import RolloutOptions, sample
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions


def compare(system: systems.System, slots: int, turns: int) -> None:
    """Prints a line."""
    count = max(slots, 16)
    grammar, prompts, size = workload(system, "all", count, SamplingOptions().passes)
    # `unroll` says which of the two a program is; stacked layers are written out, as the micro configs do
    arms = {name: dataclasses.replace(system.config, unroll=unroll) for name, unroll in (("stacked", 4), ("own", 1))}
    how = RolloutOptions(LENGTH, SamplingOptions(), EngineOptions(slots, window=2), size=size)
    ratios, first = [], {}
    for turn in range(turns + 1):
        keys = jax.random.split(jax.random.key(turn), count)
        found = {}
        for name, config in arms.items():
            with mock.patch.object(decode_loop, "_unstacking_pays", lambda config, layers: config.unroll == 1):
                found[name] = timed(lambda c=config, k=keys: sample(c, system.params, grammar, prompts, k, how))
        np.testing.assert_array_equal(found["own"][0], found["stacked"][0])
        seconds = {name: one[2] for name, one in found.items()}
        if turn:
            ratios.append(seconds["stacked"] / seconds["own"])
        else:
            first = seconds
    print(f"slots {slots:>3}  first turn, compiling {first['stacked']:.1f} and {first['own']:.1f} s of CPU, then "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=lambda text: [int(x) for x in text.split(",")], default=[1, 16, 64])
    parser.add_argument("--checkpoint", default=systems.MICRO)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    system = systems.load(options.checkpoint)
    for slots in options.slots:
        compare(system, slots, options.turns)


if __name__ == "__main__":
    main()
