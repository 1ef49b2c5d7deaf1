"""The one reader of what a model answered: from its text to checked values.

Judgements, plans, root causes, reflections, the judge of RL and the benchmarks all read answers here.  Servers with
structured output answer with the JSON that the schema asks for.  Others put it into prose or code fences, or think
aloud first.  The rules:

* Text up to the last closing tag of a thought is thought, whether or not an opening tag stands before it.  A thought
  that is not closed is no answer.
* What stands in any other tag than an answer's ("<notes>") or under the heading of a draft is left out; under a heading
  such as "## Final answer" stands the answer.
* One JSON object with the needed keys is the answer.  Several that differ, an object that breaks off, and an object
  that repeats a key are no answer.
* A score is a number on the scale that was asked for.  "4/10", "3-4", "not a 5/5" and 7 are no scores.
* Without JSON, a single score that prose states clearly ("Score: 4. The hat is there.") is read.

What is no answer raises `Unusable`, and the model is asked again: a guess would become a verdict.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.protocol.markers import check_user_text

LOWEST, HIGHEST = 1.0, 5.0  # the scale of all scores outside the benchmarks

_HTML = re.compile(r"\s*<(!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
_FENCED = re.compile(r"```[\w-]*\s*(\{.*\})\s*```", re.DOTALL)
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_WORDS = {
    word: number
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMERAL = rf"(?:{_NUMBER}|{'|'.join(_WORDS)})"
_OUT_OF = r"\s*(?:/|out\s+of|of)\s*"
_LONGEST = 20_000  # characters of a text that are kept
_MOST_BRACES = 1000  # places where an object is looked for
_SHOWN = 80  # characters of an answer that an error shows
_SCALE_KEYS = re.compile(  # of a key without blanks and marks: "max", "score_max", "highest possible score"
    r"(?:score|rating|points?|value|possible)*(?:scale|max(?:imum)?|outof|range|limit|highest|denominator)"
    r"(?:score|rating|points?|value|possible)*|total|possible"
)
_SUPPOSED = re.compile(
    r"\W*(?:if|unless|had|were|suppose|imagine)\b|.*\b(?:example|e\.g|hypothetical\w*)\b", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
    r"[\s`*.]*(?:(?:wait|hold on|hmm+|sorry|correction|scratch that|on second thought|actually)\b|no[,.!])",
    re.IGNORECASE,
)

# -- thoughts --

_THOUGHT = (  # what stands for a thought in a tag's name, with whatever stands around it there
    r"(?:[\w:.-]{0,40}?(?:think|thought|reason|reflection|analysis|scratch|monologue|rationale|deliberat|brainstorm|ponder"
    r"|chain[\s_-]of[\s_-]thought)[\w:.-]{0,60}(?:\sprocess)?|cot|plan(?:ning)?|internal|details)"
)
_LEFT, _RIGHT = r"(?:<|&lt;|◁|＜|\\u003c)\s*", r"\s*(?:>|&gt;|▷|＞|\\u003e|(?=\s*\n|\s*\{|\s*\Z))"
_BAR = r"\s*[|｜]?\s*"
_CLOSING = re.compile(
    "|".join(
        (
            rf"{_LEFT}{_BAR}\\?/{_BAR}{_THOUGHT}{_BAR}{_RIGHT}",  # </think>, ◁/think▷, </seed:think>, &lt;/think&gt;
            rf"{_LEFT}{_BAR}{_THOUGHT}(?<=[_▁-])(?:end|close|stop){_BAR}{_RIGHT}",  # <|thought_end|>
            rf"{_LEFT}{_BAR}{_THOUGHT}(?<=end){_BAR}{_RIGHT}",
            rf"{_LEFT}{_BAR}{_THOUGHT}\s*/\s*{_RIGHT}",  # <think/>
            rf"[\[{{]\s*/\s*{_THOUGHT}\s*[\]}}]",  # Magistral: [/THINK]
            rf"{_LEFT}{_BAR}end[\s_▁-]*(?:of[\s_▁-]*)?{_THOUGHT}{_BAR}{_RIGHT}",  # <|end_of_thought|>, <|END_THINKING|>
            r"<\|channel\|>\s*final[^<>]{0,40}<\|message\|>",  # gpt-oss
            r"<channel\|>",  # Gemma
            r"<unused95>",  # MedGemma
            r"\bassistantfinal(?=\W|[A-Z])",  # gpt-oss, its special tokens removed
            r"\bhere(?:'s| is) my response:",  # Granite
        )
    ),
    re.IGNORECASE,
)
_OPENING = re.compile(
    "|".join(
        (
            rf"{_LEFT}{_BAR}{_THOUGHT}(?:\s[^<>]{{0,80}}?)?{_BAR}{_RIGHT}",
            rf"\[\s*{_THOUGHT}\s*\]",
            rf"{_LEFT}{_BAR}(?:begin|start)[\s_▁-]*(?:of[\s_▁-]*)?{_THOUGHT}{_BAR}{_RIGHT}",
            r"<\|channel\|>\s*(?:analysis|commentary)",
            r"<\|channel>\s*thought",
            r"<unused94>",
            r"\A\s*(?:assistant)?analysis(?=[A-Z])",
            r"\bhere(?:'s| is) my thought process:",
        )
    ),
    re.IGNORECASE,
)
# Any other tag: what it holds is no answer, unless its name is that of an answer, a picture or a text's form.
_TAG = re.compile(
    r"<\s*(?P<close>/?)\s*(?P<name>[a-z][\w:.-]{0,40})(?:\s[^<>]{0,80}?)?(?P<empty>/?)\s*>", re.IGNORECASE
)
_ANSWER_TAG = re.compile(
    r"[\w:.-]*(?:answer|final|output|response|result|json|eval|verdict|score|judg|assess|critique|review|rating|solution"
    r"|conclusion|summary|feedback|report|image|source|content|text|message|code|object|tool|function|data)[\w:.-]*"
    r"|[bipsu]|em|br|hr|li|ul|ol|h[1-6]|div|pre|span|strong|table|t[rdh]|tbody|thead|xml|img|step\w*",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"^[ >]{0,4}(?:#{1,6}[ \t]+\**(?P<line>[^\n*:]{1,60})|(?:\*\*|__)(?P<bold>[^\n*_:]{1,60}):?(?:\*\*|__))",
    re.MULTILINE,
)
_DRAFT_HEADING = re.compile(
    r"\b(?:draft|scratch|brainstorm|thinking|thoughts?|rough|tentative|preliminary|provisional|initial|example"
    r"|first (?:pass|impression|attempt|guess))\b",
    re.IGNORECASE,
)
_END_HEADING = re.compile(
    r"^\W*(?:end|done|finished)\b.*\b(?:draft|scratch|think|thought|reason|analysis)", re.IGNORECASE
)
_FINAL_HEADING = re.compile(r"\b(?:final|revised|corrected|answer)\b", re.IGNORECASE)
_LEAKED_END = re.compile(r"(?:\s*(?:<\|[^|<>\n]{1,40}\|>|</s>|<end_of_turn>|<eos>))+\s*\Z")


class Unusable(Exception):
    """The reply does not say what was asked for; the message says why, without the server's secrets."""


