"""The grammar of an answer as one table-driven automaton; `legal_row` is the mask of constrained decoding.

Three consumers share this single definition: the sampler asks `legal_row` which ids may come next, the format reward
asks whether a sequence ends in `accept`, and the parser (`codec.parse_answer`) reads the fields off the nodes that a
sequence visits.

Token ids fall into a few dozen *classes* (`class_of[id]`): every id with a role of its own (digits, BOI, EOL, the
pieces of the markers ...), all other text, all visual ids, and class 0 for ids that are never legal.  The automaton
proper is `next_node[node, class]`; -1 is an error.  Rounds are unrolled, so the table knows which round it is in, which
mode, and whether an axis of the current evaluation has failed.  Only three things need counters: the digits of an
image's size, the position in its grid, and the length of a free text.  They live in `GrammarState`, int32 arrays of
one value a sequence, and `advance` is the same code for numpy and for jax.numpy inside a jitted loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from ivr_jax.config import Positive, Range, Section
from ivr_jax.errors import UserError
from ivr_jax.protocol import markers
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.trajectory import AXES, MAX_REFLECTIONS, MAX_STEPS, Mode

ERROR, ACCEPT = 0, 1  # the first two nodes
ILLEGAL, TEXT, VISUAL = 0, 1, 2  # the first three classes
NODE_MULTIPLE = 512  # of the nodes of an automaton
ANY_TEXT = -1  # key of a node's default transition for every text class
PLAIN, HEIGHT, WIDTH, GRID, END_ROW, FREE_TEXT = range(6)  # node kinds: what `advance` does beside the table
INTERLEAVED = "interleaved"  # stands alone among the modes: texts and images in any order, as Emu3.5 was trained
FREE = (-1, -1)  # image size: the first image chooses it, two digits a side, and the others keep it


@dataclasses.dataclass(frozen=True)
class GrammarOptions(Section, name="grammar"):
    """Which answers are legal.

    Attributes:
      modes: modes the answer may use; ("direct",) forces direct generation, ("interleaved",) allows texts and images
        in any order, with nothing evaluated (what a model that never saw a trajectory can say).
      force: with a single non-direct mode, continue after the first evaluation whatever its verdict.
      max_reflections, max_steps: rounds after the first image.
      follow_verdict: control flow follows the verdict (pass ends the answer, fail continues while rounds are left).
      text_cap: longest free text, in tokens; then its closing marker is forced.
    """

    modes: tuple[str, ...] = tuple(mode.value for mode in Mode)
    force: bool = False
    max_reflections: Annotated[int, Range(0, MAX_REFLECTIONS)] = MAX_REFLECTIONS
    max_steps: Annotated[int, Range(0, MAX_STEPS)] = MAX_STEPS
    follow_verdict: bool = True
    text_cap: Positive = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {mode.value for mode in Mode}
        if not self.modes or not (set(self.modes) <= known or tuple(self.modes) == (INTERLEAVED,)):
            raise UserError(
                f"grammar modes {self.modes!r} are not among {sorted(known)}.",
                f"Name at least one of them, or {INTERLEAVED} alone.",
            )


@dataclasses.dataclass(frozen=True)
class AnswerField:
    """What a run of tokens is: `part` G, E, R, S or "" (end), in `round` 1, 2, ..., and the field's name in it."""

    part: str
    round: int
    name: str
    marker: str = ""  # a free text's run ends with this closing marker


class GrammarState(NamedTuple):
    """Registers, int32 [B] each.

    `want_*` is the forced size of every image in latent cells, 0 when each may have any (1-99), and -1 when the next
    one shall choose it, two digits a side, for all that follow.
    """

    node: Any
    height: Any
    width: Any
    rows_left: Any
    cells_left: Any
    text_left: Any
    want_height: Any
    want_width: Any


