"""Training text for other trainers: the three released JSONL forms, made from `result.json` records.

    sharegpt   {"id", "conversations": [{"from": "human", ...}, {"from": "gpt", ...}], "images": [path, ...]}
    messages   {"id", "messages": [{"role": "user", "content": [part, ...]}, {"role": "assistant", "content": [...]}]}
    chatml     {"id", "text"}

A sample whose own texts contain a token of these forms ("<image>", "</think>", "<|im_start|>") is left out by name: a
trainer would take the text for the token.

An answer is a row of thoughts, each followed by the image it led to.  What is said is fixed by the format: the first
thought announces the edit or lists the steps, a reflection and a step speak for themselves, and when the final image is
not the last one shown (rounds were capped), one last thought presents it.  `result_from_trajectory` makes the record
of a trajectory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from ivr_jax import files
from ivr_jax.construct.released import (
    RESULT,
    Problem,
    check_final_passes,
    load_result,
    require_some,
    result_from_trajectory,
    sample_folders,
)
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError

Record: TypeAlias = dict[str, Any]
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")  # what trainers of these forms replace
_CONTROL = r"<\|[^|<>\n]{1,40}\|>"
_LABELS = (
    ("failure_analysis", "Failure analysis: "),
    ("specific_issues", "Specific issues: "),
    ("improvement_plan", "Improvement plan: "),
)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What the forms leave open.

    Attributes:
      image_token: stands for an image.
      think_open, think_close: around a thought.
      skip_direct: leave out samples with neither a reflection nor a step.
      max_reflections: show at most this many reflection rounds; None shows all.
    """

    image_token: str = "<image>"
    think_open: str = "<think>"
    think_close: str = "</think>"
    skip_direct: bool = False
    max_reflections: int | None = None


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A thought in its tags, and the path of the image that follows ("" when none does)."""

    thought: str
    image: str


def answer(result: Mapping[str, Any], options: ExportOptions) -> list[_Turn]:
    """The assistant's side of a record, thought by thought."""
    steps = [_text(step.get("step_instruction")) for step in result.get("multi_step") or []]
    if steps:
        lines = [
            "I will decompose this task into the following atomic edits:",
            *(f"{i}. {s}" for i, s in enumerate(steps, 1)),
        ]
        rows = [("\n".join(lines), result.get("direct_edit_image_path"))]
    else:
        rows = [
            (
                f"I will perform the requested edit: {_text(result.get('edit_prompt'))}",
                result.get("direct_edit_image_path"),
            )
        ]
    for reflection in (result.get("reflect") or [])[: options.max_reflections]:
        rows.append((_reflection_text(reflection.get("reflect_thinking") or {}), reflection.get("reflect_image_path")))
    for instruction, step in zip(steps, result.get("multi_step") or [], strict=True):
        rows.append((f"Next sub-step: {instruction}", step.get("step_image_path")))
    final = result.get("final_edited_image_path")
    if isinstance(final, str) and final and final != rows[-1][1]:
        rows.append(("This result satisfies all the requirements.", final))
    return [_Turn(f"{options.think_open}{thought}{options.think_close}", image or "") for thought, image in rows]


def to_sharegpt(result: Mapping[str, Any], options: ExportOptions) -> Record:
    """The `sharegpt` record of a `result.json`."""
    sources, turns = _sources(result), answer(result, options)
    said = "".join(turn.thought + (options.image_token if turn.image else "") for turn in turns)
    asked = f"{options.image_token}\n" * len(sources) + result["edit_prompt"]
    return {
        "id": result["task_id"],
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}],
        "images": sources + [turn.image for turn in turns if turn.image],
    }


def to_messages(result: Mapping[str, Any], options: ExportOptions) -> Record:
    """The `messages` record of a `result.json`."""
    asked = [*map(_image_part, _sources(result)), {"type": "text", "text": result["edit_prompt"]}]
    said: list[Record] = []
    for turn in answer(result, options):
        said.append({"type": "text", "text": turn.thought})
        if turn.image:
            said.append(_image_part(turn.image))
    return {
        "id": result["task_id"],
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
    }


def to_chatml(result: Mapping[str, Any], options: ExportOptions) -> Record:
    """The `chatml` record of a `result.json`."""

    def shown(path: str) -> str:
        return options.image_token + "{" + path + "}" if path else ""

    asked = "".join(map(shown, _sources(result))) + result["edit_prompt"]
    said = "".join(turn.thought + shown(turn.image) for turn in answer(result, options))
    text = f"<|im_start|>user\n{asked}<|im_end|><|im_start|>assistant\n{said}<|im_end|>"
    return {"id": result["task_id"], "text": text}


FORMS: dict[str, Callable[[Mapping[str, Any], ExportOptions], Record]] = {
    "sharegpt": to_sharegpt,
    "messages": to_messages,
    "chatml": to_chatml,
}


