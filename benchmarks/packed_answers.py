"""An RL update with answers packed into rows, prompts shared or not, against a row for each: tokens and CPU time.

    python benchmarks/packed_answers.py --turns=3 --cores=1

Eight answers to each of six prompts, of the lengths that `micro_rl`'s model gives (`LENGTHS`), with random tokens: an
update's time does not depend on them.  An update is the reference's log-probabilities and the gradients of all passes.
Of the same answers all three give the same update (tests/training/test_losses.py).  The three take turns; the first
turn, in which programs are compiled, is shown apart.  A ratio above 1 says that packing is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# Prompt tokens, and answer tokens of a group: three groups of RL's galleries in `make demo` (steps 4, 8, 12), and three
# harder ones.
LENGTHS = (
    (31, (73,) * 8),
    (42, (92, 92, 92, 92, 392, 92, 92, 394)),
    (37, (82, 82, 82, 82, 176, 82, 82, 259)),
    (44, (92, 174, 176, 180, 260, 264, 392, 92)),
    (52, (100, 100, 185, 270, 275, 410, 415, 500)),
    (39, (87, 87, 87, 170, 172, 87, 255, 87)),
)


def made_rollout(vocab_size: int, row: int) -> Any:
    """A rollout of random tokens, all sampled in row `row` of the grammar's legality table."""
    import numpy as np

    from ivr_jax.sampling.batch import Samples
    from ivr_jax.sampling.rollout import Rollout

    rng = np.random.default_rng(0)
    lengths = np.array([n for _, group in LENGTHS for n in group], np.int32)
    shape = len(lengths), int(lengths.max())
    prompts = rng.integers(0, vocab_size, (len(LENGTHS), max(p for p, _ in LENGTHS))).astype(np.int32)
    samples = Samples(
        rng.integers(0, vocab_size, shape).astype(np.int32), np.full(shape, row, np.int32),
        np.zeros((shape[0], shape[1] + 1), np.int32), np.full(shape, -1, np.float32), lengths,
    )  # fmt: skip
    count = len(lengths)
    prompt_lengths = np.array([p for p, _ in LENGTHS], np.int32)
    return Rollout(prompts, prompt_lengths, samples, (None,) * count, ("",) * count, count // len(LENGTHS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cores", type=int, default=0, help="use only this many cores; 0: all")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])

    import functools

    import jax
    import numpy as np

    from ivr_jax.checkpoints import system as systems
    from ivr_jax.config import load_config
    from ivr_jax.protocol.grammar import Grammar
    from ivr_jax.training.answer_batches import passes
    from ivr_jax.training.policy_logprobs import policy_gradient, policy_logprobs
    from ivr_jax.training.rl_options import rl_options

    settings = rl_options(load_config("micro_rl"))
    system = systems.load("micro")
    grammar = Grammar(system.tokenizer, settings.grammar)
    row = int(np.asarray(grammar.tables.legal).sum(1).argmax())
    rollout = made_rollout(system.tokenizer.vocab.size, row)
    answers = np.arange(len(rollout.answers))
    advantages = np.random.default_rng(1).normal(size=len(answers)).astype(np.float32)
    logprobs = jax.jit(functools.partial(policy_logprobs, system.config, grammar=grammar, options=settings))
    gradient = policy_gradient(system.config, grammar, settings)
    kinds = {
        "a row an answer": (dataclasses.replace(settings, packed_rows=0), False),
        "packed": (settings, False),
        "packed, prompts shared": (settings, True),
    }

    def update(kind: str) -> tuple[float, int, int]:
        """CPU seconds, tokens with padding, shapes."""
        clock = time.process_time()
        chosen, shares_prompts = kinds[kind]
        shapes = []
        for batch in passes(rollout, advantages, answers, chosen, shares_prompts):
            shapes.append(batch["tokens"].shape)
            batch["reference"] = logprobs(system.params, batch).log_probs
            jax.block_until_ready(gradient(system.params, {}, batch))
        return time.process_time() - clock, sum(rows * length for rows, length in shapes), len(set(shapes))

    print(f"{len(answers)} answers, {int(rollout.total_lengths.sum()):,} tokens with their prompts")
    first = {kind: update(kind) for kind in kinds}
    turns = [{kind: update(kind)[0] for kind in kinds} for _ in range(options.turns)]
    for kind, (seconds, tokens, shapes) in first.items():
        ratios = [turn["a row an answer"] / turn[kind] for turn in turns]
        print(f"{kind:<24} {tokens:7,} tokens computed, {shapes} shapes, first update {seconds:6.1f} s, then "
              f"{statistics.median(turn[kind] for turn in turns):5.2f} s: {statistics.median(ratios):.2f}x as fast "
              f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
