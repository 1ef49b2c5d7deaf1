"""Samples and trajectories <-> tokens, with the segment map and the selective loss mask.

Worked example at micro size (4x4 latent cells, one reference; `[..]` is one token or a run of one kind):

    [BOS][system][BOI]4*4[IMG][16 cells, 3 EOL][EOI][question][ASSISTANT][BSS]          prompt, never carries loss
    [BOI]4*4[IMG][..][EOI]                      G1
    [<Evaluate>][\\nInstruction: ][fail: ][wrong at b2] ... [</Evaluate>]                E1
    [<Step 2>][put a red circle at b2][</Step 2>]                                        S2
    [BOI]4*4[IMG][..][EOI]                      G2
    [<Evaluate>] ... [</Evaluate>]              E2
    [EOS]                                       belongs to the last evaluation

Loss (paper, section on supervised fine-tuning): direct G1 E1; reflection E_{K-1} R_{K-1} G_K E_K; multi-step E1 and
every S_i G_i E_i.  A failed image is never a target, so a lone G1 that failed its evaluation (training data for
evaluation alone) carries loss on E1 only, and not on EOS.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.protocol import grammar as grammar_lib
from ivr_jax.protocol import markers
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Round, Sample, Step, Trajectory

Codes = Mapping[str, np.ndarray]  # image name -> int [rows, columns] codes of the image tokenizer


PARTS = "GERS"  # kinds of segment: drawing, evaluation, reflection, step


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of an answer are `part` (G, E, R, S) of `round`, and carry loss or not."""

    part: str
    round: int
    start: int
    end: int
    loss: bool

    @property
    def name(self) -> str:
        """As in the paper: G1 E1 R1 G2 ...; the reflection that leads to round k + 1 is R_k."""
        return f"{self.part}{self.round - 1 if self.part == 'R' else self.round}"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A trajectory as tokens: `tokens` int32 [T] (prompt then answer), `answer_start`, and the answer's segments."""

    tokens: np.ndarray
    answer_start: int
    segments: tuple[Segment, ...]

    def loss_mask(self) -> np.ndarray:
        """bool [T]: True where the token is a target."""
        return self.target_parts() > 0

    def target_parts(self) -> np.ndarray:
        """uint8 [T]: 0 where the token is no target, else 1 + the index in `PARTS` of its kind of segment."""
        parts = np.zeros(len(self.tokens), np.uint8)
        for segment in self.segments:
            if segment.loss:
                where = slice(self.answer_start + segment.start, self.answer_start + segment.end)
                parts[where] = 1 + PARTS.index(segment.part)
        return parts


@dataclasses.dataclass(frozen=True)
class ParsedAnswer:
    """An answer read back: its trajectory, the codes of its images (names "G1", "G2", ...) and its segments."""

    trajectory: Trajectory
    codes: dict[str, np.ndarray]
    segments: tuple[Segment, ...]


# -- images -----------------------------------------------------------------------------------------------------------


def encode_image(tokenizer: TextTokenizer, codes: np.ndarray) -> list[int]:
    """Codes int [rows, columns] -> BOI "h*w" IMG row EOL row ... row EOI.  Raises UserError for codes out of range."""
    vocab = tokenizer.vocab
    if codes.ndim != 2 or 0 in codes.shape or codes.min() < 0 or codes.max() >= vocab.visual_size:
        raise UserError(
            f"image codes of shape {codes.shape} do not fit a vocabulary of {vocab.visual_size} visual tokens.",
            "Use the image tokenizer that the vocabulary was made for.",
        )
    rows = (codes + vocab.visual_start).tolist()
    grid = [token for row in rows for token in (*row, vocab.eol)][:-1]
    size = [tokenizer.encode(character)[0] for character in f"{codes.shape[0]}*{codes.shape[1]}"]
    return [vocab.boi, *size, vocab.img, *grid, vocab.eoi]


