"""Where RL's prompts come from, and the iterator over them, which also carries what a resumed run must remember."""

from __future__ import annotations

import collections
import copy
import functools
import io
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ivr_jax.data import pipeline
from ivr_jax.data.sources import open_dataset
from ivr_jax.data.store import TrajectorySource
from ivr_jax.errors import UserError
from ivr_jax.images import Images
from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.trajectory import Sample
from ivr_jax.world.sampler import sample_task

WORLD = "world"
WORLD_CHECKED = 256  # tasks of the micro-world whose lengths are checked before a run


class Prompt(NamedTuple):
    """A request and the pixels of its sources by name."""

    sample: Sample
    images: Images


class Tasks(NamedTuple):
    """The prompts of one step, and those of each of the next ones for which rollouts are sampled ahead."""

    now: tuple[Prompt, ...]
    upcoming: tuple[tuple[Prompt, ...], ...] = ()


class Memory(Protocol):
    """Something with JSON state."""

    def get_state(self) -> Any:
        """The state as JSON values."""

    def set_state(self, state: Any) -> None:
        """Resumes from what `get_state` gave."""


def prompt_source(config: Any, seed: int) -> pipeline.Indexed:
    """Prompts: tasks of the micro-world (`source` "world"), or the samples of a trajectory dataset.

    Raises UserError when there is none.
    """
    if config.source == WORLD:
        source = pipeline.Indexed(functools.partial(_world_prompt, config.level, seed), config.size)
    else:
        dataset = open_dataset(config.source)
        source = pipeline.Indexed(functools.partial(_stored_prompt, dataset), len(dataset))
    if source.size < 1:
        raise UserError("there is no prompt to answer.", "Set config.prompts.size, or name a dataset with some.")
    return source


def image_sizes(config: Any, seed: int) -> Iterator[tuple[Sample, dict[str, tuple[int, int]]]]:
    """The samples of `prompt_source` with the height and width of their sources, no pixel decoded.

    All of a dataset's; of the micro-world's tasks, which are alike, the first `WORLD_CHECKED`.
    """
    if config.source == WORLD:
        for index in range(min(config.size, WORLD_CHECKED)):
            sample, images = _world_prompt(config.level, seed, index)
            yield sample, {name: pixels.shape[:2] for name, pixels in images.items()}
        return
    dataset = open_dataset(config.source)
    for index in range(len(dataset)):
        sample = dataset[index].sample
        opened = {name: Image.open(io.BytesIO(dataset.png(name))) for name in sample.sources}
        yield sample, {name: (image.height, image.width) for name, image in opened.items()}


def check_lengths(
    prompts: Iterable[tuple[Sample, Mapping[str, tuple[int, int]]]],
    tokenizer: TextTokenizer,
    factor: int,
    answer_length: int,
    longest: int,
) -> None:
    """Raises UserError for a prompt that leaves an answer no room.

    Args:
      prompts: see `image_sizes`; factor: pixels a side of a latent cell.
      longest: tokens that prompt and answer may have together: the model's context, or the largest bucket.
    """
    for sample, sizes in prompts:
        codes = {name: np.zeros((h // factor, w // factor), np.int32) for name, (h, w) in sizes.items()}
        tokens = len(codec.encode_prompt(tokenizer, sample, codes))
        if tokens + answer_length > longest:
            raise UserError(
                f"the prompt {sample.key!r} has {tokens} tokens and an answer may have {answer_length}: more than "
                f"{longest}, the largest of config.buckets and the model's context allow.",
                "Lower config.answer_length, add a larger bucket (config.buckets may change when a run resumes), or "
                "leave such prompts out.",
            )


def _world_prompt(level: int, seed: int, index: int) -> Prompt:
    task = sample_task(level, seed, index)
    return Prompt(task.sample, task.images)


def _stored_prompt(dataset: TrajectorySource, index: int) -> Prompt:
    sample = dataset[index].sample
    return Prompt(sample, {name: dataset.image(name) for name in sample.sources})


class SameSize:
    """Endless lists of `count` prompts whose images have one size, since answers of one size are sampled together.

    Prompts come in the shuffled order of `source`; those of a size that has not yet `count` of them are held back.

    Args:
      size_of: what has to be equal within a list.
    """

    def __init__(self, source: pipeline.Indexed, count: int, seed: int, size_of: Callable[[Prompt], Hashable]):
        self._source, self._count, self._size_of = source, count, size_of
        numbered = pipeline.Indexed(lambda index: (index, source[index]), len(source))
        self._stream = pipeline.indexed_batches(numbered, 1, seed, collate=list)
        self._held: dict[Hashable, list[tuple[int, Prompt]]] = {}

    def __next__(self) -> list[Prompt]:
        while True:
            [(index, prompt)] = next(self._stream)
            same = self._held.setdefault(self._size_of(prompt), [])
            same.append((index, prompt))
            if len(same) == self._count:
                del self._held[self._size_of(prompt)]
                return [prompt for _, prompt in same]

    def get_state(self) -> dict[str, Any]:
        """The stream's position, and the numbers of the prompts that are held."""
        held = [[index for index, _ in same] for same in self._held.values()]
        return {"position": copy.deepcopy(self._stream.get_state()), "held": held}

    def set_state(self, state: Any) -> None:
        """Resumes from what `get_state` gave; held prompts are read again."""
        self._stream.set_state(state["position"])
        held = [[(index, self._source[index]) for index in same] for same in state["held"]]
        self._held = {self._size_of(same[0][1]): same for same in held}


class PromptIterator:
    """Yields `Tasks`; its state holds the position and that of `memory` (alarms, counts) together.

    Args:
      batches: iterator of lists of prompts with JSON state.
      ahead: of how many further steps each element also shows the prompts.
    """

    def __init__(self, batches: Any, memory: Memory, ahead: int = 0):
        self._batches, self._memory, self._ahead = batches, memory, ahead
        self._shown: collections.deque[tuple[Any, tuple[Prompt, ...]]] = collections.deque()  # each after its position

    def __next__(self) -> Tasks:
        while len(self._shown) <= self._ahead:
            position = self._batches.get_state() if self._ahead else None
            self._shown.append((position, tuple(next(self._batches))))
        _, now = self._shown.popleft()
        return Tasks(now, tuple(prompts for _, prompts in self._shown))

    def get_state(self) -> dict[str, Any]:
        """The position of the next step's prompts, and the memory's state."""
        position = self._shown[0][0] if self._shown else self._batches.get_state()  # a resumed run's next call
        return {"prompts": position, "memory": self._memory.get_state()}

    def set_state(self, state: Any) -> None:
        """Resumes from what `get_state` gave."""
        self._batches.set_state(state["prompts"])
        self._memory.set_state(state["memory"])
        self._shown.clear()
