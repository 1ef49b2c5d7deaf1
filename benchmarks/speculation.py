"""Speculative decoding of image tokens against plain decoding: the same tokens, model calls, CPU and wall time.

    python benchmarks/speculation.py                                    edits and all requests of the packaged model
    python benchmarks/speculation.py --requests=edits --slots=1,8 --windows=4,8,20 --guidance=3
    python benchmarks/speculation.py --checkpoint=runs/demo/rl
    python benchmarks/speculation.py --calls                            CPU time of one call of the model alone
    python benchmarks/speculation.py --parts --windows=8,20             where the CPU time of an edit goes
    python benchmarks/speculation.py --size=small                       cost of a call of the engine at 33 M parameters

Requests are held-out tasks of the micro-world: `edits` change one source once, and the answer's first image is drawn;
`all` are the training mixture, answered in whatever mode the model chooses.  Plain and speculative decoding take turns
in one process, after a turn that compiles; a ratio above 1 says that speculation is faster.  Tokens are compared in
each turn.

--size draws images of 16 x 16 cells with random weights of that size (side_by_side.SIZES), whose guesses are all but
never right, and prints what a call with each window costs beside one of plain decoding.  Times the calls an image token
that a trained model needs with the window, that is an estimate of the time that speculation would take there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import PROMPT, SIDE, SIZES, decoder

from ivr_jax.checkpoints import system as systems
from ivr_jax.models import backbone, kv_cache
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.sampling import decode_loop
from ivr_jax.sampling import slots as slots_module
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, Usage, sample
from ivr_jax.sampling.engine import EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import encode_prompts
from ivr_jax.world.sampler import sample_task

REQUESTS: dict[str, tuple[dict[str, Any], GrammarOptions]] = {
    "edits": ({"subset": "edit", "edits": 1}, GrammarOptions(modes=("direct",))),
    "all": ({}, GrammarOptions(max_reflections=3, max_steps=4, text_cap=72)),
}
LENGTH = 448


def workload(system: systems.System, requests: str, count: int, passes: int) -> tuple[Grammar, PromptBatch, Any]:
    """Grammar, prompts and image size of `count` requests."""
    which, grammar = REQUESTS[requests]
    tasks = [sample_task(0, 11, index, held_out=True, **which) for index in range(count)]
    batch, size = encode_prompts(system, [t.sample for t in tasks], [t.images for t in tasks], passes, system.cells)
    return Grammar(system.tokenizer, grammar), batch, size


def timed(draw: Any) -> tuple[np.ndarray, Usage, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    samples, usage = draw()
    return samples.tokens, usage, time.process_time() - cpu, time.perf_counter() - wall


def compare(system: systems.System, requests: str, slots: int, options: argparse.Namespace) -> None:
    """Prints a line for each window."""
    sampling = SamplingOptions(guidance=options.guidance, temperature=options.temperature)
    count = max(slots, options.answers)
    grammar, prompts, size = workload(system, requests, count, sampling.passes)
    image = len(codec.encode_image(system.tokenizer, np.zeros(size, np.int32)))
    length = image if requests == "edits" else LENGTH
    arms = {0: EngineOptions(slots, window=2)}
    arms |= {window: EngineOptions(slots, window=window, speculate=True) for window in options.windows}
    ratios: dict[int, tuple[list[float], list[float]]] = {window: ([], []) for window in options.windows}
    usages = {}
    for turn in range(options.turns + 1):
        keys = jax.random.split(jax.random.key(turn), count)
        found = {}
        for window, engine in arms.items():
            how = RolloutOptions(length, sampling, engine, size=size)
            found[window] = timed(lambda how=how, keys=keys: sample(
                system.config, system.params, grammar, prompts, keys, how
            ))  # fmt: skip
            usages[window] = found[window][1]
            np.testing.assert_array_equal(found[window][0], found[0][0])
        for window, (cpu, wall) in ratios.items():
            if turn:
                cpu.append(found[0][2] / found[window][2])
                wall.append(found[0][3] / found[window][3])
    for window, pair in ratios.items():
        usage = usages[window]
        cpu, wall = (f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in pair)
        print(f"{requests:<6} slots {slots:>3}  window {window:>3}  calls an image token "
              f"{usage.image_calls / usage.image_tokens:.3f}  right guesses {usage.accepted / usage.drafted:.0%}  "
              f"calls {usages[0].calls} to {usage.calls}  CPU {cpu}  wall {wall}", flush=True)  # fmt: skip


def calls(system: systems.System) -> None:
    """Prints the CPU time of a call of the model for each number of slots and of tokens in a slot's window."""
    config, repeats = system.config, 50

    @jax.jit
    def run(params: Any, cache: kv_cache.KVCache, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]) + 40, tokens.shape)

        def call(_: int, carry: tuple[kv_cache.KVCache, jax.Array]) -> tuple[kv_cache.KVCache, jax.Array]:
            hidden, cache = backbone.apply(config, params, tokens + carry[1], positions, cache=carry[0])
            return cache, (hidden.sum() > 1e9).astype(jnp.int32)  # each call needs the one before

        return jax.lax.fori_loop(0, repeats, call, (cache, jnp.int32(0)))[1]

    for slots in (1, 8):
        for window in (1, 2, 4, 8, 20):
            cache, tokens = kv_cache.init_cache(config, slots, 128), jnp.ones((slots, window), jnp.int32)
            seconds = []
            for _ in range(6):
                start = time.process_time()
                run(system.params, cache, tokens).block_until_ready()
                seconds.append(time.process_time() - start)
            print(f"slots {slots}  window {window:>2}  {1e3 * min(seconds[1:]) / repeats:.3f} ms a call", flush=True)


