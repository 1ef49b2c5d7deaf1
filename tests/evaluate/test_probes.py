"""Probes of single skills: a text is right when greedy decoding from the true prefix says exactly it."""

from __future__ import annotations

import numpy as np
from tiny_model import CONFIG, TOKENIZER, answer_logits, noisy_params

from ivr_jax.checkpoints.system import System
from ivr_jax.evaluate.probes import _texts_right
from ivr_jax.protocol.codec import Encoded, Segment

PARAMS = noisy_params()
PROMPT = np.array([3, 7, 1], np.int32)


def greedy(start: list[int], count: int) -> list[int]:
    tokens = list(start)
    for _ in range(count):
        tokens.append(int(answer_logits(PARAMS, PROMPT, np.array([*tokens, 0], np.int32))[-1].argmax()))
    return tokens


def example(steps: list[list[int]], critique: list[int]) -> Encoded:
    """Steps S2, S3 ... and a critique R1, in the order in which they stand, each behind a token of its own."""
    segments, tokens = [], []
    for k, text in enumerate(steps, 2):
        segments.append(Segment("S", k, len(tokens), len(tokens) + len(text), True))
        tokens += text
    segments.append(Segment("R", 2, len(tokens), len(tokens) + len(critique), True))
    return Encoded(np.array([*PROMPT, *tokens, *critique], np.int32), len(PROMPT), tuple(segments))


def test_a_text_is_right_when_greedy_decoding_says_it_whatever_opens_it():
    first = greedy([11], 4)  # an unlikely token may open it: how to go on is not what is probed
    second = greedy([*first, 12], 3)[len(first) :]
    spoilt = [*second[:-1], (second[-1] + 1) % CONFIG.vocab_size]
    critique = greedy([*first, *spoilt, 13], 5)[len(first) + len(spoilt) :]
    system = System(CONFIG, PARAMS, TOKENIZER, None, {})
    found = _texts_right(system, [example([first, spoilt], critique), example([first, second], [13, 5, 5])], batch=2)
    assert found == {"step_text": [[True, False], [True, True]], "critique": [[True], [False]]}


def test_nothing_to_probe_is_nothing_measured():
    assert _texts_right(System(CONFIG, PARAMS, TOKENIZER, None, {}), [], batch=2) == {"step_text": [], "critique": []}
