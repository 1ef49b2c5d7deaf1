"""The micro-world's English: templates, their exact parser, and the phrases that make it cheap in tokens.

Edits are clauses, and a prompt is its clauses in order, each closed by a full stop; a step of a multi-step answer is
one clause closed by ", nothing else.":

    Put a red circle at b2. Swap b2 with c3. Paint the cell left of b2 blue.
    Swap b2 with c3, nothing else.

Every kind of edit has several wordings (the first is the canonical one, used in steps); `parse_prompt` and
`parse_step` read all of them, so parse(render(edit)) == edit.  `PHRASES` cuts the whole language into pieces for a
greedy longest-match tokenizer: "Put a" " red" " circle at" " b2" ". " - a space belongs to the piece that follows it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from ivr_jax.world.edits import COUNTS, DIRECTIONS, RELATIONS, Edit
from ivr_jax.world.scene import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    COLUMN_LETTERS,
    DEFECTS,
    LETTERS,
    MAX_SIDE,
    OBJECT_PATTERN,
    POSES,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    TONES,
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "put": ("Put a {thing} at {ref}", "Place a {thing} at {ref}", "Draw a {thing} at {ref}", "Add a {thing} at {ref}"),
    "replace": ("Substitute a {thing} at {ref}", "Swap in a {thing} at {ref}"),
    "clear": ("Clear {ref}", "Empty {ref}", "Erase {ref}"),
    "recolour": ("Paint {ref} {colour}", "Recolour {ref} {colour}", "Colour {ref} {colour}"),
    "move": ("Move {ref} to {to}", "Shift {ref} to {to}"),
    "swap": ("Swap {ref} with {to}", "Exchange {ref} with {to}"),
    "line": ("Line up {count} {things} in {line}", "Set out {count} {things} in {line}"),
    "duplicate": ("Copy {ref} to {to}", "Repeat {ref} to {to}"),
    "copy": ("Copy {ref} of image {image} to {to}", "Bring {ref} of image {image} to {to}"),
    "exchange": ("Replace {to} with {ref} of image {image}",),
    "dye": ("Give {to} the colour of {ref} of image {image}",),
    "keep": ("Keep only {ref}",),
    "complete": ("Complete {ref}", "Finish {ref}"),
    "fix": ("Fix {ref}", "Repair {ref}"),
    "texture": ("Make {ref} {texture}",),
    "resize": ("Resize {ref} to {size}",),
    "pose": ("Turn {ref} to point {pose}",),
    "letter": ("Rewrite {ref} as {letter}",),
    "mirror": ("Mirror the board",),
    "rotate": ("Rotate the board",),
    "slide": ("Slide everything {direction}",),
    "fall": ("Let everything fall",),
    "background": ("Change the background to {background}",),
    "style": ("Change the style to {style}",),
    "tone": ("Change the tone to {tone}",),
}

_PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
_SINGULAR = {plural: shape for shape, plural in _PLURALS.items()}
_CELL = rf"[{COLUMN_LETTERS}][1-{MAX_SIDE}]"
_REFERENCE = (rf"{_CELL}|the cell (?:{'|'.join(RELATIONS)}) {_CELL}"
              rf"|the (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES + LETTERS)})")
_CHOICES: dict[str, tuple[str, ...]] = {  # slots that hold one of a few words, all kept in `Edit.value`
    "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "pose": POSES, "letter": LETTERS,
    "direction": tuple(DIRECTIONS), "background": BACKGROUNDS, "style": STYLES, "tone": TONES,
}
_SLOTS: dict[str, str] = {
    "ref": _REFERENCE, "to": _REFERENCE, "thing": OBJECT_PATTERN,
    "things": rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(_SINGULAR)})",
    "line": rf"row [1-{MAX_SIDE}]|column [{COLUMN_LETTERS}]", "count": "|".join(COUNTS), "image": "[1-4]",
    **{name: "|".join(words) for name, words in _CHOICES.items()},
}
_NUMERALS = {number: word for word, number in COUNTS.items()}

FULL_STOP, NEXT, STEP_END = ".", ". ", ", nothing else."


def _compile(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{piece}>{_SLOTS[piece]})" if i % 2 else re.escape(piece)
                              for i, piece in enumerate(pieces)))


_PATTERNS = tuple((kind, _compile(template)) for kind, templates in TEMPLATES.items() for template in templates)


# -- edits <-> clauses ------------------------------------------------------------------------------------------------


def clause(edit: Edit, wording: int = 0) -> str:
    """The edit in words, without a full stop.  `wording` counts through the kind's synonyms, cyclically."""
    templates = TEMPLATES[edit.kind]
    colour, _, shape = edit.thing.partition(" ")
    return templates[wording % len(templates)].format(
        ref=edit.ref, to=edit.to, thing=edit.thing, line=edit.line, image=edit.image,
        things=f"{colour} {_PLURALS.get(shape, shape)}", count=_NUMERALS.get(edit.count, ""),
        **{name: edit.value for name in _CHOICES})


