"""The fixed strings of prompts and answers.

In the Emu3.5 vocabulary they are ordinary text (its embedding table must not grow); a micro tokenizer gives each an
id of its own.  `control_strings` lists what a user's text must not contain.
"""

from __future__ import annotations

import re

from ivr_jax.errors import UserError
from ivr_jax.trajectory import AXES, MAX_STEPS, TASKS

EVALUATE_OPEN, EVALUATE_CLOSE = "<Evaluate>", "\n</Evaluate>"
AXIS = {axis: f"\n{axis.capitalize()}: " for axis in AXES}
PASS, FAIL = "pass: ", "fail: "
ANALYSIS_OPEN, ANALYSIS_CLOSE = "<Failure Analysis>", "</Failure Analysis>"
PLAN_OPEN, PLAN_CLOSE = "<Improvement Plan>", "</Improvement Plan>"
STEP_OPEN = {k: f"<Step {k}>" for k in range(2, MAX_STEPS + 2)}
STEP_CLOSE = {k: f"</Step {k}>" for k in range(2, MAX_STEPS + 2)}

ANSWER_MARKERS: tuple[str, ...] = (
    EVALUATE_OPEN,
    EVALUATE_CLOSE,
    *AXIS.values(),
    PASS,
    FAIL,
    ANALYSIS_OPEN,
    ANALYSIS_CLOSE,
    PLAN_OPEN,
    PLAN_CLOSE,
    *STEP_OPEN.values(),
    *STEP_CLOSE.values(),
)

SYSTEM = {task: f"You are a helpful assistant for {task} task. USER: " for task in TASKS}
SYSTEM_UNCONDITIONAL = "You are a helpful assistant. USER: "
ASSISTANT = " ASSISTANT: "

MAX_CHARACTERS = 200_000
_CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?(?:Evaluate|Failure Analysis|Improvement Plan|Step \d+)>", re.IGNORECASE
)


def check_user_text(text: str, where: str) -> str:
    """Returns `text`, or raises UserError when it holds a control token, an answer marker, NUL, or what UTF-8 has not.

    A text of more than `MAX_CHARACTERS` is refused too: no model has the context for it.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where} holds {len(text):,} characters; at most {MAX_CHARACTERS:,} are used.", "Shorten it.")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where} contains half of a surrogate pair.", "Remove it; it is no character.")
    if "\0" in text:
        raise UserError(f"{where} contains the character NUL.", "Remove it; files that hold it are no plain text.")
    found = _CONTROL.search(text)
    if found:
        raise UserError(
            f"{where} contains the control token {found.group(0)!r}.",
            "Remove it, or write it differently (a space inside is enough).",
        )
    return text
