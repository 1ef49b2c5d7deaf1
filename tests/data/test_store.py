"""The dataset directory: what goes in comes out, all of it or nothing, and what is broken is said."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from dataset_fixtures import build, evaluation, example

from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.trajectory import Round, Sample, Trajectory


def leftovers(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def test_what_goes_in_comes_out(tmp_path):
    dataset = TrajectoryDataset(build(tmp_path / "data"))
    assert len(dataset) == 5
    for index in range(5):
        trajectory, images = example(index)
        assert dataset[index] == trajectory
        back = dataset.images(trajectory)
        assert set(back) == set(images) and all(
            np.array_equal(back[n], images[n]) and back[n].dtype == np.uint8 for n in images
        )
    assert [t.sample.key for t in dataset] == [f"key/{i}" for i in range(5)]
    assert dataset[-1] == dataset[np.int64(4)] == dataset[4]
    assert leftovers(tmp_path / "data") == []


def test_the_manifest_counts_and_remembers(tmp_path):
    manifest = json.loads((build(tmp_path / "data") / "dataset.json").read_text())
    assert manifest == {
        "format": "ivr_jax.trajectories",
        "version": 1,
        "trajectories": 5,
        "images": 10,
        "content_sha256": manifest["content_sha256"],
        "by_mode": {"direct": 2, "multi_step": 1, "reflection": 2},
        "by_category": {"addition": 3, "pose": 2},
        "by_image_size": {"8x6": 10},
        "provenance": {"seed": 7},
    }


def test_the_same_input_makes_the_same_bytes(tmp_path):
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert sorted(p.name for p in first.iterdir()) == [
        "README.md",
        "card.json",
        "dataset.json",
        "images.array_record",
        "images.json",
        "records.array_record",
    ]
    assert all((second / file.name).read_bytes() == file.read_bytes() for file in first.iterdir())


def test_it_is_a_source_for_grain_and_can_be_pickled_when_open(tmp_path):
    dataset = TrajectoryDataset(build(tmp_path / "data"))
    trajectory = dataset[2]
    dataset.images(trajectory)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[2] == trajectory and len(copy) == 5
    keys = [t.sample.key for t in grain.MapDataset.source(dataset).shuffle(seed=1)]
    assert sorted(keys) == [f"key/{i}" for i in range(5)]


def test_neither_writing_nor_reading_imports_tensorflow_or_jax():
    code = "import sys, ivr_jax.data.store; print([m for m in ('tensorflow', 'jax') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(*example(0))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_taken_over(tmp_path):
    code = (
        "import os, sys; sys.path[:0] = ['tests']; from dataset_fixtures import *\n"
        f"w = TrajectoryWriter({str(tmp_path / 'data')!r}); w.add(*example(0)); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 9
    assert leftovers(tmp_path / "data") == [".data.partial"]
    assert len(TrajectoryDataset(build(tmp_path / "data", 2))) == 2
    assert leftovers(tmp_path / "data") == []


def test_two_writers_of_one_place_do_not_mix(tmp_path):
    with TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(*example(0))
        with pytest.raises(UserError):
            TrajectoryWriter(tmp_path / "data")
    assert len(TrajectoryDataset(tmp_path / "data")) == 1


def test_an_existing_dataset_is_kept(tmp_path):
    path = build(tmp_path / "data")
    with pytest.raises(UserError):
        TrajectoryWriter(path)
    assert len(TrajectoryDataset(path)) == 5 and leftovers(path) == []


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path):
    """Datasets of one size and one manifest but for the content: the fault that 40 of them had one fingerprint."""

    def write(path, number, provenance):
        with TrajectoryWriter(path, provenance) as writer:
            pixels = np.full((6, 8, 3), number, np.uint8)
            rounds = (Round(None, image_name(pixels), evaluation(True)),)
            writer.add(Trajectory(Sample("key", f"prompt {number:02d}"), rounds), {image_name(pixels): pixels})
        return TrajectoryDataset(path)

    made = [write(tmp_path / str(number), number, {}) for number in range(40)]
    assert len({dataset.fingerprint for dataset in made}) == 40
    assert write(tmp_path / "again", 7, {"seed": 1}).fingerprint == made[7].fingerprint
    order = [TrajectoryDataset(build(tmp_path / f"order{count}", count)) for count in (2, 3)]
    assert order[0].fingerprint != order[1].fingerprint


def test_a_dataset_of_an_older_version_has_the_fingerprint_of_its_records(tmp_path):
    path = build(tmp_path / "data")
    stored = TrajectoryDataset(path).fingerprint
    manifest = json.loads((path / "dataset.json").read_text())
    del manifest["content_sha256"]
    (path / "dataset.json").write_text(json.dumps(manifest))
    assert TrajectoryDataset(path).fingerprint == stored


def test_a_place_that_is_taken_meanwhile_is_an_error_and_what_took_it_stays(tmp_path):
    with pytest.raises(UserError), TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(*example(0))
        (tmp_path / "data").write_text("mine")
    assert (tmp_path / "data").read_text() == "mine" and leftovers(tmp_path / "data") == []


def test_an_empty_directory_may_become_the_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    assert len(TrajectoryDataset(build(tmp_path / "data"))) == 5


def test_a_dataset_without_trajectories_is_refused_when_written_and_when_read(tmp_path):
    with pytest.raises(UserError), TrajectoryWriter(tmp_path / "data"):
        pass
    assert list(tmp_path.iterdir()) == []
    path = build(tmp_path / "data")
    manifest = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**manifest, "trajectories": 0}))
    with pytest.raises(UserError, match="data"):
        TrajectoryDataset(path)


def test_a_key_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="key/1"), TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(*example(1))
        writer.add(*example(1))


@pytest.mark.parametrize(
    "fault, message", [("missing", "was not given"), ("other", "other pixels"), ("float", "uint8")]
)
def test_an_image_that_is_missing_or_not_what_its_name_says_is_refused_and_the_rest_still_written(
    tmp_path, fault, message
):
    trajectory, images = example(1)
    name = trajectory.images[0]
    broken = dict(images)
    if fault == "missing":
        del broken[name]
    else:
        broken[name] = images[name].astype(np.float32) if fault == "float" else 255 - images[name]
    with TrajectoryWriter(tmp_path / "data") as writer:
        with pytest.raises(UserError, match=message):
            writer.add(trajectory, broken)
        writer.add(*example(0))
        writer.add(*example(1))
    assert [t.sample.key for t in TrajectoryDataset(tmp_path / "data")] == ["key/0", "key/1"]


def test_facts_and_provenance_must_be_json(tmp_path):
    trajectory, images = example(0)
    odd = Trajectory(Sample("odd", "p", facts={"x": {1, 2}}), trajectory.rounds)
    with pytest.raises(UserError, match="odd"), TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(odd, images)
    with pytest.raises(UserError, match="provenance"):
        TrajectoryWriter(tmp_path / "data", {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        TrajectoryWriter(tmp_path / "file" / "data")


def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path):
    code = (
        "import resource, signal, sys; sys.path[:0] = ['tests']; from dataset_fixtures import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"with TrajectoryWriter({str(tmp_path / 'data')!r}) as writer:\n"
        "    for index in range(100): writer.add(*example(index, (64, 64)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1 and "UserError: cannot write" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text, message", [(None, "holds no dataset"), ("{", "dataset.json"), ('{"format": "other"}', "is not a")]
)
def test_a_directory_that_is_no_dataset_is_an_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message):
        TrajectoryDataset(tmp_path)


def overwrite(file: Path, at: int, count: int) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + count] = b"\xff" * count
    file.write_bytes(data)


def test_a_damaged_record_is_named_and_the_others_still_read(tmp_path):
    path = tmp_path / "data"
    with TrajectoryWriter(path) as writer:
        for index in range(8):
            trajectory, images = example(index, (64, 64))
            writer.add(trajectory, images)
    whole = (path / "images.array_record").stat().st_size
    overwrite(path / "images.array_record", whole // 2, 8)
    dataset, bad, good = TrajectoryDataset(path), [], 0
    for trajectory in dataset:
        for name in trajectory.images:
            try:
                dataset.image(name)
                good += 1
            except UserError as error:
                assert name in str(error) and "corrupt" in str(error)
                bad.append(name)
    assert 1 <= len(bad) <= 2 and good >= 12


def test_a_record_that_is_no_trajectory_is_named(tmp_path):
    from array_record.python import array_record_module

    path = build(tmp_path / "data", 2)
    writer = array_record_module.ArrayRecordWriter(str(path / "records.array_record"), "group_size:1")
    writer.write(b"{]")
    writer.write(b'{"rounds": []}')
    writer.close()
    dataset = TrajectoryDataset(path)
    for index in range(2):
        with pytest.raises(UserError, match=f"record {index} .*corrupt"):
            dataset[index]


@pytest.mark.parametrize("file", ["records.array_record", "images.array_record", "images.json"])
@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_a_missing_or_truncated_file_is_named(tmp_path, file, fault):
    path = build(tmp_path / "data")
    if fault == "gone":
        (path / file).unlink()
    else:
        os.truncate(path / file, (path / file).stat().st_size // 3)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        dataset = TrajectoryDataset(path)
        dataset.images(dataset[0])


def test_an_image_or_an_index_that_is_not_there(tmp_path):
    dataset = TrajectoryDataset(build(tmp_path / "data"))
    with pytest.raises(UserError, match="'nowhere'"):
        dataset.image("nowhere")
    with pytest.raises(IndexError):
        dataset[5]
    with pytest.raises(IndexError):
        dataset[-6]


def test_a_dataset_may_be_moved(tmp_path):
    shutil.move(build(tmp_path / "data"), tmp_path / "elsewhere")
    assert TrajectoryDataset(tmp_path / "elsewhere")[0] == example(0)[0]