class Tables(NamedTuple):
    """The automaton as arrays: a pytree, so that a jitted function can take it as an argument.

    next_node int32 [nodes, classes]; legal bool [nodes + 13, classes] (the extra rows are one digit, "*" or IMG alone,
    and any digit); kind, capped int32 [nodes]; class_of int32 [V]; text_cap int32 [].
    """

    next_node: Any
    legal: Any
    kind: Any
    capped: Any
    class_of: Any
    text_cap: Any


class Grammar:
    """The automaton for one tokenizer.  `tables` holds the arrays, `fields[field_of[node]]` says what a node reads."""

    def __init__(self, tokenizer: TextTokenizer, options: GrammarOptions | None = None):
        self.tokenizer = tokenizer
        self.options = options or GrammarOptions()
        self._assign_classes()
        self._transitions: list[dict[int, int]] = [{}, {}]
        self._kinds, self._capped, self._field_ids = [PLAIN, PLAIN], [ERROR, ERROR], [0, 0]
        self.fields: list[AnswerField] = [AnswerField("", 0, "end")]
        self.start = self._interleaved() if tuple(self.options.modes) == (INTERLEAVED,) else self._answer()
        self._pad_nodes()
        self.field_of = np.array(self._field_ids, np.int32)
        self.tables = self._tabulate()

    # -- classes ------------------------------------------------------------------------------------------------

    def _assign_classes(self) -> None:
        vocab, tokenizer = self.tokenizer.vocab, self.tokenizer
        self._class_of = np.zeros(vocab.size, np.int32)
        self._class_of[: vocab.text_size] = TEXT
        self._class_of[vocab.visual_start :] = VISUAL
        digits = [self._single(str(d)) for d in range(10)]
        roles = [*digits, self._single("*"), vocab.img, vocab.boi, vocab.eoi, vocab.eol, vocab.eos]
        roles += [i for text in markers.ANSWER_MARKERS for i in tokenizer.marker(text)]
        self._blank = 3 + len(dict.fromkeys(roles))
        for number, token in enumerate(dict.fromkeys(roles)):
            self._class_of[token] = 3 + number
        self._digit_class, self._star_class, self._img_class = 3, 13, 14
        text_ids = np.arange(vocab.text_size)
        plain = text_ids[self._class_of[: vocab.text_size] == TEXT]
        self._class_of[[i for i in plain if tokenizer.is_blank(int(i))]] = self._blank
        self._other = self._blank + 1  # special ids without a role in an answer: legal in interleaved ones alone
        between = np.arange(vocab.text_size, vocab.visual_start)
        roleless = between[self._class_of[between] == ILLEGAL]
        self._class_of[roleless[~np.isin(roleless, (vocab.pad, vocab.bos, vocab.bss))]] = self._other
        self._classes = self._other + 1
        self._text_classes = sorted(set(self._class_of[: vocab.text_size].tolist()))
        self._blank_classes = {int(self._class_of[i]) for i in text_ids if tokenizer.is_blank(int(i))}

    def _single(self, text: str) -> int:
        ids = self.tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(
                f"the text tokenizer writes {text!r} as {len(ids)} tokens.", "Image sizes need one token a digit."
            )
        return ids[0]

    def _classes_of(self, text: str) -> tuple[int, ...]:
        return tuple(int(self._class_of[i]) for i in self.tokenizer.marker(text))

    # -- building blocks: each takes the node that follows and returns the node to enter ---------------------------

    def _node(self, field: int, kind: int = PLAIN) -> int:
        self._transitions.append({})
        self._kinds.append(kind)
        self._capped.append(ERROR)
        self._field_ids.append(field)
        return len(self._kinds) - 1

    def _field(self, part: str, round_: int, name: str, marker: str = "") -> int:
        self.fields.append(AnswerField(part, round_, name, marker))
        return len(self.fields) - 1

    def _choice(self, field: int, branches: Sequence[tuple[tuple[int, ...], int]]) -> int:
        """A trie over class sequences: each branch is (classes to read, node that follows)."""
        entry = self._node(field)
        for classes, following in branches:
            node = entry
            for class_ in classes[:-1]:
                if class_ not in self._transitions[node]:
                    self._transitions[node][class_] = self._node(field)
                node = self._transitions[node][class_]
            if classes[-1] in self._transitions[node]:
                raise UserError(
                    "two markers of the answer begin with the same tokens in this tokenizer.",
                    "Use another text tokenizer.",
                )
            self._transitions[node][classes[-1]] = following
        return entry

    def _literal(self, field: int, text: str, following: int) -> int:
        return self._choice(field, [(self._classes_of(text), following)])

    def _free_text(self, field: int, close: str, following: int) -> int:
        """At least one token, not blank, up to the closing marker (Knuth-Morris-Pratt over its classes)."""
        pattern = self._classes_of(close)
        forced = [following]  # forced[k]: read the last k tokens of the marker, then follow
        for class_ in reversed(pattern):
            forced.append(self._choice(field, [((class_,), forced[-1])]))
        size = len(pattern)
        matched = [self._node(field, FREE_TEXT) for _ in pattern]  # some text, then j tokens of the marker
        opening = [self._node(field, FREE_TEXT) for _ in pattern]  # nothing but j tokens that begin like the marker
        for j, node in enumerate(matched):
            self._transitions[node][ANY_TEXT] = matched[0]
            for class_ in set(pattern):
                k = _longest_match(pattern, (*pattern[:j], class_))
                self._transitions[node][class_] = following if k == size else matched[k]
            self._capped[node] = forced[size - j]
        for j, node in enumerate(opening):
            self._transitions[node] = dict(self._transitions[matched[j]])
            self._transitions[node][pattern[j]] = opening[j + 1] if j + 1 < size else ERROR
            if j == 0:  # also where the marker itself begins blank
                self._transitions[node] |= {class_: ERROR for class_ in self._blank_classes}
            self._capped[node] = forced[size]
        return opening[0]

    def _optional_text(self, field: int, close: str, following: int) -> int:
        """A free text or nothing, up to the closing marker; a text does not begin like the marker."""
        entry, (first, *rest) = self._free_text(field, close, following), self._classes_of(close)
        self._transitions[entry][first] = self._choice(field, [(tuple(rest), following)]) if rest else following
        return entry

    def _image(self, round_: int, following: int) -> int:
        field = self._field("G", round_, "image")
        return self._literal_token(field, self.tokenizer.vocab.boi, self._after_boi(field, following))

    def _after_boi(self, field: int, following: int) -> int:
        digits = range(self._digit_class, self._digit_class + 10)
        end = self._literal_token(field, self.tokenizer.vocab.eoi, following)
        grid, end_row = self._node(field, GRID), self._node(field, END_ROW)
        assert (grid, end_row) == (end + 1, end + 2)  # `advance` relies on this order
        self._transitions[grid][VISUAL] = grid
        self._transitions[end_row][self._role(self.tokenizer.vocab.eol)] = grid
        height, width = self._size(field, HEIGHT), self._size(field, WIDTH)
        for nodes, closing, target in ((height, self._star_class, width[0]), (width, self._img_class, grid)):
            first, second, last = nodes
            self._transitions[first] |= {d: second for d in digits[1:]}
            self._transitions[second] |= {d: last for d in digits} | {closing: target}
            self._transitions[last][closing] = target
        return height[0]

    def _size(self, field: int, kind: int) -> tuple[int, int, int]:
        return self._node(field, kind), self._node(field, kind), self._node(field, kind)

    def _role(self, token: int) -> int:
        return int(self._class_of[token])

    def _literal_token(self, field: int, token: int, following: int) -> int:
        return self._choice(field, [((self._role(token),), following)])

    def _evaluation(self, round_: int, passed: int, failed: int) -> int:
        """Four axes; the table remembers whether one of them has failed."""
        after = (passed, failed)
        closes = [*(markers.AXIS[axis] for axis in AXES[1:]), markers.EVALUATE_CLOSE]
        for axis, close in reversed(list(zip(AXES, closes, strict=True))):
            verdict = self._field("E", round_, f"{axis}.verdict")
            reasons = [self._field("E", round_, f"{axis}.reason", close) for _ in range(2)]
            texts = [self._free_text(reasons[fail], close, after[fail]) for fail in range(2)]
            one = (self._classes_of(markers.PASS), self._classes_of(markers.FAIL))
            after = tuple(self._choice(verdict, [(one[0], texts[fail]), (one[1], texts[1])]) for fail in range(2))
        observation = self._field("E", round_, "observation", markers.AXIS[AXES[0]])
        said = self._optional_text(observation, markers.AXIS[AXES[0]], after[0])
        return self._literal(self._field("E", round_, "open"), markers.EVALUATE_OPEN, said)

    # -- the answer -----------------------------------------------------------------------------------------------

    def _answer(self) -> int:
        """Builds from the last round to the first."""
        options, end = self.options, (self._role(self.tokenizer.vocab.eos),)
        steps = self._rounds(Mode.MULTI_STEP, options.max_steps if Mode.MULTI_STEP in options.modes else 0)
        reflections = self._rounds(Mode.REFLECTION, options.max_reflections if Mode.REFLECTION in options.modes else 0)
        on = [branch for branch in (reflections, steps) if branch]
        if options.force and not on:
            raise UserError(
                "grammar.force needs a mode that has rounds after the first image.",
                "Add reflection or multi_step to grammar.modes.",
            )
        return self._image(1, self._verdict_control(1, on, end, force=options.force))

    def _interleaved(self) -> int:
        """Texts of at most `text_cap` tokens and images in any order, then EOS; an image or EOS follows a full text."""
        vocab, field = self.tokenizer.vocab, self._field("T", 1, "text")
        text, full = self._node(field, FREE_TEXT), self._node(field)
        structural = [self._role(token) for token in (vocab.boi, vocab.img, vocab.eoi, vocab.eol, vocab.eos)]
        texts = set(range(TEXT, self._classes)) - {VISUAL, *structural}
        structure = {self._role(vocab.boi): self._after_boi(self._field("G", 1, "image"), text), structural[-1]: ACCEPT}
        self._transitions[text] = {class_: text for class_ in texts} | structure
        self._transitions[full] = structure
        self._capped[text] = full
        return text

    def _rounds(self, mode: Mode, count: int) -> tuple[tuple[int, ...], int] | None:
        """The branch (first classes, node that follows) into round 2 of `mode`, or None without rounds."""
        branch = None
        for round_ in range(count + 1, 1, -1):
            control = self._verdict_control(round_, [branch] if branch else [], (self._role(self.tokenizer.vocab.eos),))
            branch = (self._reflection if mode is Mode.REFLECTION else self._step)(round_, self._image(round_, control))
        return branch

    def _verdict_control(
        self, round_: int, on: list[tuple[tuple[int, ...], int]], end: tuple[int, ...], force: bool = False
    ) -> int:
        """The evaluation of a round, and where the answer may go after it."""
        field = self._field("", round_, "control")
        stop = (end, ACCEPT)
        if force:
            passed = failed = self._choice(field, on)
        elif self.options.follow_verdict:
            passed, failed = self._choice(field, [stop]), self._choice(field, on or [stop])
        else:
            passed = failed = self._choice(field, [stop, *on])
        return self._evaluation(round_, passed, failed)

    def _reflection(self, round_: int, following: int) -> tuple[tuple[int, ...], int]:
        analysis = self._field("R", round_, "failure_analysis", markers.ANALYSIS_CLOSE)
        opening = self._field("R", round_, "open")
        plan = self._field("R", round_, "improvement_plan", markers.PLAN_CLOSE)
        plan_text = self._free_text(plan, markers.PLAN_CLOSE, following)
        analysis_text = self._free_text(
            analysis, markers.ANALYSIS_CLOSE, self._literal(opening, markers.PLAN_OPEN, plan_text)
        )
        return self._classes_of(markers.ANALYSIS_OPEN), analysis_text

    def _step(self, round_: int, following: int) -> tuple[tuple[int, ...], int]:
        close = markers.STEP_CLOSE[round_]
        text = self._field("S", round_, "instruction", close)
        return self._classes_of(markers.STEP_OPEN[round_]), self._free_text(text, close, following)

    # -- tables -----------------------------------------------------------------------------------------------------

    def _pad_nodes(self) -> None:
        """Nodes that nothing leads to: grammars of all modes have tables of one shape, and so share programs."""
        missing = -len(self._kinds) % NODE_MULTIPLE
        self._transitions += [{} for _ in range(missing)]
        self._kinds += [PLAIN] * missing
        self._capped += [ERROR] * missing
        self._field_ids += [0] * missing

    def _tabulate(self) -> Tables:
        nodes = len(self._kinds)
        table = np.full((nodes, self._classes), ERROR, np.int32)
        for node, transitions in enumerate(self._transitions):
            if ANY_TEXT in transitions:
                table[node, self._text_classes] = transitions[ANY_TEXT]
            for class_, following in transitions.items():
                if class_ != ANY_TEXT:
                    table[node, class_] = following
        legal = np.zeros((nodes + 13, self._classes), bool)
        legal[:nodes] = table != ERROR
        legal[np.arange(nodes, nodes + 12), np.arange(self._digit_class, self._digit_class + 12)] = True
        legal[nodes + 12, self._digit_class : self._digit_class + 10] = True
        return Tables(
            table,
            legal,
            np.array(self._kinds, np.int32),
            np.array(self._capped, np.int32),
            self._class_of,
            np.int32(self.options.text_cap),
        )

    # -- running ------------------------------------------------------------------------------------------------------

    def initial(self, height: Any, width: Any) -> GrammarState:
        """State before the first answer token; `height`, `width` int [B]: forced size in cells, 0 or `FREE`."""
        height, width = np.asarray(height, np.int32), np.asarray(width, np.int32)
        sizes = (1 <= height) & (height <= 99) & (1 <= width) & (width <= 99)
        if not (sizes | (height == width) & np.isin(height, (0, *FREE))).all():
            raise UserError(
                "an image's size must be 1-99 latent cells a side.", "Resize it, or leave the size free (0)."
            )
        zero, cap = np.zeros_like(height), np.full_like(height, self.options.text_cap)
        return GrammarState(np.full_like(height, self.start), zero, zero, zero, zero, cap, height, width)

    def run(self, tokens: np.ndarray, height: Any = None, width: Any = None) -> np.ndarray:
        """Nodes *before* each token: int32 [B, T+1] for tokens int [B, T].  ACCEPT after EOS, ERROR after a mistake."""
        zeros = np.zeros(len(tokens), np.int32)
        state = self.initial(zeros if height is None else height, zeros if width is None else width)
        nodes = [state.node]
        for t in range(tokens.shape[1]):
            state = advance(self.tables, state, tokens[:, t], np)
            nodes.append(state.node)
        return np.stack(nodes, 1)