def decode_image(tokenizer: TextTokenizer, tokens: Sequence[int] | np.ndarray, offset: int = 0) -> np.ndarray:
    """The inverse of `encode_image`: int32 [rows, columns].

    Raises UserError naming position and reason; `offset` is where the block begins in what positions count from.
    """
    vocab = tokenizer.vocab
    tokens = np.asarray(tokens)

    def bad(position: int, reason: str) -> UserError:
        return UserError(f"image block does not parse at token {offset + position}: {reason}.", "Draw the image again.")

    if len(tokens) == 0 or tokens[0] != vocab.boi:
        raise bad(0, "it does not begin with BOI")
    start = np.flatnonzero(tokens == vocab.img)
    if len(start) != 1:
        raise bad(len(tokens), f"{len(start)} IMG tokens, not one")
    foreign = np.flatnonzero(tokens[1 : start[0]] >= vocab.text_size)
    if len(foreign):
        raise bad(1 + int(foreign[0]), "a special token stands in the size")
    size = tokenizer.decode(tokens[1 : start[0]]).split("*")
    if len(size) != 2 or not all(re.fullmatch("[1-9][0-9]{0,3}", side) for side in size):
        raise bad(1, "the size is not height*width in latent cells")
    rows, columns = map(int, size)
    first = int(start[0]) + 1
    expected = first + rows * (columns + 1)
    if len(tokens) != expected or tokens[-1] != vocab.eoi:
        raise bad(
            min(len(tokens), expected) - 1,
            f"{rows}*{columns} cells need {expected} tokens that end in EOI, not {len(tokens)}",
        )
    grid = np.append(tokens[first:-1], vocab.eol).reshape(rows, columns + 1)
    visual = (grid >= vocab.visual_start) & (grid < vocab.size)
    wrong = np.append(~visual[:, :-1], grid[:, -1:] != vocab.eol, axis=1)
    if wrong.any():
        raise bad(first + int(np.flatnonzero(wrong)[0]), "a visual token or an EOL is out of place")
    return (grid[:, :-1] - vocab.visual_start).astype(np.int32)


# -- prompts ----------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: TextTokenizer, sample: Sample, codes: Codes) -> list[int]:
    """BOS, the template of the sample's task with its references and question, BSS."""
    question = markers.check_user_text(sample.prompt, f"the prompt of sample {sample.key!r}")
    return _template(tokenizer, markers.SYSTEM[sample.task], sample.sources, codes, question)


def encode_unconditional_prompt(
    tokenizer: TextTokenizer, sample: Sample, codes: Codes, references: bool = True
) -> list[int]:
    """The prompts of classifier-free guidance: task and question dropped; without `references`, these too."""
    return _template(tokenizer, markers.SYSTEM_UNCONDITIONAL, sample.sources if references else (), codes, "")


def _template(tokenizer: TextTokenizer, system: str, sources: Sequence[str], codes: Codes, question: str) -> list[int]:
    """Texts that touch are encoded together: byte-pair tokens may reach from the template into the question."""
    images = [token for name in sources for token in encode_image(tokenizer, codes[name])]
    rest = f"{question}{markers.ASSISTANT}"
    texts = [*tokenizer.encode(system), *images, *tokenizer.encode(rest)] if images else tokenizer.encode(system + rest)
    return [tokenizer.vocab.bos, *texts, tokenizer.vocab.bss]


# -- answers ----------------------------------------------------------------------------------------------------


def loss_parts(trajectory: Trajectory) -> set[tuple[str, int]]:
    """The (part, round) pairs that carry loss: the selected subset O of the paper."""
    last = len(trajectory.rounds)
    if trajectory.mode is Mode.MULTI_STEP:
        later = {(part, k) for part in "SGE" for k in range(2, last + 1)}
        return {("E", 1)} | later
    parts = {("G", last), ("E", last)} if trajectory.rounds[-1].evaluation.passed else {("E", last)}
    if trajectory.mode is Mode.REFLECTION:
        parts |= {("E", last - 1), ("R", last)}
    return parts


def encode_answer(
    tokenizer: TextTokenizer, trajectory: Trajectory, codes: Codes
) -> tuple[list[int], tuple[Segment, ...]]:
    """Answer tokens, EOS included, and their segments.  Raises UserError for a text that would end itself early."""
    tokens: list[int] = []
    segments: list[Segment] = []
    selected = loss_parts(trajectory)

    def add(part: str, round_: int, ids: Sequence[int]) -> None:
        segments.append(Segment(part, round_, len(tokens), len(tokens) + len(ids), (part, round_) in selected))
        tokens.extend(ids)

    for k, round_ in enumerate(trajectory.rounds, 1):
        if isinstance(round_.cause, Reflection):
            add("R", k, encode_reflection(tokenizer, round_.cause))
        elif isinstance(round_.cause, Step):
            add("S", k, encode_step(tokenizer, round_.cause, k))
        add("G", k, encode_image(tokenizer, np.asarray(codes[round_.image])))
        add("E", k, encode_evaluation(tokenizer, round_.evaluation))
    ends_well = trajectory.rounds[-1].evaluation.passed
    last = segments[-1]
    if ends_well:
        segments[-1] = dataclasses.replace(last, end=last.end + 1)
    tokens.append(tokenizer.vocab.eos)
    return tokens, tuple(segments)


