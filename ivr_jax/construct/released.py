"""The authors' released folders, read and written: `<success_dir>/<key>/` with images and a `result.json`.

    original_image.png                        the source (original_image_{i}.png when there are several)
    step1_direct_edit_result.png              G1
    step2_reflect_edit_result_{k}.png         k = 0, 1, 2: the image of each reflection
    step4_multi_step_edit_result_{i}.png      i = 0 ... 4: the image of each step
    result.json                               who led to whom, with scores 1-5 and reasons

Reading infers what the files leave unsaid.  *Mode*: steps make it multi-step (and the reflections before them, which
repaired nothing, are pruned), else reflections make it a reflection, else it is direct.  *Verdicts*: by thresholds.
*Evaluations of steps*: the files judge each step alone, so that becomes `Round.step_evaluation`; against the whole
request an intermediate step fails on instruction, because steps remain, and keeps its other axes; the last one passes
or fails as it did alone.  `specific_issues` joins the failure analysis, as in the released training text.

Writing adds three fields of our own where the released ones would lose something, and reading honours them:
`request_evaluation` (a step's image against the whole request), `<axis>_passed` (a verdict that the thresholds would
not give), `explanation`.  Of a sample's facts only `edit_key` and `candidate` (G1 was the user's own) are kept; a
verdict without a score is written as 5 or 1.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from ivr_jax import files
from ivr_jax.construct.escalation import RELEASED_RULES, Drawing, Outcome, Rules
from ivr_jax.errors import UserError
from ivr_jax.images import Images, Pixels, image_name, load_image, save_png
from ivr_jax.protocol import markers
from ivr_jax.thresholds import MULTI_STEP, WHOLE_REQUEST, Thresholds
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation, Reflection, Round, Sample, Step, Trajectory, checked_key

RESULT = "result.json"
STEPS_REMAIN = "More steps remain before the request is met."
_ISSUES = " Specific issues: "
_REMEDY = "Correct the file, or leave the folder out."


class Released(NamedTuple):
    """One folder that was read: the trajectory, and its images by name (empty when they were not asked for)."""

    trajectory: Trajectory
    images: dict[str, Pixels]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One folder that could not be used, and why; `reason` names the file."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return self.reason if str(self.path) in self.reason else f"{self.path}: {self.reason}"


def require_some(written: int, problems: Sequence[Problem]) -> None:
    """Raises UserError when every sample was left out: nothing useful would be written."""
    if problems and not written:
        raise UserError(f"none of the {len(problems)} samples can be exported; the first: {problems[0]}",
                        "Choose another format, or correct the samples; nothing was written.")


def check_storable(value: Any, what: str, any_number: bool = False) -> None:
    """Raises UserError for what Python reads from JSON and nobody can write as such; `what` names it.

    With `any_number` NaN and the infinities pass.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=any_number).encode()
    except (ValueError, RecursionError):
        what = f"{what} holds NaN, an infinity, an unpaired surrogate, or too many levels."
        raise UserError(what, "Correct it.") from None


def iter_released(
    root: str | os.PathLike,
    *,
    with_images: bool = True,
    image_root: str | os.PathLike | None = None,
    rules: Rules = RELEASED_RULES,
    strict: bool = True,
) -> Iterator[Released | Problem]:
    """Reads the folders under `root` one by one, sorted by name.

    Args:
      root: a directory whose subdirectories hold a `result.json`.
      with_images: load the images, and name them by content; else names are the paths that the files give.
      image_root: where images may lie besides the sample's own folder; the files' relative paths start here, absolute
        ones must lead inside.
      rules: their thresholds turn scores into verdicts.
      strict: quarantine what a model should not learn from: a final image that fails, a sample with images after one
        that passes, a step that fails, a recorded failure.

    Yields:
      A trajectory with its images, or the problem that kept a folder from becoming one.

    Raises:
      UserError: `root` is no directory, or no subdirectory holds a `result.json`.
    """
    folders = sample_folders(root)
    seen: dict[str, Path] = {}
    for folder in folders:
        file = folder / RESULT
        try:
            result = load_result(file)
            trajectory = trajectory_from_result(result, f"{file}", rules)
            check_plain_texts(trajectory, f"{file}")
            check_storable(trajectory.sample.facts, f"{file}: edit_key")
            if strict:
                _check_worth(trajectory, result, f"{file}")
            key = trajectory.sample.key
            if key in seen:
                raise UserError(
                    f"{file}: the task_id {key!r} is also that of {seen[key]}.", "Give every sample its own key."
                )
            images: dict[str, Pixels] = {}
            if with_images:
                trajectory, images = _with_pixels(trajectory, folder, Path(image_root) if image_root else None)
            seen[key] = folder
            yield Released(trajectory, images)
        except UserError as error:
            yield Problem(folder, str(error))
        except Exception as error:  # a file that a library cannot read costs its own sample, and no other
            yield Problem(folder, f"{folder} cannot be read: {type(error).__name__}: {error}")


