"""Prompts, image blocks and texts as tokens: exact layouts, the way back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from answer_tokens import ByteTokenizer, answered, micro, self_overlapping, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from ivr_jax.errors import UserError
from ivr_jax.protocol import codec, markers, vocabulary
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.trajectory import (
    AxisVerdict,
    Evaluation,
    Reflection,
    Round,
    Sample,
    Step,
    Trajectory,
    sample_from_json,
    sample_to_json,
)
from ivr_jax.world.language import PHRASES

TOKENIZER, WORLD = micro(), PhraseTokenizer(PHRASES, 8)
VOCAB = TOKENIZER.vocab
GRID = np.array([[0, 1, 2], [3, 4, 7]], np.int32)


def words(tokens) -> list[str]:
    """Tokens by name: specials, `c3` for a code, text as it reads."""
    special = {"pad": VOCAB.pad, "BOS": VOCAB.bos, "EOS": VOCAB.eos, "BSS": VOCAB.bss}
    special |= {"BOI": VOCAB.boi, "IMG": VOCAB.img, "EOI": VOCAB.eoi, "EOL": VOCAB.eol}
    names = {number: name for name, number in special.items()}
    return [
        names[t] if t in names else f"c{t - VOCAB.visual_start}" if t >= VOCAB.visual_start else TOKENIZER.decode([t])
        for t in map(int, tokens)
    ]


# -- text -------------------------------------------------------------------------------------------------------------


def test_phrases_are_matched_greedily_and_the_rest_is_bytes():
    tokenizer = PhraseTokenizer(("Put a", " red", " circle", " red circle"), 4)
    assert tokenizer.encode("Put a red circle!") == [256, 259, 33]
    assert tokenizer.encode("Put é") == [80, 117, 116, 32, 0xC3, 0xA9]
    assert tokenizer.decode([256, 259, 33]) == "Put a red circle!"
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


@given(text=st.text())
def test_every_text_comes_back_and_has_no_special_id(text):
    for tokenizer in (TOKENIZER, WORLD):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab.text_size for i in ids)


LOOKALIKES = [*markers.ANSWER_MARKERS, *markers.SYSTEM.values(), "<|extra_100|>", "4*4", "a"]


@given(pieces=st.lists(st.sampled_from(LOOKALIKES)))
def test_text_that_looks_like_markers_is_still_ordinary_text(pieces):
    text = "".join(pieces)
    ids = WORLD.encode(text)
    assert max(ids, default=0) < WORLD.vocab.text_size
    assert WORLD.decode(ids) == text


def test_an_id_has_one_meaning_and_the_fingerprint_follows_it():
    vocab = vocabulary.micro(300, 24, 8)
    specials = [vocab.pad, vocab.bos, vocab.eos, vocab.bss, vocab.boi, vocab.img, vocab.eoi, vocab.eol]
    assert specials == list(range(324, 332)) and vocab.visual_start == 332 and vocab.size == 340
    marker_ids = [TOKENIZER.marker(text) for text in markers.ANSWER_MARKERS]
    assert marker_ids == [(i,) for i in range(VOCAB.text_size, VOCAB.pad)]
    assert TOKENIZER.fingerprint == micro().fingerprint
    assert len({t.fingerprint for t in (TOKENIZER, micro(9), PhraseTokenizer(("Put a",), 8))}) == 3


def test_the_released_table_is_emu35s():
    vocab = vocabulary.emu35()
    assert (vocab.size, vocab.pad, vocab.bos, vocab.eos) == (282_926, 151_643, 151_849, 151_850)
    assert (vocab.img, vocab.boi, vocab.eoi, vocab.visual_start) == (151_851, 151_852, 151_853, 151_854)
    assert (vocab.bss, vocab.eol) == (151_746, 151_846)


# -- images -----------------------------------------------------------------------------------------------------------


def test_an_image_block_is_written_row_by_row():
    expected = ["BOI", "2", "*", "3", "IMG", "c0", "c1", "c2", "EOL", "c3", "c4", "c7", "EOI"]
    assert words(codec.encode_image(TOKENIZER, GRID)) == expected


@given(rows=st.integers(1, 12), columns=st.integers(1, 120), seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_an_image_block_reads_back(rows, columns, seed):
    grid = np.random.default_rng(seed).integers(0, 8, (rows, columns))
    tokens = codec.encode_image(TOKENIZER, grid)
    assert len(tokens) == 2 + len(f"{rows}*{columns}") + rows * (columns + 1)
    back = codec.decode_image(TOKENIZER, tokens)
    assert back.dtype == np.int32 and (back == grid).all()


BLOCK = codec.encode_image(TOKENIZER, GRID)
BROKEN = {
    "nothing": ([], "at token 0: it does not begin with BOI"),
    "no BOI": (BLOCK[1:], "at token 0: it does not begin with BOI"),
    "no IMG": ([t for t in BLOCK if t != VOCAB.img], "at token 12: 0 IMG tokens, not one"),
    "two IMG": ([*BLOCK[:5], VOCAB.img, *BLOCK[5:]], "at token 14: 2 IMG tokens, not one"),
    "no star": ([*BLOCK[:2], *BLOCK[3:]], "at token 1: the size is not height*width"),
    "two stars": ([*BLOCK[:3], BLOCK[2], *BLOCK[3:]], "at token 1: the size is not height*width"),
    "a size of zero": ([BLOCK[0], 48, *BLOCK[2:]], "at token 1: the size is not height*width"),
    "a size that begins with zero": ([BLOCK[0], 48, *BLOCK[1:]], "at token 1: the size is not height*width"),
    "a special token in the size": ([*BLOCK[:2], BLOCK[0], *BLOCK[2:]], "at token 2: a special token stands in the"),
    "a size in words": ([BLOCK[0], *b"two", *BLOCK[2:]], "at token 1: the size is not height*width"),
    "another size": ([BLOCK[0], 51, *BLOCK[2:]], "at token 12: 3*3 cells need 17 tokens that end in EOI, not 13"),
    "cut short": (BLOCK[:-3], "at token 9: 2*3 cells need 13 tokens that end in EOI, not 10"),
    "too long": ([*BLOCK, VOCAB.eoi], "at token 12: 2*3 cells need 13 tokens that end in EOI, not 14"),
    "EOI replaced": ([*BLOCK[:-1], VOCAB.eol], "at token 12: 2*3 cells need 13 tokens that end in EOI, not 13"),
    "text in the grid": ([*BLOCK[:6], 97, *BLOCK[7:]], "at token 6: a visual token or an EOL is out of place"),
    "EOL in a row": ([*BLOCK[:5], VOCAB.eol, *BLOCK[6:]], "at token 5: a visual token or an EOL is out of place"),
    "no EOL": ([*BLOCK[:8], BLOCK[7], *BLOCK[9:]], "at token 8: a visual token or an EOL is out of place"),
    "in the second row": ([*BLOCK[:10], VOCAB.size, *BLOCK[11:]], "at token 10: a visual token or an EOL is out of"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_block_is_refused_with_place_and_reason(name):
    tokens, message = BROKEN[name]
    with pytest.raises(UserError) as caught:
        codec.decode_image(TOKENIZER, tokens)
    assert message in str(caught.value)


@pytest.mark.parametrize("grid", [GRID - 1, GRID + 1, GRID[:0], GRID[0]])
def test_codes_that_the_vocabulary_does_not_have_are_refused(grid):
    with pytest.raises(UserError, match="8"):
        codec.encode_image(TOKENIZER, grid)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_holds_the_template_its_references_and_the_question():
    codes = {"a": np.array([[1]]), "b": np.array([[2, 3]])}
    first, second = ["BOI", "1", "*", "1", "IMG", "c1", "EOI"], ["BOI", "1", "*", "2", "IMG", "c2", "c3", "EOI"]
    ask = lambda sources: words(codec.encode_prompt(TOKENIZER, Sample("k", "Put a red X", sources), codes))  # noqa: E731
    question = ["Put a", " red", " ", "X", " ASSISTANT: ", "BSS"]
    text = "You are a helpful assistant for t2i task. USER: "
    image = "You are a helpful assistant for x2i task. USER: "
    assert ask(()) == ["BOS", text, *question]
    assert ask(("a",)) == ["BOS", image, *first, *question]
    assert ask(("b", "a", "b")) == ["BOS", image, *second, *first, *second, *question]
    free = codec.encode_unconditional_prompt(TOKENIZER, Sample("k", "Put a red X", ("a",)), codes)
    assert words(free) == ["BOS", "You are a helpful assistant. USER: ", *first, " ASSISTANT: ", "BSS"]
    nothing = codec.encode_unconditional_prompt(TOKENIZER, Sample("k", "Put a red X", ("a",)), codes, references=False)
    assert words(nothing) == ["BOS", "You are a helpful assistant. USER: ", " ASSISTANT: ", "BSS"]


def test_the_end_of_a_request_costs_no_bytes_whatever_its_full_stop():
    for question in ("Paint a2 red", "Paint a2 red.", "Clear b3. Paint a2 red."):
        assert min(WORLD.encode(question + markers.ASSISTANT)) >= 256


@pytest.mark.parametrize("task", ["t2i", "x2i", "howto", "story", "explore", "vla"])
def test_a_sample_may_name_any_of_the_released_tasks(task):
    tokens = codec.encode_prompt(TOKENIZER, Sample("k", "Put a", task_word=task), {})
    assert words(tokens)[1] == f"You are a helpful assistant for {task} task. USER: "
    sample = Sample("k", "Put a", ("a",), task_word=task)
    assert sample_from_json(sample_to_json(sample)) == sample
    assert "task_word" not in sample_to_json(Sample("k", "Put a"))
    with pytest.raises(UserError, match="t2i"):
        Sample("k", "Put a", task_word=f"{task}s")


@pytest.mark.parametrize(
    "control", ["<|extra_100|>", "<|image token|>", "<Evaluate>", "</evaluate>", "<Failure Analysis>", "</Step 12>"]
)
def test_a_prompt_with_a_control_token_is_refused(control):
    with pytest.raises(UserError, match="'k7'") as caught:
        codec.encode_prompt(TOKENIZER, Sample("k7", f"Put a {control} here"), {})
    assert control in str(caught.value) and "Remove it" in str(caught.value)


@pytest.mark.parametrize("text", ["a < b | c > d", "<b>bold</b>", "<Steps 2>", "<| |", "< Evaluate >"])
def test_a_prompt_that_only_resembles_one_is_not(text):
    tokens = codec.encode_prompt(TOKENIZER, Sample("k", text), {})
    assert TOKENIZER.decode(tokens[2:-2]) == text


def test_text_that_has_no_utf8_is_refused():
    with pytest.raises(UserError, match="'k'"):
        codec.encode_prompt(TOKENIZER, Sample("k", "half a pair: \ud83d"), {})


# -- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_token_by_token():
    """Direct, fail, then a step: every token of the answer, and who owns it."""
    one, two = np.array([[1, 2]]), np.array([[3, 4]])
    judged = [Evaluation(*(AxisVerdict(p, "ok") for p in (passed, True, True, True))) for passed in (False, True)]
    answer = Trajectory(Sample("k", "x"), (Round(None, "A", judged[0]), Round(Step("Put a red"), "B", judged[1])))
    tokens, segments = codec.encode_answer(TOKENIZER, answer, {"A": one, "B": two})
    rest = ["ok", "\nConsistency: ", "pass: ", "ok", "\nQuality: ", "pass: ", "ok", "\nKnowledge: ", "pass: ", "ok"]
    assert words(tokens) == [
        *("BOI", "1", "*", "2", "IMG", "c1", "c2", "EOI"),
        *("<Evaluate>", "\nInstruction: ", "fail: ", *rest, "\n</Evaluate>"),
        *("<Step 2>", "Put a", " red", "</Step 2>"),
        *("BOI", "1", "*", "2", "IMG", "c3", "c4", "EOI"),
        *("<Evaluate>", "\nInstruction: ", "pass: ", *rest, "\n</Evaluate>", "EOS"),
    ]
    found = [(s.name, s.start, s.end) for s in segments]
    assert found == [("G1", 0, 8), ("E1", 8, 22), ("S2", 22, 26), ("G2", 26, 34), ("E2", 34, 49)]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ByteTokenizer(), self_overlapping()], ids=["ids", "bytes", "overlap"])
@settings(max_examples=15)
@given(data=st.data())
def test_a_trajectory_with_its_prompt_covers_every_token_once(tokenizer, data):
    answer, codes = data.draw(answered(tokenizer))
    encoded = codec.encode_trajectory(tokenizer, answer, codes)
    prompt = codec.encode_prompt(tokenizer, answer.sample, codes)
    assert encoded.tokens.dtype == np.int32 and encoded.answer_start == len(prompt)
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    ends = [s.end for s in encoded.segments]
    assert [s.start for s in encoded.segments] == [0, *ends[:-1]]
    passed = answer.rounds[-1].evaluation.passed
    assert ends[-1] == len(encoded.tokens) - len(prompt) - (not passed)  # EOS belongs to an evaluation that passes
    marked = np.concatenate([np.full(s.end - s.start, s.loss) for s in encoded.segments])
    assert not encoded.loss_mask()[: len(prompt)].any()
    assert (encoded.loss_mask()[len(prompt) :][: ends[-1]] == marked).all()


def test_scores_and_step_evaluations_are_not_spoken():
    scored = Evaluation(*(AxisVerdict(True, "ok", 5.0) for _ in range(4)))
    answer = Trajectory(Sample("k", "x"), (Round(None, "A", scored, step_evaluation=scored),))
    tokens, _ = codec.encode_answer(TOKENIZER, answer, {"A": GRID})
    parsed = codec.parse_answer(Grammar(TOKENIZER), answer.sample, tokens)
    (round_,) = parsed.trajectory.rounds
    assert round_.step_evaluation is None and round_.evaluation.scores == (None,) * 4


@pytest.mark.parametrize(
    ("tokenizer", "cause"),
    [
        (TOKENIZER, Step("say </Step 2> twice")),
        (TOKENIZER, Step("<|extra_103|>")),
        (TOKENIZER, Step(" leading space")),
        (TOKENIZER, Reflection("ok", "\nnew line")),
        (self_overlapping(), Step("xaabx")),  # "aab" closes a step there
        (self_overlapping(), Reflection("ok", "ababac")),
    ],
)
def test_a_text_that_would_end_itself_or_begins_blank_is_refused(tokenizer, cause):
    answer = trajectory([cause], [False, True])
    with pytest.raises(UserError):
        codec.encode_answer(tokenizer, answer, {"G1": GRID, "G2": GRID})


def test_a_malformed_answer_is_refused_where_it_goes_wrong():
    grammar, sample = Grammar(TOKENIZER), Sample("k", "x")
    tokens, _ = codec.encode_answer(TOKENIZER, trajectory([], [True]), {"G1": GRID})
    length = len(tokens)
    wrong = {
        f"at token {length - 1} of {length - 1}": tokens[:-1],
        f"at token 13 of {length}": [*tokens[:13], tokens[0], *tokens[14:]],
        f"at token 5 of {length}": [*tokens[:5], VOCAB.pad, *tokens[6:]],
        "at token 0 of 0": [],
    }
    for place, mistaken in wrong.items():
        with pytest.raises(UserError, match=place):
            codec.parse_answer(grammar, sample, np.array(mistaken, np.int32))
    with pytest.raises(UserError):  # something follows EOS
        codec.parse_answer(grammar, sample, np.array([*tokens, VOCAB.eos]))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, ByteTokenizer()], ids=["one id a marker", "spelled markers"])
@pytest.mark.parametrize(
    "modes, cause, rounds, texts",
    [(("direct",), None, 1, 5), (("direct", "reflection"), Reflection("x", "x"), 4, 26),
     (("direct", "multi_step"), Step("x"), 5, 29)],
)  # fmt: skip
def test_the_longest_answer_is_one_with_every_round_and_all_texts_full(tokenizer, modes, cause, rounds, texts):
    options = GrammarOptions(modes=modes, max_reflections=3, max_steps=4, text_cap=7)
    failed = Evaluation(*[AxisVerdict(False, "x")] * 4, observation="x")
    answer = Trajectory(
        Sample("a", "paint"), tuple(Round(cause if k > 1 else None, f"G{k}", failed) for k in range(1, rounds + 1))
    )
    tokens, _ = codec.encode_answer(tokenizer, answer, {name: GRID for name in answer.images})
    bound = codec.longest_answer(tokenizer, options, len(codec.encode_image(tokenizer, GRID)))
    assert bound == codec.AnswerBound(rounds, texts, len(tokens) + texts * (options.text_cap - 1))


def test_of_several_modes_the_one_with_the_longest_answers_counts():
    alone = [
        codec.longest_answer(TOKENIZER, GrammarOptions(modes=(mode,)), 10) for mode in ("reflection", "multi_step")
    ]
    both = codec.longest_answer(TOKENIZER, GrammarOptions(modes=("direct", "reflection", "multi_step")), 10)
    assert both == max(alone, key=lambda bound: bound.tokens) and alone[0] != alone[1]