def _longest_match(pattern: tuple[int, ...], seen: tuple[int, ...]) -> int:
    """Length of the longest prefix of `pattern` that `seen` ends with."""
    return next(k for k in range(min(len(pattern), len(seen)), -1, -1) if seen[len(seen) - k :] == pattern[:k])


def legal_row(tables: Tables, state: GrammarState, xp: Any) -> Any:
    """int32 [B]: the row of `tables.legal` that says which classes may come next.  `xp`: numpy or jax.numpy."""
    kind = tables.kind[state.node]
    nodes = tables.next_node.shape[0]
    in_height = kind == HEIGHT
    value, want = (
        xp.where(in_height, state.height, state.width),
        xp.where(in_height, state.want_height, state.want_width),
    )
    closing = xp.where(in_height, nodes + 10, nodes + 11)
    digit = xp.where((value == 0) & (want >= 10), want // 10, want % 10)
    forced = xp.where(value == want, closing, nodes + digit)
    in_size = in_height | (kind == WIDTH)
    second = (want < 0) & (value > 0) & (value < 10)
    free = xp.where(in_size & second, nodes + 12, state.node)
    return xp.where(in_size & (want > 0), forced, free).astype(xp.int32)


def advance(tables: Tables, state: GrammarState, token: Any, xp: Any) -> GrammarState:
    """Reads one token a sequence: int [B].  ERROR and ACCEPT are final.  `xp`: numpy or jax.numpy."""
    class_ = tables.class_of[token]
    kind = tables.kind[state.node]
    legal = tables.legal[legal_row(tables, state, xp), class_]
    node = xp.where(legal, tables.next_node[state.node, class_], ERROR)
    node = xp.where(state.node == ACCEPT, ACCEPT, node)

    digit = class_ - 3  # digits are classes 3-12
    is_digit = (digit >= 0) & (digit < 10)
    height = xp.where((kind == HEIGHT) & is_digit, state.height * 10 + digit, state.height)
    width = xp.where((kind == WIDTH) & is_digit, state.width * 10 + digit, state.width)
    begin = (kind != HEIGHT) & (tables.kind[node] == HEIGHT)
    height, width = xp.where(begin, 0, height), xp.where(begin, 0, width)

    enters_grid = (kind == WIDTH) & ~is_digit
    chosen = enters_grid & (state.want_height < 0)
    want_height, want_width = xp.where(chosen, height, state.want_height), xp.where(chosen, width, state.want_width)
    cells = xp.where(
        enters_grid | (kind == END_ROW), width, xp.where(kind == GRID, state.cells_left - 1, state.cells_left)
    )
    row_ends = (kind == GRID) & (cells == 0)
    rows = xp.where(enters_grid, height, xp.where(row_ends, state.rows_left - 1, state.rows_left))
    alive = node > ACCEPT
    node = xp.where(
        row_ends & alive, xp.where(rows == 0, node - 1, node + 1), node
    )  # the grid node's neighbours: EOI, END_ROW

    in_text, was_text = tables.kind[node] == FREE_TEXT, kind == FREE_TEXT
    text_left = xp.where(in_text & was_text, state.text_left - 1, xp.where(in_text, tables.text_cap, state.text_left))
    node = xp.where(in_text & was_text & (text_left <= 0), tables.capped[node], node)
    registers = (node, height, width, rows, cells, text_left, want_height, want_width)
    return GrammarState(*(x.astype(xp.int32) for x in registers))


def image_ahead(tables: Tables, state: GrammarState, count: int, xp: Any) -> tuple[GrammarState, Any]:
    """The registers before each of the next tokens of an image, in closed form: what `advance` would give one by one.

    Args:
      state: int32 [B]; rows whose node is not a grid are given back as they are, `count` times.
      count: how many tokens ahead.  `xp`: numpy or jax.numpy.

    Returns:
      GrammarState of int32 [B, count], and cells int32 [B, count]: which cell of the image comes next, -1 where it is
      EOL or EOI, and -2 beyond the image, where the registers mean nothing, and in rows without a grid.
    """
    whole = GrammarState(*(xp.repeat(x[:, None], count, axis=1) for x in state))
    height, columns, line = whole.height, whole.width, xp.maximum(whole.width, 0) + 1
    place = (height - whole.rows_left) * line + columns - whole.cells_left + xp.arange(count)[None, :]
    row, column = place // line, place % line
    here = (tables.kind[state.node] == GRID)[:, None] & (row < height)
    is_cell, last = column < columns, row == height - 1
    node = whole.node + xp.where(is_cell, 0, xp.where(last, -1, 1))  # the grid node's neighbours: EOI, END_ROW
    ahead = whole._replace(
        node=node, rows_left=height - row - ~is_cell, cells_left=xp.where(is_cell, columns - column, 0)
    )
    states = GrammarState(*(xp.where(here, new, old).astype(xp.int32) for new, old in zip(ahead, whole, strict=True)))
    cells = xp.where(here, xp.where(is_cell, row * columns + column, -1), -2)
    return states, cells.astype(xp.int32)
