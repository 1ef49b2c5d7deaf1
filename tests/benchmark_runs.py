"""Runs of the benchmark command on tiny data, with images of one grey each and a scripted judge behind HTTP."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import benchmark_fixtures
import commands
import judge_service
import numpy as np
from openai_service import Behaviour, serving

from ivr_jax import files
from ivr_jax.evaluate.benchmarks import generation, registry
from ivr_jax.evaluate.benchmarks.interface import Benchmark, Item, Question
from ivr_jax.images import Pixels

STEP = 9  # grey levels between two images; JPEG changes a plain grey by less


class Prepared:
    """Data and images of one benchmark.

    Attributes:
      benchmark, items, data: as read.
      images: folder of the images, in the official layout.
    """

    def __init__(self, name: str, root: Path, samples: Mapping[str, int] | None = None):
        self.benchmark: Benchmark = registry.load(name)
        self.data, self.images = root / "data", root / "images"
        self.items: list[Item] = benchmark_fixtures.load_items(self.benchmark, self.data)
        self._pairs = [(item, n) for item in self.items for n in range((samples or {}).get(item.key, 1))]
        for index, (item, sample) in enumerate(self._pairs):
            pixels = np.full((64, 64, 3), STEP * index + 4, np.uint8)
            generation.save_image(self.images / self.benchmark.image_path(item, sample), pixels)
            for path, text in self.benchmark.side_files(item).items():
                files.write_file(self.images / path, text)

    def find(self, pixels: Pixels) -> tuple[Item, int]:
        """Which image this is."""
        return self._pairs[round((float(pixels.mean()) - 4) / STEP)]

    def script(self, answer: Callable[[Item, int, Question], object]) -> judge_service.Script:
        return judge_service.script_of(self.benchmark, self.items, answer, self.find)

    def arguments(self, url: str, workdir: Path, *more: str) -> list[str]:
        return [
            f"--benchmark={self.benchmark.name}", f"--data={self.data}", f"--workdir={workdir}", "--judge_only",
            f"--answers={self.images}", "--model=tiny", *judge_flags(url), *more,
        ]  # fmt: skip

    def judge(self, url: str, workdir: Path, *more: str) -> commands.Done:
        return commands.run("evaluate", *self.arguments(url, workdir, *more))


def judge_flags(url: str) -> list[str]:
    """The scripted judge, asked without long waits."""
    return [
        "--config.judge.model=scripted", f"--config.judge.base_url={url}", "--config.judge.key_variable=",
        "--config.judge.first_wait=0.01", "--config.judge.longest_wait=0.05", "--config.judge.tries=3",
        "--config.judge.timeout=20.0", "--config.judge.in_flight=8",
    ]  # fmt: skip


@contextlib.contextmanager
def judging(script: judge_service.Script | None = None, behaviour: Behaviour | None = None) -> Iterator[
    tuple[judge_service.JudgeService, str]
]:
    """A running judge and its address."""
    service = judge_service.JudgeService(script, behaviour)
    with serving(service) as url:
        yield service, url


def summary_of(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def values_of(workdir: Path, mode: str) -> dict[str, float | None]:
    return {name: figure[mode]["value"] for name, figure in summary_of(workdir)["figures"].items()}
