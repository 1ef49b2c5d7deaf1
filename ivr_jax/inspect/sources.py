"""Stored things to look into, each as a sequence of items, and the filters that choose among them.

    DATASET/    dataset.json     trajectories, encoded as the trainer would
    EXAMPLES/   examples.json    token examples, as the trainer reads them
    ANSWER/     answer.json      an answer of `generate` or of the server
    RUN/        gallery/*.npz    rollouts of an RL run, the newest; or one of these files

A filter is NAME, an operator and a value: `mode=reflection`, `loss=0` (tokens that carry loss), `tokens>300`,
`rounds>=3`, `passed=no`, `prompt~circle` (contains), and of rollouts `total>0.5` (reward), `advantage<0`.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from ivr_jax import files
from ivr_jax.checkpoints.system import System
from ivr_jax.data import examples
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.generate.answer_folder import RECORD
from ivr_jax.images import Images, load_image
from ivr_jax.inspect.tokens import Figures, Inspected, inspected
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar
from ivr_jax.training.stored_rollouts import SUFFIX, StoredAnswer, read_answers
from ivr_jax.trajectory import Sample, Trajectory, trajectory_from_json

DATASET, EXAMPLES, GALLERY = "dataset.json", examples.MANIFEST, "gallery"
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "!=": operator.ne, "=": operator.eq, ">": operator.gt, "<": operator.lt,
    "~": lambda have, want: str(want).casefold() in str(have).casefold(),
}  # fmt: skip
_FILTER = re.compile(r"(\w+)\s*(>=|<=|!=|=|>|<|~)\s*(.*)")
_NUMBERS = {"rounds", "images", "tokens", "loss", "position"}
_REWARDS = {"total", "bonus", "advantage"}
_TEXTS = {"mode", "key", "prompt", "category", "passed"}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An item as tokens: what `tokens.inspected` takes, and the values that filters ask for; `figures` as stored."""

    title: str
    values: dict[str, Any]
    tokens: np.ndarray
    answer_start: int
    segments: Sequence[codec.Segment]
    loss: np.ndarray
    figures: Figures = dataclasses.field(default_factory=Figures)

    def inspected(self, system: System, computed: Figures | None = None) -> Inspected:
        """The view; `computed` fills in figures that are not stored."""
        figures = self.figures.with_missing(computed or Figures())
        facts = {name: _shown(value) for name, value in self.values.items() if value not in ("", None)}
        return inspected(system, self.title, facts, self.tokens, self.answer_start, self.segments, self.loss, figures)


@dataclasses.dataclass(frozen=True)
class Filter:
    """A condition on one of an item's values."""

    name: str
    compare: Callable[[Any, Any], bool]
    value: Any

    def __call__(self, item: Encoded) -> bool:
        value = item.values.get(self.name)  # a reward of something else than a rollout, or one that is missing
        return value is not None and self.compare(value, self.value)


def parse_filter(text: str) -> Filter:
    """Raises UserError for a filter that is not understood."""
    match = _FILTER.fullmatch(text.strip())
    names = sorted(_NUMBERS | _REWARDS | _TEXTS)
    if match is None or match[1] not in names:
        raise UserError(f"the filter {text!r} is not understood.", f"Write NAME=VALUE; names: {', '.join(names)}.")
    name, sign, value = match[1], match[2], match[3].strip()
    if name in _NUMBERS and sign != "~":
        if not re.fullmatch(r"-?\d+", value):
            raise UserError(f"the filter {text!r} compares {name} with {value!r}.", "It takes a whole number.")
        return Filter(name, _OPERATORS[sign], int(value))
    if name in _REWARDS:
        try:
            return Filter(name, _OPERATORS[sign], float(value))
        except ValueError:
            raise UserError(f"the filter {text!r} compares {name} with {value!r}.", "It takes a number.") from None
    if sign in (">", "<", ">=", "<="):
        raise UserError(f"the filter {text!r} orders {name}.", "Use =, != or ~ with texts.")
    return Filter(name, _OPERATORS[sign], value)


def items(path: Path, system: System, first: int = 0, key: str | None = None) -> Iterator[Encoded]:
    """The items of a folder from number `first` on, or the one with `key`.  Raises UserError for a folder of no kind
    that is known, and for a number or key that is not there."""
    if (path / DATASET).is_file():
        yield from _dataset_items(TrajectoryDataset(path), system, first, key)
    elif (path / EXAMPLES).is_file():
        if key is not None:
            raise UserError("token examples have no keys.", "Name one by --index.")
        yield from _example_items(path, system, first)
    elif (path / RECORD).is_file():
        yield _answer_item(path, system)
    elif path.suffix == SUFFIX or (path / GALLERY).is_dir():
        yield from _rollout_items(path if path.suffix == SUFFIX else _newest(path / GALLERY), system, first, key)
    else:
        raise UserError(f"{path} is no dataset, no folder of token examples, no answer and no RL run with rollouts.",
                        f"Name a folder with {DATASET}, {EXAMPLES}, {RECORD} or {GALLERY}/step_<N>{SUFFIX}.")


def _dataset_items(dataset: TrajectoryDataset, system: System, first: int, key: str | None) -> Iterator[Encoded]:
    if not 0 <= first < len(dataset):
        raise UserError(f"there is no sample {first}: the dataset has {len(dataset)}.", "Name a smaller --index.")
    for position in range(first, len(dataset)):
        trajectory = dataset[position]
        if key is None or trajectory.sample.key == key:
            yield encode(trajectory, dataset.images(trajectory), system, f"sample {position}", position)
            if key is not None:
                return
    if key is not None:
        raise UserError(f"no sample has the key {key!r}.", "Check it; --filter=prompt~WORDS finds one by its words.")


