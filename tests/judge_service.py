"""A judge of benchmarks that speaks the OpenAI protocol on loopback: scripted replies, first tokens and faults.

`script` takes the prompt's text and the shown images, and returns scores by name, a text that is sent as it is, or
None for scores that depend on the question alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable

import numpy as np
from openai_service import Behaviour, OpenAIService, _decode, _from_uri
from starlette.responses import JSONResponse, Response

from ivr_jax.evaluate.benchmarks import prompts
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item, Question

Script = Callable[[str, list[np.ndarray]], "dict | str | None"]
REFUSAL = "<refuse>"
_LOW_HIGH = re.compile(r"whole numbers? from (\d+) to (\d+)")


class JudgeService(OpenAIService):
    """See the module.  `asked` counts questions by text and images."""

    def __init__(self, script: Script | None = None, behaviour: Behaviour | None = None):
        super().__init__(behaviour)
        self.script = script or (lambda text, images: None)

    def chat(self, body: bytes, content_type: str, fault: str | None) -> tuple[str, Response]:
        asked = json.loads(body)
        if self.log.keep:
            self.log.bodies.append(asked)
        parts = asked["messages"][0]["content"]
        text = max((part["text"] for part in parts if part["type"] == "text"), key=len)
        text = text.partition("\n\nYour last answer could not be used")[0]
        uris = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        question = hashlib.sha256("\0".join([text, *uris]).encode()).hexdigest()[:16]
        images = [_decode(_from_uri(uri)) for uri in uris]
        said = self.behaviour.answer if self.behaviour.answer is not None else self.script(text, images)
        if said is None:
            said = sanity(text, images) or scores_of(text, question, bool(asked.get("logprobs")))
        if fault is not None:
            said = {"prose": "I would rather not.", "seven": {"score": 77}, "empty": ""}.get(fault, "{")
        return question, self._reply(asked, said)

    def _reply(self, asked: dict, said: dict | str) -> Response:
        message: dict = {"role": "assistant", "content": said if isinstance(said, str) else json.dumps(said)}
        if said == REFUSAL:
            message = {"role": "assistant", "content": None, "refusal": "I cannot look at this."}
        choice: dict = {"index": 0, "message": message, "finish_reason": "stop"}
        if asked.get("logprobs") and isinstance(said, dict):
            likeliest = [{"token": token, "logprob": math.log(chance)} for token, chance in said.items() if chance > 0]
            choice["logprobs"] = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": likeliest}]}
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 0, "model": asked["model"],
                             "choices": [choice], "usage": usage})  # fmt: skip


def sanity(text: str, images: list[np.ndarray]) -> dict | None:
    """The right answer to a question of the sanity check, from the pixels in the middle of the image."""
    found = re.search(r"The image shows a (red square|blue circle)", text)
    if not found:
        return None
    middle = images[-1][images[-1].shape[0] // 2, images[-1].shape[1] // 2]
    right = bool(middle.argmax() == (0 if found.group(1) == "red square" else 2))
    if '"score"' not in text:
        return {"Yes": 0.9 if right else 0.1, "No": 0.1 if right else 0.9}
    return {"reasoning": "Seen.", "score": int(right)}


def scores_of(text: str, question: str, tokens: bool) -> dict:
    """Scores on the scale that the prompt names, from the question's hash."""
    value = int(question, 16)
    if tokens:
        return {"Yes": 0.2 + value % 7 / 10, "three": 0.1, "2": 0.05, " ": 0.02}
    names = [name for name in re.findall(r'"(\w+)":', text.split("{")[-1]) if name != "reasoning"]
    scale = _LOW_HIGH.search(text)
    low, high = (int(end) for end in scale.groups()) if scale else (0, 1)
    return {"reasoning": f"Looked at, {question}.",
            **{name: low + (value >> 8 * n) % (high - low + 1) for n, name in enumerate(names)}}  # fmt: skip


def script_of(
    benchmark: Benchmark,
    items: list[Item],
    answer: Callable[[Item, int, Question], dict | str | None],
    find: Callable[[np.ndarray], tuple[Item, int]],
) -> Script:
    """A script by item, sample and question.

    A question is found again by its rendered prompt; where several images share one, `find` tells the judged image.
    """
    known: dict[str, list[tuple[Item, Question]]] = {}
    for item in items:
        for question in benchmark.questions(item, 0, "chat"):
            known.setdefault(prompts.render(question), []).append((item, question))

    def script(text: str, images: list[np.ndarray]) -> dict | str | None:
        asked = known.get(text)
        if asked is None:
            return None
        if len(asked) == 1 and benchmark.samples == 1:
            return answer(asked[0][0], 0, asked[0][1])
        item, sample = find(images[-1])
        return answer(item, sample, asked[0][1])

    return script
