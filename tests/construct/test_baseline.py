"""First images by a checkpoint of our own: which are drawn, how many, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import tiny_model
from openai_service import service_config

from ivr_jax.construct import baseline
from ivr_jax.construct.baseline import Baseline
from ivr_jax.construct.escalation import Request
from ivr_jax.construct.run import Entry
from ivr_jax.construct.shards import Shard
from ivr_jax.errors import UserError
from ivr_jax.sampling import batch as engine_batch
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.services.caller import Caller, Reply
from ivr_jax.services.checkpoint import CheckpointGenerator

SYSTEM = tiny_model.system()
AREA = SYSTEM.image_codec.config.resolution**2


def collected(made: Baseline, entries: list[Entry], **options) -> list[Entry]:
    async def collect():
        return [entry async for entry in made.with_first_images(entries, **options)]

    return asyncio.run(collect())


def made(batch: int, system=SYSTEM) -> Baseline:
    return Baseline(system, SamplingOptions(), seed=3, batch=batch, area=AREA)


def test_first_images_skip_what_is_known_what_is_given_and_what_cannot_be_read():
    samples, images = tiny_model.requests(6, sources=1)
    given = np.full((32, 32, 3), 7, np.uint8)

    def loader(i):
        def load():
            if i == 1:
                raise UserError("damaged.")
            return Request(samples[i], images[i], given if i == 2 else None)

        return load

    entries = [Entry(f"request {i}", str(i), loader(i)) for i in range(6)]
    every = collected(made(2), entries)
    assert [entry.key for entry in every] == [f"request {i}" for i in range(6)]
    assert every[1] is entries[1] and np.array_equal(every[2].load().first_image, given)
    resumed = collected(made(2), entries, known=lambda entry: entry.key < "request 4")
    assert resumed[:4] == entries[:4]
    for i in (4, 5):
        assert np.array_equal(resumed[i].load().first_image, every[i].load().first_image)


def test_a_run_that_is_asked_to_stop_gives_up_what_is_being_drawn(monkeypatch):
    monkeypatch.setattr(engine_batch, "REPORTED", 2)  # model calls between two looks
    samples, images = tiny_model.requests(2, sources=1)
    entries = [Entry(f"request {i}", str(i), lambda i=i: Request(samples[i], images[i])) for i in range(2)]
    shown: list[str] = []
    stopped = collected(made(2), entries, progress=shown.append, stopped=lambda: len(shown) > 0)
    assert stopped == entries and len(shown) == 1
    whole = collected(made(2), entries, progress=shown.append)
    assert len(shown) > 3 and shown[-1] == "" and all(entry.load().first_image.any() for entry in whole)


def test_parts_draw_together_what_one_process_draws():
    samples, images = tiny_model.requests(7, sources=1)
    entries = [
        Entry(f"request {i}", str(i), lambda i=i: Request(samples[i], images[i], None)) for i in range(len(samples))
    ]
    whole = {entry.key: entry.load().first_image for entry in collected(made(2), entries)}
    parts = [collected(made(2), entries, holds=Shard(index, 3).holds_batch) for index in range(3)]
    assert [[entry.key for entry in part] for part in parts] == [
        ["request 0", "request 1", "request 6"], ["request 2", "request 3"], ["request 4", "request 5"]
    ]  # fmt: skip
    for entry in (entry for part in parts for entry in part):
        assert np.array_equal(entry.load().first_image, whole[entry.key])


@pytest.fixture
def drawings(monkeypatch):
    """Stands in for the model: notes how many images were asked for at a time, and takes a while."""
    sizes = []

    def draw(system, samples, images, key, options, size=None, on_usage=None):
        sizes.append(len(samples))
        time.sleep(0.3)
        return [np.full((8, 8, 3), i, np.uint8) for i in range(len(samples))]

    monkeypatch.setattr(baseline, "draw_first_images", draw)
    monkeypatch.setattr("ivr_jax.services.checkpoint.draw_first_images", draw)
    return sizes


def entries_of(heights: list[int], loads: list[int]) -> list[Entry]:
    def loader(i, height):
        def load():
            loads.append(i)
            pixels = np.full((height, 32, 3), i, np.uint8)
            sample, image = tiny_model.requests(1, sources=1)
            name = sample[0].sources[0]
            return Request(sample[0], {name: pixels} if height else image[0])

        return load

    return [Entry(f"{i}", "", loader(i, height)) for i, height in enumerate(heights)]


def test_few_samples_are_few_drawings_and_each_is_read_once(drawings):
    loads: list[int] = []
    told: list[str] = []
    entries = collected(made(256), entries_of([32, 32, 32, 64, 64, 128], loads), progress=told.append)
    requests = [entry.load() for entry in entries]
    assert drawings == [4, 2, 1]  # three sizes; each in the next power of two
    assert loads == list(range(6))
    assert [request.first_image[0, 0, 0] for request in requests] == [0, 1, 2, 0, 1, 0]
    assert [request.images[request.sample.sources[0]].shape[0] for request in requests] == [32, 32, 32, 64, 64, 128]
    assert [text for text in told if "of 6" in text]


def test_large_images_are_not_held_until_their_turn(drawings, monkeypatch):
    monkeypatch.setattr(baseline, "_HELD", 32 * 32 * 3)
    loads: list[int] = []
    entries = collected(made(4), entries_of([32, 64], loads))
    for entry in entries:
        assert entry.load().first_image is not None
    assert loads == [0, 1, 1]


def test_calls_of_a_healthy_service_do_not_time_out_while_a_model_draws(drawings):
    """A call of 100 ms that may take 200 ms, beside drawings of 300 ms: none is asked again."""
    caller = Caller(service_config("http://127.0.0.1:1/v1", timeout=0.2, tries=1))

    async def answer(complaint):
        await asyncio.sleep(0.1)
        return Reply("fine")

    async def both():
        loads: list[int] = []
        calls = asyncio.gather(*(caller.call(answer, lambda reply: reply.text) for _ in range(4)))
        await asyncio.sleep(0.05)
        entries = [entry async for entry in made(8).with_first_images(entries_of([32, 64, 128], loads))]
        (sample,), (images,) = tiny_model.requests(1, sources=1)
        more = asyncio.gather(*(caller.call(answer, lambda reply: reply.text) for _ in range(4)))
        await asyncio.sleep(0.05)
        generator = CheckpointGenerator(SYSTEM, "tiny", SamplingOptions(), 5, None)
        await generator.generate(sample, sample.prompt, list(images.values()))
        return entries, await calls, await more

    entries, first, second = asyncio.run(both())
    assert len(entries) == 3 and first == second == ["fine"] * 4
    assert caller.counts.calls == 8 and not caller.counts.faults


def test_a_model_edits_photographs_at_the_area_of_the_dataset(drawings, monkeypatch):
    """Baseline and generator fit the sources to it, not to the image tokenizer's own resolution."""
    shapes, cells = [], []

    def draw(system, samples, images, key, options, size=None, on_usage=None):
        shapes.extend(pixels.shape[:2] for given in images for pixels in given.values())
        cells.append(size or system.cells)
        return [np.zeros((8, 8, 3), np.uint8)] * len(samples)

    monkeypatch.setattr(baseline, "draw_first_images", draw)
    monkeypatch.setattr("ivr_jax.services.checkpoint.draw_first_images", draw)
    photograph = np.zeros((48, 96, 3), np.uint8)
    (sample,), _ = tiny_model.requests(1, sources=1)
    request = Request(sample, {sample.sources[0]: photograph})
    collected(Baseline(SYSTEM, SamplingOptions(), 3, 4, area=64 * 128), [Entry("0", "", lambda: request)])
    generator = CheckpointGenerator(SYSTEM, "tiny", SamplingOptions(), 5, None, area=64 * 128)
    asyncio.run(generator.generate(sample, sample.prompt, [photograph]))
    assert shapes == [(64, 128)] * 2
    text_only = dataclasses.replace(sample, sources=())
    entries = [Entry("0", "", lambda: Request(text_only, {}))]
    collected(Baseline(SYSTEM, SamplingOptions(), 3, 4, area=64 * 128), entries)
    for size in ("auto", "128x64", "1024x2048"):
        generator = CheckpointGenerator(SYSTEM, "tiny", SamplingOptions(), 5, None, 64 * 128, size)
        asyncio.run(generator.generate(text_only, sample.prompt, []))
    factor = SYSTEM.image_codec.config.factor
    side = round((64 * 128) ** 0.5 / factor)
    assert cells[2:] == [(side, side), (side, side), (64 // factor, 128 // factor), (128 // factor, 64 // factor)]
    with pytest.raises(UserError):
        CheckpointGenerator(SYSTEM, "tiny", SamplingOptions(), 5, None, size="large")
