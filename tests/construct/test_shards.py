"""Parts of a construction: each sample in exactly one, and together the dataset of a run without parts."""

from __future__ import annotations

import asyncio
import collections
import json
from pathlib import Path

import commands
import numpy as np
import pytest
from benchmark_model import write_model
from construct_worker import KEY, arguments, contents, write_samples
from hypothesis import given
from hypothesis import strategies as st
from openai_service import Behaviour, OpenAIService, serving

from ivr_jax.construct.shards import Shard
from ivr_jax.errors import UserError
from ivr_jax.services.journal import Journal

COUNT = 12


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


@given(st.lists(st.text(max_size=8), unique=True), st.integers(1, 7), st.integers(0, 1000))
def test_every_key_is_in_one_part_and_the_shares_add_up(keys, count, quota):
    parts = [Shard.parse(f"{i}/{count}") for i in range(count)]
    assert all(sum(part.holds(key) for part in parts) == 1 for key in keys)
    assert sum(part.share({"direct": quota})["direct"] for part in parts) == quota


def test_parts_do_not_depend_on_the_machine():
    assert [Shard(0, 5).holds(f"sample_{i}") for i in range(12)] == [
        i in (2, 4, 9) for i in range(12)
    ], "another hash would pay for everything again"
    assert Shard.parse("") == Shard(0, 1)


@pytest.mark.parametrize("text", ["2/2", "x", "1", "-1/2", "0/0", "1/2/3", "0 / 2"])
def test_a_shard_outside_its_range_is_refused(text):
    with pytest.raises(UserError) as error:
        Shard.parse(text)
    assert repr(text) in error.value.what


def test_merged_parts_are_the_run_without_parts_and_nothing_is_asked_twice(tmp_path):
    samples, service = write_samples(tmp_path, COUNT), OpenAIService(Behaviour(key=KEY))
    with serving(service) as url:
        commands.succeed("construct", *arguments(url, samples, tmp_path / "whole", folders=True))
        calm, service.log.answered = service.log.answered, collections.Counter()
        parts = [tmp_path / f"part{i}" for i in range(3)]
        for i in (0, 1):
            printed = commands.succeed("construct", *arguments(url, samples, parts[i]), f"--shard={i}/3")
            assert f"shard {i}/3 is complete" in printed and not (parts[i] / "dataset").exists()
        summaries = [json.loads((part / "summary.json").read_text()) for part in parts[:2]]
        assert 0 < sum(summary["samples"] for summary in summaries) < COUNT
        assert "shard was" in commands.run("construct", *arguments(url, samples, parts[0]), "--shard=1/3").complaint
        command = arguments(url, samples, tmp_path / "all", folders=True)
        merged = f"--merge={parts[0]},{parts[1]}"  # the third machine was lost: its part is constructed now
        commands.succeed("construct", *command, merged)
        assert service.log.answered == calm
        assert contents(tmp_path / "all" / "dataset") == contents(tmp_path / "whole" / "dataset")
        assert contents(tmp_path / "all" / "folders").keys() == contents(tmp_path / "whole" / "folders").keys()
        usage = [json.loads((tmp_path / run / "summary.json").read_text())["services"] for run in ("all", "whole")]
        assert usage[0] == usage[1]
        assert "complete" in commands.succeed("construct", *command, merged)


def test_what_does_not_belong_together_is_not_merged(tmp_path):
    samples, service = write_samples(tmp_path, 2), OpenAIService(Behaviour(key=KEY))
    with serving(service) as url:
        commands.succeed("construct", *arguments(url, samples, tmp_path / "part"), "--shard=0/1")
        other = arguments(url, samples, tmp_path / "other", seed=9)
        assert "seed was 2, is 9" in commands.run("construct", *other, f"--merge={tmp_path / 'part'}").complaint
        whole = arguments(url, samples, tmp_path / "all")
        for name, complaint in (("absent", "no journal"), ("pictures", "no journal"), ("all", "into itself")):
            assert complaint in commands.run("construct", *whole, f"--merge={tmp_path / name}").complaint
        assert "is a part" in commands.run("construct", *whole, "--shard=0/2", "--merge=x").complaint
        with Journal(tmp_path / "part" / "journal"):
            used = commands.run("construct", *whole, f"--merge={tmp_path / 'part'}")
            assert "another process" in used.complaint


def test_the_micro_world_s_parts_fill_their_shares_and_the_merged_set_is_the_whole(tmp_path):
    quotas = [f"--config.quotas.{mode}=5" for mode in ("direct", "reflection", "multi_step")]

    def construct(name: str, *more: str) -> Path:
        commands.succeed("construct", "--config=construct_micro", f"--workdir={tmp_path / name}", *quotas, *more)
        return tmp_path / name

    whole = construct("whole")
    parts = [construct(f"part{i}", f"--shard={i}/2") for i in range(2)]
    counts = [json.loads((part / "summary.json").read_text())["constructed"] for part in parts]
    assert all(sum(c[mode] for c in counts) >= 5 for mode in ("direct", "reflection", "multi_step"))
    merged = construct("merged", f"--merge={parts[0]},{parts[1]}")
    assert contents(merged / "dataset") == contents(whole / "dataset")


def test_first_images_by_a_model_are_those_of_a_run_without_parts(tmp_path):
    model = write_model(tmp_path / "model")
    wanted = {"direct": 0, "reflection": 3, "multi_step": 3}  # a model that knows nothing draws no direct answer
    quotas = [f"--config.quotas.{mode}={count}" for mode, count in wanted.items()]
    drawn = [f"--config.baseline={model}", "--config.batch=4", "--config.tasks.limit=40", *quotas]

    def construct(name: str, *more: str) -> Path:
        commands.succeed("construct", "--config=micro_construct", f"--workdir={tmp_path / name}", *drawn, *more)
        return tmp_path / name

    whole = construct("whole")
    parts = [construct(f"part{i}", f"--shard={i}/2") for i in range(2)]
    merged = construct("merged", f"--merge={parts[0]},{parts[1]}")
    assert contents(merged / "dataset") == contents(whole / "dataset")


def test_a_journal_takes_over_images_large_and_small(tmp_path):
    rng = np.random.default_rng(0)
    large, small = (rng.integers(0, 256, (side, side, 3), np.uint8) for side in (300, 20))

    async def add(journal: Journal) -> list[str]:
        return [await journal.add_image(pixels) for pixels in (large, small)]

    with Journal(tmp_path / "one") as one:
        names = asyncio.run(add(one))
    with Journal(tmp_path / "two") as two, Journal(tmp_path / "one") as one:
        for _ in range(2):  # a second time changes nothing
            two.take(one)
        assert [np.array_equal(two.image(name), pixels) for name, pixels in zip(names, (large, small), strict=True)] \
            == [True, True]
    assert not list((tmp_path / "two" / "images").rglob("*.tmp"))