def encode_trajectory(tokenizer: TextTokenizer, trajectory: Trajectory, codes: Codes) -> Encoded:
    """Prompt and answer.  `codes` holds the codes of every source and drawn image."""
    prompt = encode_prompt(tokenizer, trajectory.sample, codes)
    answer, segments = encode_answer(tokenizer, trajectory, codes)
    return Encoded(np.array(prompt + answer, np.int32), len(prompt), segments)


def encode_evaluation(tokenizer: TextTokenizer, evaluation: Evaluation) -> list[int]:
    """`E`; raises UserError like `encode_answer`, as do the two below."""
    first = markers.AXIS[AXES[0]]
    said = evaluation.observation
    ids = [*tokenizer.marker(markers.EVALUATE_OPEN)]
    ids += _free_text(tokenizer, said, first) if said else tokenizer.marker(first)
    closes = [*(markers.AXIS[axis] for axis in AXES[1:]), markers.EVALUATE_CLOSE]
    for verdict, close in zip(evaluation.axes, closes, strict=True):
        ids += tokenizer.marker(markers.PASS if verdict.passed else markers.FAIL)
        ids += _free_text(tokenizer, verdict.reason, close)
    return ids


def encode_step(tokenizer: TextTokenizer, step: Step, round_: int) -> list[int]:
    """`S` that leads to `round_`."""
    text = _free_text(tokenizer, step.instruction, markers.STEP_CLOSE[round_])
    return [*tokenizer.marker(markers.STEP_OPEN[round_]), *text]


def encode_reflection(tokenizer: TextTokenizer, reflection: Reflection) -> list[int]:
    """`R`."""
    return [
        *tokenizer.marker(markers.ANALYSIS_OPEN),
        *_free_text(tokenizer, reflection.failure_analysis, markers.ANALYSIS_CLOSE),
        *tokenizer.marker(markers.PLAN_OPEN),
        *_free_text(tokenizer, reflection.improvement_plan, markers.PLAN_CLOSE),
    ]


def _free_text(tokenizer: TextTokenizer, text: str, close: str) -> list[int]:
    """A text and its closing marker; the marker must not stand in the text, which must not begin blank."""
    markers.check_user_text(text, f"the text {text[:60]!r} of a trajectory")
    ids, marker = tokenizer.encode(text), list(tokenizer.marker(close))
    first = next((i for i in range(len(ids) + 1) if (ids + marker)[i : i + len(marker)] == marker), 0)
    if first != len(ids) or tokenizer.is_blank(ids[0]):
        raise UserError(
            f"the text {text[:60]!r} holds the marker {close!r} that ends it, or begins with white space.",
            "Rewrite the text.",
        )
    return ids + marker


@dataclasses.dataclass(frozen=True)
class AnswerBound:
    """What an answer has at most: images, free texts, and tokens with its markers and EOS."""

    images: int
    texts: int
    tokens: int


def longest_answer(tokenizer: TextTokenizer, options: grammar_lib.GrammarOptions, image: int) -> AnswerBound:
    """The longest answer that the grammar allows: every text has `text_cap` tokens.

    Args:
      image: tokens of an image's block, with its markers (`encode_image`).
    """

    def size(*texts: str) -> int:
        return sum(len(tokenizer.marker(text)) for text in texts)

    verdict = max(size(markers.PASS), size(markers.FAIL))
    evaluation = size(markers.EVALUATE_OPEN, *markers.AXIS.values(), markers.EVALUATE_CLOSE) + len(AXES) * verdict
    reflection = size(markers.ANALYSIS_OPEN, markers.ANALYSIS_CLOSE, markers.PLAN_OPEN, markers.PLAN_CLOSE)
    bounds = []
    for mode in options.modes:
        steps = options.max_steps if mode == Mode.MULTI_STEP else 0
        reflections = options.max_reflections if mode == Mode.REFLECTION else 0
        images = 1 + steps + reflections
        texts = images * (1 + len(AXES)) + 2 * reflections + steps  # an observation and a reason for each axis
        lead_ins = sum(size(markers.STEP_OPEN[k], markers.STEP_CLOSE[k]) for k in range(2, 2 + steps))
        lead_ins += reflections * reflection
        tokens = images * (image + evaluation) + lead_ins + texts * options.text_cap + 1
        bounds.append(AnswerBound(images, texts, tokens))
    return max(bounds, key=lambda bound: bound.tokens)


