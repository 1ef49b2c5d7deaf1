"""Probes of single skills under true prefixes: two of the entry gates that whole answers cannot show.

The model draws `G1` of held-out requests itself.  Where it is wrong, the exact analyzer and a faultless generator
continue from it, once with a critique and once in steps; every text of these trajectories is then compared with what
the model generates in its place.  A text counts as right when each of its tokens is the likeliest one after the
true tokens before it, that is, when greedy decoding from the true prefix gives exactly this text.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.checkpoints.system import System
from ivr_jax.construct.escalation import Outcome, Rules, construct
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol import codec
from ivr_jax.report.intervals import Estimate, share
from ivr_jax.sampling.rollout import draw_first_images
from ivr_jax.training.losses import token_statistics
from ivr_jax.trajectory import Mode
from ivr_jax.world.analyzer import WorldAnalyzer
from ivr_jax.world.generator import WorldGenerator
from ivr_jax.world.sampler import sample_task

PROBES = {"step_text": "S", "critique": "R"}  # name -> part of the answer
_PATHS = (Rules(max_reflections=1), Rules(max_reflections=0))  # a critique, then steps at once


def probe(
    system: System, level: int, prompts: int, most_edits: int, seed: int, batch: int, observe: bool = False
) -> dict[str, Estimate]:
    """Shares of steps and of critiques that are right, each an estimate (`ivr_jax.report.intervals`).

    Args:
      prompts: held-out requests of 2 to `most_edits` edits; those whose first image is right are not counted.
      batch: trajectories a forward pass.
      observe: whether the evaluations of the true prefixes begin with an observation, as those learnt from did.
    """
    tasks = [
        sample_task(level, seed, i, edits=2 + i % (most_edits - 1), held_out=True)
        for i in range(prompts if most_edits > 1 else 0)
    ]
    first = _first_images(system, tasks, seed, batch)
    encoded = []
    for rules in _PATHS:
        for outcome in asyncio.run(_outcomes(tasks, first, level, rules, observe)):
            if outcome.trajectory is not None and outcome.trajectory.mode is not Mode.DIRECT:
                names = list(dict.fromkeys((*outcome.sample.sources, *outcome.trajectory.images)))
                codes = dict(zip(names, system.image_codec.encode([outcome.images[n] for n in names]), strict=True))
                encoded.append(codec.encode_trajectory(system.tokenizer, outcome.trajectory, codes))
    right = _texts_right(system, encoded, batch)
    return {name: share([hit for found in part for hit in found]) for name, part in right.items()}


async def _outcomes(
    tasks: Sequence[Any], first: Sequence[np.ndarray], level: int, rules: Rules, observe: bool
) -> list[Outcome]:
    """What the escalation makes of each task's first image."""
    analyzer, generator = WorldAnalyzer(observe=observe), WorldGenerator(level=level)
    return [
        await construct(task.sample, task.images, image, analyzer, generator, rules)
        for task, image in zip(tasks, first, strict=True)
    ]


def _first_images(system: System, tasks: Sequence[Any], seed: int, batch: int) -> list[np.ndarray]:
    images = []
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        filled = part + [part[0]] * (batch - len(part))
        key = jax.random.fold_in(jax.random.key(seed), start)
        drawn = draw_first_images(system, [t.sample for t in filled], [t.images for t in filled], key)
        images += drawn[: len(part)]
    return images


def _texts_right(system: System, encoded: Sequence[codec.Encoded], batch: int) -> dict[str, list[list[bool]]]:
    """For every probe, trajectory by trajectory, whether each of its texts is what greedy decoding gives."""
    longest = max((len(e.tokens) for e in encoded), default=0)
    length = -(-longest // 64) * 64
    right: dict[str, list[list[bool]]] = {name: [] for name in PROBES}
    for start in range(0, len(encoded), batch):
        part = encoded[start : start + batch]
        tokens = np.zeros((batch, length), np.int32)
        for row, example in enumerate(part):
            tokens[row, : len(example.tokens)] = example.tokens
        likeliest = np.asarray(_likeliest(system.config, system.params, tokens)) > 0
        for row, example in enumerate(part):
            for name, letter in PROBES.items():
                # The first token chooses the mode, which is not what is probed.
                spans = [(s.start + 1, s.end) for s in example.segments if s.part == letter]
                hits = [likeliest[row, example.answer_start + a : example.answer_start + b].all() for a, b in spans]
                right[name].append([bool(hit) for hit in hits])
    return right


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(config: BackboneConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """float32 [B, T]: 1 where the token is the likeliest after those before it; position 0 means nothing."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = backbone.apply(config, params, tokens, positions)
    head = backbone.lm_head(config, params)[:, : config.vocab_size]
    found = token_statistics(hidden, head, jnp.roll(tokens, -1, 1), 4096)
    return jnp.roll(found.correct, 1, axis=1)
