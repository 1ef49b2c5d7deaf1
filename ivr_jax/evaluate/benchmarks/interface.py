"""What a benchmark is: its items, the layout of its images, the questions put to a judge, and its figures.

A benchmark is one module of `suites/` with a constant `BENCHMARK`, an instance of a subclass of `Benchmark`.  Two modes
of summary exist:

    strict   the figure of the official scripts, their quirks included
    fixed    what those scripts were evidently meant to compute

Where a quirk changes the question itself, the benchmark asks two questions (`Question.modes`).  In both modes a missing
judgement is no number: it is outside the mean and inside the coverage.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks.figures import Figure

STRICT, FIXED = "strict", "fixed"
MODES = (STRICT, FIXED)
NOT_JUDGED = "not judged"  # what stands for the judge's name where there is none
ANSWER = "<answer>"  # stands for the judged image in `Picture.path`
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Kind(enum.StrEnum):
    """What a question asks for."""

    SCORES = "scores"  # a JSON object with whole numbers
    PROBABILITY = "probability"  # the probabilities of the first token
    DETECTION = "detection"  # boxes and colours of objects
    WORLD = "world"  # the micro-world's exact analyzer


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
      key: unique within the benchmark, a relative path of plain names ("00017", "chemistry/12").
      prompt: what the model is asked.
      category: the stratum that it belongs to.
      references: paths of the reference images, below the data folder or absolute.
      data: the record as published.
      task: task word of the prompt; "" for that of its references.
      aspect_ratio: of the answer's images, as in a request (`ivr_jax.sampling.requests`); "" takes the shape of one
        reference, else a square.
    """

    key: str
    prompt: str
    category: str
    references: tuple[str, ...] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = ""
    aspect_ratio: str = ""

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.key).parts
        if not parts or self.key != "/".join(parts) or parts[0] == "/" or {".", ".."} & set(parts) or "\0" in self.key:
            raise UserError(f"the key {self.key!r} of a prompt is no relative path.", "Correct the prompt file.")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError(f"the prompt of {self.key!r} is {self.prompt!r}.", "Give every item a non-empty text.")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image shown to the judge.

    Attributes:
      label: what it is called there.
      path: below the data folder, absolute, or `ANSWER`.
      max_area: pixels to which it is scaled down; 0 leaves it as it is.
      multiple: its sides are cut to multiples of this.
      like: path of the image whose size it is given; "" keeps its own.
    """

    label: str
    path: str
    max_area: int = 0
    multiple: int = 1
    like: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """One call of a judge about one image.

    Attributes:
      metric: names the judgement; unique for an image.
      kind: what is asked for.
      template: name of the prompt, a file of `prompts/` without its suffix; "" for questions without words.
      fields: what is filled into the prompt.
      pictures: shown, in order.
      scores: keys of the JSON reply that hold scores.
      low, high: least and greatest score, both whole numbers.
      accepted: first tokens that count as the right answer (kind PROBABILITY).
      modes: the summaries that read it.
      data: what a judge without words needs (kinds DETECTION and WORLD).
    """

    metric: str
    kind: Kind
    template: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: tuple[Picture, ...] = (Picture("Image", ANSWER),)
    scores: tuple[str, ...] = ()
    low: int = 0
    high: int = 1
    accepted: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class State(enum.StrEnum):
    """What became of a question."""

    OK = "ok"
    REFUSED = "refused"  # the judge will not answer it
    UNPARSABLE = "unparsable"  # it answered something else, also after it was asked again
    TRANSPORT = "transport"  # it could not be reached, or failed
    NO_IMAGE = "no_image"  # there is nothing to judge


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The outcome of one question.

    Attributes:
      item, sample, metric: what was judged.
      judge: the judge's identity (model, settings, prompt version).
      state: what became of it.
      value: JSON values that the benchmark reads: {"scores": {...}, "reasoning": "..."} and the like; None without.
      image: name of the judged image (`ivr_jax.images.image_name`), "" without one.
      detail: why there is no value, for people.
    """

    item: str
    sample: int
    metric: str
    judge: str
    state: State
    value: Mapping[str, Any] | None = None
    image: str = ""
    detail: str = ""

    @property
    def address(self) -> tuple[str, int, str]:
        """(item, sample, metric): what it is the judgement of."""
        return self.item, self.sample, self.metric


