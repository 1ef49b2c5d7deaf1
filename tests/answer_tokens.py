"""What the tests of the token language share: two small tokenizers, trajectories of every kind, a second recogniser.

The recogniser is a regular expression over token ids, written from the rules of an answer and knowing nothing of the
automaton's tables.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from ivr_jax.protocol import markers, vocabulary
from ivr_jax.protocol.grammar import GrammarOptions
from ivr_jax.protocol.text import PhraseTokenizer, TextTokenizer
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Round, Sample, Step, Trajectory

WHITE = " \t\n\r\f\v"
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")  # that a text of a user may hold


def without_scores(found: Evaluation) -> Evaluation:
    """What the tokens of an evaluation hold: observation, verdicts and reasons."""
    return dataclasses.replace(found, **{axis: dataclasses.replace(getattr(found, axis), score=None) for axis in AXES})


def token_content(answer: Trajectory) -> Trajectory:
    """What the tokens of an answer hold: no scores, no step evaluations."""
    rounds = (Round(r.cause, r.image, without_scores(r.evaluation)) for r in answer.rounds)
    return Trajectory(answer.sample, tuple(rounds))


def micro(visual: int = 8) -> PhraseTokenizer:
    """A marker is one id here."""
    return PhraseTokenizer(("Put a", " red", " circle", "ok"), visual)


class ByteTokenizer:
    """Every marker is several ordinary text tokens, as in a vocabulary that must not grow.

    `spelling` spells some closing markers anew, so that they begin again inside themselves.
    """

    def __init__(self, spelling: Mapping[str, str] | None = None, visual: int = 8):
        self._spelling = dict(spelling or {})
        self.vocab = vocabulary.micro(256, 0, visual)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")

    def marker(self, text: str) -> tuple[int, ...]:
        return tuple(self._spelling.get(text, text).encode())

    def is_blank(self, token: int) -> bool:
        return not bytes((token,)).strip()


def self_overlapping() -> ByteTokenizer:
    """Markers whose search must fall back to a shorter match: "aaab" after "aaa", "abac" after "ab"."""
    spelling = {text: "aab" for text in markers.STEP_CLOSE.values()}
    spelling |= {markers.ANALYSIS_CLOSE: "aaab", markers.PLAN_CLOSE: "abac", markers.EVALUATE_CLOSE: "ababb"}
    return ByteTokenizer(spelling | {markers.AXIS["quality"]: "\n\na"})


def fits(tokenizer: TextTokenizer, text: str, close: str) -> bool:
    """Whether `text` may stand before the closing marker: not blank at first, and the marker not found sooner."""
    ids, marker = tokenizer.encode(text), list(tokenizer.marker(close))
    stream = ids + marker
    first = next(i for i in range(len(stream)) if stream[i : i + len(marker)] == marker)
    return text[0] not in WHITE and first == len(ids)


def evaluation(passed: bool | Sequence[bool], reason: str = "a") -> Evaluation:
    verdicts = [passed] * 4 if isinstance(passed, bool) else passed
    return Evaluation(*(AxisVerdict(v, reason) for v in verdicts))


def trajectory(causes: Sequence, passed: Sequence[bool], sources: tuple[str, ...] = ()) -> Trajectory:
    """One round a verdict; `causes` lead to the second round, the third ...; images are G1, G2 ..."""
    rounds = [
        Round(cause, f"G{k}", evaluation(verdict))
        for k, (cause, verdict) in enumerate(zip([None, *causes], passed, strict=True), 1)
    ]
    return Trajectory(Sample("key", "x", sources), tuple(rounds))


@st.composite
def answered(draw, tokenizer: TextTokenizer, alphabet: str | None = None, longest: int = 8):
    """A trajectory whose control flow follows its verdicts, and the codes of all its images."""

    def text(close: str) -> str:
        written = st.text(CHARACTERS if alphabet is None else alphabet, min_size=1, max_size=longest)
        return draw(written.map(lambda t: t if fits(tokenizer, t, close) else "x"))

    def judged(passed: bool) -> Evaluation:
        failing = frozenset() if passed else draw(st.frozensets(st.integers(0, 3), min_size=1))
        closes = [*(markers.AXIS[axis] for axis in AXES[1:]), markers.EVALUATE_CLOSE]
        verdicts = [AxisVerdict(i not in failing, text(close)) for i, close in enumerate(closes)]
        said = text(markers.AXIS[AXES[0]]) if draw(st.booleans()) else ""
        return Evaluation(*verdicts, observation=said)

    mode = draw(st.sampled_from(Mode))
    most = {Mode.DIRECT: 0, Mode.REFLECTION: 3, Mode.MULTI_STEP: 5}[mode]
    extra = draw(st.integers(min(1, most), most))
    last_passes = extra < most or mode is Mode.DIRECT or draw(st.booleans())
    rounds = []
    for k in range(1, extra + 2):
        cause = None
        if k > 1 and mode is Mode.REFLECTION:
            cause = Reflection(text(markers.ANALYSIS_CLOSE), text(markers.PLAN_CLOSE))
        elif k > 1:
            cause = Step(text(markers.STEP_CLOSE[k]))
        rounds.append(Round(cause, f"G{k}", judged(last_passes if k == extra + 1 else False)))
    sources = tuple(f"source {i}" for i in range(draw(st.integers(0, 3))))
    prompt = draw(st.text(CHARACTERS, max_size=20).map(lambda t: t if t.strip(WHITE) else "paint"))
    answer = Trajectory(Sample("key", prompt, sources), tuple(rounds))
    sizes = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 9, 10, 12]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    visual = tokenizer.vocab.visual_size
    codes = {name: rng.integers(0, visual, draw(sizes)).astype(np.int32) for name in (*sources, *answer.images)}
    return answer, codes


class Recogniser:
    """Says whether tokens are an answer, by a regular expression: characters stand for ids."""

    def __init__(self, tokenizer: TextTokenizer, options: GrammarOptions, rows: int, columns: int):
        self._tokenizer, self._options, self._size = tokenizer, options, (rows, columns)
        vocab = tokenizer.vocab
        self._text = f"[{self._chars([0])}-{self._chars([vocab.text_size - 1])}]"
        blank = [i for i in range(vocab.text_size) if tokenizer.is_blank(i)]
        self._start = f"(?![{self._chars(blank)}])"
        self._pattern = re.compile(self._image() + self._control(1, None), re.DOTALL)

    def accepts(self, tokens: Sequence[int]) -> bool:
        return self._pattern.fullmatch(self._chars(tokens)) is not None

    @staticmethod
    def _chars(ids: Sequence[int]) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)  # far from every character with a meaning in a pattern

    def _marker(self, text: str) -> str:
        return self._chars(self._tokenizer.marker(text))

    def _free(self, close: str) -> str:
        close = self._marker(close)
        return f"{self._start}(?:(?!{close}){self._text}){{1,{self._options.text_cap}}}{close}"

    def _image(self) -> str:
        vocab, (rows, columns) = self._tokenizer.vocab, self._size
        visual = f"[{self._chars([vocab.visual_start])}-{self._chars([vocab.size - 1])}]{{{columns}}}"
        size = self._chars([self._tokenizer.encode(c)[0] for c in f"{rows}*{columns}"])
        grid = self._chars([vocab.eol]).join([visual] * rows)
        return f"{self._chars([vocab.boi])}{size}{self._chars([vocab.img])}{grid}{self._chars([vocab.eoi])}"

    def _evaluation(self, verdict: str) -> str:
        closes = [*(markers.AXIS[axis] for axis in AXES[1:]), markers.EVALUATE_CLOSE]
        first = markers.AXIS[AXES[0]]
        opening = f"{self._marker(markers.EVALUATE_OPEN)}(?:{self._marker(first)}|{self._free(first)})"
        return opening + "".join(f"(?:{verdict}){self._free(close)}" for close in closes)

    def _control(self, round_: int, mode: Mode | None) -> str:
        """An evaluation and what may follow it."""
        options = self._options
        passes, fails = self._marker(markers.PASS), self._marker(markers.FAIL)
        good, any_ = self._evaluation(passes), self._evaluation(f"{passes}|{fails}")
        end = self._chars([self._tokenizer.vocab.eos])
        on = []
        if mode is not Mode.MULTI_STEP and "reflection" in options.modes and round_ <= options.max_reflections:
            reflect = self._marker(markers.ANALYSIS_OPEN) + self._free(markers.ANALYSIS_CLOSE)
            reflect += self._marker(markers.PLAN_OPEN) + self._free(markers.PLAN_CLOSE)
            on.append(reflect + self._image() + self._control(round_ + 1, Mode.REFLECTION))
        if mode is not Mode.REFLECTION and "multi_step" in options.modes and round_ <= options.max_steps:
            step = self._marker(markers.STEP_OPEN[round_ + 1]) + self._free(markers.STEP_CLOSE[round_ + 1])
            on.append(step + self._image() + self._control(round_ + 1, Mode.MULTI_STEP))
        more = "|".join(on)
        if options.force and round_ == 1:
            return f"{any_}(?:{more})"
        if not options.follow_verdict:
            return f"{any_}(?:{end}|{more})" if on else any_ + end
        return f"(?:{good}{end}|(?!{good}){any_}(?:{more or end}))"
