"""`python -m ivr_jax.export`: datasets and released folders out to every format, and released folders in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from answer_tokens import token_content
from commands import run, succeed
from dataset_fixtures import build, example
from photographs import write_success

from ivr_jax.construct.exports import FORMS
from ivr_jax.construct.released import iter_released
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter, write_card
from ivr_jax.images import load_image
from ivr_jax.trajectory import AxisVerdict, Evaluation, Round, Sample, Trajectory, trajectory_from_json

ROOT = Path(__file__).resolve().parents[2]
VECTORS = Path(__file__).parents[1] / "vectors"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def paths_of(record: dict) -> list[str]:
    """Every image path in a record of any form."""
    return re.findall(r"[\w./-]+\.png", json.dumps(record, ensure_ascii=False))


@pytest.fixture
def dataset(tmp_path) -> Path:
    """The five photograph samples as a dataset, imported by the command."""
    success = write_success(tmp_path, 16)
    printed = succeed("export", success, "--format=dataset", f"--out={tmp_path / 'dataset'}")
    assert printed == f"{tmp_path / 'dataset'}: 5 samples\n"
    return tmp_path / "dataset"


# -- JSONL --


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix, flags", [("", []), (".max1_skip", ["--skip_direct", "--max_reflections=1"])])
def test_the_command_writes_what_the_released_converter_writes(tmp_path, form, suffix, flags):
    out = tmp_path / "out.jsonl"
    printed = succeed("export", *flags, VECTORS / "success", f"--format={form}", f"--out={out}")
    expected = VECTORS / f"{form}{suffix}.jsonl"
    assert out.read_bytes() == expected.read_bytes()
    assert printed == f"{out}: {len(lines(expected))} samples\n"


@pytest.mark.parametrize("form", FORMS)
def test_the_jsonl_of_a_dataset_differs_from_that_of_its_released_folders_in_paths_alone(tmp_path, dataset, form):
    succeed("export", dataset, "--format=released", f"--out={tmp_path / 'again'}")
    succeed("export", tmp_path / "again", f"--format={form}", f"--out={tmp_path / 'tree.jsonl'}")
    succeed("export", dataset, f"--format={form}", f"--out={tmp_path / 'data' / 'set.jsonl'}")
    from_tree, from_dataset = lines(tmp_path / "tree.jsonl"), lines(tmp_path / "data" / "set.jsonl")
    assert len(from_tree) == len(from_dataset) == 5
    for theirs, ours in zip(from_tree, from_dataset, strict=True):
        paths = dict(zip(paths_of(theirs), paths_of(ours), strict=True))
        text = json.dumps(theirs, ensure_ascii=False)
        for path, name in paths.items():
            text = text.replace(path, name)
            assert np.array_equal(load_image(path), load_image(tmp_path / "data" / name))
        assert json.loads(text) == ours
    stored = len(list((tmp_path / "data" / "set_images").iterdir()))
    assert stored == len(TrajectoryDataset(dataset).image_names) == 8, "shared pictures are written once"


def test_tokens_of_the_forms_are_options(tmp_path, dataset):
    flags = ["--image_token=[I]", "--think_open=<<", "--think_close=>>", "--skip_direct"]
    succeed("export", dataset, "--format=chatml", f"--out={tmp_path / 'out.jsonl'}", *flags)
    texts = [record["text"] for record in lines(tmp_path / "out.jsonl")]
    assert len(texts) == 2 and all("<<I will" in text and "[I]{out_images/" in text for text in texts)


def failed_end(key: str) -> Trajectory:
    verdicts = Evaluation(*(AxisVerdict(False, "no", 1) for _ in range(4)))
    base, _ = example(0)
    return Trajectory(Sample(key, "p", base.sample.sources), (Round(None, base.images[0], verdicts),))


def test_answers_that_end_in_a_failed_image_are_not_shown_to_other_trainers(tmp_path):
    with TrajectoryWriter(tmp_path / "data") as writer:
        trajectory, images = example(0)
        writer.add(failed_end("bad"), images)
        writer.add(Trajectory(Sample("good", "p"), trajectory.rounds), images)
    printed = succeed("export", tmp_path / "data", "--format=messages", f"--out={tmp_path / 'out.jsonl'}")
    assert "'bad'" in printed and "1 samples, 1 left out" in printed
    assert [record["id"] for record in lines(tmp_path / "out.jsonl")] == ["good"]
    assert len(list((tmp_path / "out_images").iterdir())) == 1
    printed = succeed("export", tmp_path / "data", "--format=released", f"--out={tmp_path / 'success'}")
    assert "'bad'" in printed
    assert [folder.name for folder in (tmp_path / "success").iterdir()] == ["good"]


# -- released folders, both ways --


def test_out_to_released_folders_and_in_again_is_the_same_dataset(tmp_path, dataset):
    printed = succeed("export", dataset, "--format=released", f"--out={tmp_path / 'again'}")
    assert printed == f"{tmp_path / 'again'}: 5 samples\n"
    result = json.loads((tmp_path / "again" / "cat_dusk" / "result.json").read_text())
    assert result["direct_edit_image_path"] == f"{tmp_path}/again/cat_dusk/step1_direct_edit_result.png"
    succeed("export", tmp_path / "again", "--format=dataset", f"--out={tmp_path / 'back'}")
    before, after = TrajectoryDataset(dataset), TrajectoryDataset(tmp_path / "back")
    assert before.image_names == after.image_names
    # inferred verdicts get a score on the way, nothing else changes
    assert list(map(token_content, before)) == list(map(token_content, after))
    succeed("export", tmp_path / "back", "--format=released", f"--out={tmp_path / 'third'}")
    succeed("export", tmp_path / "third", "--format=dataset", f"--out={tmp_path / 'last'}")
    assert list(after) == list(TrajectoryDataset(tmp_path / "last"))


def test_keys_that_cannot_name_a_folder_are_named_and_left_out(tmp_path):
    trajectory, images = example(0)
    with TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(Trajectory(Sample("good", "p"), trajectory.rounds), images)
        writer.add(Trajectory(Sample("key/1", "p"), trajectory.rounds), images)
    printed = succeed("export", tmp_path / "data", "--format=released", f"--out={tmp_path / 'out'}")
    assert "'key/1' cannot name a folder" in printed and "1 samples, 1 left out" in printed
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["good"]


@pytest.mark.parametrize("form", [*FORMS, "released", "visual_reflection"])
def test_an_export_of_nothing_is_an_error_and_leaves_nothing(tmp_path, form):
    _, images = example(0)
    with TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(failed_end("bad"), images)
    done = run("export", tmp_path / "data", f"--format={form}", f"--out={tmp_path / 'out.jsonl'}")
    assert "'bad'" in done.complaint
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_an_import_of_nothing_is_an_error_and_leaves_nothing(tmp_path):
    success = write_success(tmp_path, 16)
    for file in success.glob("*/*.png"):
        file.write_bytes(b"no image")
    done = run("export", success, "--format=dataset", f"--out={tmp_path / 'dataset'}")
    assert "no image" in done.complaint and not (tmp_path / "dataset").exists()


def test_what_an_import_leaves_out_is_named_with_its_reason(tmp_path):
    success = write_success(tmp_path, 16)
    (success / "cat_dusk" / "step1_direct_edit_result.png").write_bytes(b"<html>")
    printed = succeed("export", success, "--format=dataset", f"--out={tmp_path / 'data'}")
    assert "no image" in printed and "4 samples, 1 left out" in printed
    counts = TrajectoryDataset(tmp_path / "data").manifest["provenance"]["counts"]
    assert counts == {"folders": 5, "imported": 4}


def test_images_elsewhere_are_imported_from_the_image_root(tmp_path):
    success = write_success(tmp_path, 16)
    (tmp_path / "photographs").mkdir()
    shutil.move(success / "portrait_grey" / "original_image.png", tmp_path / "photographs" / "portrait_grey.png")
    flags = ["--format=dataset", f"--out={tmp_path / 'data'}", f"--image_root={tmp_path}"]
    assert "5 samples" in succeed("export", success, *flags)


# -- mistakes --


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["{data}"], "what to export is not clear"),
        (["--format=chatml"], "what to export is not clear"),
        (["{data}", "--format=chatml"], "no place to write to"),
        (["{data}", "--format=alpaca", "--out={out}"], "value should be one of"),
        (["{data}", "--format=dataset", "--out={out}"], "is a dataset already"),
        (["{success}", "--format=tfds", "--out={out}"], "holds no dataset"),
        (["{data}", "--format=tfds", "--out={file}/x"], "cannot write"),
        (["{success}", "--format=released", "--out={out}"], "holds no dataset"),
        (["{success}", "--format=card"], "holds no dataset"),
        (["{data}", "--format=card", "--out={out}"], "--out was given"),
        (["{data}", "--format=released", "--out={data}"], "exists"),
        (["{success}", "--format=dataset", "--out={data}"], "exists"),
        (["{empty}", "--format=chatml", "--out={out}"], "no folder in"),
        (["{data}", "--format=chatml", "--out={file}/x.jsonl"], "cannot write"),
        (["{data}", "--format=released", "--out={file}/x"], "cannot write"),
        (["{data}", "--format=chatml", "--out={out}", "--max_reflections=-1"], "max_reflections"),
    ],
)
def test_mistakes_are_one_clear_line_and_write_nothing(tmp_path, dataset, arguments, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    names = {"data": dataset, "success": tmp_path / "success", "out": tmp_path / "out", "empty": tmp_path / "empty"}
    done = run("export", *(word.format(file=tmp_path / "file", **names) for word in arguments))
    assert complaint in done.complaint
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_breaks_off_leaves_nothing_and_earlier_files_alone(tmp_path):
    data = build(tmp_path / "data", 6)
    (tmp_path / "out.jsonl").write_text("earlier")
    images = (data / "images.array_record").read_bytes()
    (data / "images.array_record").write_bytes(images[: len(images) // 3])
    for flags in (["--format=chatml", f"--out={tmp_path / 'out.jsonl'}"], ["--format=tfds", f"--out={tmp_path}"]):
        assert "images.array_record" in run("export", data, *flags).complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "earlier"


# -- the card --


def test_the_card_counts_by_mode_category_size_score_and_yield(tmp_path):
    counts = {"requests": 9, "yield": {"direct": 2, "reflection": 4}, "drops": {"bad_plan": 3}}
    with TrajectoryWriter(tmp_path / "data", {"counts": counts}) as writer:
        for index in range(5):
            writer.add(*example(index))
    numbers = json.loads((tmp_path / "data" / "card.json").read_text())
    assert numbers["by_category_and_mode"] == {
        "addition": {"direct": 1, "multi_step": 1, "reflection": 1},
        "pose": {"direct": 1, "reflection": 1},
    }
    assert numbers["by_image_size"] == {"8x6": 10} and numbers["by_references"] == {"1": 5}
    assert numbers["drawn_images_by_mode"] == {"direct": {"1": 2}, "multi_step": {"3": 1}, "reflection": {"2": 2}}
    assert numbers["scores"]["first_image"]["quality"] == {"1.5": 3, "5": 2}
    assert numbers["scores"]["final_image"]["quality"] == {"5": 5}
    assert numbers["yield"] == [
        {"stage": "requests", "samples": 9},
        {"stage": "yield: direct", "samples": 2},
        {"stage": "yield: reflection", "samples": 4},
        {"stage": "drops: bad_plan", "samples": 3},
    ]
    card = (tmp_path / "data" / "README.md").read_text()
    assert "| pose | 1 | 1 | 0 | 2 |" in card and "| all | 2 | 2 | 1 | 5 |" in card
    assert "| direct | 2 | 40.0% | 1.00 |" in card and "| yield: reflection | 4 |" in card and "| 8x6 | 10 |" in card


def test_a_lost_card_is_written_again_the_same(tmp_path):
    data = build(tmp_path / "data")
    texts = {name: (data / name).read_bytes() for name in ("README.md", "card.json")}
    fingerprint = TrajectoryDataset(data).fingerprint
    for name in texts:
        (data / name).unlink()
    assert succeed("export", data, "--format=card") == f"{data / 'README.md'}\n"
    assert {name: (data / name).read_bytes() for name in texts} == texts
    assert TrajectoryDataset(data).fingerprint == fingerprint
    assert write_card(data) == data / "README.md"


# -- TensorFlow Datasets --


def test_both_tables_load_through_tfds_without_tensorflow(tmp_path):
    data = build(tmp_path / "data", 5)
    code = f"""
