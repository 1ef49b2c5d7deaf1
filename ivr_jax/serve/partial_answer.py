"""Tokens so far as the parts of an answer, and edited parts as the tokens to continue from.

    tokens   BOI 4*4 IMG v v v v EOL v v            <Evaluate> Instruction: pass: one red circle ...
    parts    image, round 1, 4 x 4, 6 cells drawn   evaluation, round 1, instruction passed: "one red circle ..."

The grammar's nodes say what each token is, exactly as for the parser of finished answers (`codec.parse_answer`); here
the answer may end anywhere, also within an image or a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.protocol import codec, markers
from ivr_jax.protocol.grammar import ACCEPT, ERROR, AnswerField, GrammarState, Tables, advance
from ivr_jax.protocol.joined_grammar import JoinedGrammar
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Reflection, Step

IMAGE, EVALUATION, REFLECTION, STEP, TEXT = "image", "evaluation", "reflection", "step", "text"
OBSERVATION = "observation"  # what an evaluation may begin with
_KINDS = {"G": IMAGE, "E": EVALUATION, "R": REFLECTION, "S": STEP, "T": TEXT}


@dataclasses.dataclass(frozen=True)
class Part:
    """Tokens [start, end) of an answer: `kind` image, evaluation, reflection, step or text, of `round` 1, 2, ...

    Attributes:
      complete: whether its last token is there.
      texts: a reflection's `failure_analysis` and `improvement_plan`, a step's `instruction`, a text's `text`, as far
        as they go; of an evaluation the reasons by axis, and its `observation` where it has one.
      verdicts: of an evaluation, by axis; an axis that was not reached is missing.
      codes: of an image, int32 [rows, columns] with -1 where nothing is drawn yet; None before its size is known.
    """

    kind: str
    round: int
    start: int
    end: int
    complete: bool
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    verdicts: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    codes: np.ndarray | None = None

    @property
    def passed(self) -> bool | None:
        """Of a complete evaluation: whether all axes passed."""
        if self.kind != EVALUATION or not self.complete:
            return None
        return all(self.verdicts.get(axis, False) for axis in AXES)


class PartialAnswer:
    """The tokens of one answer in progress, and the grammar's node before each and after the last."""

    def __init__(self, grammar: JoinedGrammar, state: GrammarState):
        """`state`: before the first token, arrays of one value (`JoinedGrammar.initial`)."""
        self._grammar, self.state = grammar, state
        self.tokens: list[int] = []
        self.nodes: list[int] = [int(state.node[0])]

    @property
    def ended(self) -> bool:
        """Whether the answer is complete."""
        return self.nodes[-1] == ACCEPT

    def parts(self) -> tuple[Part, ...]:
        """The parts so far.  Raises UserError when the tokens have left the grammar."""
        if ERROR in self.nodes:
            wrong = self.nodes.index(ERROR) - 1
            raise UserError(f"the answer leaves the grammar at token {wrong}.", "Undo the edit, or edit another part.")
        runs = self._runs()
        parts: list[Part] = []
        at, opening = 0, 0  # `opening`: first token that chose how to continue; it belongs to what it opens
        while at < len(runs):
            field = runs[at][0]
            last = at
            while last + 1 < len(runs) and self._goes_on(field, runs[last + 1]):
                last += 1
            if field.part in _KINDS:
                complete = last + 1 < len(runs) or self.ended or self._next_field().part != field.part
                parts.append(dataclasses.replace(self._part(runs[at : last + 1], complete), start=opening))
                opening = parts[-1].end
            at = last + 1
        return tuple(parts)

    def _goes_on(self, field: AnswerField, run: tuple[AnswerField, int, int]) -> bool:
        """Whether a run belongs to the part that began with `field`; BOI always begins one."""
        boi = self.tokens[run[1]] == self._grammar.tokenizer.vocab.boi
        return not boi and (run[0].part, run[0].round) == (field.part, field.round)

    def _next_field(self) -> AnswerField:
        return self._grammar.fields[self._grammar.field_of[self.nodes[-1]]]

    def _runs(self) -> list[tuple[AnswerField, int, int]]:
        """Maximal runs of tokens of one field: (field, start, end).  BOI begins one, and belongs to its image: an
        interleaved answer reads it where a text could continue.
        """
        count = len(self.tokens)
        if count == 0:
            return []
        boi = np.array(self.tokens) == self._grammar.tokenizer.vocab.boi
        numbers = self._grammar.field_of[np.where(boi, self.nodes[1:], self.nodes[:count])]
        starts = [0, *(np.flatnonzero((np.diff(numbers) != 0) | boi[1:]) + 1).tolist()]
        return [(self._grammar.fields[numbers[a]], a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]

    def _part(self, runs: Sequence[tuple[AnswerField, int, int]], complete: bool) -> Part:
        first, tokenizer = runs[0][0], self._grammar.tokenizer
        start, end = runs[0][1], runs[-1][2]
        kind = _KINDS[first.part]
        if kind == IMAGE:
            codes = partial_codes(tokenizer, self.tokens[start:end])
            return Part(kind, first.round, start, end, complete, codes=codes)
        texts: dict[str, str] = {}
        verdicts: dict[str, bool] = {}
        for field, a, b in runs:
            tokens = self.tokens[a:b]
            axis, _, aspect = field.name.partition(".")
            if aspect == "verdict":
                if b < len(self.tokens) or self._next_field().name != field.name:
                    verdicts[axis] = tuple(tokens) == tuple(tokenizer.marker(markers.PASS))
            elif field.marker:
                text = _without_marker(tokenizer, tokens, field.marker)
                if text or axis != OBSERVATION:
                    texts[axis] = text
            elif kind == TEXT:
                texts["text"] = _readable(tokenizer.decode(_texts_only(tokenizer, tokens)))
        return Part(kind, first.round, start, end, complete, texts, verdicts)


def read_tokens(tables: Tables, answers: Sequence[PartialAnswer], fresh: Sequence[Sequence[int]]) -> None:
    """Appends new tokens to each answer; all answers together, token by token.

    Args:
      fresh: the new tokens of each.
    """
    longest = max(map(len, fresh), default=0)
    if longest == 0:
        return
    lengths = np.array([len(tokens) for tokens in fresh])
    padded = np.zeros((len(fresh), longest), np.int64)
    for number, new in enumerate(fresh):
        padded[number, : len(new)] = new
    state = GrammarState(*(np.concatenate(x) for x in zip(*(answer.state for answer in answers), strict=True)))
    nodes = np.empty(padded.shape, np.int32)
    for t in range(longest):
        after = advance(tables, state, padded[:, t], np)
        on = t < lengths
        state = GrammarState(*(np.where(on, new, old) for new, old in zip(after, state, strict=True)))
        nodes[:, t] = state.node
    for number, (partial, new) in enumerate(zip(answers, fresh, strict=True)):
        partial.state = GrammarState(*(x[number : number + 1] for x in state))
        partial.tokens += [int(token) for token in new]
        partial.nodes += nodes[number, : len(new)].tolist()


def partial_codes(tokenizer: TextTokenizer, tokens: Sequence[int]) -> np.ndarray | None:
    """Codes int32 [rows, columns] of an image block that may end anywhere, -1 where it has no token yet; None before
    its size is complete."""
    vocab, block = tokenizer.vocab, np.asarray(tokens)
    begins = np.flatnonzero(block == vocab.img)
    if not len(begins):
        return None
    sides = tokenizer.decode(block[1 : begins[0]].tolist()).split("*")
    rows, columns = map(int, sides)
    visual = block[begins[0] + 1 :]
    visual = visual[visual >= vocab.visual_start][: rows * columns] - vocab.visual_start
    codes = np.full(rows * columns, -1, np.int32)
    codes[: len(visual)] = visual
    return codes.reshape(rows, columns)


def filled(codes: np.ndarray) -> np.ndarray:
    """Codes with something to decode where nothing is drawn yet: the cell above, else the first code."""
    whole = codes.copy()
    for row in range(len(whole)):
        missing = whole[row] < 0
        whole[row, missing] = whole[row - 1, missing] if row else 0
    return whole


def masked(pixels: np.ndarray, codes: np.ndarray, grey: int = 168) -> np.ndarray:
    """Pixels uint8 [height, width, 3] of decoded `filled(codes)`, grey where nothing is drawn yet."""
    factor = pixels.shape[0] // codes.shape[0]
    missing = np.kron(codes < 0, np.ones((factor, factor), bool))
    return np.where(missing[..., None], np.uint8(grey), pixels)


def encode_part(tokenizer: TextTokenizer, part: Part, round_: int) -> list[int]:
    """Tokens of an edited part.  Raises UserError for a text that is empty, or that would end itself early."""
    if part.kind == IMAGE:
        if part.codes is None:
            raise UserError("an edited image has no codes.", "Give an image.")
        return codec.encode_image(tokenizer, part.codes)
    if part.kind == EVALUATION:
        verdicts = {axis: AxisVerdict(part.verdicts[axis], part.texts[axis]) for axis in AXES}
        observation = part.texts.get(OBSERVATION, "")
        return codec.encode_evaluation(tokenizer, Evaluation(**verdicts, observation=observation))
    if part.kind == REFLECTION:
        return codec.encode_reflection(tokenizer, Reflection(**part.texts))
    if part.kind == STEP:
        return codec.encode_step(tokenizer, Step(**part.texts), round_)
    raise UserError("this part cannot be edited.", "Edit an image, an evaluation, a reflection or a step.")


def _without_marker(tokenizer: TextTokenizer, tokens: Sequence[int], marker: str) -> str:
    """The text before its closing marker, or before what may be the beginning of it."""
    closing = tokenizer.marker(marker)
    for length in range(min(len(closing), len(tokens)), 0, -1):
        if tuple(tokens[len(tokens) - length :]) == tuple(closing[:length]):
            tokens = tokens[: len(tokens) - length]
            break
    return _readable(tokenizer.decode(tokens))


def _texts_only(tokenizer: TextTokenizer, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token < tokenizer.vocab.text_size]


def _readable(text: str) -> str:
    """Without an incomplete character at the end: byte-pair tokens may split one."""
    return text.rstrip("\ufffd")
