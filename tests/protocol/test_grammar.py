"""The automaton: it accepts exactly the answers, forces what must be forced, and numpy and JAX run it alike."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer_tokens import (
    ByteTokenizer,
    Recogniser,
    answered,
    evaluation,
    micro,
    self_overlapping,
    token_content,
    trajectory,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ivr_jax.errors import UserError
from ivr_jax.protocol import codec, markers
from ivr_jax.protocol.grammar import (
    ACCEPT,
    ERROR,
    FREE,
    GRID,
    Grammar,
    GrammarOptions,
    Tables,
    advance,
    image_ahead,
    legal_row,
)
from ivr_jax.protocol.interleaved import parse_interleaved
from ivr_jax.trajectory import Reflection, Round, Sample, Step, Trajectory

TOKENIZERS = {"one id a marker": micro(), "spelled markers": ByteTokenizer(), "overlapping": self_overlapping()}
ALL = ("direct", "reflection", "multi_step")
OPTIONS = {
    "default": GrammarOptions(text_cap=60),
    "direct": GrammarOptions(modes=("direct",), text_cap=60),
    "reflection, forced, one round": GrammarOptions(modes=("reflection",), force=True, max_reflections=1, text_cap=60),
    "free verdicts, two rounds": GrammarOptions(max_reflections=2, max_steps=2, follow_verdict=False, text_cap=60),
}
SAMPLE = Sample("key", "x")
SIZE = np.array([2]), np.array([2])


@functools.cache
def grammar_of(tokenizer: str, options: str = "default") -> Grammar:
    return Grammar(TOKENIZERS[tokenizer], OPTIONS[options])


@functools.cache
def recogniser_of(tokenizer: str, options: str) -> Recogniser:
    return Recogniser(TOKENIZERS[tokenizer], OPTIONS[options], 2, 2)


def accepts(grammar: Grammar, tokens: list[int], size=SIZE) -> bool:
    return grammar.run(np.array([tokens]), *size)[0, -1] == ACCEPT


def legal_now(grammar: Grammar, tokens: list[int], size: tuple[int, int] = (2, 2)) -> list[int]:
    """Ids that may come after `tokens`."""
    state = grammar.initial(np.array([size[0]]), np.array([size[1]]))
    for token in tokens:
        state = advance(grammar.tables, state, np.array([token]), np)
    return legal_ids(grammar, state)


def legal_ids(grammar: Grammar, state) -> list[int]:
    row = legal_row(grammar.tables, state, np)[0]
    return np.flatnonzero(grammar.tables.legal[row][grammar.tables.class_of]).tolist()


def encode(tokenizer, answer: Trajectory, size: tuple[int, int] = (2, 2)) -> list[int]:
    codes = {name: np.full(size, k, np.int32) for k, name in enumerate(answer.images)}
    return codec.encode_answer(tokenizer, answer, codes)[0]


STEP, REFLECTION = Step("go"), Reflection("bad", "better")


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25)
@given(data=st.data())
def test_every_encoded_trajectory_is_an_answer_and_reads_back(name, data):
    tokenizer, grammar = TOKENIZERS[name], grammar_of(name)
    alphabet = data.draw(st.sampled_from([None, "ab\n", "<a/E\n"]))
    answer, codes = data.draw(answered(tokenizer, alphabet))
    tokens, segments = codec.encode_answer(tokenizer, answer, codes)
    assert grammar.run(np.array([tokens]))[0, -1] == ACCEPT
    parsed = codec.parse_answer(grammar, answer.sample, tokens)
    assert parsed.trajectory == token_content(answer)
    assert parsed.segments == segments
    assert set(parsed.codes) == set(answer.images)
    assert all((parsed.codes[image] == codes[image]).all() for image in answer.images)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), plain=st.booleans())
def test_every_legal_walk_ends_in_an_answer(name, options, seed, plain):
    """With `plain`, texts are drawn from a few letters, so they are written in only one way."""
    tokenizer, rng = TOKENIZERS[name], np.random.default_rng(seed)
    limits = {key: getattr(OPTIONS[options], key) for key in ("modes", "force", "follow_verdict")}
    grammar = capped_grammar(name, tuple(limits.items()))
    letters = {tokenizer.encode(letter)[0] for letter in "abx"}
    tokens, state = [], grammar.initial(*SIZE)
    while state.node[0] != ACCEPT:
        legal = legal_ids(grammar, state)
        assert legal, f"a dead end after {tokens}"
        wanted = [i for i in legal if i in letters]
        tokens.append(int(rng.choice(wanted if plain and wanted else legal)))
        state = advance(grammar.tables, state, np.array([tokens[-1]]), np)
        assert state.node[0] != ERROR and len(tokens) < 2000
    parsed = codec.parse_answer(grammar, SAMPLE, np.array(tokens), grammar.run(np.array([tokens]), *SIZE)[0])
    assert Recogniser(tokenizer, grammar.options, 2, 2).accepts(tokens)
    if plain:
        assert codec.encode_answer(tokenizer, parsed.trajectory, parsed.codes) == (tokens, parsed.segments)


@functools.cache
def capped_grammar(name: str, options: tuple) -> Grammar:
    return Grammar(TOKENIZERS[name], GrammarOptions(max_reflections=2, max_steps=3, text_cap=5, **dict(options)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=20)
@given(data=st.data())
def test_damaged_answers_are_accepted_only_where_they_are_answers(name, options, data):
    tokenizer, grammar = TOKENIZERS[name], grammar_of(name, options)
    answer, codes = data.draw(answered(tokenizer, "ab\n<", longest=4))
    codes = {image: np.resize(grid, (2, 2)) for image, grid in codes.items()}
    tokens = codec.encode_answer(tokenizer, answer, codes)[0]
    for _ in range(data.draw(st.integers(0, 2))):
        tokens = damaged(tokens, tokenizer.vocab.size, data.draw)
    expected = recogniser_of(name, options).accepts(tokens)
    nodes = grammar.run(np.array([tokens], np.int32), *SIZE)[0]
    assert (nodes[-1] == ACCEPT and (nodes[:-1] > ACCEPT).all()) == expected
    if expected:
        codec.parse_answer(grammar, SAMPLE, np.array(tokens), nodes)
    else:
        with pytest.raises(UserError):
            codec.parse_answer(grammar, SAMPLE, np.array(tokens), nodes)


def damaged(tokens: list[int], vocabulary: int, draw) -> list[int]:
    """One random mistake: tokens lost, doubled, exchanged, replaced by another id, or cut off."""
    if not tokens:
        return [draw(st.integers(0, vocabulary - 1))]
    a, b = sorted(draw(st.integers(0, len(tokens))) for _ in range(2))
    b = min(len(tokens), max(b, a + 1))
    kind = draw(st.sampled_from(["lose", "double", "replace", "copy", "cut", "insert", "lose one"]))
    other = draw(st.one_of(st.integers(0, vocabulary - 1), st.sampled_from(tokens)))
    return {
        "lose": tokens[:a] + tokens[b:],
        "lose one": tokens[:a] + tokens[a + 1 :],
        "double": tokens[:b] + tokens[a:],
        "replace": [*tokens[:a], other, *tokens[a + 1 :]],
        "copy": tokens[:a] + tokens[a:b] + tokens[a:b] + tokens[b:],
        "cut": tokens[:a],
        "insert": [*tokens[:a], other, *tokens[a:]],
    }[kind]


# -- control flow -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causes", "passed", "options", "legal"),
    [
        ([], [True], {}, True),
        ([], [False], {}, False),  # rounds are left
        ([], [False], {"modes": ("direct",)}, True),
        ([], [False], {"max_reflections": 0, "max_steps": 0}, True),
        ([], [False], {"follow_verdict": False}, True),
        ([], [True], {"modes": ("reflection",), "force": True}, False),
        ([REFLECTION], [False, True], {}, True),
        ([REFLECTION], [True, True], {}, False),  # goes on after pass
        ([REFLECTION], [True, True], {"follow_verdict": False}, True),
        ([REFLECTION], [True, True], {"modes": ("reflection",), "force": True}, True),
        ([REFLECTION], [False, False], {}, False),  # ends on fail with rounds left
        ([REFLECTION], [False, False], {"max_reflections": 1}, True),
        ([REFLECTION], [False, True], {"modes": ("direct", "multi_step")}, False),
        ([REFLECTION] * 3, [False] * 4, {}, True),  # no round is left
        ([REFLECTION] * 2, [False] * 3, {}, False),
        ([REFLECTION] * 2, [False, True, True], {}, False),
        ([STEP], [False, True], {}, True),
        ([STEP], [True, True], {}, False),
        ([STEP] * 5, [False] * 5 + [True], {}, True),
        ([STEP] * 5, [False] * 6, {}, True),
        ([STEP] * 4, [False] * 5, {}, False),
        ([STEP] * 3, [False] * 3 + [True], {"max_steps": 2}, False),
        ([STEP], [False, True], {"modes": ("direct", "reflection")}, False),
    ],
)
def test_control_flow_follows_the_verdict_and_the_options(causes, passed, options, legal):
    for tokenizer in TOKENIZERS.values():
        tokens = encode(tokenizer, trajectory(causes, passed))
        assert accepts(Grammar(tokenizer, GrammarOptions(**options)), tokens) == legal


@pytest.mark.parametrize("axis", range(4))
def test_one_failed_axis_fails_the_evaluation(axis):
    verdicts = [i != axis for i in range(4)]
    alone = Trajectory(SAMPLE, (Round(None, "G1", evaluation(verdicts)),))
    mended = Trajectory(SAMPLE, (*alone.rounds, Round(REFLECTION, "G2", evaluation(True))))
    for name, tokenizer in TOKENIZERS.items():
        assert not accepts(grammar_of(name), encode(tokenizer, alone))
        assert accepts(grammar_of(name), encode(tokenizer, mended))


def test_reflections_and_steps_do_not_mix_and_steps_count_up():
    tokenizer, grammar = TOKENIZERS["one id a marker"], grammar_of("one id a marker")
    passed = [False, False, True]
    stepped, reflected = (encode(tokenizer, trajectory([cause] * 2, passed)) for cause in (STEP, REFLECTION))
    second, third = (stepped.index(tokenizer.marker(markers.STEP_OPEN[k])[0]) for k in (2, 3))
    analyses = [i for i, t in enumerate(reflected) if t == tokenizer.marker(markers.ANALYSIS_OPEN)[0]]
    assert accepts(grammar, stepped) and accepts(grammar, reflected)
    assert not accepts(grammar, stepped[:second] + stepped[third:])  # <Step 3> first
    assert not accepts(grammar, stepped[:third] + reflected[analyses[1] :])
    assert not accepts(grammar, reflected[: analyses[1]] + stepped[second:])


def test_options_out_of_range_are_refused():
    for wrong in ({"modes": ()}, {"modes": ("dircet",)}, {"max_steps": 6}, {"max_reflections": -1}, {"text_cap": 0}):
        with pytest.raises(UserError):
            GrammarOptions(**wrong)
    with pytest.raises(UserError):
        Grammar(micro(), GrammarOptions(modes=("direct",), force=True))


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 11), (10, 3)])
def test_a_forced_size_leaves_one_way_to_write_it(size):
    tokenizer, grammar = TOKENIZERS["one id a marker"], grammar_of("one id a marker")
    image = codec.encode_image(tokenizer, np.zeros(size, np.int32))
    for count in range(image.index(tokenizer.vocab.img) + 1):
        assert legal_now(grammar, image[:count], size) == [image[count]]
    visual = list(range(tokenizer.vocab.visual_start, tokenizer.vocab.size))
    for count in range(image.index(tokenizer.vocab.img) + 1, len(image)):
        expected = visual if image[count] >= tokenizer.vocab.visual_start else [image[count]]
        assert legal_now(grammar, image[:count], size) == expected
    assert not accepts(grammar, encode(tokenizer, trajectory([], [True]), (3, 3)), tuple(np.array([s]) for s in size))


def test_a_free_size_has_one_or_two_digits_and_no_leading_zero():
    tokenizer, grammar = TOKENIZERS["one id a marker"], grammar_of("one id a marker")
    digit = {str(d): tokenizer.encode(str(d))[0] for d in range(10)}
    star, boi, img = tokenizer.encode("*")[0], tokenizer.vocab.boi, tokenizer.vocab.img
    one_to_nine = sorted(digit[str(d)] for d in range(1, 10))
    assert legal_now(grammar, [boi], (0, 0)) == one_to_nine
    assert legal_now(grammar, [boi, digit["4"]], (0, 0)) == sorted([*digit.values(), star])
    assert legal_now(grammar, [boi, digit["4"], digit["0"]], (0, 0)) == [star]
    assert legal_now(grammar, [boi, digit["4"], star], (0, 0)) == one_to_nine
    assert legal_now(grammar, [boi, digit["4"], star, digit["1"], digit["2"]], (0, 0)) == [img]
    for size in ((99, 1), (1, 99), (10, 10)):
        free = (np.array([0]), np.array([0]))
        assert accepts(grammar, encode(tokenizer, trajectory([], [True]), size), free)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (100, 4), (-1, 4), (-2, -2), (-1, 0)])
def test_a_size_that_cannot_be_written_is_refused(size):
    with pytest.raises(UserError, match="1-99"):
        grammar_of("one id a marker").initial(np.array([size[0]]), np.array([size[1]]))


def test_a_free_size_has_two_digits_a_side_and_later_images_keep_it():
    grammar = grammar_of("one id a marker", "reflection, forced, one round")
    vocab, digits = grammar.tokenizer.vocab, [ord(d) for d in "0123456789"]
    head = [vocab.boi, *b"10*11", vocab.img]
    now = [legal_now(grammar, head[:k], FREE) for k in range(len(head))]
    assert now == [[vocab.boi], digits[1:], digits, [ord("*")], digits[1:], digits, [vocab.img]]
    answer = trajectory([REFLECTION], [False, True])
    for second, wanted in (((10, 11), True), ((11, 10), False), ((2, 2), False)):
        codes = {"G1": np.zeros((10, 11), np.int32), "G2": np.zeros(second, np.int32)}
        tokens = codec.encode_answer(grammar.tokenizer, answer, codes)[0]
        assert accepts(grammar, tokens, size=np.array([FREE]).T) == wanted
        assert accepts(grammar, tokens, size=np.zeros((2, 1), int))  # any size, for each image


# -- interleaved answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_interleaved_answer_has_texts_and_images_in_any_order(name):
    tokenizer = TOKENIZERS[name]
    grammar = Grammar(tokenizer, GrammarOptions(modes=("interleaved",), text_cap=3))
    image, text, eos = codec.encode_image(tokenizer, np.zeros((2, 2), np.int32)), list(b"abc"), tokenizer.vocab.eos
    assert all(accepts(grammar, [*x, eos]) for x in ([], text, image, [*image, *image], [*text, *image, *text]))
    wrong = ([*text, 97], [*image[:-1]], [tokenizer.vocab.pad], [tokenizer.vocab.img], [*text, tokenizer.vocab.eoi])
    assert not any(accepts(grammar, [*x, eos]) for x in wrong)
    assert legal_now(grammar, text) == sorted([tokenizer.vocab.boi, eos])  # a full text: an image, or the end
    with pytest.raises(UserError):
        codec.parse_answer(grammar, SAMPLE, np.array([*text, eos]))


def test_an_interleaved_answer_reads_back_part_by_part():
    tokenizer = TOKENIZERS["one id a marker"]
    grid = np.array([[1, 2, 3]], np.int32)
    image, eos = codec.encode_image(tokenizer, grid), tokenizer.vocab.eos
    thought = tokenizer.encode("<|extra_60|>plan\n<|extra_61|>")
    parts, ended = parse_interleaved(tokenizer, [*thought, *b" Hi ", *image, *image, *b" ", eos])
    assert ended and [part.kind for part in parts] == ["global_thought", "text", "image", "image"]
    assert parts[0].text == "plan\n" and parts[1].text == " Hi " and (parts[3].codes == grid).all()
    parts, ended = parse_interleaved(tokenizer, [*b"ab", *image[:-2]])
    assert not ended and [part.text for part in parts] == ["ab"]
    with pytest.raises(UserError, match=r"9.*1\*3"):
        parse_interleaved(tokenizer, [*b"ab", *image[:6], *image[7:], eos])


# -- texts ------------------------------------------------------------------------------------------------------------


def before_reason(tokenizer) -> list[int]:
    """Tokens of a direct answer up to its first reason."""
    head = codec.encode_image(tokenizer, np.zeros((2, 2), np.int32))
    for text in (markers.EVALUATE_OPEN, markers.AXIS["instruction"], markers.PASS):
        head += tokenizer.marker(text)
    return head


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_begins_with_something_that_is_not_blank_and_holds_any_text(name):
    tokenizer, grammar = TOKENIZERS[name], grammar_of(name)
    head = before_reason(tokenizer)
    text = range(tokenizer.vocab.text_size)
    assert legal_now(grammar, head) == [i for i in text if not tokenizer.is_blank(i)]
    assert set(text) <= set(legal_now(grammar, [*head, tokenizer.encode("x")[0]]))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_at_the_cap_the_rest_of_the_marker_is_forced(name):
    tokenizer = TOKENIZERS[name]
    grammar = Grammar(tokenizer, GrammarOptions(text_cap=3))
    head, close = before_reason(tokenizer), list(tokenizer.marker(markers.AXIS["consistency"]))
    x = tokenizer.encode("x")[0]
    for begun in range(min(3, len(close))):  # so many tokens of the marker are there when the cap is reached
        tokens = head + [x] * (3 - begun) + close[:begun]
        for token in close[begun:]:
            assert legal_now(grammar, tokens) == [token]
            tokens.append(token)
        verdicts = {tokenizer.marker(text)[0] for text in (markers.PASS, markers.FAIL)}
        assert set(legal_now(grammar, tokens)) == verdicts


def test_a_cap_inside_an_opening_that_looks_like_the_marker_still_closes_it_whole():
    """Two tokens of text, "aa", are the beginning of the marker "aab": all of it is still to come."""
    tokenizer = self_overlapping()
    grammar = Grammar(tokenizer, GrammarOptions(text_cap=2))
    answer = trajectory([Step("aa")], [False, True])
    tokens = encode(tokenizer, answer)
    opening = list(tokenizer.marker(markers.STEP_OPEN[2]))
    start = next(i for i in range(len(tokens)) if tokens[i : i + len(opening)] == opening) + len(opening)
    assert tokens[start : start + 5] == list(b"aaaab")
    for count in range(start + 2, start + 5):
        assert legal_now(grammar, tokens[:count]) == [tokens[count]]
    assert accepts(grammar, tokens)


def test_the_first_whole_marker_closes_a_text_however_it_begins():
    """"aaab" closes a failure analysis: "aaaaab" is the text "aa" and the marker, found by falling back twice."""
    tokenizer, grammar = self_overlapping(), grammar_of("overlapping")
    answer = trajectory([Reflection("aa", "abab")], [False, True])
    parsed = codec.parse_answer(grammar, answer.sample, encode(tokenizer, answer))
    assert parsed.trajectory.rounds[1].cause == Reflection("aa", "abab")


# -- numpy and JAX ----------------------------------------------------------------------------------------------------


@jax.jit
def run_in_jax(tables: Tables, state, tokens: jax.Array):
    """Registers and legality rows before each token."""

    def step(state, token):
        return advance(tables, state, token, jnp), (state, legal_row(tables, state, jnp))

    last, (states, rows) = jax.lax.scan(step, state, tokens)
    return last, states, rows


@pytest.mark.parametrize("name", ["one id a marker", "overlapping"])
def test_numpy_and_jax_agree_in_every_register(name):
    tokenizer, grammar, rng = TOKENIZERS[name], grammar_of(name), np.random.default_rng(0)
    answers = [encode(tokenizer, trajectory(*kind)) for kind in
               (([], [True]), ([REFLECTION], [False, True]), ([STEP] * 2, [False, False, True]), ([], [False]))]
    tokens = np.zeros((8, max(map(len, answers))), np.int32)
    for row, answer in zip(tokens, answers * 2, strict=True):
        row[: len(answer)] = answer
    for row in range(4, 8):  # the second half is damaged
        tokens[row, rng.integers(0, 60, 2)] = rng.integers(0, tokenizer.vocab.size, 2)
    initial = grammar.initial(np.full(8, 2), np.array([2] * 4 + [2, 2, 3, 2]))
    last, states, rows = run_in_jax(Tables(*map(jnp.asarray, grammar.tables)), initial, tokens.T)
    state = initial
    for t in range(tokens.shape[1]):
        np.testing.assert_array_equal(rows[t], legal_row(grammar.tables, state, np))
        for ours, theirs in zip(state, states, strict=True):
            np.testing.assert_array_equal(ours, theirs[t])
        state = advance(grammar.tables, state, tokens[:, t], np)
        assert all(register.dtype == np.int32 for register in state)
    np.testing.assert_array_equal(state.node, last.node)
    assert (state.node[:3] == ACCEPT).all() and state.node[3] == ERROR


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 4), (5, 3)])
def test_the_registers_ahead_in_an_image_are_those_of_advancing(size):
    grammar, count, begun = grammar_of("one id a marker"), 7, 0
    vocab, tables = grammar.tokenizer.vocab, grammar.tables
    tokens = codec.encode_image(grammar.tokenizer, np.zeros(size, np.int32))
    state = grammar.initial(*np.reshape(size, (2, 1)))
    for place, token in enumerate(tokens):
        ahead, cells = image_ahead(tables, state, count, np)
        if tables.kind[state.node[0]] == GRID:
            there, walked = tokens[place:][:count], state
            assert (cells[0, : len(there)] >= 0).tolist() == [t >= vocab.visual_start for t in there]
            assert (cells[0, len(there) :] == -2).all()
            for step, next_token in enumerate(there):
                assert [int(x[0, step]) for x in ahead] == [int(x[0]) for x in walked]
                begun += 1
                walked = advance(tables, walked, np.array([next_token]), np)
        else:
            assert (cells == -2).all()
            assert all((x == y[:, None]).all() for x, y in zip(ahead, state, strict=True))
        state = advance(tables, state, np.array([token]), np)
    assert begun >= size[0] * size[1]


def test_grammars_of_all_modes_have_tables_of_one_shape():
    """So that they share the compiled programs that take these as arguments."""
    modes = (("direct",), ("multi_step",), ("direct", "reflection", "multi_step"))
    shapes = {
        tuple(np.shape(table) for table in Grammar(micro(), GrammarOptions(modes=chosen)).tables) for chosen in modes
    }
    assert len(shapes) == 1
