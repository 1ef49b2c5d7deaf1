"""What the rollout engine gains over one padded batch in lock-step, on the micro-world's model.

    python benchmarks/rollout.py                               random weights that answer with one to five images
    python benchmarks/rollout.py --checkpoint=runs/demo/sft    a trained model on its own prompts

All arms draw the same answers with the same keys in one process, each once to compile and `--repeats` times to be
measured; the best counts.  Seconds are of CPU time (all threads of the process), which other programs on the machine
hardly change, and of wall time.  The reference is `tests/plain_sampler.py`.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from plain_sampler import plain_sample  # noqa: E402

from ivr_jax.checkpoints import system as systems  # noqa: E402
from ivr_jax.models import backbone  # noqa: E402
from ivr_jax.protocol import codec, markers  # noqa: E402
from ivr_jax.protocol.grammar import Grammar, GrammarOptions  # noqa: E402
from ivr_jax.protocol.text import PhraseTokenizer  # noqa: E402
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, Usage, sample  # noqa: E402
from ivr_jax.sampling.engine import EngineOptions, pad_prompts  # noqa: E402
from ivr_jax.trajectory import AXES  # noqa: E402
from ivr_jax.world.language import PHRASES  # noqa: E402
from ivr_jax.world.sampler import sample_task  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "workdir of a trained micro model")
flags.DEFINE_string("image_tokenizer", None, "workdir of its image tokenizer, if it was moved")
flags.DEFINE_integer("prompts", 8, "prompts", lower_bound=1)
flags.DEFINE_integer("group_size", 8, "answers to a prompt", lower_bound=1)
flags.DEFINE_integer("slots", 32, "slots of the arms with refilling", lower_bound=1)
flags.DEFINE_integer("answer_length", 288, "most tokens of an answer", lower_bound=1)
flags.DEFINE_string("only", "", "measure the arms whose name contains this, and the reference")
flags.DEFINE_integer("repeats", 1, "measured runs of each arm", lower_bound=1)

SIZE, GRAMMAR = (4, 4), GrammarOptions(max_reflections=3, max_steps=4, text_cap=24)


def random_model() -> tuple[backbone.BackboneConfig, Any, PhraseTokenizer]:
    """The micro model's shape with random weights; a constant feature makes texts short and verdicts even."""
    tokenizer = PhraseTokenizer(PHRASES, 256)
    config = backbone.BackboneConfig(tokenizer.vocab.size, 96, 256, 4, 4, 2, 32, rope_theta=1e4,
                                     max_position_embeddings=512)  # fmt: skip
    params = jax.tree.map(np.array, backbone.init_params(config, jax.random.key(0)))
    params["embed"][:, 0], params["final_norm"][0] = 4, 1
    params["layers"]["attention"]["o"][..., 0] = params["layers"]["mlp"]["down"][..., 0] = 0
    closing = [markers.EVALUATE_CLOSE, markers.ANALYSIS_CLOSE, markers.PLAN_CLOSE, *markers.STEP_CLOSE.values(),
               *(markers.AXIS[axis] for axis in AXES[1:])]  # fmt: skip
    head = params["lm_head"] = 0.3 * params["lm_head"]
    head[0] = 0
    head[0, [i for text in closing for i in tokenizer.marker(text)]] = 1.2
    head[0, tokenizer.marker(markers.PASS)] = 0.45
    return config, jax.tree.map(jax.numpy.asarray, params), tokenizer


def workload() -> tuple[Any, ...]:
    """(config, params, grammar, prompts, lengths) of the flags."""
    if not FLAGS.checkpoint:
        config, params, tokenizer = random_model()
        rng = np.random.default_rng(0)
        tokens = [list(rng.integers(0, 256, rng.integers(50, 90))) for _ in range(FLAGS.prompts)]
    else:
        system = systems.load(FLAGS.checkpoint, FLAGS.image_tokenizer)
        config, params, tokenizer, tokens = system.config, system.params, system.tokenizer, []
        for index in range(FLAGS.prompts):
            task = sample_task(0, 3, index)
            names = task.sample.sources
            codes = dict(zip(names, system.image_codec.encode([task.images[name] for name in names]), strict=True))
            tokens.append(codec.encode_prompt(tokenizer, task.sample, codes))
    return config, params, Grammar(tokenizer, GRAMMAR), *pad_prompts(tokens, tokenizer.vocab.pad)


