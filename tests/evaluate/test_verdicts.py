"""P(pass): greedy text around verdicts held to pass, and the product of the model's probabilities at them."""

from __future__ import annotations

import numpy as np
import pytest
from answer_tokens import ByteTokenizer, micro
from tiny_model import CONFIG, TOKENIZER, all_logits, legal_mask, noisy_params, prompts_of, requests, system

from ivr_jax.evaluate.verdicts import JudgedImage, VerdictScorer, passing_grammar
from ivr_jax.protocol import codec, markers
from ivr_jax.protocol.grammar import ACCEPT, Grammar, GrammarOptions
from ivr_jax.trajectory import AXES

OPTIONS = GrammarOptions(text_cap=4)
PARAMS = noisy_params()


def by_hand(prefix: list[int]) -> float:
    """Greedy decoding, the whole sequence run anew for each token, passes forced; their probabilities multiplied."""
    grammar, decisions = passing_grammar(Grammar(TOKENIZER, GrammarOptions(modes=("direct",), text_cap=4)))
    tokens, product = list(prefix), 1.0
    answer: list[int] = []
    node = grammar.start
    while node != ACCEPT:
        padded = np.zeros((1, CONFIG.max_position_embeddings), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(all_logits(CONFIG, PARAMS, padded))[0, len(tokens) - 1].astype(np.float64)
        if node in decisions:
            pair = logits[list(decisions[node])]
            product *= np.exp(pair[0]) / np.exp(pair).sum()
        allowed = legal_mask(grammar, np.array([*answer, 0]), (2, 2))[-1]
        answer.append(int(np.where(allowed, logits, -np.inf).argmax()))
        tokens.append(answer[-1])
        node = int(grammar.run(np.array([answer]))[0, -1])
    return product


def test_the_probability_is_that_of_teacher_forcing():
    samples, held = requests(2)
    contexts = [np.array(prompt, np.int32) for prompt in prompts_of(samples, held)]
    images = [JudgedImage(context, np.array([[a, 1], [2, a]], np.int32)) for context in contexts for a in (0, 3)]
    found = VerdictScorer(system(PARAMS), OPTIONS, evaluation_length=60, batch=3)(images)
    for image, verdict in zip(images, found, strict=True):
        expected = by_hand([*image.context.tolist(), *codec.encode_image(TOKENIZER, image.codes)])
        assert verdict.passes == pytest.approx(expected, rel=1e-3)
    assert len({round(verdict.passes, 6) for verdict in found}) == 4  # the images and the prompts do matter here


def test_an_evaluation_that_does_not_end_passes_with_probability_0():
    samples, held = requests(1)
    image = JudgedImage(np.array(prompts_of(samples, held)[0], np.int32), np.zeros((2, 2), np.int32))
    assert VerdictScorer(system(PARAMS), OPTIONS, evaluation_length=3)([image])[0].passes == 0.0
    assert VerdictScorer(system(PARAMS), OPTIONS, evaluation_length=3)([]) == []


@pytest.mark.parametrize("tokenizer", [micro(), ByteTokenizer()], ids=["one id a marker", "several"])
def test_the_grammar_reads_one_evaluation_whose_verdicts_pass(tokenizer):
    grammar, decisions = passing_grammar(Grammar(tokenizer, GrammarOptions(modes=("direct",))))
    assert len(set(decisions.values())) == 1 and len(decisions) == 2 * len(AXES)  # with an axis failed before, too

    def evaluation(verdicts: tuple[str, ...]) -> np.ndarray:
        tokens = [*tokenizer.marker(markers.EVALUATE_OPEN), *tokenizer.marker(markers.AXIS[AXES[0]])]
        closes = [*(markers.AXIS[axis] for axis in AXES[1:]), markers.EVALUATE_CLOSE]
        for verdict, close in zip(verdicts, closes, strict=True):
            tokens += [*tokenizer.marker(verdict), *tokenizer.encode("ok"), *tokenizer.marker(close)]
        return np.array([[*tokens, tokenizer.vocab.eos]])

    assert grammar.run(evaluation((markers.PASS,) * 4))[0, -1] == ACCEPT
    assert grammar.run(evaluation((markers.PASS, markers.FAIL, markers.PASS, markers.PASS)))[0, -1] != ACCEPT