import json, sys
from commands import succeed
succeed("export", {str(data)!r}, "--format=tfds", {f"--out={tmp_path}"!r})
import tensorflow_datasets as tfds
images = tfds.data_source("ivr_trajectories/images", data_dir={str(tmp_path)!r}, split="train")
rows = tfds.data_source("ivr_trajectories/trajectories", data_dir={str(tmp_path)!r}, split="train")
print(json.dumps({{
    "tensorflow": "tensorflow" in sys.modules, "modes": rows.dataset_info.features["mode"].names,
    "images": [[image["name"].decode(), image["image"].tolist()] for image in images],
    "rows": [[row["json"].decode(), int(row["mode"]), [int(p) for p in row["sources"]],
              *([bool(f) if "loss" in field else int(f) for f in row["rounds"][field]]
                for field in ("image", "image_loss", "cause_loss", "evaluation_loss"))] for row in rows]}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests",
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found, dataset = json.loads(done.stdout.splitlines()[-1]), TrajectoryDataset(data)
    assert found["tensorflow"] is False
    names = [name for name, _ in found["images"]]
    assert tuple(names) == dataset.image_names, "every image once"
    for name, pixels in found["images"]:
        assert np.array_equal(np.array(pixels, np.uint8), dataset.image(name))
    for trajectory, (text, mode, sources, drawn, *_) in zip(dataset, found["rows"], strict=True):
        assert trajectory_from_json(json.loads(text)) == trajectory
        assert found["modes"][mode] == trajectory.mode.value
        assert [names[p] for p in sources] == list(trajectory.sample.sources)
        assert [names[p] for p in drawn] == list(trajectory.images)
    losses = [losses for *_, losses in ((row[0], row[4:]) for row in found["rows"])][:3]
    assert losses == [  # image, cause, evaluation: the paper's table of what carries loss
        [[True], [False], [True]],
        [[False, True], [False, True], [True, True]],
        [[False, True, True], [False, True, True], [True, True, True]],
    ]


def test_tables_are_not_written_over(tmp_path):
    data = build(tmp_path / "data", 1)
    (tmp_path / "ivr_trajectories").mkdir()
    (tmp_path / "ivr_trajectories" / "theirs").touch()
    assert "exists" in run("export", data, "--format=tfds", f"--out={tmp_path}").complaint


def test_only_the_tfds_module_imports_tfds_and_nothing_imports_torch(tmp_path):
    code = f"""
import pathlib, sys
import ivr_jax.export, ivr_jax.train
from ivr_jax.training.metrics import MetricsLog
log = MetricsLog(pathlib.Path({str(tmp_path)!r}), 0)
log.write(1, {{"loss": 2.0}})
log.close()
print([name for name in sys.modules if name.startswith(("tensorflow", "torch"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]" and list((tmp_path / "tensorboard").iterdir())


def test_tfrecord_tables_load_through_tfds_load(tmp_path):
    pytest.importorskip("tensorflow", reason="tfds.load itself needs TensorFlow, which is no requirement of ours")
    import tensorflow_datasets as tfds

    data = build(tmp_path / "data", 3)
    succeed("export", data, "--format=tfds", f"--out={tmp_path}", "--tfds_files=tfrecord")
    rows = tfds.as_numpy(tfds.load("ivr_trajectories/trajectories", data_dir=str(tmp_path), split="train"))
    assert [trajectory_from_json(json.loads(row["json"])) for row in rows] == list(TrajectoryDataset(data))
    images = tfds.as_numpy(tfds.load("ivr_trajectories/images", data_dir=str(tmp_path), split="train"))
    assert len(list(images)) == len(TrajectoryDataset(data).image_names)


def test_reading_released_folders_keeps_them_as_they_are(tmp_path):
    success = write_success(tmp_path, 16)
    before = {path: path.read_bytes() for path in success.rglob("*") if path.is_file()}
    list(iter_released(success))
    assert {path: path.read_bytes() for path in success.rglob("*") if path.is_file()} == before
