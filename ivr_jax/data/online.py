"""Token examples without a dataset: lessons of the micro-world (`ivr_jax.world.practice`), made when they are read.

They are equal to what `ivr_jax.data.examples` makes of a stored dataset of the same trajectories.
"""

from __future__ import annotations

import collections
import threading

import numpy as np

from ivr_jax.data.examples import EncodeImages
from ivr_jax.protocol import codec
from ivr_jax.protocol.text import TextTokenizer
from ivr_jax.world.practice import Lesson, PracticeOptions, draw_lesson
from ivr_jax.world.render import render

CHUNK = 64  # lessons whose images are encoded together: one by one takes eight times as long
KEPT = 4  # chunks, for readers that do not go in step


class LessonExamples:
    """Example i is lesson i as tokens int32 [T] and loss uint8 [T] (see `examples.unpack_example`).

    A source for Grain, meant to be read roughly in order, by any number of threads.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        encode_images: EncodeImages,
        options: PracticeOptions,
        seed: int,
        size: int = 2**31,
    ):
        self._tokenizer, self._encode, self._options = tokenizer, encode_images, options
        self._seed, self._size = seed, size
        self._lock, self._chunks = threading.Lock(), collections.OrderedDict()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, place = divmod(int(index), CHUNK)
        with self._lock:
            if number not in self._chunks:
                self._chunks[number] = self._make(number * CHUNK)
                if len(self._chunks) > KEPT:
                    self._chunks.popitem(last=False)
            return self._chunks[number][place]

    def _make(self, start: int) -> list[dict[str, np.ndarray]]:
        lessons = [draw_lesson(self._options, self._seed, start + i) for i in range(CHUNK)]
        images = [render(scene, self._options.level) for lesson in lessons for scene in lesson.scenes.values()]
        codes = iter(self._encode(images))
        return [self._example(lesson, {name: next(codes) for name in lesson.scenes}) for lesson in lessons]

    def _example(self, lesson: Lesson, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        encoded = codec.encode_trajectory(self._tokenizer, lesson.trajectory, codes)
        loss = encoded.target_parts()
        rounds = lesson.trajectory.rounds
        for segment in encoded.segments:
            if segment.part == "G" and rounds[segment.round - 1].image in lesson.given:
                loss[encoded.answer_start + segment.start : encoded.answer_start + segment.end] = 0
        return {"tokens": encoded.tokens, "loss": loss}