def timed(draw: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """What `draw` returns, CPU seconds of its first run, and the best CPU and wall seconds of the later ones."""
    clock = time.process_time()
    found = draw()
    first, cpu, wall = time.process_time() - clock, np.inf, np.inf
    for _ in range(FLAGS.repeats):
        clock, watch = time.process_time(), time.perf_counter()
        found = draw()
        cpu, wall = min(cpu, time.process_time() - clock), min(wall, time.perf_counter() - watch)
    return found, first, cpu, wall


def main(_: list[str]) -> None:
    config, params, grammar, prompts, lengths = workload()
    count = FLAGS.prompts * FLAGS.group_size
    keys = jax.random.split(jax.random.key(1), count)
    fixed = (config, params, grammar, prompts, lengths, SIZE, keys, FLAGS.answer_length, None, FLAGS.group_size)
    reference, first, base, wall = timed(lambda: jax.tree.map(np.asarray, plain_sample(*fixed)))
    images = (reference.tokens == grammar.tokenizer.vocab.boi).sum(1)
    print(f"{count} answers of {images.min()} to {images.max()} images, {np.mean(reference.lengths):.0f} tokens on "
          f"average, {reference.lengths.max()} at most; images: {np.bincount(images).tolist()}")  # fmt: skip
    print(f"{'arm':<44} first CPU s   CPU s  wall s  ratio  calls  in use  queued  calls/image token  same tokens")
    print(f"{'lock-step, one token a call':<44} {first:>11.1f} {base:>7.2f} {wall:>7.2f}   1.00")
    together = count
    arms = {
        "lock-step, this engine": EngineOptions(together, window=1, growth=1, shrink=False),
        "  + forced tokens in the same call": EngineOptions(together, window=2, growth=1, shrink=False),
        "  + cache that grows, slots that move together": EngineOptions(together, window=2),
        "refilled slots, one token a call": EngineOptions(FLAGS.slots, window=1),
        "refilled slots": EngineOptions(FLAGS.slots, window=2),
        "refilled slots, by 1/16": EngineOptions(FLAGS.slots, window=2, refill=1 / 16),
        "refilled slots, by 1/32": EngineOptions(FLAGS.slots, window=2, refill=1 / 32),
        "together, speculation, window 4": EngineOptions(together, window=4, speculate=True),
        "together, speculation, window 8": EngineOptions(together, window=8, speculate=True),
    }
    for name, engine in arms.items():
        if FLAGS.only not in name:
            continue
        (samples, usage), first, cpu, wall = timed(lambda engine=engine: sample(
            config, params, grammar, PromptBatch(prompts, lengths), keys,
            RolloutOptions(FLAGS.answer_length, engine=engine, group_size=FLAGS.group_size, size=SIZE),
        ))  # fmt: skip
        same = (samples.tokens == reference.tokens).all(1).mean()
        print(row(name, first, cpu, wall, base, usage, same), flush=True)


def row(name: str, first: float, cpu: float, wall: float, base: float, usage: Usage, same: float) -> str:
    """One line of the table."""
    queued = f"{usage.queued_in_use / usage.queued_slot_calls:.0%}" if usage.queued_slot_calls else ""
    per_image = usage.image_calls / max(usage.image_tokens, 1)
    return (
        f"{name:<44} {first:>11.1f} {cpu:>7.2f} {wall:>7.2f} {base / cpu:>6.2f} {usage.calls:>6} "
        f"{usage.utilisation:>6.0%} {queued:>7} {per_image:>18.2f} {same:>12.0%}"
    )


if __name__ == "__main__":
    app.run(main)