def answer_text(text: str | None) -> str:
    """`text` without the thought before the answer, and without the end tokens that some servers leave in.

    A text that is one JSON object throughout is the answer as it stands, also when a string in it names a tag.

    Raises:
      Unusable: nothing, a web page, a thought that is not closed, or nothing after the thought.
    """
    if text is None or not text.strip():
        raise Unusable("the answer is empty")
    if _HTML.match(text):
        raise Unusable(f"the answer is a web page: {_shown(text)}")
    text = _LEAKED_END.sub("", text)
    if _is_object(_unfenced(text)):
        return text
    answer = text
    for closing in _CLOSING.finditer(text):
        answer = text[closing.end() :]
        if answer.lstrip()[:1] in ("{", "`") and _is_object(_unfenced(answer)):
            return answer
    if _OPENING.search(answer):
        raise Unusable("the answer ends inside a thought")
    if not answer.strip():
        raise Unusable("the answer is a thought, and nothing after it")
    for start, end in reversed(_asides(answer)):
        answer = f"{answer[:start]}\n{answer[end:]}"
    if not answer.strip():
        raise Unusable("the answer is a draft, and nothing after it")
    return answer


def _asides(text: str) -> list[tuple[int, int]]:
    """Where `text` is no answer, in order: inside other tags than an answer's, and under the heading of a draft."""
    try:
        bounds = [bound for _, start, end in _scan(text) for bound in (start, end)]
    except Unusable:  # whoever reads the object says so
        bounds = []

    def outside(pattern: re.Pattern[str]) -> list[re.Match[str]]:
        """The matches that do not begin in an object."""
        return [match for match in pattern.finditer(text) if bisect.bisect(bounds, match.start()) % 2 == 0]

    found, opened = [], list[tuple[str, int]]()
    for tag in outside(_TAG):
        name = tag["name"].lower()
        if tag["empty"] or _ANSWER_TAG.fullmatch(name):
            continue
        if not tag["close"]:
            opened.append((name, tag.start()))
            continue
        while opened and name in [other for other, _ in opened] and opened[-1][0] != name:
            opened.pop()
        found.append((opened.pop()[1] if opened and opened[-1][0] == name else 0, tag.end()))
    found += [(start, len(text)) for _, start in opened[:1]]
    headings = outside(_HEADING)
    for number, heading in enumerate(headings):
        title = heading["line"] or heading["bold"]
        if _END_HEADING.search(title):
            found.append((0, heading.end()))
        elif _DRAFT_HEADING.search(title):
            found.append((heading.start(), headings[number + 1].start() if number + 1 < len(headings) else len(text)))
        elif _FINAL_HEADING.search(title):
            found.append((0, heading.start()))
    merged = list[tuple[int, int]]()
    for start, end in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# -- objects --


