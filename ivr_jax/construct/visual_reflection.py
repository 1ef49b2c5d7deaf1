"""`visual_reflection_v1`: the JSON lines in which torch trainers of reflection exchange trajectories, read and written.

    {"trajectory_id", "manifest_id", "source_dataset", "source_record_id",
     "pipeline_variant": "direct_parse" | "pair_0_1_turn" | "prompt_k_turn", "prompt",
     "images": [{"uri", "sha256"}, ...],
     "steps": [{"reflection", "action": "continue" | "stop", "edit"}, ...]}

Image i is followed by step i.  All steps but the last continue, with an edit that leads to the next image; the last one
stops, without an edit.  `sha256` is that of the image file, `trajectory_id` is derived from everything else.

*What has no place there* is said, never squeezed in: verdicts and scores (left out), sources and atomic steps (the
trajectory is left out).  Writing puts a failure analysis into `reflection` and an improvement plan into `edit`; the
reflection at which a trajectory stops is made of the reasons of its last evaluation.

*What the format lacks* is not invented: it holds no verdicts, so reading gives a request with images and critiques
(`InputSample`), and construction has the analyzer judge them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.construct.released import Problem, check_final_passes, check_storable, require_some
from ivr_jax.construct.samples import GivenRound, InputSample, Quarantined, sort_entries
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.protocol.markers import check_user_text
from ivr_jax.trajectory import AXES, MAX_REFLECTIONS, Evaluation, Mode, Reflection, Trajectory, checked_key

SCHEMA = "visual_reflection_v1"
VARIANTS = ("direct_parse", "pair_0_1_turn", "prompt_k_turn")
PROVENANCE = ("manifest_id", "source_dataset", "source_record_id", "pipeline_variant")
FIELDS = ("trajectory_id", *PROVENANCE, "prompt", "images", "steps")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HEADER = re.compile(r"^(Reflection|Action|Edit):", re.MULTILINE)  # a line that the format's own text form reserves
_LEFT_OUT = "Leave it out, or export it as another format."


def trajectory_id(record: Mapping[str, Any]) -> str:
    """The id that a record's other fields give: a hash of the schema's name and their canonical JSON."""
    content = {name: record[name] for name in FIELDS if name != "trajectory_id"}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "traj_" + hashlib.sha256(f"{SCHEMA}\0{text}".encode()).hexdigest()


# -- writing --


def record_of(
    trajectory: Trajectory, images: Sequence[Mapping[str, str]], manifest_id: str, dataset: str
) -> dict[str, Any]:
    """The record of a trajectory that ends well.

    Args:
      images: uri and sha256 of each drawn image, in order.
      manifest_id, dataset: where it comes from; a trajectory that was read from this format keeps its own.

    Raises:
      UserError: it has sources or atomic steps, ends in a failed image, or a text that the format reserves.
    """
    sample, where = trajectory.sample, f"the sample {trajectory.sample.key!r}"
    check_final_passes(trajectory)
    if sample.sources:
        raise UserError(f"{where} has source images, for which {SCHEMA} has no place.", _LEFT_OUT)
    if trajectory.mode is Mode.MULTI_STEP:
        raise UserError(f"{where} is carried out in atomic steps, for which {SCHEMA} has no place.", _LEFT_OUT)
    steps = [
        {"reflection": round_.cause.failure_analysis, "action": "continue", "edit": round_.cause.improvement_plan}
        for round_ in trajectory.rounds
        if isinstance(round_.cause, Reflection)
    ]
    steps.append({"reflection": _reasons(trajectory.rounds[-1].evaluation), "action": "stop", "edit": ""})
    steps = [{name: _plain(text) for name, text in step.items()} for step in steps]
    if not all(step["reflection"] and (step["edit"] or step["action"] == "stop") for step in steps):
        raise UserError(f"{where} has a critique without visible text.", _LEFT_OUT)
    if any(_HEADER.search(step[name]) for step in steps for name in ("reflection", "edit")):
        raise UserError(f"{where} has a text with a line that begins with Reflection:, Action: or Edit:.", _LEFT_OUT)
    own = {"manifest_id": manifest_id, "source_dataset": dataset, "source_record_id": sample.key,
           "pipeline_variant": "prompt_k_turn"}
    kept = sample.facts.get(SCHEMA)
    record = {**(kept if _is_provenance(kept) else own), "prompt": _plain(sample.prompt),
              "images": [dict(image) for image in images], "steps": steps}
    return {"trajectory_id": trajectory_id(record), **record}


def export_visual_reflection(dataset: TrajectoryDataset, out: str | os.PathLike[str]) -> tuple[int, list[Problem]]:
    """Writes a dataset's trajectories as JSON lines, and their images, each once, into `<out>_images/<name>.png`.

    Returns:
      How many records were written, and the trajectories that have no place in the format, with the reason.

    Raises:
      UserError: an image is corrupt, no trajectory has a place in the format, or nothing can be written there.
    """
    target = Path(out)
    pictures = target.with_name(f"{target.stem}_images")
    manifest_id = f"ivr_jax_{dataset.fingerprint[:32]}"
    written, problems = 0, []
    with files.new_file(target) as lines, files.NewFolder(pictures) as folder:
        for trajectory in dataset:
            pngs = {name: dataset.png(name) for name in trajectory.images}
            images = [{"uri": f"{pictures.name}/{name}.png", "sha256": hashlib.sha256(pngs[name]).hexdigest()}
                      for name in trajectory.images]
            try:
                record = record_of(trajectory, images, manifest_id, dataset.path.resolve().name)
            except UserError as error:
                problems.append(Problem(dataset.path / trajectory.sample.key, error.what))
                continue
            for name, png in pngs.items():
                (folder / f"{name}.png").write_bytes(png)
            lines.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            written += 1
        require_some(written, problems)
    return written, problems


def _reasons(evaluation: Evaluation) -> str:
    """What the evaluation says of an image that passes, axis by axis."""
    return " ".join(f"{axis.capitalize()}: {getattr(evaluation, axis).reason}" for axis in AXES)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _is_provenance(value: Any) -> bool:
    fits = isinstance(value, Mapping) and set(value) == set(PROVENANCE)
    return fits and all(isinstance(text, str) and text for text in value.values())


# -- reading --


def read_visual_reflection(
    file: str | os.PathLike[str], image_root: str | os.PathLike[str] | None = None
) -> tuple[list[InputSample], list[Quarantined]]:
    """The records of a file as samples whose images and critiques construction judges anew.

    Args:
      file: JSON lines.
      image_root: where relative uris start; the folder of `file` when None.

    Returns:
      The samples, and the lines that cannot be used, with the reason.

    Raises:
      UserError: the file cannot be read.
    """
    path = Path(file)
    root = Path(image_root) if image_root is not None else path.parent
    try:
        lines = files.read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Check the path: --config.samples=FILE.jsonl.") from error
    named = ((f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
    return sort_entries(path, named, lambda line, where: _sample(line, where, root))


def _sample(line: str, where: str, root: Path) -> InputSample:
    def check(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{where}: {what}.", "Correct the record, or leave it out.")

    record = files.parse_json(line, where, "Write one record a line.")
    check(isinstance(record, dict) and set(record) == set(FIELDS), f"a record has the fields {', '.join(FIELDS)}")
    for name in ("trajectory_id", *PROVENANCE, "prompt"):
        check(isinstance(record[name], str) and bool(record[name].strip()), f"{name} is no text")
    check(record["pipeline_variant"] in VARIANTS, f"pipeline_variant is none of {', '.join(VARIANTS)}")
    images, steps = record["images"], record["steps"]
    check(isinstance(images, list) and isinstance(steps, list), "images and steps are no lists")
    check(len(images) == len(steps) > 0, f"there are {len(images)} images for {len(steps)} steps")
    check(len(images) <= MAX_REFLECTIONS + 1, f"there are {len(images) - 1} reflections; at most {MAX_REFLECTIONS} are")
    for i, step in enumerate(steps):
        named = isinstance(step, dict) and set(step) == {"reflection", "action", "edit"}
        check(named, f"steps[{i}] is no object with reflection, action and edit alone")
        for name, text in step.items():
            check(isinstance(text, str), f"steps[{i}].{name} is no text")
        check(bool(step["reflection"].strip()), f"steps[{i}].reflection is empty")
        last = i + 1 == len(steps)
        check(step["action"] == ("stop" if last else "continue"), f"steps[{i}].action is {step['action'][:80]!r}")
        check(bool(step["edit"].strip()) != last, f"steps[{i}].edit does not fit its action")
    check_storable(record, f"{where}: it")
    check(record["trajectory_id"] == trajectory_id(record), "trajectory_id is not that of the record's content")
    texts = {"prompt": record["prompt"], **{f"steps[{i}].{name}": step[name] for i, step in enumerate(steps)
                                            for name in ("reflection", "edit")}}
    for name, text in texts.items():
        check_user_text(text, f"{where}: {name} of the record {record['source_record_id'][:80]!r}")
    paths = [_image_file(image, f"{where}: images[{i}]", root) for i, image in enumerate(images)]
    given = tuple(
        GivenRound(Reflection(step["reflection"].strip(), step["edit"].strip()), image)
        for step, image in zip(steps, paths[1:], strict=False)
    )
    facts = {SCHEMA: {name: record[name] for name in PROVENANCE}}
    key = checked_key(record["trajectory_id"], where)
    return InputSample(key, record["prompt"].strip(), candidate=paths[0], given=given, facts=facts)


def _path_of_url(url: str) -> str:
    """The path that a `file:` address names."""
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.unquote(parts.path if parts.netloc.lower() == "localhost" else parts.netloc + parts.path)
    return path[1:] if re.match(r"/[A-Za-z]:", path) else path


def _image_file(image: Any, where: str, root: Path) -> Path:
    if not isinstance(image, dict) or set(image) != {"uri", "sha256"}:
        raise UserError(f"{where} has not the fields uri and sha256.", "Correct the record, or leave it out.")
    uri, digest = image["uri"], image["sha256"]
    if not isinstance(uri, str) or not uri.strip() or "\0" in uri or not isinstance(digest, str):
        raise UserError(f"{where} is no reference to an image.", "Correct the record, or leave it out.")
    scheme = re.match(r"(?:[a-z][a-z0-9+.-]+:/|data:)", uri, re.IGNORECASE)
    if scheme and scheme.group().lower() != "file:/":
        raise UserError(f"{where}: {uri[:80]} is not fetched.", "Fetch the images, and name files.")
    if not _SHA256.fullmatch(digest):
        raise UserError(f"{where}: sha256 is {digest[:80]!r}.", "Give 64 hexadecimal digits in lower case.")
    path = files.written_path(root, _path_of_url(uri) if scheme else uri)
    name, remedy = str(path)[:200], "Correct the path, or name --config.image_root."
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):  # a link in the folder may lead out of it
        raise UserError(f"{where}: {name} is not below {root}.", "Copy it there, or name a folder above it: "
                        "--config.image_root=FOLDER.")
    if not files.is_file(path):  # nor a folder, a pipe or a device
        raise UserError(f"{where}: {name} is no file.", remedy)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{where}: {name} cannot be read: {error.strerror}.", remedy) from error
    if found != digest:
        raise UserError(f"{where}: {path} is another file than the one that sha256 names.", "Get the file again.")
    return path