def parts(system: systems.System, windows: list[int]) -> None:
    """Prints the CPU time of an answer to an edit, one at a time, and how much of it each part takes."""
    grammar, prompts, size = workload(system, "edits", 16, 0)
    keys = jax.random.split(jax.random.key(0), 16)
    length = len(codec.encode_image(system.tokenizer, np.zeros(size, np.int32)))
    spent: dict[str, float] = {}

    def clocked(name: str, function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            start = time.process_time()
            result = jax.block_until_ready(function(*arguments, **options))
            spent[name] = spent.get(name, 0.0) + time.process_time() - start
            return result

        return wrapped

    parts_of = {
        "reading the prompt": (slots_module, "prefill"),
        "admission": (slots_module, "admit"),
        "calls": (decode_loop, "run"),
    }
    with contextlib.ExitStack() as stack:
        for name, (module, function) in parts_of.items():
            stack.enter_context(mock.patch.object(module, function, clocked(name, getattr(module, function))))
        for window in (0, *windows):
            engine = EngineOptions(1, window=window or 2, speculate=window > 0)
            how = RolloutOptions(length, SamplingOptions(), engine, size=size)
            found = []
            for _ in range(6):
                spent.clear()
                start = time.process_time()
                _, usage = sample(system.config, system.params, grammar, prompts, keys, how)
                found.append((time.process_time() - start, dict(spent)))
            whole, shares = min(found[1:], key=lambda turn: turn[0])
            shown = ", ".join(f"{name} {1e3 * seconds / 16:.2f}" for name, seconds in shares.items())
            print(f"window {window or 'plain':>5}  {1e3 * whole / 16:.2f} ms an answer: {shown}; "
                  f"{usage.calls / 16:.1f} calls", flush=True)  # fmt: skip


def costs(size: str, options: argparse.Namespace) -> None:
    """Prints the time of one call of the engine for each window, as a ratio to plain decoding's."""
    tokenizer, config, params = decoder(size)
    params = jax.tree.map(jnp.asarray, params)
    grammar = Grammar(tokenizer, GrammarOptions(modes=("direct",)))
    length = len(codec.encode_image(tokenizer, np.zeros((SIDE, SIDE), np.int32)))
    for slots in options.slots:
        rows = np.random.default_rng(0).integers(0, tokenizer.vocab.text_size, (slots, PROMPT)).astype(np.int32)
        prompts = PromptBatch(rows, np.full(slots, PROMPT, np.int32))
        arms = {0: EngineOptions(slots, window=2, growth=1)}
        arms |= {window: EngineOptions(slots, window=window, growth=1, speculate=True) for window in options.windows}
        found: dict[int, list[float]] = {window: [] for window in arms}
        for turn in range(options.turns + 1):
            keys = jax.random.split(jax.random.key(turn), slots)
            for window, engine in arms.items():
                how = RolloutOptions(length, SamplingOptions(), engine, size=(SIDE, SIDE))
                _, usage, cpu, _ = timed(lambda how=how, keys=keys, prompts=prompts: sample(
                    config, params, grammar, prompts, keys, how
                ))  # fmt: skip
                if turn:
                    found[window].append(cpu / usage.calls)
        for window, seconds in found.items():
            ratios = [x / y for x, y in zip(seconds, found[0], strict=True)]
            print(f"{size}  slots {slots}  window {window or 'plain':>5}  {1e3 * statistics.median(seconds):.2f} ms of "
                  f"CPU a call, {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of plain",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser.add_argument("--calls", action="store_true", help="measure calls of the model alone")
    parser.add_argument("--parts", action="store_true", help="measure the parts of an answer to an edit")
    parser.add_argument("--size", choices=SIZES, help="measure calls of the engine with random weights of this size")
    parser.add_argument("--checkpoint", default=systems.MICRO)
    parser.add_argument("--requests", default="edits,all")
    parser.add_argument("--slots", type=numbers, default=[1, 8, 64])
    parser.add_argument("--windows", type=numbers, default=[4, 8, 20])
    parser.add_argument("--answers", type=int, default=16, help="at least this many, more than the slots hold")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    if options.size:
        costs(options.size, options)
        return
    system = systems.load(options.checkpoint)
    if options.calls:
        calls(system)
        return
    if options.parts:
        parts(system, options.windows)
        return
    for requests in options.requests.split(","):
        for slots in options.slots:
            compare(system, requests, slots, options)


if __name__ == "__main__":
    main()