def read_object(text: str | None, needed: Sequence[str]) -> dict[str, Any]:
    """The JSON object in `text` that has all `needed` keys.

    Raises:
      Unusable: see `answer_text`; no such object, several that differ in what is needed, one that breaks off, or one
        that repeats a key.
    """
    answer = answer_text(text)
    objects = list(_objects(answer))
    found = [value for value in map(_with_keys(needed), objects) if all(key in value for key in needed)]
    if not found:
        if not objects:
            raise Unusable(f"the answer holds no complete JSON object: {_shown(answer)}")
        missing = [key for key in needed if key not in objects[-1]]
        raise Unusable(f"the answer lacks {', '.join(missing)}: {_shown(answer)}")
    if any(value[key] != found[-1][key] for value in found for key in needed):
        raise Unusable(f"the answer holds {len(found)} objects that differ: {_shown(answer)}")
    return found[-1]


def _unfenced(text: str) -> str:
    fenced = _FENCED.fullmatch(text.strip())
    return fenced.group(1) if fenced else text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _with_keys(needed: Sequence[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Gives an object's keys the case of `needed` ("Score" is `score`); no two of its keys differ in case alone."""
    names = {key.lower(): key for key in needed}
    return lambda value: {names.get(key.strip().lower(), key): value[key] for key in value}


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every outermost JSON object in `text`, strict about numbers (no NaN, no infinity).

    An object that is malformed but closed is passed over, unless it is the last one; so is one that is supposed
    ("If it had a hat: {...}", "Example: {...}").  Raises Unusable when the last one is taken back ("Wait, no.").
    """
    malformed, last = False, 0
    for value, start, end in _scan(text):
        malformed = value is None
        if value is not None and not _SUPPOSED.match(_lead(text[last:start])):
            yield value
        last = end
    if last and _TAKEN_BACK.match(text[last:]):
        raise Unusable(f"the answer is taken back: {_shown(text[last:])}")
    if malformed:
        raise Unusable(f"the answer's JSON is malformed: {_shown(text)}")


def _lead(text: str) -> str:
    """The unfinished sentence at the end of `text`, which leads to what follows; empty after a finished one."""
    text = re.sub(r"(?:```\w*|[\s*_>])+\Z", "", text)
    return "" if text.endswith((".", "!", "?")) else re.split(r"[.!?;]\s|\n", text)[-1]


def _scan(text: str) -> Iterator[tuple[dict[str, Any] | None, int, int]]:
    """Every outermost JSON object in `text` with its start and end; None for one that is malformed but closed.

    Raises Unusable for one that breaks off or repeats a key.
    """
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys, strict=False)
    position = text.find("{")
    for _ in range(_MOST_BRACES):
        if position < 0:
            break
        try:
            value, end = decoder.raw_decode(text, position)
            yield value, position, end
        except (ValueError, RecursionError):
            end = position + 1
            if re.match(r'\s*"', text[end : end + 100]):  # meant as an object
                end = _closing_brace(text, position)
                yield None, position, end
        position = text.find("{", end)


def _closing_brace(text: str, position: int) -> int:
    """The end of the malformed object that begins at `position`.  Raises Unusable when it breaks off."""
    depth = 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[{}]', text[position:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if not depth:
            return position + match.end()
    raise Unusable(f"the answer's JSON breaks off: {_shown(text)}")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len({key.strip().lower() for key in value}) != len(pairs):
        raise Unusable(f"the answer repeats a key: {_shown(', '.join(key for key, _ in pairs))}")
    return value


# -- scores --


def read_scored(text: str | None) -> tuple[float, str]:
    """Score (1-5) and reason of an answer with the keys `score` and `reason`; prose that states a score is read too.

    Raises:
      Unusable: there is no score from 1 to 5.
    """
    score, value = _score_and_object(text, "score", LOWEST, HIGHEST)
    if value is None:
        return score, as_text(answer_text(text), "reason")
    value = {key.strip().lower(): value[key] for key in value}
    reason = next((value[key] for key in ("reason", "reasoning", "explanation") if value.get(key)), None)
    return score, as_text(reason, "reason")


def read_score(text: str | None, key: str) -> float:
    """The score under `key`, from `LOWEST` to `HIGHEST`; prose that states one ("KEY: 4") is read too.

    Raises:
      Unusable: there is no such score.
    """
    return _score_and_object(text, key, LOWEST, HIGHEST)[0]


def read_scores(
    text: str | None, keys: Sequence[str], low: float = LOWEST, high: float = HIGHEST
) -> dict[str, float]:
    """The scores of one object under all `keys`, each from `low` to `high`.

    Raises:
      Unusable: one is missing or out of range.
    """
    value = read_object(text, keys)
    check_scale(value, high)
    return {key: as_score(value[key], low, high) for key in keys}


def as_score(value: Any, low: float = LOWEST, high: float = HIGHEST) -> float:
    """A number from `low` to `high`: 4, 4.5, "4", "four", and, where `high` is 5, "4/5".

    Raises:
      Unusable: anything else: another scale ("4/10"), a span ("3-4"), a truth value.
    """
    number = value
    if isinstance(value, str):
        word = value.strip().lower().rstrip(".")
        match = re.fullmatch(rf"({_NUMERAL})(?:{_OUT_OF}({_NUMERAL}))?", word)
        if match and match.group(2) and _number(match.group(2)) != high:
            raise Unusable(f"the score {_shown(repr(value))} is on another scale than {low:g} to {high:g}")
        number = _number(match.group(1)) if match else None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise Unusable(f"the score {_shown(repr(value))} is no number")
    if not low <= number <= high:
        raise Unusable(f"the score {_shown(repr(value))} is not from {low:g} to {high:g}")
    return float(number)


def _number(numeral: str) -> float:
    return float(_WORDS.get(numeral.lower(), numeral))


def _score_and_object(
    text: str | None, key: str, low: float, high: float
) -> tuple[float, Mapping[str, Any] | None]:
    """The score, and the object that states it; None for the object when prose states the score."""
    answer = answer_text(text)
    if "{" not in answer:
        if "}" in answer:
            raise Unusable(f"the answer holds the end of a JSON object alone: {_shown(answer)}")
        return _score_in_prose(answer, key, low, high), None
    value = read_object(text, (key,))
    check_scale(value, high)
    return as_score(value[key], low, high), value


def check_scale(value: Mapping[str, Any], high: float = HIGHEST) -> None:
    """Raises Unusable when an object with a score names a scale of its own that ends elsewhere."""
    for key, scale in value.items():
        named = _SCALE_KEYS.fullmatch(re.sub(r"[\W_]+", "", key).lower())
        ends = re.findall(r"\d+(?:\.\d+)?", str(scale)) if named else []
        if ends and float(ends[-1]) != high:
            raise Unusable(f"the answer's score is on another scale: {_shown(f'{key} {scale}')}")


# Before a number these say that it is not the score itself, after it that it is a part of one.
_NOT_A_SCORE = re.compile(
    r"\b(?:not|no|never|hardly|less|more|below|above|under|over|almost|nearly|between|from|than|if|unless|least|most"
    r"|max|maximum|minimum|highest|lowest|best|worst|scale|range|or|to|could|might|may|maybe|perhaps|nor|neither"
    r"|cannot|instead|rather|draft|should|expected|example|previous(?:ly)?|earlier|initial(?:ly)?|prior|former|once"
    r"|tentative|provisional|preliminary|ideally|until)\b|n't\b|n’t\b|[<>≤≥~]",
    re.IGNORECASE,
)
_GOES_ON = re.compile(
    rf"[\w%+½]|\.\d|\s*(?:[-–—/~&:=]|\bto\b|\bor\b|\band\b|\.\.+|,)\s*{_NUMERAL}|{_OUT_OF}\w|\s*\?"
    rf"|[\s,([]*(?:points?\s+|stars?\s+)?(?:out\s+)?of\s+{_NUMERAL}"
    r"|[ \t]+(?!(?:out|of|points?|stars?|because|since|as|for|due|given|with|but|and|on|in|at|so|overall)\b)(?-i:[a-z])"
    r"|\s+(?:(?:right|correct|wrong|missing|of the)\s+)?"  # a count
    r"(?:images|pictures|objects|steps|errors|faults|mistakes|items|times|criteria|requirements)\b"
    r"|[\s,(]*(?:percent|per cent|would|could|might|if|needs?|requires?|means?|maybe|perhaps|possibly|or|at most"
    r"|at least|at best)\b",
    re.IGNORECASE,
)
# Another scale, named anywhere beside the score: its end is one of the groups.
_SCALE = re.compile(
    rf"\bscale\b\D{{0,24}}?(?:{_NUMERAL}\s*(?:[-–—]|to\b|through\b|and\b)\s*)?({_NUMERAL})"
    rf"|\bout\s+of\s+({_NUMERAL})\b|({_NUMERAL})[\s-]*points?\b\s*scale"
    rf"|[([]\s*{_NUMERAL}\s*(?:[-–—]|to\b)\s*({_NUMERAL})\s*[)\]]",
    re.IGNORECASE,
)


def _score_in_prose(text: str, key: str, low: float, high: float) -> float:
    """The one score that prose states: "KEY: 4", "I rate this 4/5".

    Raises:
      Unusable: none, several, or a mention that is no plain score (negated, a span, another scale).
    """
    for scale in _SCALE.finditer(text):
        if _number(next(end for end in scale.groups() if end)) != high:
            raise Unusable(f"the answer's score is on another scale: {_shown(scale.group())}")
    between = rf"[\s*_\"'`]*(?:\({low:g}\s*(?:[-–—]|to)\s*{high:g}\))?[\s*_\"'`]*(?:[:=]|\bis\b|\bof\b)?[\s*_\"'`]*"
    mention = re.compile(
        rf"\b\w*?{re.escape(key)}\w*\b(?P<link>{between})(?P<named>{_NUMERAL})"
        rf"(?P<of>{_OUT_OF}(?P<scale>{_NUMERAL}))?|(?P<rated>{_NUMERAL})\s*(?:/|out\s+of)\s*(?P<high>{_NUMERAL})",
        re.IGNORECASE,
    )
    scores = set()
    for match in mention.finditer(text):
        sentence = re.split(r"[.!?;]\s|\n", text[: match.start()])[-1]
        sentence = _SCALE.sub("", sentence) + (match.group("link") or "")  # its end is `high`
        named = match.group("named") or match.group("rated")
        scale = match.group("scale") or match.group("high")
        attached = re.search(r"[\w./-]\Z", text[: match.start()]) is not None and match.group("rated") is not None
        plain = not attached and not _NOT_A_SCORE.search(sentence) and not _GOES_ON.match(text[match.end() :])
        if not plain or (scale is not None and _number(scale) != high):
            raise Unusable(f"the answer states no plain score: {_shown(match.group())}")
        scores.add(as_score(named, low, high))
    if len(scores) != 1:
        raise Unusable(f"the answer states {len(scores) or 'no'} scores: {_shown(text)}")
    return scores.pop()


# -- texts --


def as_text(value: Any, name: str) -> str:
    """A non-empty text without control tokens; end tokens that a server left at its end are cut off.

    Raises:
      Unusable: anything else, or a control token in the middle, which no tokenizer may take from a user's text.
    """
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"the {name} is no text: {_shown(repr(value))}")
    # An unpaired surrogate, written as an escape, has no UTF-8 form and could not be stored.
    text = _LEAKED_END.sub("", value).strip()[:_LONGEST].encode("utf-8", "replace").decode("utf-8").replace("\0", "")
    if not text:
        raise Unusable(f"the {name} is no text: {_shown(repr(value))}")
    try:
        return check_user_text(text, f"the {name}")
    except UserError as error:
        raise Unusable(error.what.rstrip(".")) from None


def as_texts(value: Any, name: str) -> tuple[str, ...]:
    """A list of non-empty texts.  Raises Unusable for anything else."""
    if not isinstance(value, list) or not value:
        raise Unusable(f"the {name} are no list of texts: {_shown(repr(value))}")
    return tuple(as_text(item, name) for item in value)


def as_choice(value: Any, choices: Sequence[str], name: str) -> str:
    """One of `choices`; case, spaces and hyphens do not matter.  Raises Unusable for anything else."""
    word = re.sub(r"[\s\-]+", "_", value.strip().lower().rstrip(".")) if isinstance(value, str) else value
    if word not in choices:
        raise Unusable(f"the {name} {_shown(repr(value))} is none of {', '.join(choices)}")
    return word


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
