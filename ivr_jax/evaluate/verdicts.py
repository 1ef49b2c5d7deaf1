"""How likely a model is to pass an image: P(all axes pass | prompt, answer so far, image).

An evaluation is free text (an observation, if the model writes one, and a reason after every verdict) around four
verdicts.  The free text is decoded greedily under the answer's grammar, with each verdict held to "pass"; then one
forward pass over the whole sequence gives the model's probability of "pass" against "fail" at each verdict, and

    P(all pass) = product over the axes of P(pass_axis | image, text and passes before it).

What a model writes before a verdict is therefore its own, whatever the format, and the figure is a probability rather
than one draw of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ivr_jax.checkpoints.system import System
from ivr_jax.errors import UserError
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol import codec, markers
from ivr_jax.protocol.grammar import ACCEPT, ERROR, Grammar, GrammarOptions
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, sample
from ivr_jax.sampling.engine import EngineOptions, pad_prompts
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.trajectory import AXES, Mode

OBSERVATION = "observation"  # the field of the grammar's slot for what is written before the first verdict


class JudgedImage(NamedTuple):
    """An image in the place of an answer where the model judges it.

    Attributes:
      context: int [T] tokens before the image: the prompt, and earlier rounds of the answer.
      codes: int [rows, columns] codes of the image tokenizer.
    """

    context: np.ndarray
    codes: np.ndarray


class Verdict(NamedTuple):
    """`passes`: P(all axes pass), in [0, 1]; `observation`: what was written before the first verdict, "" for none."""

    passes: float
    observation: str = ""


Scorer = Callable[[Sequence[JudgedImage]], list[Verdict]]


class VerdictScorer:
    """Scores images by the module's definition; a `Scorer`.

    Args:
      system: the model.
      options: grammar of its answers; modes and limits of rounds do not matter here.
      evaluation_length: most tokens of one evaluation; one that does not end in them passes with probability 0.
      batch: images decoded, and sequences scored, at a time.
    """

    def __init__(self, system: System, options: GrammarOptions, evaluation_length: int, batch: int = 64):
        self._system, self._length, self._batch = system, evaluation_length, batch
        self._grammar, self._decisions = passing_grammar(Grammar(system.tokenizer, _one_round(options)))

    def __call__(self, images: Sequence[JudgedImage]) -> list[Verdict]:
        """Verdicts in the order of `images`; equal ones are scored once."""
        keys = [(image.context.tobytes(), image.codes.tobytes(), image.codes.shape) for image in images]
        distinct = {key: image for key, image in zip(keys, images, strict=True)}
        scored = dict(zip(distinct, self._score(list(distinct.values())), strict=True))
        return [scored[key] for key in keys]

    def _score(self, images: Sequence[JudgedImage]) -> list[Verdict]:
        if not images:
            return []
        system, tokenizer = self._system, self._system.tokenizer
        prefixes = [[*image.context.tolist(), *codec.encode_image(tokenizer, image.codes)] for image in images]
        prompts, lengths = pad_prompts(prefixes, tokenizer.vocab.pad)
        room = system.config.max_position_embeddings - prompts.shape[1]
        if room < 1:
            raise UserError(
                f"an answer of {prompts.shape[1]} tokens leaves no room for an evaluation in a context of "
                f"{system.config.max_position_embeddings}.",
                "Judge answers of fewer rounds.",
            )
        keys = jax.random.split(jax.random.key(0), len(prefixes))  # temperature 0: not used
        options = RolloutOptions(
            min(self._length, room), SamplingOptions(temperature=0.0), EngineOptions(slots=self._batch),
            size=images[0].codes.shape,
        )  # fmt: skip
        drawn, _ = sample(system.config, system.params, self._grammar, PromptBatch(prompts, lengths), keys, options)
        return self._read(prompts, lengths, drawn)

    def _read(self, prompts: np.ndarray, lengths: np.ndarray, drawn: Any) -> list[Verdict]:
        """Probabilities at the verdicts of the decoded evaluations."""
        tokenizer, grammar = self._system.tokenizer, self._grammar
        width = -(-(int(lengths.max()) + drawn.tokens.shape[1]) // 64) * 64
        verdicts: list[Verdict] = []
        for start in range(0, len(lengths), self._batch):
            tokens = np.full((self._batch, width), tokenizer.vocab.pad, np.int32)
            at = np.zeros((self._batch, len(AXES)), np.int32)
            complete = []
            for row in range(start, min(start + self._batch, len(lengths))):
                prefix, count = int(lengths[row]), int(drawn.lengths[row])
                tokens[row - start, :prefix] = prompts[row, :prefix]
                tokens[row - start, prefix : prefix + count] = drawn.tokens[row, :count]
                decided = np.flatnonzero(np.isin(drawn.nodes[row, :count], list(self._decisions)))
                complete.append(drawn.nodes[row, count] == ACCEPT and len(decided) == len(AXES))
                if complete[-1]:
                    at[row - start] = prefix + decided - 1  # the position that predicts the verdict
            pair = np.asarray(next(iter(self._decisions.values())), np.int32)
            log_pass = np.asarray(_log_pass(self._system.config, self._system.params, tokens, at, pair))
            for offset, ended in enumerate(complete):
                row = start + offset
                nodes = drawn.nodes[row, : int(drawn.lengths[row])]
                written = [grammar.fields[number].name == OBSERVATION for number in grammar.field_of[nodes]]
                text = _observation(tokenizer, drawn.tokens[row, : len(nodes)][np.array(written, bool)])
                verdicts.append(Verdict(float(np.exp(log_pass[offset].sum())) if ended else 0.0, text))
        return verdicts


def passing_grammar(grammar: Grammar) -> tuple[Grammar, dict[int, tuple[int, int]]]:
    """`grammar`, changed so that it reads one evaluation in which every verdict is "pass", then EOS.

    Returns:
      The grammar, and for each node where a verdict is decided the ids of "pass" and "fail" that differ there.
    """
    tokenizer = grammar.tokenizer
    nodes = grammar.run(np.array([codec.encode_image(tokenizer, np.zeros((1, 1), np.int32))]))
    grammar.start = int(nodes[0, -1])
    passing, failing = tokenizer.marker(markers.PASS), tokenizer.marker(markers.FAIL)
    split = next(i for i, (p, f) in enumerate(zip(passing, failing, strict=False)) if p != f)
    pair = (passing[split], failing[split])
    tables = grammar.tables._replace(next_node=grammar.tables.next_node.copy(), legal=grammar.tables.legal.copy())
    pass_class, fail_class = (int(tables.class_of[token]) for token in pair)
    decisions = {}
    for node, number in enumerate(grammar.field_of):
        if grammar.fields[number].name.endswith(".verdict") and tables.legal[node, [pass_class, fail_class]].all():
            tables.next_node[node, fail_class] = ERROR
            tables.legal[node, fail_class] = False
            decisions[node] = pair
    grammar.tables = tables
    return grammar, decisions


def _one_round(options: GrammarOptions) -> GrammarOptions:
    """The same texts, and an answer that ends after its first evaluation."""
    return dataclasses.replace(options, modes=(Mode.DIRECT.value,), force=False, follow_verdict=True)


def _observation(tokenizer: Any, tokens: np.ndarray) -> str:
    """The text of an observation without the marker that closes it."""
    marker = list(tokenizer.marker(markers.AXIS[AXES[0]]))
    said = tokens.tolist()
    if said[-len(marker) :] == marker:
        said = said[: -len(marker)]
    return tokenizer.decode(said) if said else ""


@functools.partial(jax.jit, static_argnums=0)
def _log_pass(config: BackboneConfig, params: Any, tokens: jax.Array, at: jax.Array, pair: jax.Array) -> jax.Array:
    """float32 [B, 4]: log P(pair[0]) against pair[1] after position `at` int [B, 4] of `tokens` int [B, T]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = backbone.apply(config, params, tokens, positions)
    chosen = jnp.take_along_axis(hidden, at[..., None], axis=1)
    head = backbone.lm_head(config, params)[:, pair].astype(chosen.dtype)
    logits = jnp.matmul(chosen, head, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1)[..., 0]
