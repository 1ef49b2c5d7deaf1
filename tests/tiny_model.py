"""A decoder small enough to compile in seconds, and its log-probabilities computed the long way round."""

from __future__ import annotations

import functools
import types

import jax
import numpy as np
from answer_tokens import micro

from ivr_jax.checkpoints.system import System
from ivr_jax.images import image_name
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol import codec, markers
from ivr_jax.protocol.grammar import Grammar, advance, legal_row
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.trajectory import Sample

TOKENIZER = micro(visual=4)
CONFIG = BackboneConfig(
    vocab_size=TOKENIZER.vocab.size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_theta=1e4, max_position_embeddings=256,
)  # fmt: skip


def noisy_params(config: BackboneConfig = CONFIG, seed: int = 0):
    """Random parameters, made by numpy: norms near 1, the rest wide enough for decided opinions.

    The first feature is positive everywhere. By it "pass" is likelier than "fail", whatever the ids of both, so that
    some answers end early, and texts end before their cap now and then.
    """
    rng = np.random.default_rng(seed)

    def one(leaf, axes):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.3 * noise if len(axes) - ("layers" in axes) == 1 else 0.3 * noise

    params = jax.tree.map(one, backbone.param_shapes(config), backbone.param_axes(config))
    layers = params["layers"]
    params["embed"][:, 0], params["final_norm"][0] = 4, 1
    layers["attention"]["o"][..., 0] = layers["mlp"]["down"][..., 0] = 0
    head, verdicts = params["lm_head"], [*TOKENIZER.marker(markers.PASS), *TOKENIZER.marker(markers.FAIL)]
    head[:, verdicts] *= 0.3
    head[0, verdicts] = 3, 0
    closing = [markers.EVALUATE_CLOSE, markers.ANALYSIS_CLOSE, markers.PLAN_CLOSE, *list(markers.AXIS.values())[1:]]
    head[0, [i for text in closing for i in TOKENIZER.marker(text)]] = 8
    return jax.tree.map(jax.numpy.asarray, params)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, tokens):
    positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = backbone.apply(config, params, tokens, positions)
    return backbone.logits(config, params, hidden)


def answer_logits(params, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Teacher forcing without a cache: float64 [A, V], logits of each answer token given all before it."""
    tokens = np.zeros((1, CONFIG.max_position_embeddings), np.int32)  # one shape, so one compilation
    tokens[0, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
    logits = np.asarray(all_logits(CONFIG, params, tokens))[0].astype(np.float64)
    return logits[len(prompt) - 1 : len(prompt) + len(answer) - 1]


def legal_mask(grammar: Grammar, answer: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [A, V]: ids that the grammar allows at each answer token, replayed in numpy."""
    state, rows = grammar.initial(np.array([size[0]]), np.array([size[1]])), []
    for token in answer:
        rows.append(legal_row(grammar.tables, state, np)[0])
        state = advance(grammar.tables, state, np.array([token]), np)
    return np.asarray(grammar.tables.legal)[rows][:, grammar.tables.class_of]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


class FlatCodec:
    """An image tokenizer without a network: code c is a 16-pixel cell of grey level 10 c."""

    config = types.SimpleNamespace(resolution=32, factor=16)

    def encode(self, images):
        return [image[::16, ::16, 0].astype(np.int32) // 10 for image in images]

    def decode(self, codes):
        return [np.repeat(np.kron(grid, np.ones((16, 16)))[..., None], 3, 2).astype(np.uint8) * 10 for grid in codes]


def system(params=None) -> System:
    return System(CONFIG, noisy_params() if params is None else params, TOKENIZER, FlatCodec(), {})


def requests(count: int, sources: int = 0) -> tuple[list[Sample], list[dict[str, np.ndarray]]]:
    """Requests of different lengths, with `sources` reference images each, and the pixels of these."""
    samples, images = [], []
    for i in range(count):
        pixels = [np.full((32, 32, 3), 10 * ((i + j) % 4), np.uint8) for j in range(sources)]
        names = tuple(image_name(x) for x in pixels)
        samples.append(Sample(f"request {i}", "Put a red circle" + "!" * (3 * i), names))
        images.append(dict(zip(names, pixels, strict=True)))
    return samples, images


def prompts_of(
    samples, images, tokenizer: PhraseTokenizer = TOKENIZER, unconditional: bool = False, references: bool = True
) -> list[list[int]]:
    """Prompts, or unconditional ones: with the references, or (`references` False) with nothing."""
    found = []
    for sample, held in zip(samples, images, strict=True):
        codes = dict(zip(held, FlatCodec().encode(list(held.values())), strict=True))
        if unconditional or not references:
            found.append(codec.encode_unconditional_prompt(tokenizer, sample, codes, references))
        else:
            found.append(codec.encode_prompt(tokenizer, sample, codes))
    return found