def encode(trajectory: Trajectory, images: Images, system: System, title: str, position: int = 0) -> Encoded:
    """A trajectory as the trainer reads it."""
    names = list(dict.fromkeys((*trajectory.sample.sources, *trajectory.images)))
    codes = dict(zip(names, system.image_codec.encode([images[name] for name in names]), strict=True))
    made = codec.encode_trajectory(system.tokenizer, trajectory, codes)
    loss = made.loss_mask()
    values = {"position": position, **_values(trajectory), "tokens": len(made.tokens), "loss": int(loss.sum())}
    return Encoded(f"{title}: {trajectory.sample.key}", values, made.tokens, made.answer_start, made.segments, loss)


def _values(trajectory: Trajectory) -> dict[str, Any]:
    sample = trajectory.sample
    return {
        "key": sample.key, "prompt": sample.prompt, "category": sample.category, "mode": trajectory.mode.value,
        "rounds": len(trajectory.rounds), "images": len(sample.sources) + len(trajectory.rounds),
        "passed": "yes" if trajectory.rounds[-1].evaluation.passed else "no",
    }  # fmt: skip


def _example_items(folder: Path, system: System, first: int) -> Iterator[Encoded]:
    """Token examples of all modes, one mode after the other; their answers are parsed for the segments."""
    grammar, position = Grammar(system.tokenizer), 0
    for file in sorted(folder.glob("*.array_record")):
        reader = array_record_module.ArrayRecordReader(str(file))
        try:
            for number in range(reader.num_records()):
                if position >= first:
                    record = examples.unpack_example(reader.read([number])[0])
                    yield _example(record, system, grammar, f"{file.stem}, example {number}", position)
                position += 1
        finally:
            reader.close()
    if position <= first:
        raise UserError(f"there is no example {first}: the folder has {position}.", "Name a smaller --index.")


def _example(record: dict[str, np.ndarray], system: System, grammar: Grammar, title: str, position: int) -> Encoded:
    tokens, parts = record["tokens"], record["loss"]
    if len(tokens) and tokens.max() >= system.tokenizer.vocab.size:
        raise UserError(f"{title} holds the token {tokens.max()}, which the vocabulary does not have.",
                        "Name the --checkpoint whose tokenizers made the examples.")
    start = int(np.flatnonzero(tokens == system.tokenizer.vocab.bss)[0]) + 1
    prompt = system.tokenizer.decode([t for t in tokens[:start] if t < system.tokenizer.vocab.text_size])
    parsed = codec.parse_answer(grammar, Sample("example", prompt or "example"), tokens[start:])
    values = {"position": position, **_values(parsed.trajectory), "tokens": len(tokens), "loss": int((parts > 0).sum())}
    return Encoded(title, values, tokens, start, parsed.segments, parts > 0)


def _answer_item(folder: Path, system: System) -> Encoded:
    """The answer of a folder that `generate` or the server wrote."""
    record = files.read_json(folder / RECORD, "Make the answer again.")
    if "rounds" not in record:
        raise UserError(f"{folder} holds an answer that is no trajectory (it was stopped, or is interleaved).",
                        "Inspect one that came to its end.")
    trajectory = trajectory_from_json({"sample": record["sample"], "rounds": record["rounds"]})
    images = {name: load_image(folder / f"G{n}.png") for n, name in enumerate(trajectory.images, 1)}
    images |= {name: load_image(folder / f"source{n}.png") for n, name in enumerate(trajectory.sample.sources, 1)}
    return encode(trajectory, images, system, "answer")


# -- rollouts ---------------------------------------------------------------------------------------------------------


def _newest(gallery: Path) -> Path:
    found = sorted(gallery.glob(f"step_*{SUFFIX}"))
    if not found:
        raise UserError(f"{gallery} holds no rollouts.", "Train with --config.gallery.every=N.")
    return found[-1]


def _rollout_items(path: Path, system: System, first: int, key: str | None) -> Iterator[Encoded]:
    answers = read_answers(path)
    if not 0 <= first < len(answers):
        raise UserError(f"there is no answer {first}: the file has {len(answers)}.", "Name a smaller --index.")
    chosen = [(n, a) for n, a in enumerate(answers) if n >= first and key in (None, a.key)]
    if not chosen:
        raise UserError(f"no answer is to the sample {key!r}.", "--filter=prompt~WORDS finds one by its words.")
    for position, answer in chosen:
        yield encode_rollout(answer, system, path.stem, position)


def encode_rollout(answer: StoredAnswer, system: System, title: str, position: int) -> Encoded:
    """A sampled answer with its rewards.  Raises UserError when its tokens are not of the system's vocabulary."""
    if answer.tokens.max() >= system.tokenizer.vocab.size:
        raise UserError(f"{title} holds the token {answer.tokens.max()}, which the vocabulary does not have.",
                        "Name the --checkpoint that was trained.")  # fmt: skip
    loss = np.arange(len(answer.tokens)) >= answer.answer_start
    values = {
        "position": position, "key": answer.key, "prompt": answer.prompt, "mode": answer.mode, "rounds": answer.images,
        "images": answer.images, "passed": "yes" if answer.passed else "no", "error": answer.error,
        "tokens": len(answer.tokens), "loss": int(loss.sum()), **answer.rewards,
    }  # fmt: skip
    name = f"{title}, group {answer.group + 1}, member {answer.member + 1}"
    figures = Figures(log_prob=answer.log_probs, advantage=answer.advantages)
    return Encoded(name, values, answer.tokens, answer.answer_start, answer.segments, loss, figures)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