@functools.lru_cache(maxsize=65536)
def parse_clause(text: str) -> Edit | None:
    """The edit that a clause (no full stop) means; None when it is no clause of the language."""
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is not None:
            return _edit(kind, match.groupdict())
    return None


def _edit(kind: str, slots: Mapping[str, str]) -> Edit:
    values = dict(slots)
    fields: dict[str, str | int] = {name: values[name] for name in ("ref", "to", "thing", "line") if name in values}
    if "things" in values:
        colour, plural = values["things"].split(" ")
        fields["thing"] = f"{colour} {_SINGULAR[plural]}"
    if "count" in values:
        fields["count"] = COUNTS[values["count"]]
    if "image" in values:
        fields["image"] = int(values["image"])
    for name in _CHOICES:
        if name in values:
            fields["value"] = values[name]
    return Edit(kind, **fields)


def prompt(edits: Sequence[Edit], wordings: Sequence[int] | None = None) -> str:
    """The request for all edits in order; `wordings` picks a synonym for each."""
    wordings = wordings or [0] * len(edits)
    return NEXT.join(clause(edit, wording) for edit, wording in zip(edits, wordings, strict=True)) + FULL_STOP


def parse_prompt(text: str) -> tuple[Edit, ...] | None:
    """The edits of a request, or of a step; None when any clause is outside the language."""
    text = text.strip()
    for end in (STEP_END, FULL_STOP):
        if text.endswith(end):
            text = text.removesuffix(end)
            break
    edits = tuple(parse_clause(part) for part in text.split(NEXT))
    return None if None in edits else edits


def step(edit: Edit) -> str:
    """One sub-instruction: the canonical clause, and that all else stays."""
    return clause(edit) + STEP_END


def parse_step(text: str) -> Edit | None:
    """The single edit of a sub-instruction, with or without its ending; None when it is not exactly one."""
    edits = parse_prompt(text)
    return edits[0] if edits is not None and len(edits) == 1 else None


# -- verdicts, critiques, plans ----------------------------------------------------------------------------------------

RULER, SIZE = "the ruler", "the image size"  # what can be wrong beside a scene's places
PASSED, EMPTY = "as asked", "empty"
REDRAWN = "redrawn"  # what a damaged ruler or a wrong size should become
WRONG = "wrong at"
MORE = " and more"
FAULTS = ("Under-editing", "Wrong target", "Over-editing", "Artefact")  # failure types, in the order they are named
NO_FAULT, NO_PLAN = "No fault.", "Keep it."
MAX_PLACES = 4
_PLACE = rf"{_CELL}|{'|'.join(ATTRIBUTES)}|{RULER}|{SIZE}"
_CONTENT = rf"{EMPTY}|{OBJECT_PATTERN}|{'|'.join(BACKGROUNDS + STYLES + TONES + (REDRAWN,))}"
_ENTRY = re.compile(rf"(?P<place>{_PLACE}) (?P<content>{_CONTENT})")
_PLACES = re.compile(_PLACE)


def reason(wrong: Sequence[str]) -> str:
    """Why an axis passed (nothing `wrong`) or failed, naming at most `MAX_PLACES` places: "wrong at b2 c1"."""
    if not wrong:
        return PASSED
    return " ".join((WRONG, *wrong[:MAX_PLACES])) + (MORE if len(wrong) > MAX_PLACES else "")


def failure_analysis(faults: Mapping[str, Sequence[str]]) -> str:
    """{fault type: places} -> "Under-editing at b2 c1. Artefact at a3."; types without places are left out."""
    parts = [f"{fault} at {' '.join(faults[fault])}" for fault in FAULTS if faults.get(fault)]
    return NEXT.join(parts) + FULL_STOP if parts else NO_FAULT


def parse_failure_analysis(text: str) -> dict[str, tuple[str, ...]] | None:
    """The inverse of `failure_analysis`; None when the text is something else."""
    if text.strip() == NO_FAULT:
        return {}
    faults: dict[str, tuple[str, ...]] = {}
    for part in text.strip().removesuffix(FULL_STOP).split(NEXT):
        fault, _, places = part.partition(" at ")
        if fault not in FAULTS or not re.fullmatch(rf"(?:{_PLACE})(?: (?:{_PLACE}))*", places):
            return None
        faults[fault] = faults.get(fault, ()) + tuple(_PLACES.findall(places))
    return faults


def plan(entries: Sequence[tuple[str, str]]) -> str:
    """((place, what it should hold), ...) -> "Make b2 red circle, c1 empty."; "empty" stands for nothing."""
    return "Make " + ", ".join(f"{place} {content}" for place, content in entries) + FULL_STOP if entries else NO_PLAN


def parse_plan(text: str) -> tuple[tuple[str, str], ...] | None:
    """The inverse of `plan`; None when the text is something else."""
    text = text.strip()
    if text == NO_PLAN:
        return ()
    if not text.startswith("Make "):
        return None
    matches = [_ENTRY.fullmatch(part) for part in text[len("Make ") :].removesuffix(FULL_STOP).split(", ")]
    return None if None in matches else tuple((m["place"], m["content"]) for m in matches)