def sample_folders(root: str | os.PathLike) -> list[Path]:
    """The subdirectories of `root` that hold a `result.json`, sorted by name; UserError when there are none."""
    path = Path(root)
    if not path.is_dir():
        raise UserError(f"{path} is not a directory.", "Name the directory that holds one folder a sample.")
    folders = sorted(c for c in path.iterdir() if (c / RESULT).is_file() and not c.name.startswith("."))
    if not folders:
        raise UserError(f"no folder in {path} holds a {RESULT}.", "Name the directory that holds one folder a sample.")
    return folders


def load_result(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; UserError when it cannot be read or is none."""
    result = files.read_json_object(file, _REMEDY)
    check_storable(result, f"{file}: it", any_number=True)
    return result


def trajectory_from_result(result: Mapping[str, Any], where: str, rules: Rules = RELEASED_RULES) -> Trajectory:
    """The trajectory that a `result.json` tells, its images named by the paths in it.

    Args:
      result: the parsed file.
      where: names the file in errors.
      rules: their thresholds turn scores into verdicts.

    Raises:
      UserError: a field is missing or of the wrong kind; `where` and the field are named.
    """
    record = _Fields(result, f"{where}: ")
    steps, reflections = record.objects("multi_step"), record.objects("reflect")
    first = Round(
        None, record.text("direct_edit_image_path"), _evaluation(record.object("evaluation"), rules.thresholds)
    )
    if steps:
        others = [_step(step, step is steps[-1], rules) for step in steps]
    else:
        others = [_reflection(reflection, rules) for reflection in reflections]
    try:
        return Trajectory(_sample(record), (first, *others))
    except UserError as error:
        raise error if error.what.startswith(where) else UserError(f"{where}: {error.what}", error.remedy) from error


def check_plain_texts(trajectory: Trajectory, where: str) -> None:
    """Raises UserError when a text holds a control token or a marker of answers, which no tokenizer may take."""
    sample = trajectory.sample
    texts = {"edit_prompt": sample.prompt, "explanation": sample.explanation}
    for number, round_ in enumerate(trajectory.rounds, 1):
        texts |= {f"image {number}, {axis}_reasoning": getattr(round_.evaluation, axis).reason for axis in AXES}
        texts[f"image {number}, observation"] = round_.evaluation.observation
        if round_.cause is not None:
            texts |= {f"image {number}, {name}": text for name, text in dataclasses.asdict(round_.cause).items()}
    for name, text in texts.items():
        markers.check_user_text(text, f"{where}: {name} of the sample {sample.key!r}")


class _Fields:
    """A JSON object that knows where it stands, so that every complaint names the file and the field."""

    def __init__(self, value: Mapping[str, Any], where: str):
        self.value, self.where = value, where

    def error(self, field: str) -> UserError:
        value = self.value.get(field)
        return UserError(f"{self.where}{field} {'is missing' if value is None else f'is {value!r}'}.", _REMEDY)

    def text(self, field: str) -> str:
        value = self.value.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field)
        return value

    def score(self, field: str) -> float:
        value = self.value.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 5:
            raise self.error(field)
        return value

    def object(self, field: str) -> _Fields:
        value = self.value.get(field)
        if not isinstance(value, dict):
            raise self.error(field)
        return _Fields(value, f"{self.where}{field}.")

    def objects(self, field: str) -> list[_Fields]:
        value = self.value.get(field) or []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(field)
        return [_Fields(item, f"{self.where}{field}[{i}].") for i, item in enumerate(value)]


def _sample(record: _Fields) -> Sample:
    paths = record.value.get("original_image_path")
    sources = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(sources, list) or not all(isinstance(s, str) and s for s in sources):
        raise record.error("original_image_path")
    explanation = record.text("explanation") if record.value.get("explanation") else ""
    edit_key = record.value.get("edit_key")
    category = edit_key.get("category") if isinstance(edit_key, dict) else None
    category = category if isinstance(category, str) else ""
    facts = {} if edit_key is None or edit_key == {"category": category} else {"edit_key": edit_key}
    if record.value.get("original_success") is True:
        facts["candidate"] = True
    key = checked_key(record.text("task_id"), f"{record.where}task_id")
    return Sample(key, record.text("edit_prompt"), tuple(sources), explanation, category, facts)


def _reflection(record: _Fields, rules: Rules) -> Round:
    thinking = record.object("reflect_thinking")
    analysis, plan = thinking.text("failure_analysis"), thinking.text("improvement_plan")
    if thinking.value.get("specific_issues"):
        analysis += _ISSUES + thinking.text("specific_issues")
    evaluation = _evaluation(record.object("evaluation"), rules.thresholds)
    return Round(Reflection(analysis, plan), record.text("reflect_image_path"), evaluation)


def _step(record: _Fields, last: bool, rules: Rules) -> Round:
    thresholds = rules.step_thresholds or rules.thresholds
    whole = (
        _evaluation(record.object("request_evaluation"), thresholds) if "request_evaluation" in record.value else None
    )
    alone = None
    if whole is None or record.value.get("evaluation"):
        alone = _evaluation(record.object("evaluation"), thresholds)
    if whole is None:
        whole = alone if last else dataclasses.replace(alone, instruction=AxisVerdict(False, STEPS_REMAIN))
    return Round(Step(record.text("step_instruction")), record.text("step_image_path"), whole, alone)


def _evaluation(record: _Fields, thresholds: Thresholds | None) -> Evaluation:
    verdicts = {
        axis: AxisVerdict(True, record.text(f"{axis}_reasoning"), record.score(f"{axis}_score")) for axis in AXES
    }
    judged = (thresholds or WHOLE_REQUEST).judge(Evaluation(**verdicts))
    stated = {axis: record.value.get(f"{axis}_passed") for axis in AXES}
    changes = {
        axis: dataclasses.replace(getattr(judged, axis), passed=passed)
        for axis, passed in stated.items()
        if isinstance(passed, bool)
    }
    return dataclasses.replace(judged, **changes)


def _check_worth(trajectory: Trajectory, result: Mapping[str, Any], where: str) -> None:
    """Raises UserError when a model should not learn from the trajectory."""
    if result.get("failure_reason"):
        raise UserError(f"{where}: the sample failed: {result['failure_reason']}.", "Leave failed samples out.")
    final = result.get("final_edited_image_path")
    final = final[-1] if isinstance(final, list) and final else final
    if final != trajectory.images[-1]:
        raise UserError(f"{where}: the final image {final!r} is not the last one drawn.", _REMEDY)
    for number, r in enumerate(trajectory.rounds, 1):
        last = number == len(trajectory.rounds)
        if r.step_evaluation is not None and not r.step_evaluation.passed:
            raise UserError(
                f"{where}: image {number} fails as a step ({_low(r.step_evaluation)}).", "Leave the sample out."
            )
        if last and not r.evaluation.passed:
            raise UserError(f"{where}: the final image fails ({_low(r.evaluation)}).", "Leave the sample out.")
        if not last and r.evaluation.passed:
            raise UserError(
                f"{where}: image {number} passes, but further images follow.", "Cut it there, or leave it out."
            )


def _low(evaluation: Evaluation) -> str:
    return ", ".join(
        f"{axis} {getattr(evaluation, axis).score}" for axis in AXES if not getattr(evaluation, axis).passed
    )


def _with_pixels(trajectory: Trajectory, folder: Path, image_root: Path | None) -> tuple[Trajectory, dict[str, Pixels]]:
    """Loads the images that a trajectory names by path; returns it with names by content, and the pixels."""
    sources = trajectory.sample.sources
    names, images = {}, {}
    for index, path in enumerate(sources):
        copies = [folder / f"original_image_{index}.png"] + (
            [folder / "original_image.png"] if len(sources) == 1 else []
        )
        pixels = load_image(_find(path, [*copies, folder / _file_name(path)], image_root))
        names[path] = image_name(pixels)
        images[names[path]] = pixels
    for path in trajectory.images:
        pixels = load_image(_find(path, [folder / _file_name(path)], image_root))
        names[path] = image_name(pixels)
        images[names[path]] = pixels
    sample = dataclasses.replace(trajectory.sample, sources=tuple(names[s] for s in sources))
    rounds = tuple(dataclasses.replace(r, image=names[r.image]) for r in trajectory.rounds)
    return Trajectory(sample, rounds), images


def _file_name(path: str) -> str:
    """The last part of a path as any system writes it: `C:\\out\\a.png` and `out/a.png` end in `a.png`."""
    return PureWindowsPath(path).name


def _find(path: str, candidates: Sequence[Path], image_root: Path | None) -> Path:
    """The first candidate inside the folder that exists, else `path` under `image_root`."""
    folder = candidates[0].parent.resolve()
    for candidate in candidates:
        if candidate.is_file() and candidate.resolve().is_relative_to(folder):
            return candidate
    if image_root is not None:
        candidate = files.written_path(image_root, path)
        if candidate.is_file() and candidate.resolve().is_relative_to(image_root.resolve()):
            return candidate
    where = f"neither in the folder nor under {image_root}" if image_root else "not in the folder"
    raise UserError(f"{folder / RESULT}: the image {path!r} is {where}.",
                    "Copy it there, or name the directory it starts from (image_root).")


def check_final_passes(trajectory: Trajectory) -> None:
    """Raises UserError for a trajectory that ends in an image that failed: it teaches evaluation alone."""
    if not trajectory.rounds[-1].evaluation.passed:
        raise UserError(f"{trajectory.sample.key!r} ends in an image that failed: it teaches evaluation alone.")


def result_from_trajectory(
    trajectory: Trajectory, folder: str, by_name: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """The `result.json` of a trajectory, and which image (file name -> image name) goes beside it.

    Args:
      trajectory: what to tell.
      folder: put before the file names, as the released paths have it (`outputs/success/<key>`).
      by_name: tell the paths `<folder>/<image name>.png` instead, for images that are stored once in one folder.
    """
    history = [Drawing(r.cause, r.image, r.evaluation, r.step_evaluation) for r in trajectory.rounds]
    return _result(trajectory.sample, history, None, folder, by_name)


def write_trajectory(
    root: str | os.PathLike, trajectory: Trajectory, images: Images, recorded_root: str | os.PathLike | None = None
) -> Path:
    """Writes `root/<key>/` (all of it or nothing) and returns its path; `images` as in `construct`.

    The paths in `result.json` start with `recorded_root` where that is given (`root` is about to be moved there).

    Raises:
      UserError: the key cannot name a folder, the folder exists, or an image is missing.
    """
    folder = Path(root) / checked_key(trajectory.sample.key, "a trajectory")
    recorded = folder if recorded_root is None else Path(recorded_root) / folder.name
    result, names = result_from_trajectory(trajectory, str(recorded))
    return _write_folder(folder, result, names, images)


def write_outcome(success_dir: str | os.PathLike, fail_dir: str | os.PathLike, outcome: Outcome) -> Path:
    """Writes what construction did, nothing pruned except failed tries of a step, and returns the folder.

    A dropped sample goes to `fail_dir` with its reason; of a step that never passed, the last try is shown.
    """
    key = checked_key(outcome.sample.key, "an outcome")
    folder = Path(fail_dir if outcome.drop else success_dir) / key
    history = [d for i, d in enumerate(outcome.history) if d.kept or i == len(outcome.history) - 1]
    result, names = _result(outcome.sample, history, outcome.drop.value if outcome.drop else None, str(folder))
    return _write_folder(folder, result, names, outcome.images)


def _result(
    sample: Sample, history: Sequence[Drawing], failure: str | None, folder: str, by_name: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    def path_of(file: str, name: str) -> str:
        return f"{folder}/{name}.png" if by_name else f"{folder}/{file}"

    sources = {
        f"original_image_{i}.png" if len(sample.sources) > 1 else "original_image.png": name
        for i, name in enumerate(sample.sources)
    }
    names, reflections, steps, final = dict(sources), [], [], ""
    for drawing in history:
        if drawing.cause is None:
            file = "step1_direct_edit_result.png"
        elif isinstance(drawing.cause, Reflection):
            file = f"step2_reflect_edit_result_{len(reflections)}.png"
        else:
            file = f"step4_multi_step_edit_result_{len(steps)}.png"
        names[file], final = drawing.image, path_of(file, drawing.image)
        if isinstance(drawing.cause, Reflection):
            reflections.append(_reflection_json(drawing, final))
        elif drawing.cause is not None:
            steps.append(_step_json(drawing, final))
    paths = [path_of(file, name) for file, name in sources.items()]
    passed = failure is None
    result = {
        "task_id": sample.key,
        "edit_key": sample.facts.get("edit_key", {"category": sample.category} if sample.category else None),
        "original_image_path": paths if len(paths) > 1 else paths[0] if paths else None,
        "edit_prompt": sample.prompt,
        "direct_edit_image_path": path_of("step1_direct_edit_result.png", history[0].image),
        "evaluation": _evaluation_json(history[0].evaluation, WHOLE_REQUEST),
        "reflect": reflections,
        "multi_step": steps,
        "final_edited_image_path": final if passed else None,
        "failure_reason": failure,
        "original_success": passed and len(history) == 1 and sample.facts.get("candidate") is True,
    }
    if sample.explanation:
        result["explanation"] = sample.explanation
    return result, names


def _reflection_json(drawing: Drawing, path: str) -> dict[str, Any]:
    cause = drawing.cause
    assert isinstance(cause, Reflection)
    thinking = {"failure_analysis": cause.failure_analysis, "improvement_plan": cause.improvement_plan}
    analysis, _, issues = cause.failure_analysis.partition(_ISSUES)
    if analysis.strip() and issues.strip():
        thinking |= {"failure_analysis": analysis, "specific_issues": issues}
    return {
        "reflect_thinking": thinking,
        "reflect_image_path": path,
        "evaluation": _evaluation_json(drawing.evaluation, WHOLE_REQUEST),
    }


def _step_json(drawing: Drawing, path: str) -> dict[str, Any]:
    thresholds = MULTI_STEP
    assert isinstance(drawing.cause, Step)
    record = {
        "step_instruction": drawing.cause.instruction,
        "step_image_path": path,
        "evaluation": _evaluation_json(drawing.step_evaluation, thresholds),
    }
    if drawing.evaluation is not None:
        record["request_evaluation"] = _evaluation_json(drawing.evaluation, thresholds)
    return record


def _evaluation_json(evaluation: Evaluation | None, thresholds: Thresholds) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for axis in AXES if evaluation else ():
        verdict = getattr(evaluation, axis)
        score = verdict.score if verdict.score is not None else (5 if verdict.passed else 1)
        record[f"{axis}_score"], record[f"{axis}_reasoning"] = score, verdict.reason
        if verdict.passed != (score >= getattr(thresholds, axis)):
            record[f"{axis}_passed"] = verdict.passed
    return record


def _write_folder(folder: Path, result: dict[str, Any], names: Mapping[str, str], images: Images) -> Path:
    missing = [name for name in names.values() if name not in images]
    if missing:
        raise UserError(
            f"the image {missing[0]!r} of {folder} was not given.", "Pass the sources and every drawn image."
        )
    with files.NewFolder(folder) as partial:
        for file, name in names.items():
            save_png(partial / file, images[name])
        (partial / RESULT).write_text(
            json.dumps(result, ensure_ascii=False, indent=4, allow_nan=False), encoding="utf-8"
        )
    return folder