def export_records(
    results: Iterable[Mapping[str, Any]], form: str, options: ExportOptions | None = None
) -> Iterator[Record]:
    """The records of `results` in one of `FORMS`, in order, without the samples that the options leave out.

    Raises:
      UserError: the form is unknown, or a result lacks its task_id or prompt or has a field of the wrong kind.
    """
    if form not in FORMS:
        raise UserError(f"the export form {form!r} is unknown.", f"Choose one of {', '.join(FORMS)}.")
    options = options or ExportOptions()
    tokens = re.compile("|".join((*map(re.escape, _reserved(options)), _CONTROL)), re.IGNORECASE)
    for result in results:
        if options.skip_direct and not result.get("reflect") and not result.get("multi_step"):
            continue
        try:
            record = FORMS[form](result, options)
            _check_plain(result, tokens)
            yield record
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the result {result.get('task_id')!r} has a missing field or one of the wrong kind ({error}).",
                "Correct it, or leave it out.",
            ) from error


def _reserved(options: ExportOptions) -> tuple[str, ...]:
    return tuple(filter(None, (options.image_token, options.think_open, options.think_close, *_PLACEHOLDERS)))


def _check_plain(result: Mapping[str, Any], tokens: re.Pattern[str]) -> None:
    """Raises UserError when a text of the sample contains a token that the forms are made of."""
    texts = [result["edit_prompt"], *_sources(result)]
    for reflection in result.get("reflect") or []:
        texts += [_text((reflection.get("reflect_thinking") or {}).get(field)) for field, _ in _LABELS]
        texts.append(reflection.get("reflect_image_path"))
    for step in result.get("multi_step") or []:
        texts += [step.get("step_instruction"), step.get("step_image_path")]
    for text in texts:
        found = tokens.search(text or "")
        if found:
            raise UserError(
                f"the sample {result['task_id']!r} contains the token {found.group()!r} in a text: {text[:80]!r}.",
                "Write the text differently (a space inside the token is enough).",
            )


def export_success(
    root: str | os.PathLike, out: str | os.PathLike, form: str, options: ExportOptions | None = None
) -> tuple[int, list[Problem]]:
    """Writes the JSONL of a released `success/` tree, folders sorted by name; `out` appears when it is complete.

    Returns:
      How many records were written, and the folders that could not be.

    Raises:
      UserError: the form is unknown, `root` holds no samples or none that can be used, or `out` cannot be written.
    """
    folders, problems = sample_folders(root), []

    def records() -> Iterator[Record]:
        for folder in folders:
            try:
                yield from export_records([load_result(folder / RESULT)], form, options)
            except UserError as error:
                problems.append(Problem(folder, str(error)))

    list(export_records([], form))
    with _new_lines(Path(out)) as lines:
        written = _write_lines(lines, records())
        require_some(written, problems)
    return written, problems


def export_dataset(
    dataset: TrajectoryDataset, out: str | os.PathLike, form: str, options: ExportOptions | None = None
) -> tuple[int, list[Problem]]:
    """Writes the JSONL of a dataset, and its images, each once, into `<out without suffix>_images/<name>.png`.

    Paths in the records start in the folder of `out`.  Trajectories that end in an image that failed (they teach
    evaluation alone) are left out, and with them images that nothing else shows.

    Returns:
      How many records were written, and what was left out.

    Raises:
      UserError: the form is unknown, an image is corrupt, all samples are left out, the folder of images exists, or
        nothing can be written there.
    """
    list(export_records([], form))
    target = Path(out)
    pictures = target.with_name(f"{target.stem}_images")
    problems: list[Problem] = []

    def records(folder: Path) -> Iterator[Record]:
        for trajectory in dataset:
            result, names = result_from_trajectory(trajectory, pictures.name, by_name=True)
            try:
                check_final_passes(trajectory)
                made = list(export_records([result], form, options))
            except UserError as error:
                problems.append(Problem(dataset.path / trajectory.sample.key, str(error)))
                continue
            for name in names.values() if made else ():
                file = folder / f"{name}.png"
                if not file.exists():
                    file.write_bytes(dataset.png(name))
            yield from made

    with _new_lines(target) as lines, files.NewFolder(pictures) as folder:  # the images get their name first
        written = _write_lines(lines, records(folder))
        require_some(written, problems)
    return written, problems


@contextlib.contextmanager
def _new_lines(target: Path) -> Iterator[IO[bytes]]:
    if target.is_dir():
        raise UserError(f"{target} is a folder.", "Name a file.")
    with files.new_file(target) as lines:
        yield lines


def _write_lines(lines: IO[bytes], records: Iterable[Record]) -> int:
    """Writes one JSON value a line; returns the number of lines."""
    written = 0
    for record in records:
        lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        written += 1
    return written


def _sources(result: Mapping[str, Any]) -> list[str]:
    paths: str | Sequence[str] | None = result.get("original_image_path")
    return [] if paths is None else [paths] if isinstance(paths, str) else list(paths)


def _reflection_text(thinking: Mapping[str, Any]) -> str:
    parts = [label + _text(thinking.get(field)) for field, label in _LABELS if _text(thinking.get(field))]
    return " ".join(parts) or "Let me try once more."


def _text(value: str | None) -> str:
    return (value or "").strip()


def _image_part(path: str) -> Record:
    return {"type": "image", "image": path}
