"""From what a judge wrote to checked values, however it wrote it.

Servers with structured outputs answer with the JSON that the schema asks for; others wrap it into prose, code fences
or `<think>` blocks, write "4/5" or "five", or forget the JSON ("Score: 4. The hat is there.").  All of that is read.
What does not say clearly what is asked for (a score of 7, NaN, half a JSON, HTML, nothing) raises `Unusable`, and the
judge is asked again: a guess would become a verdict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_HTML = re.compile(r"\s*<(!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
_WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_OUT_OF_FIVE = re.compile(rf"\s*({_NUMBER})\s*(?:/|out\s+of|of)\s*5(?:\.0)?\s*\.?\s*", re.IGNORECASE)
_LONGEST = 20_000  # characters of a reason that are kept
_MOST_BRACES = 1000  # places where an object is looked for: what has more is no answer
_SHOWN = 80  # characters of an answer that an error shows


class Unusable(Exception):
    """The reply does not say what was asked for; the message says why, without the server's secrets."""


def read_object(text: str | None, needed: Sequence[str]) -> dict[str, Any]:
    """The first JSON object in `text` that has all `needed` keys.

    Raises:
      Unusable: nothing, HTML, half a JSON, or an object without those keys.
    """
    if text is None or not text.strip():
        raise Unusable("the answer is empty")
    if _HTML.match(text):
        raise Unusable(f"the answer is a web page: {_shown(text)}")
    text = _THINKING.sub(" ", text)
    found = list(_objects(text))
    for value in found:
        if all(key in value for key in needed):
            return value
    if found:
        missing = [key for key in needed if key not in found[0]]
        raise Unusable(f"the answer lacks {', '.join(missing)}: {_shown(text)}")
    raise Unusable(f"the answer holds no complete JSON object: {_shown(text)}")


def read_scored(text: str | None) -> tuple[float, str]:
    """Score (1-5) and reason of an answer with the keys `score` and `reason`; prose that names a score is read too.

    Raises:
      Unusable: there is no score from 1 to 5.
    """
    try:
        value = read_object(text, ("score",))
    except Unusable:
        named = _score_in_prose(text or "")
        if named is None:
            raise
        return named, as_text(text, "reason")
    score = as_score(value["score"])
    reason = next((value[key] for key in ("reason", "reasoning", "explanation") if value.get(key)), None)
    return score, as_text(reason, "reason")


def as_score(value: Any) -> float:
    """A number from 1 to 5: 4, 4.5, "4", "4/5", "five".  Raises Unusable for anything else."""
    number: Any = value
    if isinstance(value, str):
        word = value.strip().lower().rstrip(".")
        match = _OUT_OF_FIVE.fullmatch(value)
        if word in _WORDS:
            number = _WORDS[word]
        elif match:
            number = float(match.group(1))
        elif re.fullmatch(_NUMBER, word):
            number = float(word)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise Unusable(f"the score {_shown(repr(value))} is no number")
    if not 1 <= number <= 5:
        raise Unusable(f"the score {_shown(repr(value))} is not from 1 to 5")
    return float(number)


def as_text(value: Any, name: str) -> str:
    """A non-empty text, its ends stripped.  Raises Unusable for anything else."""
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"the {name} is no text: {_shown(repr(value))}")
    # A lone surrogate (half a character, written as an escape) has no UTF-8 form and could not be stored.
    return value.strip()[:_LONGEST].encode("utf-8", "replace").decode("utf-8").replace("\0", "")


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


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    """Every outermost JSON object in `text`, strict about numbers (no NaN, no infinity)."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    position = text.find("{")
    for _ in range(_MOST_BRACES):
        if position < 0:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            if isinstance(value, dict):
                yield value
        position = text.find("{", end)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _score_in_prose(text: str) -> float | None:
    """The one score that prose names ("Score: 4", "I rate this 4/5"); None when there is none, several, or half a JSON.
    """
    text = _THINKING.sub(" ", text)
    if "{" in text or _HTML.match(text):
        return None
    words = "|".join((_NUMBER, *_WORDS))
    found = re.findall(rf"\bscore\b\W{{0,4}}(?:is|of)?\W{{0,4}}({words})(?![\w.]*\d)", text, re.IGNORECASE)
    found += re.findall(rf"(?<![\d./-])({_NUMBER})\s*(?:/|out of)\s*5\b", text, re.IGNORECASE)
    try:
        scores = {as_score(word) for word in found}
    except Unusable:
        return None
    return scores.pop() if len(scores) == 1 else None


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