class Judged:
    """Judgements by item, sample and metric, of one run and one judge.

    Args:
      judgements: at most one for an address.
      samples: how many images each item should have.
      paths: path of each found image by (item, sample), as the official result files name it.
    """

    def __init__(
        self,
        judgements: Mapping[tuple[str, int, str], Judgement],
        samples: Mapping[str, int],
        paths: Mapping[tuple[str, int], str] | None = None,
    ):
        self._judgements, self._samples, self._paths = judgements, samples, paths or {}

    def samples(self, item: Item) -> range:
        """Numbers of the answers to an item."""
        return range(self._samples.get(item.key, 1))

    def path(self, item: Item, sample: int = 0) -> str:
        """The image's path; "" when there is none."""
        return self._paths.get((item.key, sample), "")

    def judgement(self, item: Item, metric: str, sample: int = 0) -> Judgement | None:
        """The judgement of one answer under one metric; None where there is none."""
        return self._judgements.get((item.key, sample, metric))

    def value(self, item: Item, metric: str, sample: int = 0) -> Mapping[str, Any] | None:
        """What was recorded for a question, whatever its state; None without a value."""
        found = self.judgement(item, metric, sample)
        return None if found is None else found.value

    def score(self, item: Item, metric: str, name: str, sample: int = 0, mode: str = FIXED) -> float | None:
        """One score of an answered question; None without one.

        In the mode `STRICT` a score that the official parser takes from the reply goes before ours.
        """
        found = self.judgement(item, metric, sample)
        if found is None or found.value is None:
            return None
        if mode == STRICT and "strict" in found.value:
            return found.value["strict"].get(name)
        return found.value.get("scores", {}).get(name) if found.state == State.OK else None

    def reasoning(self, item: Item, metric: str, sample: int = 0) -> str:
        """The reasoning that the judge gave with a value; "" without."""
        value = self.value(item, metric, sample)
        return "" if value is None else str(value.get("reasoning", ""))


class Benchmark(abc.ABC):
    """One benchmark.  Subclasses are stateless.

    Attributes:
      name: on the command line.
      title: for people.
      samples: images a prompt, as published.
      headline: name of the figure that is the result.
      top: the best that its figures can be.
      official_judge: what the authors judge with.
      judges: forms of judges that can judge it, the usual one first: "chat", "detector", "world".
      prompt_version: changes when one of its prompts changes.
      count: prompts as published; 0 when unknown.
      decimals: written after the point.
      shown: answers in each part of the page's gallery.
      needs_judge: whether a run without a judge is an error; otherwise its page shows the answers alone.
      notes: sentences that stand beside its figures.
    """

    name: str
    title: str
    samples: int = 1
    headline: str = "Overall"
    top: float = 100.0
    official_judge: str = ""
    judges: tuple[str, ...] = ("chat",)
    prompt_version: str = "1"
    count: int = 0
    decimals: int = 2
    shown: int = 8
    needs_judge: bool = True
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def items(self, data: Path, scratch: Path) -> list[Item]:
        """The prompts in published order.

        Args:
          data: folder of the published files.
          scratch: folder for images that stand inside prompt files; made when needed.

        Raises:
          UserError: a file is missing, malformed or of another benchmark.
        """

    @abc.abstractmethod
    def prompt_files(self, data: Path) -> list[Path]:
        """The files whose hash is the data's identity; see `datafiles.fingerprint`."""

    def image_path(self, item: Item, sample: int) -> str:
        """Where an image of ours is written, below the images folder."""
        return f"{item.key}.png"

    def side_files(self, item: Item) -> Mapping[str, str]:
        """Texts that the official layout wants beside the images: path below the images folder -> content."""
        return {}

    def find_images(self, images: Path, item: Item) -> list[Path]:
        """The images that stand for an item, one a sample, in order; none when it has none.

        Raises:
          UserError: there are two images for one place.
        """
        path = images / self.image_path(item, 0)
        found = [path.with_name(path.stem + suffix) for suffix in IMAGE_SUFFIXES]
        return only_one([path for path in found if path.is_file()], item)

    @abc.abstractmethod
    def questions(self, item: Item, sample: int, judge: str) -> list[Question]:
        """What is asked about one image by a judge of the form `judge`."""

    def read_strict(self, question: Question, text: str) -> Mapping[str, float] | None:
        """The scores that the official parser takes from a reply; None when it is as strict as ours."""
        return None

    @abc.abstractmethod
    def figures(self, items: Sequence[Item], judged: Judged, mode: str) -> list[Figure]:
        """Every figure of one mode, the headline among them."""

    @abc.abstractmethod
    def result_files(self, items: Sequence[Item], judged: Judged, model: str, judge: str) -> Mapping[str, str]:
        """The official result files: path below `results/` -> content.  Judgements that are missing are left out."""


def only_one(paths: Sequence[Path], item: Item) -> list[Path]:
    """`paths` when it holds at most one.  Raises UserError when two files stand for one image."""
    if len(paths) > 1:
        names = ", ".join(sorted(path.name for path in paths))
        raise UserError(f"there are {len(paths)} images for {item.key!r}: {names} in {paths[0].parent}.",
                        "Remove all but the one that is to be judged.")
    return list(paths)


def for_mode(questions: Sequence[Question], modes: Sequence[str]) -> list[Question]:
    """Those that one of `modes` reads."""
    return [question for question in questions if set(question.modes) & set(modes)]
