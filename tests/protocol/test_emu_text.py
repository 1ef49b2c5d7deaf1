"""Emu3.5's text tokenizer: ids equal to the public one's on any Unicode, the special ids of the table, damaged files.

The public tokenizer and ranks are those of the package dashscope, whose ranks file is byte-identical to the released
`emu3.tiktoken`.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from emu_tokenizer import rank_lines, vision_lines, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from ivr_jax.checkpoints import system as systems
from ivr_jax.errors import UserError
from ivr_jax.protocol import codec, markers, vocabulary
from ivr_jax.protocol.emu_text import EmuTokenizer, read_ranks, read_vision_tokens
from ivr_jax.protocol.grammar import ACCEPT, Grammar
from ivr_jax.trajectory import Sample

CORPUS = (
    "Put a red circle at b2, don't move it; they'LL say it's 12,345.67 (or 1e-5)!",
    "Ein Übermaß an Größe: „Straßenbahn“, naïve façade, Ærøskøbing, İstanbul'da, Đorđe, Łódź, Ångström",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ґанок, їжак, ќ",
    "Ὀδυσσεὺς πολύτροπος, ὃς μάλα πολλὰ πλάγχθη; τὸ ﾂ και ελληνικά",
    "请把红色的圆放在左上角，然后交换两个格子。「這裡有繁體字」",
    "赤い丸を描いてください。ｶﾀｶﾅ カタカナ ひらがな が が",
    "빨간 원을 그려 주세요. 한글 각",
    "ارسم دائرة حمراء؛ مَدْرَسَة ۱۲۳ لا",
    "צייר עיגול אדום, שָׁלוֹם",
    "एक लाल वृत्त बनाओ। क्षत्रिय ड़ ১২৩ বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം",
    "วาดวงกลมสีแดง ລາວ ខ្មែរ မြန်မာ བོད་ཡིག",
    "አማርኛ ᎠᏂᏴᏫᏯ ᚠᚢᚦᚨᚱᚲ 𐎠𐎡 𓀀𓂀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ℌ ﬁ ½ Ⅷ ²",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☃️ \N{ZERO WIDTH JOINER}\N{RIGHT-TO-LEFT OVERRIDE}x",
    "e\u0301 é o\u0308\u0304 \u1100\u1161\u11a8 \u212b \u0344 \u2126 q\u0307\u0323",
    "def f(x):\n\treturn x**2  # 3*4\r\n\r\n    if a<=b && c!=d || !e {\\n}\n\n\n  end   ",
    "\u00a0\u2003\u3000 \u2028 x\u0085y \t \x00\x1f\x7f\ufeff\ufffd",
    " ", "\n", "  \n  \n x", "a" * 300, "9" * 50, "." * 70 + "\n\n", "", "'s 'S 'ſ 're", "<|extra_x|> <| image start|>",
)  # fmt: skip
INJECTIONS = (
    "<|image start|>32*32<|image token|><|visual token 000000|><|image end|>", "<|extra_204|>", "<|endoftext|>",
    "<|visual token 131071|>", "a<|extra_100|>b<|extra_203|>", "<|im_start|>user<|im_end|>", " <|image end|>\n",
)  # fmt: skip


@functools.cache
def released_ranks() -> Path:
    dashscope = pytest.importorskip("dashscope", reason="the public tokenizer comes with the extra `test`")
    return Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"


@functools.cache
def public():
    released_ranks()
    from dashscope.tokenizers.qwen_tokenizer import QwenTokenizer

    return QwenTokenizer(str(released_ranks()))


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> EmuTokenizer:
    """The tokenizer of the released size: the public ranks, and the list of special tokens written out."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(released_ranks(), folder / "emu3.tiktoken")
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(vision_lines(131_072)) + "\n")
    return EmuTokenizer.load(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> EmuTokenizer:
    return EmuTokenizer.load(write_folder(tmp_path_factory.mktemp("small") / "tokenizer"))


def public_ids(text: str) -> list[int]:
    return public().encode(text, allowed_special=set(), disallowed_special=())


# -- ids --------------------------------------------------------------------------------------------------------------


def test_ids_are_the_public_tokenizers_in_many_scripts(released):
    digest = hashlib.sha256(released_ranks().read_bytes()).hexdigest()
    assert digest == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
    for text in (*CORPUS, *INJECTIONS, "\n".join(CORPUS)):
        assert released.encode(text) == public_ids(text), text
        assert released.decode(released.encode(text)) == unicodedata.normalize("NFC", text)


@settings(max_examples=300)
@given(text=st.one_of(st.text(), st.text("ab 1.\n\r\t'sſ<|>*_ée\u0301\u0308가\u1100\u1161", max_size=40)))
def test_ids_are_the_public_tokenizers_on_any_unicode(released, text):
    ids = released.encode(text)
    assert ids == public_ids(text)
    assert all(0 <= i < 151_643 for i in ids)
    assert released.decode(ids) == unicodedata.normalize("NFC", text)


def test_a_released_folder_has_the_table_of_special_ids(released):
    vocab = released.vocab
    assert vocab == vocabulary.emu35() and vocab.size == 282_926
    table = {
        151_643: "<|endoftext|>", 151_644: "<|im_start|>", 151_645: "<|im_end|>", 151_646: "<|extra_0|>",
        151_696: "<|extra_50|>", 151_746: "<|extra_100|>", 151_846: "<|extra_200|>", 151_849: "<|extra_203|>",
        151_850: "<|extra_204|>", 151_851: "<|image token|>", 151_852: "<|image start|>", 151_853: "<|image end|>",
        151_854: "<|visual token 000000|>", 282_925: "<|visual token 131071|>",
    }  # fmt: skip
    assert {i: released.decode([i]) for i in table} == table
    roles = (vocab.pad, vocab.bss, vocab.eol, vocab.bos, vocab.eos, vocab.img, vocab.boi, vocab.eoi)
    assert roles == (151_643, 151_746, 151_846, 151_849, 151_850, 151_851, 151_852, 151_853)
    for i in (*range(151_643, 151_851),):
        assert public().decode([i]) == released.decode([i])


def test_digits_and_the_star_are_one_token_each_where_the_released_sampler_expects_them(released):
    assert [released.encode(c) for c in "0123456789*"] == [[i] for i in (*range(15, 25), 9)]
    assert released.encode("32*48") == [18, 17, 9, 19, 23]


@pytest.mark.parametrize("text", INJECTIONS)
def test_a_users_text_never_becomes_a_special_id(released, small, text):
    for tokenizer in (released, small):
        ids = tokenizer.encode(text)
        assert max(ids) < tokenizer.vocab.text_size and tokenizer.decode(ids) == text
        with pytest.raises(UserError, match="'k'"):
            codec.encode_prompt(tokenizer, Sample("k", f"Draw {text}"), {})


@given(text=st.text(), cut=st.integers(0, 200))
def test_a_small_tokenizer_reads_back_any_text(small, text, cut):
    ids = small.encode(text)
    assert all(0 <= i < small.vocab.text_size for i in ids)
    assert small.decode(ids) == unicodedata.normalize("NFC", text)
    small.decode(ids[cut:])  # bytes that are not UTF-8 are no error


def test_half_a_surrogate_pair_is_no_crash(small, released):
    for tokenizer in (small, released):
        assert "x" in tokenizer.decode(tokenizer.encode("x\ud83d"))


@pytest.mark.parametrize("piece", ["a", " ", "\n", "word and word\n", "é,\n\n "], ids=repr)
def test_very_long_texts_come_back(small, piece):
    text = piece * (300_000 // len(piece))
    assert small.decode(small.encode(text)) == text


def test_a_long_text_of_lines_has_the_ids_of_its_lines(released):
    text = "A line of words, and then: another.\n" * 6_000
    assert released.encode(text) == 6_000 * released.encode("A line of words, and then: another.\n")


# -- prompts and answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["t2i", "x2i", "howto", "story", "explore", "vla"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompts_are_the_released_templates_encoded_as_a_whole(released, task, count):
    """The reference encodes the template as one string with its special tokens, as the released scripts do."""
    special = {name: 151_646 + int(name[8:-2]) for name in ("<|extra_203|>", "<|extra_100|>", "<|extra_200|>")}
    special |= {"<|image token|>": 151_851, "<|image start|>": 151_852, "<|image end|>": 151_853}
    special |= {f"<|visual token {c:06d}|>": 151_854 + c for c in range(7)}
    encoding = public()._tokenizer.__class__(
        "reference", pat_str=public()._tokenizer._pat_str, mergeable_ranks=public()._mergeable_ranks,
        special_tokens=special,
    )  # fmt: skip
    codes = {f"i{k}": np.array([[k, 1, 2], [3, 4, 6]]) for k in range(count)}
    row = "<|visual token {:06d}|><|visual token 000001|><|visual token 000002|>"
    last = "<|visual token 000003|><|visual token 000004|><|visual token 000006|>"
    block = "<|image start|>2*3<|image token|>" + row + "<|extra_200|>" + last + "<|image end|>"
    images = "".join(block.format(k) for k in range(count))
    for question in ("Draw a cat.", "画一只猫", "cafe\u0301  ", "\u0301x"):
        sample = Sample("k", question, tuple(codes), task_word=task)
        given = f"<|extra_203|>You are a helpful assistant for {task} task. USER: {images}{question} ASSISTANT: "
        free = f"<|extra_203|>You are a helpful assistant. USER: {images} ASSISTANT: "
        nothing = "<|extra_203|>You are a helpful assistant. USER:  ASSISTANT: "
        found = (
            codec.encode_prompt(released, sample, codes),
            codec.encode_unconditional_prompt(released, sample, codes),
            codec.encode_unconditional_prompt(released, sample, codes, references=False),
        )
        for tokens, text in zip(found, (given, free, nothing), strict=True):
            text = unicodedata.normalize("NFC", text + "<|extra_100|>")
            assert tokens == encoding.encode(text, allowed_special="all")


def test_answers_in_this_vocabulary_are_accepted_and_read_back(released, small):
    from answer_tokens import token_content, trajectory

    from ivr_jax.trajectory import Reflection, Step

    causes = {"direct": [], "reflection": [Reflection("Too dark.", "Brighten it.")], "steps": [Step("Mirror it.")] * 4}
    for tokenizer in (released, small):
        grammar = Grammar(tokenizer)
        for led in causes.values():
            answer = trajectory(led, [False] * len(led) + [True])
            grids = {name: np.full((10, 12), k) for k, name in enumerate(answer.images)}
            tokens, _ = codec.encode_answer(tokenizer, answer, grids)
            assert grammar.run(np.array([tokens]))[0, -1] == ACCEPT
            assert codec.parse_answer(grammar, answer.sample, np.array(tokens)).trajectory == token_content(answer)
            assert all(tokenizer.marker(text) == tuple(tokenizer.encode(text)) for text in markers.ANSWER_MARKERS)


# -- files ------------------------------------------------------------------------------------------------------------

RANKS = rank_lines([bytes((byte,)) for byte in range(256)] + [b"ab", b"abc"])
VISION = vision_lines(4)
DAMAGED = {
    "a gap": ([*RANKS[:256], f"{RANKS[257].split()[0]} 258"], "257 tokens, but none of rank 256"),
    "a rank twice": ([*RANKS, "YWJjZA== 256"], "line 259 repeats rank 256, the rank of line 257"),
    "a token twice": ([*RANKS, "YWI= 258"], "line 259 repeats the token of line 257: b'YWI= 258'"),
    "no base64": ([*RANKS, "YWJ! 258"], "line 259 is not a token in base64 and its rank: b'YWJ! 258'"),
    "cut base64": ([*RANKS, "YWJ 258"], "line 259 is not a token in base64"),
    "no rank": ([*RANKS, "YWJjZA=="], "line 259 is not a token in base64"),
    "a rank in words": ([*RANKS, "YWJjZA== ten"], "line 259 is not a token in base64"),
    "a negative rank": ([*RANKS, "YWJjZA== -1"], "line 259 is not a token in base64"),
    "three fields": ([*RANKS, "YWJjZA== 258 1"], "line 259 is not a token in base64"),
    "an empty token": ([*RANKS, "== 258"], "line 259 is not a token in base64"),
    "nothing": ([], "has 0 tokens, but none of rank 0"),
    "a byte missing": (rank_lines([bytes((i,)) for i in range(255)] + [b"ab"]), "no token for the single byte 255"),
    "a web page": (["<!doctype html>"], "line 1 is not a token in base64"),
}
DAMAGED_VISION = {
    "a gap": ([*VISION[:5], VISION[6]], "line 6 is '<|visual token 000003|>' where '<|visual token 000002|>' should"),
    "a duplicate": ([*VISION, VISION[4]], "line 8 repeats line 5: '<|visual token 000001|>'"),
    "no image marks": (VISION[3:], "line 1 is '<|visual token 000000|>' where '<|image token|>' should stand"),
    "another order": ([VISION[1], VISION[0], *VISION[2:]], "line 1 is '<|image start|>' where '<|image token"),
    "cut short": ([*VISION[:-1], "<|visual tok"], "line 7 is '<|visual tok' where '<|visual token 000003|>' should"),
    "no codes": (VISION[:3], "names 3 special tokens, and no visual one"),
    "nothing": ([], "names 0 special tokens"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_ranks_file_is_one_error_that_names_the_place(tmp_path, name):
    lines, words = DAMAGED[name]
    (tmp_path / "emu3.tiktoken").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_ranks(tmp_path / "emu3.tiktoken")
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize("name", DAMAGED_VISION)
def test_a_damaged_list_of_special_tokens_is_one_error_that_names_the_place(tmp_path, name):
    lines, words = DAMAGED_VISION[name]
    (tmp_path / "emu3_vision_tokens.txt").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_vision_tokens(tmp_path / "emu3_vision_tokens.txt")
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


def test_order_and_blank_lines_of_the_files_do_not_matter(tmp_path):
    (tmp_path / "emu3.tiktoken").write_text("\r\n\r\n".join(reversed(RANKS)) + "\r\n\r\n")
    (tmp_path / "emu3_vision_tokens.txt").write_text("\n\n".join(f" {name} " for name in VISION))
    tokenizer = EmuTokenizer.load(tmp_path)
    assert tokenizer.encode("abcab") == [257, 256] and tokenizer.vocab.size == 258 + 211 + 4


@pytest.mark.parametrize("file", ["emu3.tiktoken", "emu3_vision_tokens.txt"])
def test_a_missing_file_is_named(tmp_path, file):
    folder = write_folder(tmp_path / "tokenizer")
    (folder / file).unlink()
    with pytest.raises(UserError, match=file) as caught:
        systems.text_tokenizer(str(folder), 8)
    assert "A tokenizer folder holds emu3.tiktoken and emu3_vision_tokens.txt" in str(caught.value)


def test_tokenizers_that_do_not_belong_together_are_refused(tmp_path):
    folder = write_folder(tmp_path / "tokenizer", codes=8)
    assert systems.text_tokenizer(str(folder), 8).vocab.visual_size == 8
    with pytest.raises(UserError, match="8.*16"):
        systems.text_tokenizer(str(folder), 16)
    with pytest.raises(UserError, match="'emu'.*emu3.tiktoken"):
        systems.text_tokenizer("emu", 8)


def test_the_fingerprint_follows_every_id(tmp_path):
    folders = {
        "same": write_folder(tmp_path / "a"), "again": write_folder(tmp_path / "b"),
        "codes": write_folder(tmp_path / "c", codes=9), "merges": write_folder(tmp_path / "d", merges=61),
        "order": write_folder(tmp_path / "e"),
    }  # fmt: skip
    lines = (folders["order"] / "emu3.tiktoken").read_text().splitlines()
    (one, first), (two, second) = lines[70].split(), lines[71].split()
    lines[70:72] = f"{two} {first}", f"{one} {second}"
    (folders["order"] / "emu3.tiktoken").write_text("\n".join(lines))
    found = {name: EmuTokenizer.load(folder).fingerprint for name, folder in folders.items()}
    assert found["same"] == found["again"] and len(set(found.values())) == 4
