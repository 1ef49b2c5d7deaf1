"""Export a dataset, or a `success/` folder in the authors' released layout, to other formats; and import the latter.

    python -m ivr_jax.export DATASET --format=sharegpt --out=train.jsonl      also messages, chatml
    python -m ivr_jax.export DATASET --format=released --out=success          one folder a sample, as released
    python -m ivr_jax.export DATASET --format=visual_reflection --out=v.jsonl  visual_reflection_v1
    python -m ivr_jax.export DATASET --format=tfds --out=FOLDER               for tfds.data_source, tfds.load
    python -m ivr_jax.export DATASET --format=card                            README.md and card.json, counted anew
    python -m ivr_jax.export SUCCESS --format=sharegpt --out=train.jsonl      equal to the released converter
    python -m ivr_jax.export SUCCESS --format=dataset --out=DATASET           mode and loss inferred

DATASET is a folder with a dataset.json, SUCCESS one with `<key>/result.json`.  The JSONL of a dataset comes with its
images, each once, in a folder beside it.  Samples that cannot be used are named with the reason and left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from ivr_jax import cli, files
from ivr_jax.construct.exports import FORMS, ExportOptions, export_dataset, export_success
from ivr_jax.construct.released import Problem, check_final_passes, iter_released, require_some, write_trajectory
from ivr_jax.construct.visual_reflection import export_visual_reflection
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter, write_card
from ivr_jax.errors import UserError
from ivr_jax.trajectory import checked_key

_MOST_SHOWN = 100  # of the samples that are left out, each with its reason
FORMATS = (*FORMS, "released", "dataset", "tfds", "card", "visual_reflection")


def write_released(dataset: TrajectoryDataset, out: Path) -> tuple[int, list[Problem]]:
    """Writes `out/<key>/` for every trajectory, all of them or none; returns their number and what was left out."""
    written, problems = 0, []
    with files.NewFolder(out) as partial:
        for trajectory in dataset:
            key = trajectory.sample.key
            try:
                checked_key(key, f"{dataset.path}")
                check_final_passes(trajectory)
            except UserError as error:
                problems.append(Problem(dataset.path / key, str(error)))
                continue
            write_trajectory(partial, trajectory, dataset.images(trajectory), recorded_root=out)
            written += 1
        require_some(written, problems)
    return written, problems


def import_success(root: Path, out: Path, image_root: str | None) -> tuple[int, list[Problem]]:
    """Makes the dataset `out` of a `success/` folder, image sizes as they are; returns their number and the rest."""
    problems, written = [], 0
    with TrajectoryWriter(out, {"released": str(root)}) as writer:
        for found in iter_released(root, image_root=image_root):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                writer.add(found.trajectory, found.images)
                written += 1
        require_some(written, problems)
        writer.provenance["counts"] = {"folders": written + len(problems), "imported": written}
    return written, problems


def export(source: Path, form: str, out: Path | None, values: flags.FlagValues) -> str:
    """Does what the command line asks, and returns what to print."""
    is_dataset = (source / "dataset.json").is_file()
    if form in ("released", "tfds", "card", "visual_reflection") and not is_dataset:
        TrajectoryDataset(source)  # says what is missing
    if form == "dataset" and is_dataset:
        raise UserError(f"{source} is a dataset already.", f"Choose another format: {', '.join(FORMATS)}.")
    if form == "card":
        if out is not None:
            raise UserError("--out was given, but a card is written into its dataset.", "Leave --out out.")
        return f"{write_card(source)}"
    if out is None:
        raise UserError("no place to write to was named.", "Add --out=PATH.")
    if form == "tfds":
        from ivr_jax.data.tfds_builder import write_tfds  # slow to import, and nothing else needs it

        return f"{write_tfds(source, cli.prepare_workdir(out, 'out'), values.tfds_files)}"
    problems: list[Problem] = []
    if form == "released":
        written, problems = write_released(TrajectoryDataset(source), out)
    elif form == "visual_reflection":
        written, problems = export_visual_reflection(TrajectoryDataset(source), out)
        print("left out of every record: verdicts and scores, for which visual_reflection_v1 has no place")
    elif form == "dataset":
        written, problems = import_success(source, out, values.image_root)
    else:
        options = ExportOptions(
            values.image_token, values.think_open, values.think_close, values.skip_direct, values.max_reflections
        )
        if is_dataset:
            written, problems = export_dataset(TrajectoryDataset(source), out, form, options)
        else:
            written, problems = export_success(source, out, form, options)
    for problem in problems[:_MOST_SHOWN]:
        print(f"left out: {problem}")
    if len(problems) > _MOST_SHOWN:
        print(f"left out: {len(problems) - _MOST_SHOWN} more")
    return f"{out}: {written} samples" + (f", {len(problems)} left out" if problems else "")


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "a dataset or a success/ folder; may also stand without --source=",
                        flag_values=values)
    flags.DEFINE_enum("format", None, FORMATS, "what to write", flag_values=values)
    flags.DEFINE_string("out", None, "the new file or folder", flag_values=values)
    flags.DEFINE_string("image_token", "<image>", "JSONL: stands for an image", flag_values=values)
    flags.DEFINE_string("think_open", "<think>", "JSONL: before a thought", flag_values=values)
    flags.DEFINE_string("think_close", "</think>", "JSONL: after a thought", flag_values=values)
    flags.DEFINE_boolean("skip_direct", False, "JSONL: leave out samples with neither reflection nor step",
                         flag_values=values)
    flags.DEFINE_integer("max_reflections", None, "JSONL: show at most this many reflection rounds",
                         lower_bound=0, flag_values=values)
    flags.DEFINE_string("image_root", None, "import: where relative image paths start", flag_values=values)
    flags.DEFINE_enum("tfds_files", "array_record", ["array_record", "tfrecord"],
                      "tfds: array_record for tfds.data_source, tfrecord (needs TensorFlow) for tfds.load",
                      flag_values=values)


def main(call: cli.Call) -> None:
    if not call.flags.source or call.flags.format is None:
        raise UserError("what to export is not clear.", "Write: DATASET --format=NAME --out=PATH; see --help.")
    out = Path(call.flags.out).expanduser() if call.flags.out else None
    print(export(Path(call.flags.source).expanduser(), call.flags.format, out, call.flags))


def entry() -> None:
    argv = cli.with_named_source(sys.argv, ["skip_direct"])
    cli.run(main, reads=("source",), config=False, workdir=False, add_flags=add_flags, argv=argv)


if __name__ == "__main__":
    entry()
