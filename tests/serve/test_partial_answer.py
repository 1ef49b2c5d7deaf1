"""The parts of an answer while it is generated, and the tokens of edited parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from answer_tokens import micro, trajectory

from ivr_jax.errors import UserError
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.protocol.joined_grammar import JoinedGrammar
from ivr_jax.serve.partial_answer import Part, PartialAnswer, encode_part, filled, masked, partial_codes, read_tokens
from ivr_jax.trajectory import AXES, Reflection, Step

TOKENIZER = micro(visual=8)
GRAMMAR = JoinedGrammar({"auto": Grammar(TOKENIZER), "direct": Grammar(TOKENIZER, GrammarOptions(modes=("direct",)))})
CODES = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
CAUSES = {"reflection": [Reflection("the hat is missing", "add the hat")], "multi_step": [Step("put a red hat")]}


def answer(kind: str) -> tuple[list[int], tuple[codec.Segment, ...]]:
    """Tokens and segments of an answer with two images of `CODES`' shape."""
    made = trajectory(CAUSES[kind], [False, True])
    return codec.encode_answer(TOKENIZER, made, {r.image: CODES + k for k, r in enumerate(made.rounds)})


def partial(mode: str = "auto", size=(2, 3)) -> PartialAnswer:
    return PartialAnswer(GRAMMAR, GRAMMAR.initial(mode, *(np.full(1, side) for side in size)))


def read(tokens, mode: str = "auto") -> PartialAnswer:
    made = partial(mode)
    read_tokens(GRAMMAR.tables, [made], [tokens])
    return made


@pytest.mark.parametrize("kind", CAUSES)
def test_the_parts_of_a_whole_answer_are_its_segments(kind):
    tokens, segments = answer(kind)
    whole = read(tokens)
    parts = whole.parts()
    assert whole.ended and all(part.complete for part in parts)
    letters = {"image": "G", "evaluation": "E", "reflection": "R", "step": "S"}
    assert [(letters[p.kind], p.round) for p in parts] == [(s.part, s.round) for s in segments]
    np.testing.assert_array_equal(parts[0].codes, CODES)
    assert parts[1].passed is False and parts[-1].passed is True
    assert set(parts[1].verdicts) == set(AXES) == set(parts[1].texts)
    said = {"reflection": {"failure_analysis": "the hat is missing", "improvement_plan": "add the hat"},
            "multi_step": {"instruction": "put a red hat"}}[kind]  # fmt: skip
    assert parts[2].texts == said


@pytest.mark.parametrize("kind", CAUSES)
def test_wherever_an_answer_ends_its_parts_are_a_beginning_of_the_whole_ones(kind):
    tokens, _ = answer(kind)
    whole = read(tokens).parts()
    for length in range(len(tokens)):
        parts = read(tokens[:length]).parts()
        assert len(parts) <= len(whole)
        for part, final in zip(parts, whole, strict=False):
            assert (part.kind, part.round, part.start) == (final.kind, final.round, final.start)
            assert all(final.verdicts[axis] == passed for axis, passed in part.verdicts.items())
            for field, text in part.texts.items():
                assert final.texts[field].startswith(text)
            if part.codes is not None:
                drawn = part.codes >= 0
                np.testing.assert_array_equal(part.codes[drawn], final.codes[drawn])
                assert part.complete == drawn.all() or not part.complete
        assert all(part.complete for part in parts[:-1])


def test_an_interleaved_answer_is_its_texts_and_images():
    grammar = JoinedGrammar({"interleaved": Grammar(TOKENIZER, GrammarOptions(modes=("interleaved",)))})
    images = [codec.encode_image(TOKENIZER, CODES + shift) for shift in (-1, 0, 1)]
    texts = [TOKENIZER.encode(text) for text in ("First", "Then")]
    tokens = [*images[0], *texts[0], *images[1], *images[2], *texts[1], TOKENIZER.vocab.eos]
    kinds = ["image", "text", "image", "image", "text"]
    for length in range(len(tokens) + 1):
        made = PartialAnswer(grammar, grammar.initial("interleaved", np.full(1, 2), np.full(1, 3)))
        read_tokens(grammar.tables, [made], [tokens[:length]])
        parts = made.parts()
        assert [part.kind for part in parts] == kinds[: len(parts)]
        assert all(part.complete for part in parts[:-1])
        assert [part.end for part in parts[:-1]] == [part.start for part in parts[1:]]
    assert made.ended and len(parts) == 5
    assert [part.texts["text"] for part in parts if part.kind == "text"] == ["First", "Then"]
    drawn = [part.codes for part in parts if part.kind == "image"]
    np.testing.assert_array_equal(drawn, [CODES - 1, CODES, CODES + 1])


def test_many_answers_are_read_together_as_one_by_one():
    answers = [answer("reflection")[0], answer("multi_step")[0][:17], []]
    together = [partial(), partial(), partial("direct")]
    for start in range(0, max(map(len, answers)), 5):
        read_tokens(GRAMMAR.tables, together, [tokens[start : start + 5] for tokens in answers])
    for one, tokens in zip(together, answers, strict=True):
        assert one.tokens == list(tokens)
        alone = read(tokens, "direct" if not tokens else "auto")
        assert one.nodes == alone.nodes and [int(x[0]) for x in one.state] == [int(x[0]) for x in alone.state]


def test_tokens_that_leave_the_grammar_are_an_error():
    tokens, _ = answer("multi_step")
    with pytest.raises(UserError):
        read(tokens, "direct").parts()
    with pytest.raises(UserError):
        read([TOKENIZER.vocab.eos]).parts()


@pytest.mark.parametrize("kind", CAUSES)
def test_a_part_as_tokens_is_what_it_was_read_from(kind):
    tokens, _ = answer(kind)
    for part in read(tokens).parts():
        assert encode_part(TOKENIZER, part, part.round) == tokens[part.start : part.end]


def test_an_edited_verdict_sends_the_answer_another_way():
    tokens, _ = answer("reflection")
    parts = read(tokens).parts()
    last = parts[-1]
    assert last.passed
    failed = dataclasses.replace(last, verdicts={**last.verdicts, "quality": False})
    prefix = tokens[: last.start] + encode_part(TOKENIZER, failed, last.round)
    assert not read(prefix).ended
    with pytest.raises(UserError):  # after a failed evaluation the answer may not end while rounds are left
        read([*prefix, TOKENIZER.vocab.eos]).parts()


@pytest.mark.parametrize("text", ["", "  ", "<|image start|>", "</Failure Analysis> more"])
def test_an_edit_may_not_end_its_text_early(text):
    tokens, _ = answer("reflection")
    part = read(tokens).parts()[2]
    with pytest.raises(UserError):
        encode_part(TOKENIZER, dataclasses.replace(part, texts={**part.texts, "failure_analysis": text}), part.round)


def test_an_unfinished_image_is_grey_where_nothing_is_drawn():
    tokens = codec.encode_image(TOKENIZER, CODES)
    assert partial_codes(TOKENIZER, tokens[:4]) is None
    codes = partial_codes(TOKENIZER, tokens[: tokens.index(TOKENIZER.vocab.img) + 6])
    np.testing.assert_array_equal(codes, [[1, 2, 3], [4, -1, -1]])
    np.testing.assert_array_equal(filled(codes), [[1, 2, 3], [4, 2, 3]])
    pixels = masked(np.full((4, 6, 3), 7, np.uint8), codes, grey=168)
    np.testing.assert_array_equal(pixels[..., 0] == 168, np.kron(codes < 0, np.ones((2, 2), bool)))
    assert Part("image", 1, 0, 8, True, codes=CODES).passed is None