# -- observations -----------------------------------------------------------------------------------------------------

CELLS = ". Wanted, seen:"
SAME, DIFFERENT = "matches.", "differs."  # the mark that closes what is said of a cell
BLOT = "unknown blot"  # what a cell shows that holds no object of the world
_SEEN = rf"{_CONTENT}|{BLOT}"
_CHANGE = re.compile(rf" (?P<place>{_PLACE}) (?P<content>{_CONTENT})")
_CELL_ROW = re.compile(rf" (?P<wanted>{_CONTENT}) (?P<seen>{_SEEN}) (?P<mark>matches|differs)\.")


@dataclasses.dataclass(frozen=True)
class Observation:
    """What an evaluation writes down before its verdicts.

    Attributes:
      edits: for every edit of the request, in order, its canonical clause and the (place, content) of each change that
        it makes; a later change of the same place replaces an earlier one.
      places: (wanted content, seen content, whether they agree) for every place in reading order.
      broken: what else is wrong: the ruler, or the size of the image, of which then no place can be said.
    """

    edits: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    places: tuple[tuple[str, str, bool], ...]
    broken: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """The changes of all edits, in order."""
        return tuple(change for _, changes in self.edits for change in changes)


def observation(found: Observation) -> str:
    """"Put a red circle at b2, b2 red circle. Clear a1, a1 empty. Wanted, seen: empty red circle differs. ..." """
    edits = (said + ("," + "".join(f" {place} {content}" for place, content in changes) if changes else "")
             for said, changes in found.edits)
    places = "".join(f" {wanted} {seen} {SAME if same else DIFFERENT}" for wanted, seen, same in found.places)
    return f"{NEXT.join(edits)}{CELLS}{places}" + "".join(f" {name} {DIFFERENT}" for name in found.broken)


def parse_observation(text: str) -> Observation | None:
    """The inverse of `observation`; None when the text is something else."""
    head, separator, body = text.partition(CELLS)
    if not separator:
        return None
    edits = []
    for part in head.split(NEXT):
        said, _, listed = part.partition(",")
        changes = _matches(_CHANGE, listed)
        if parse_clause(said) is None or changes is None:
            return None
        edits.append((said, tuple((m["place"], m["content"]) for m in changes)))
    broken = []
    for name in (SIZE, RULER):
        if body.endswith(ending := f" {name} {DIFFERENT}"):
            body = body.removesuffix(ending)
            broken.insert(0, name)
    places = _matches(_CELL_ROW, body)
    if places is None:
        return None
    rows = tuple((m["wanted"], m["seen"], m["mark"] == "matches") for m in places)
    return Observation(tuple(edits), rows, tuple(broken))


def _matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]] | None:
    """Matches of `pattern` that make up the whole text one after the other; None when they do not."""
    found, at = [], 0
    while at < len(text):
        match = pattern.match(text, at)
        if match is None:
            return None
        found.append(match)
        at = match.end()
    return found


# -- phrases -----------------------------------------------------------------------------------------------------------


def _pieces() -> list[str]:
    """The literal text of the templates, cut at the slots; spaces go to the piece that follows them."""
    found = []
    for templates in TEMPLATES.values():
        for template in templates:
            text = re.sub(r" \{(\w+)\}", "\0", template.replace(" of image {image}", "\0").replace(" at {ref}", "\0"))
            found += [piece for piece in text.split("\0") if piece]
    return found


def _phrases() -> tuple[str, ...]:
    words = [*COLOURS, *SIZES, *TEXTURES, *DEFECTS[1:], *(f"pointing {pose}" for pose in POSES[1:]), *POSES, *SHAPES,
             *LETTERS, *(f"{shape} at" for shape in SHAPES + LETTERS), "at", *(f"{p} in" for p in _SINGULAR),
             *COUNTS, *(f"row {i + 1}" for i in range(MAX_SIDE)), *(f"column {c}" for c in COLUMN_LETTERS),
             *(f"the cell {relation}" for relation in RELATIONS), "the", *(f"of image {i}" for i in range(1, 5)),
             *BACKGROUNDS, *STYLES, *TONES, *ATTRIBUTES, EMPTY, REDRAWN, RULER, SIZE]
    cells = [f" {letter}{i + 1}" for i in range(MAX_SIDE) for letter in COLUMN_LETTERS]
    fixed = [FULL_STOP, NEXT, STEP_END, ",", PASSED, WRONG, MORE, *(f"{fault} at" for fault in FAULTS), "Make",
             NO_FAULT, NO_PLAN, "Changes", CELLS, f" {SAME}", f" {DIFFERENT}", f" {BLOT}"]
    # Colour and shape in one piece, so that what a cell holds is one token.
    fixed += [f" {colour} {shape}" for colour in COLOURS for shape in SHAPES + LETTERS]
    fixed += [f" {colour} {things} in" for colour in COLOURS for things in _SINGULAR]
    return tuple(dict.fromkeys([*fixed, *cells, *(f" {word}" for word in words), *_pieces()]))


PHRASES: tuple[str, ...] = _phrases()
