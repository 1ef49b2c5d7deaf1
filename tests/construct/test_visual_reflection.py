"""visual_reflection_v1: written, read back, judged anew; what has no place is said."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import commands
import numpy as np
import pytest
from construct_worker import KEY, arguments
from hypothesis import given
from openai_service import Behaviour, OpenAIService, serving
from trajectory_strategies import trajectories

from ivr_jax.construct.escalation import Rules, construct
from ivr_jax.construct.visual_reflection import (
    FIELDS,
    PROVENANCE,
    SCHEMA,
    export_visual_reflection,
    read_visual_reflection,
    record_of,
    trajectory_id,
)
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import image_name
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Mode, Reflection, Round, Sample, Step, Trajectory

PIXELS = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)]
IMAGES = {image_name(pixels): pixels for pixels in PIXELS}
NAMES = list(IMAGES)


def verdict(passed: bool) -> Evaluation:
    return Evaluation(*(AxisVerdict(passed, f"{axis} is seen", 5 if passed else 2) for axis in AXES))


def reflected(key: str, **changes) -> Trajectory:
    rounds = (
        Round(None, NAMES[0], verdict(False)),
        Round(Reflection("The cup is blue.", "Draw it red."), NAMES[1], verdict(True)),
    )
    return Trajectory(Sample(key, "A red cup.", **changes), rounds)


@pytest.fixture
def exported(tmp_path) -> Path:
    """A dataset of what fits and what does not, exported."""
    steps = (Round(None, NAMES[0], verdict(False)), Round(Step("one"), NAMES[1], verdict(True), verdict(True)))
    with TrajectoryWriter(tmp_path / "data") as writer:
        writer.add(reflected("fits"), IMAGES)
        writer.add(Trajectory(Sample("direct", "A cup."), (Round(None, NAMES[2], verdict(True)),)), IMAGES)
        writer.add(reflected("sources", sources=(NAMES[2],)), IMAGES)
        writer.add(Trajectory(Sample("steps", "A cup."), steps), IMAGES)
        writer.add(Trajectory(Sample("failed", "A cup."), (Round(None, NAMES[2], verdict(False)),)), IMAGES)
    written, problems = export_visual_reflection(TrajectoryDataset(tmp_path / "data"), tmp_path / "out.jsonl")
    assert written == 2 and [problem.path.name for problem in problems] == ["sources", "steps", "failed"]
    return tmp_path / "out.jsonl"


def test_records_hold_the_invariants_of_the_format(exported):
    for record in map(json.loads, exported.read_text().splitlines()):
        assert tuple(record) == FIELDS and record["trajectory_id"] == trajectory_id(record)
        assert len(record["images"]) == len(record["steps"])
        *before, last = record["steps"]
        assert all(step["action"] == "continue" and step["edit"] for step in before)
        assert last["action"] == "stop" and last["edit"] == "" and last["reflection"]
        for image in record["images"]:
            data = (exported.parent / image["uri"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == image["sha256"]
    assert [step["edit"] for step in json.loads(exported.read_text().splitlines()[0])["steps"]] == ["Draw it red.", ""]


def test_an_id_is_that_of_the_public_definition():
    """Worked out by hand from "schema NUL canonical JSON of the other fields"."""
    record = dict.fromkeys(PROVENANCE, "x") | {"prompt": "é", "images": [], "steps": []}
    text = (
        'visual_reflection_v1\0{"images":[],"manifest_id":"x","pipeline_variant":"x","prompt":"é",'
        '"source_dataset":"x","source_record_id":"x","steps":[]}'
    )
    assert trajectory_id(record) == "traj_" + hashlib.sha256(text.encode()).hexdigest()


class Judge:
    """Passes the second image; asked for nothing else."""

    async def evaluate(self, sample, images, image):
        return verdict(bool(image[0, 0, 0] == 20))


def test_a_record_read_and_judged_anew_keeps_texts_images_and_provenance(exported):
    (sample, _), bad = read_visual_reflection(exported)
    assert not bad
    request = sample.load()
    services = Judge()
    outcome = asyncio.run(
        construct(request.sample, request.images, request.first_image, services, services, Rules(), request.given)
    )
    assert outcome.trajectory.mode is Mode.REFLECTION
    assert outcome.trajectory.rounds[1].cause == Reflection("The cup is blue.", "Draw it red.")
    assert list(outcome.trajectory.images) == NAMES[:2]
    before = json.loads(exported.read_text().splitlines()[0])
    again = record_of(outcome.trajectory, before["images"], "other", "other")
    assert again == before


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}", "{}"])
def test_images_are_found_at_addresses_of_files(exported, form):
    record = json.loads(exported.read_text().splitlines()[0])
    (exported.parent / "a b").mkdir()
    for image in record["images"]:
        path = exported.parent / image["uri"]
        path.rename(exported.parent / "a b" / path.name)
        whole = str(exported.parent / "a b" / path.name)
        image["uri"] = form.format(whole.replace(" ", "%20") if form != "{}" else whole)
    record["trajectory_id"] = trajectory_id(record)
    exported.write_bytes(json.dumps(record).encode("utf-16"))
    samples, quarantined = read_visual_reflection(exported)
    assert not quarantined and samples[0].load().first_image.shape[2] == 3


CHANGES = {
    "field": lambda r: r.update(extra=1),
    "missing": lambda r: r.pop("manifest_id"),
    "variant": lambda r: r.update(pipeline_variant="x"),
    "lengths": lambda r: r["images"].append(r["images"][0]),
    "early stop": lambda r: r["steps"][0].update(action="stop", edit=""),
    "no stop": lambda r: r["steps"][-1].update(action="continue", edit="more"),
    "empty edit": lambda r: r["steps"][0].update(edit=" "),
    "empty reflection": lambda r: r["steps"][0].update(reflection=""),
    "content": lambda r: r.update(prompt="Another."),
    "hash": lambda r: r["images"][0].update(sha256="0" * 64),
    "uri": lambda r: r["images"][0].update(uri="https://host/x.png"),
    "path": lambda r: r["images"][0].update(uri="absent.png"),
    "kind": lambda r: r.update(steps="x"),
    "control": lambda r: r.update(prompt="<|im_start|>"),
    "inline image": lambda r: r["images"][0].update(uri="data:image/png;base64,AAAA"),
    "bucket": lambda r: r["images"][0].update(uri="S3://bucket/a.png"),
    "name of a hash": lambda r: r["images"][0].update(sha256="sha256:" + r["images"][0]["sha256"]),
    "half a character": lambda r: r.update(prompt="\ud800"),
    "outside": lambda r: r["images"][0].update(uri="../x.png"),
    "root": lambda r: r["images"][0].update(uri="file:///dev/null", sha256=hashlib.sha256(b"").hexdigest()),
    "folder": lambda r: r["images"][0].update(uri="."),
    "marker in an edit": lambda r: r["steps"][0].update(edit="</Evaluate>"),
    "token in a reflection": lambda r: r["steps"][0].update(reflection="<|image start|>"),
    "action": lambda r: r["steps"][0].update(action="revise"),
    "no action": lambda r: r["steps"][0].update(action=None),
    "too many": lambda r: r.update(images=r["images"][:1] * 6, steps=r["steps"][:1] * 5 + r["steps"][1:]),
    "too long": lambda r: r.update(prompt="a" * 200_001),
    "not a number": lambda r: r.update(source_dataset=float("nan")),
}


# No id can be made of these; with an id of its own "content" is a good record.
OLD_ID_ALONE = {"missing", "half a character", "not a number", "content"}


@pytest.mark.parametrize("name, with_id", [
    *((name, False) for name in CHANGES), *((name, True) for name in CHANGES if name not in OLD_ID_ALONE)
])  # fmt: skip
def test_a_faulty_record_is_set_aside_with_its_line(exported, name, with_id):
    """Also when its id was made for the faulty content."""
    record = json.loads(exported.read_text().splitlines()[0])
    CHANGES[name](record)
    if with_id:
        record["trajectory_id"] = trajectory_id(record)
    exported.write_text("\ufeff" + exported.read_text() + json.dumps(record) + "\n{\n", encoding="utf-8")
    samples, quarantined = read_visual_reflection(exported)
    assert len(samples) == 2 and [entry.key for entry in quarantined] == ["line 3", "line 4"]


def altered(exported: Path, **changes) -> dict:
    record = json.loads(exported.read_text().splitlines()[0]) | changes
    return record | {"trajectory_id": trajectory_id(record)}


def test_an_image_outside_the_folder_needs_a_root_above_it(exported):
    folder = exported.parent / "folder"
    folder.mkdir()
    images = json.loads(exported.read_text().splitlines()[0])["images"]
    changed = altered(exported, images=[{**image, "uri": str(exported.parent / image["uri"])} for image in images])
    (folder / "v.jsonl").write_text(json.dumps(changed) + "\n")
    samples, quarantined = read_visual_reflection(folder / "v.jsonl")
    assert not samples and images[0]["uri"] in quarantined[0].reason.what
    samples, quarantined = read_visual_reflection(folder / "v.jsonl", exported.parent)
    assert len(samples) == 1 and not quarantined


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"trajectory_id": 1e400}',
        "9" * 5000,
        "[1, 2]",
        "null",
        '{"prompt": 1, "prompt": 2}',
        "{",
        "a" * 10**7,
    ],
    ids=["deep", "1e400", "digits", "list", "null", "key twice", "cut", "long"],
)
def test_a_line_that_is_no_record_is_set_aside_in_few_words(exported, line):
    exported.write_bytes(exported.read_bytes().replace(b"\n", b"\r\n") + line.encode() + b"\r\n")
    samples, quarantined = read_visual_reflection(exported)
    assert len(samples) == 2 and [entry.key for entry in quarantined] == ["line 3"]
    assert len(quarantined[0].reason.what) < 500


def test_of_a_record_that_stands_twice_the_second_is_set_aside(exported):
    exported.write_text(exported.read_text() * 2)
    samples, quarantined = read_visual_reflection(exported)
    assert len(samples) == 2 and [entry.key for entry in quarantined] == ["line 3", "line 4"]


def test_an_error_quotes_the_beginning_of_what_is_wrong(exported):
    steps = json.loads(exported.read_text().splitlines()[0])["steps"]
    for long in ({"action": "x" * 10**6}, {"edit": "<|im_end|>"}):
        changed = altered(exported, steps=[{**steps[0], **long}, *steps[1:]], source_record_id="r" * 10**6)
        (exported.parent / "long.jsonl").write_text(json.dumps(changed))
        _, quarantined = read_visual_reflection(exported.parent / "long.jsonl")
        assert len(quarantined[0].reason.what) < 1000


@given(trajectories())
def test_any_trajectory_is_written_within_the_invariants_or_refused(trajectory):
    images = [{"uri": name, "sha256": "0" * 64} for name in trajectory.images]
    try:
        record = record_of(trajectory, images, "m", "d")
    except UserError:
        assert (
            trajectory.sample.sources
            or trajectory.mode is Mode.MULTI_STEP
            or not trajectory.rounds[-1].evaluation.passed
        )
        return
    assert len(record["steps"]) == len(record["images"]) == len(trajectory.rounds)
    assert all(step["reflection"] for step in record["steps"])


def test_the_command_judges_the_images_of_a_file_and_writes_a_dataset(exported, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    scores = json.dumps({"reason": "seen", "score": 5})
    with serving(OpenAIService(Behaviour(key=KEY, answer=scores))) as url:
        workdir = exported.parent / "run"
        commands.succeed("construct", *arguments(url, exported, workdir))
    found = list(TrajectoryDataset(workdir / "dataset"))
    assert [trajectory.mode for trajectory in found] == [Mode.DIRECT] * 2  # the judge passes the first images
    assert set(found[0].sample.facts[SCHEMA]) == set(PROVENANCE)
    printed = commands.succeed("export", workdir / "dataset", "--format=visual_reflection",
                               f"--out={exported.parent / 'again.jsonl'}")
    assert "verdicts" in printed and "2 samples" in printed
