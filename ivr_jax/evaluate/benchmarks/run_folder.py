r"""The folder of one run.

    run.json           what was run: benchmark, model, sampling, judge, hashes of the data; written first
    images/            the final images, in the official layout
    answers/<key>/<sample>/
        answer.json    the whole interleaved answer: texts, mode, images used, tokens, model calls
        G1.png ...     its drafts
    judgements.jsonl   one judgement a line
    results/           the official result files
    summary.json       every figure; table.md, table.tex, report.html for people

Every file but `judgements.jsonl` is written under a temporary name and renamed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import datafiles
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item

RUN, SUMMARY, IMAGES, ANSWERS, RESULTS = "run.json", "summary.json", "images", "answers", "results"
ANSWER_FILE = "answer.json"
SCHEMA = "ivr_jax.benchmark/1"
# Of the parts of run.json: what a resumed run must share with the run that it resumes.
_FIXED = ("schema", "benchmark", "samples", "data", "generation", "answers", "rewriter", "seed")


@dataclasses.dataclass(frozen=True)
class AnswerRecord:
    """One answer of the model, without its pixels.

    Attributes:
      item, sample: what it answers.
      mode: "direct", "reflection", "multi_step", "interleaved", or "invalid" when it did not parse.
      images: images that it drew.
      tokens: of the answer.
      model_calls: generations that it took; one, however many images stand in it.
      error: why it is invalid, "" otherwise.
      content: the texts and images in order, as JSON (`ivr_jax.report.answers.answer_to_json`, or the parts of an
        interleaved answer); None when it did not parse.
    """

    item: str
    sample: int
    mode: str
    images: int
    tokens: int
    model_calls: int = 1
    error: str = ""
    content: Mapping[str, Any] | None = None


def claim(workdir: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Writes `run.json`, or checks that the one that is there describes the same run.

    Returns:
      What now stands in the file; its part on the judge is replaced by `run`'s.

    Raises:
      UserError: the folder holds another run; the prompt files have changed since (their hashes are told).
    """
    path = workdir / RUN
    wanted = json.loads(json.dumps(dict(run)))
    if not path.exists():
        files.write_json(path, wanted)
        return wanted
    found = read_run(workdir)
    for name in _FIXED:
        if found.get(name) == wanted.get(name):
            continue
        if name == "data":
            told = "; ".join(datafiles.changed(found["data"], wanted["data"]))
            raise UserError(f"the prompts in {workdir} were others: {told}.",
                            "Restore the prompt files, or name another --workdir.")
        raise UserError(f"{workdir} holds another run: {name} was {_short(found.get(name))}, is "
                        f"{_short(wanted.get(name))}.", "Name another --workdir.")
    if found != wanted:
        files.write_json(path, wanted)
    return wanted


def read_run(workdir: Path) -> dict[str, Any]:
    """What `run.json` says.  Raises UserError when it is missing or damaged."""
    return files.read_json_object(workdir / RUN, "Name the folder of a finished benchmark run.", SCHEMA)


def answer_folder(workdir: Path, item: Item, sample: int) -> Path:
    """Where one answer is stored."""
    return workdir / ANSWERS / item.key / str(sample)


def write_answer(workdir: Path, item: Item, record: AnswerRecord) -> None:
    """Writes `answer.json`, the mark of a finished answer; its images must have been written before."""
    files.write_json(answer_folder(workdir, item, record.sample) / ANSWER_FILE, dataclasses.asdict(record))


def read_answer(workdir: Path, item: Item, sample: int) -> AnswerRecord | None:
    """The finished answer, or None."""
    path = answer_folder(workdir, item, sample) / ANSWER_FILE
    try:
        value = json.loads(path.read_bytes())
        return AnswerRecord(**value)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}).", "Remove it: the answer is made again.") from None


def read_answers(workdir: Path, items: Sequence[Item], samples: int) -> Iterator[tuple[Item, AnswerRecord]]:
    """Every finished answer, in the order of the items."""
    for item in items:
        for sample in range(samples):
            record = read_answer(workdir, item, sample)
            if record is not None:
                yield item, record


def check_drawn(workdir: Path, items: Sequence[Item], samples: int) -> None:
    """Raises UserError when the model has answered and no answer holds an image."""
    records = [record for _, record in read_answers(workdir, items, samples)]
    if records and not any(record.images for record in records):
        first = records[0]
        raise UserError(
            f"none of the {len(records)} answers in {workdir / ANSWERS} holds an image. The first has {first.tokens} "
            f"tokens: {first.error or 'it is text alone.'}",
            "Allow longer answers (--config.answer_length=N) or shorter texts (--config.text_cap=N), in another "
            "--workdir.",
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """The images of a run.

    Attributes:
      paths: file of each image by (item, sample).
      samples: images each item should have.
    """

    paths: dict[tuple[str, int], Path]
    samples: dict[str, int]

    def prompts_with_image(self) -> set[str]:
        """Keys of the prompts that have an image."""
        return {key for key, _ in self.paths}


def find_images(benchmark: Benchmark, images: Path, items: Sequence[Item], samples: int) -> Found:
    """Looks for every item's images in a folder of the official layout.

    Args:
      samples: images a prompt that are wanted; an item may have more, and then all of them count.

    Raises:
      UserError: two images stand for one place, or the folder holds no image of any prompt.
    """
    paths, counts = {}, {}
    for item in items:
        found = benchmark.find_images(images, item)
        counts[item.key] = max(samples, len(found))
        paths |= {(item.key, sample): path for sample, path in enumerate(found)}
    if not paths:
        raise UserError(f"{images} holds no image of {benchmark.title}.",
                        f"Its layout is that of {benchmark.image_path(items[0], 0)}.")
    return Found(paths, counts)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
