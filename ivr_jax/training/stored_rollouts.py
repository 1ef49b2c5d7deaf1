"""Sampled answers of an RL step on disk, with what the update computed of them.

    WORKDIR/gallery/step_<N>.html    a page for people
    WORKDIR/gallery/step_<N>.npz     the tokens of the same answers, for `python -m ivr_jax.inspect`

The second holds arrays alone and is read without unpickling: `tokens` int32 (prompts and answers, one after the other),
`lengths` int32 [n, 2] (prompt and answer tokens of each), `log_probs` and `advantages` float32 (of all answer tokens),
and `facts`, JSON as uint8 (request, place in its group, mode, segments, rewards).
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.images import Pixels
from ivr_jax.protocol import codec
from ivr_jax.report.answers import EvaluatedAnswer
from ivr_jax.report.gallery import GalleryItem, GallerySection
from ivr_jax.report.pages import write_report
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.training.scoring import Scored, rewards_of
from ivr_jax.trajectory import Sample

SUFFIX = ".npz"
INVALID = "invalid"
_FACTS = ("prompt", "key", "group", "member", "rewards", "mode", "passed", "images", "error")


@dataclasses.dataclass(frozen=True)
class StoredAnswer:
    """One answer of a group.

    Attributes:
      prompt, key: of the request; group, member: its place among the answers that one update compared.
      tokens: int32 [T], prompt and answer; answer_start: where the answer begins.
      log_probs: float32 [A], natural logarithms under the distribution that the tokens were sampled from.
      advantages: float32 [A].
      mode, segments: of an answer that parses; else "invalid", no segments, and why as `error`.
      passed: the verdict of its last evaluation; images: that were drawn.
      rewards: by name, those that are present.
    """

    prompt: str
    key: str
    group: int
    member: int
    tokens: np.ndarray
    answer_start: int
    log_probs: np.ndarray
    advantages: np.ndarray
    rewards: Mapping[str, float]
    mode: str = INVALID
    segments: tuple[codec.Segment, ...] = ()
    passed: bool = False
    images: int = 0
    error: str = ""


def write_gallery(
    folder: Path,
    step: int,
    stored: Sequence[StoredAnswer],
    answers: Sequence[EvaluatedAnswer],
    images: Mapping[str, Pixels],
) -> None:
    """Page and file of some answers of a step's rollout.

    Args:
      stored: the answers as `stored_answers` gives them; answers, images: the same ones as `shown_answers` does.
    """
    items = tuple(
        GalleryItem(f"member {one.member + 1}", answer, images)
        for one, answer in zip(stored, answers, strict=True)
    )
    intro = "Groups of answers that one update compared: rewards as judged, the bonus, and the advantage."
    title = f"Rollouts of step {step}"
    write_answers(folder / f"step_{step:06d}{SUFFIX}", stored)
    write_report(folder / f"step_{step:06d}.html", title, (), {}, (GallerySection(title, intro, items),), (), ())


def stored_answers(
    rollout: Rollout, samples: Sequence[Sample], scored: Scored, advantages: np.ndarray, numbers: Sequence[int]
) -> list[StoredAnswer]:
    """The answers `numbers` of a rollout.

    Args:
      samples: the request of each group.
      advantages: float32 [N, A] of every token (`scoring.token_advantages`).
    """
    found = []
    for number in numbers:
        group, member = divmod(number, rollout.group_size)
        prompt, tokens, answer = rollout.prompt(number), rollout.answer_tokens(number), rollout.answers[number]
        stored = StoredAnswer(
            samples[group].prompt,
            samples[group].key,
            group,
            member,
            np.concatenate([prompt, tokens]),
            len(prompt),
            rollout.samples.log_probs[number, : len(tokens)],
            advantages[number, : len(tokens)],
            rewards_of(scored, group, member),
            error=rollout.errors[number],
        )
        if answer is not None:
            rounds = answer.trajectory.rounds
            stored = dataclasses.replace(
                stored, mode=answer.trajectory.mode.value, segments=answer.segments, images=len(rounds),
                passed=rounds[-1].evaluation.passed,
            )  # fmt: skip
        found.append(stored)
    return found


def write_answers(path: Path, answers: Sequence[StoredAnswer]) -> None:
    """Writes the file whole or not at all."""
    facts = [
        {**{name: getattr(answer, name) for name in _FACTS}, "rewards": dict(answer.rewards),
         "segments": [dataclasses.astuple(segment) for segment in answer.segments]}
        for answer in answers
    ]  # fmt: skip
    lengths = [(a.answer_start, len(a.tokens) - a.answer_start) for a in answers]
    with files.new_file(path) as file:
        np.savez_compressed(
            file,
            tokens=np.concatenate([a.tokens for a in answers]).astype(np.int32),
            lengths=np.asarray(lengths, np.int32),
            log_probs=np.concatenate([a.log_probs for a in answers]).astype(np.float32),
            advantages=np.concatenate([a.advantages for a in answers]).astype(np.float32),
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
        )


def read_answers(path: Path) -> list[StoredAnswer]:
    """Raises UserError for a file that is no such file, or not whole."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("tokens", "lengths", "log_probs", "advantages", "facts")}
        facts = json.loads(arrays["facts"].tobytes())
        prompts, answers = arrays["lengths"].T
        ends, answer_ends = np.cumsum(prompts + answers), np.cumsum(answers)
        whole = len(facts) == len(prompts) and ends[-1] == len(arrays["tokens"])
        if not whole or any(answer_ends[-1] != len(arrays[name]) for name in ("log_probs", "advantages")):
            raise ValueError("its lengths do not fit")
        return [
            StoredAnswer(
                **{name: fact[name] for name in _FACTS},
                segments=tuple(codec.Segment(*segment) for segment in fact["segments"]),
                tokens=arrays["tokens"][end - prompt - answer : end],
                answer_start=int(prompt),
                log_probs=arrays["log_probs"][answer_end - answer : answer_end],
                advantages=arrays["advantages"][answer_end - answer : answer_end],
            )
            for fact, prompt, answer, end, answer_end in zip(
                facts, prompts, answers, ends, answer_ends, strict=True
            )
        ]
    except (OSError, IndexError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as stored rollouts ({error}).", "Name another file.") from error