def parse_answer(
    grammar: grammar_lib.Grammar, sample: Sample, tokens: np.ndarray, nodes: np.ndarray | None = None
) -> ParsedAnswer:
    """Reads an answer (int [T], up to and including EOS) back into a trajectory.

    `nodes` are the automaton's nodes before each token (`Grammar.run`, or what the sampler recorded); computed when
    not given.  Raises UserError with the position when the grammar does not accept the tokens.
    """
    tokens = np.asarray(tokens)
    if nodes is None:
        nodes = grammar.run(tokens[None])[0]
    if nodes[len(tokens)] != grammar_lib.ACCEPT or (nodes[: len(tokens)] <= grammar_lib.ACCEPT).any():
        wrong = np.flatnonzero(nodes <= grammar_lib.ACCEPT)
        position = int(wrong[0]) - 1 if len(wrong) else len(tokens)
        raise UserError(
            f"the answer is not well-formed at token {position} of {len(tokens)}.",
            "It ends too early, or leaves the grammar.",
        )
    runs = _runs(grammar, nodes[: len(tokens)])
    tokenizer, fields = grammar.tokenizer, {}
    codes: dict[str, np.ndarray] = {}
    for field, start, end in runs:
        key = (field.part, field.round, field.name)
        if field.part == "G":
            codes[f"G{field.round}"] = decode_image(tokenizer, tokens[start:end])
        elif field.name.endswith(".verdict"):
            fields[key] = tuple(tokens[start:end]) == tokenizer.marker(markers.PASS)
        elif field.marker:
            fields[key] = tokenizer.decode(tokens[start : end - len(tokenizer.marker(field.marker))])
    rounds = []
    for k in range(1, len(codes) + 1):
        axes = (AxisVerdict(fields["E", k, f"{axis}.verdict"], fields["E", k, f"{axis}.reason"]) for axis in AXES)
        evaluation = Evaluation(*axes, observation=fields["E", k, "observation"])
        cause: Reflection | Step | None = None
        if ("S", k, "instruction") in fields:
            cause = Step(fields["S", k, "instruction"])
        elif ("R", k, "improvement_plan") in fields:
            cause = Reflection(fields["R", k, "failure_analysis"], fields["R", k, "improvement_plan"])
        rounds.append(Round(cause, f"G{k}", evaluation))
    trajectory = Trajectory(sample, tuple(rounds))
    return ParsedAnswer(trajectory, codes, _segments(runs, trajectory))


def _runs(grammar: grammar_lib.Grammar, nodes: np.ndarray) -> list[tuple[grammar_lib.AnswerField, int, int]]:
    """Maximal runs of one field: (field, start, end)."""
    numbers = grammar.field_of[nodes]
    starts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
    return [(grammar.fields[numbers[a]], a, b) for a, b in zip(starts, [*starts[1:], len(nodes)], strict=True)]


def _segments(runs: Sequence[tuple[grammar_lib.AnswerField, int, int]], trajectory: Trajectory) -> tuple[Segment, ...]:
    """Runs joined to G, E, R, S; the tokens that choose how to continue belong to what they open, EOS to the last E."""
    selected, segments, pending = loss_parts(trajectory), [], None
    for field, start, end in runs:
        if not field.part:
            pending = start if pending is None else pending
            continue
        if segments and (segments[-1].part, segments[-1].round) == (field.part, field.round):
            segments[-1] = dataclasses.replace(segments[-1], end=end)
        else:
            begin = start if pending is None else pending
            segments.append(Segment(field.part, field.round, begin, end, (field.part, field.round) in selected))
        pending = None
    if trajectory.rounds[-1].evaluation.passed and pending is not None:
        segments[-1] = dataclasses.replace(segments[-1], end=runs[-1][2])
    return tuple(segments)
