"""The released folders: what is inferred from them, what is quarantined, and that writing undoes reading."""

from __future__ import annotations

import asyncio
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from photographs import photograph, scores, write_success
from released_reader import read_released
from trajectory_strategies import PICTURES, Services, name, pixels, trajectories

from ivr_jax.cli import config_from_argv
from ivr_jax.construct.__main__ import import_released
from ivr_jax.construct.escalation import RELEASED_RULES, Drop, Rules, construct
from ivr_jax.construct.released import (
    STEPS_REMAIN,
    Released,
    iter_released,
    load_result,
    result_from_trajectory,
    trajectory_from_result,
    write_outcome,
    write_trajectory,
)
from ivr_jax.data.store import TrajectoryDataset, TrajectoryWriter
from ivr_jax.errors import UserError
from ivr_jax.images import image_name, load_image
from ivr_jax.trajectory import (
    AXES,
    AxisVerdict,
    Evaluation,
    Mode,
    Round,
    Sample,
    Trajectory,
    checked_key,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "success"


@pytest.fixture
def success(tmp_path) -> Path:
    return write_success(tmp_path, 16)


def by_key(found: list[Released]) -> dict[str, Released]:
    return {f.trajectory.sample.key: f for f in found}


def edit(success: Path, key: str, change) -> None:
    """Applies `change` to the parsed `result.json` of one sample."""
    file = success / key / "result.json"
    result = json.loads(file.read_text())
    change(result)
    file.write_text(json.dumps(result))


def test_photographs_become_trajectories_with_their_modes_and_pixels(success):
    read, problems = read_released(success)
    assert problems == []
    modes = {key: r.trajectory.mode for key, r in by_key(read).items()}
    assert modes == {
        "portrait_grey": Mode.DIRECT,
        "coffee_mirrored": Mode.REFLECTION,
        "cat_dusk": Mode.MULTI_STEP,
        "cup_alone": Mode.DIRECT,
        "cat_and_cup": Mode.DIRECT,
    }
    cat, coffee = photograph("chelsea", 16), photograph("coffee", 16)
    both = by_key(read)["cat_and_cup"]
    assert both.trajectory.sample.sources == (image_name(cat), image_name(coffee))
    assert np.array_equal(both.images[both.trajectory.images[0]], np.concatenate([cat, coffee], 1))
    assert by_key(read)["cup_alone"].trajectory.sample.sources == ()
    assert both.trajectory.sample.category == "test"
    for r in read:
        assert set(r.images) == {*r.trajectory.sample.sources, *r.trajectory.images}


def test_reflections_before_steps_are_pruned_and_steps_are_judged_twice(success):
    (cat,) = (r.trajectory for r in read_released(success)[0] if r.trajectory.sample.key == "cat_dusk")
    first, step, last = cat.rounds
    assert not first.evaluation.passed and first.evaluation.scores == (1, 5, 5, 2)
    assert [r.cause and r.cause.instruction for r in cat.rounds] == [
        None,
        "Mirror the cat; keep all else.",
        "Make it dusk; keep all else.",
    ]
    assert step.step_evaluation.passed and step.evaluation.instruction == AxisVerdict(False, STEPS_REMAIN)
    assert step.evaluation.axes[1:] == step.step_evaluation.axes[1:]
    assert last.evaluation == last.step_evaluation and last.evaluation.passed and last.evaluation.scores == (5, 5, 4, 5)


def test_what_was_read_can_be_stored_as_a_dataset(success, tmp_path):
    with TrajectoryWriter(tmp_path / "data") as writer:
        for trajectory, images in read_released(success)[0]:
            writer.add(trajectory, images)
    dataset = TrajectoryDataset(tmp_path / "data")
    assert dataset.manifest["by_mode"] == {"direct": 3, "multi_step": 1, "reflection": 1}
    assert dataset.manifest["by_image_size"] == {"16x16": 7, "32x16": 1}, "shared pictures are stored once"


@pytest.mark.parametrize(
    "thresholded, passes",
    [
        (scores(instruction=4), False),
        (scores(5, 3, 3, 3), True),
        (scores(consistency=2), False),
        (scores(quality=2), False),
        (scores(knowledge=2), False),
        (scores(quality=3), True),
    ],
)
def test_verdicts_of_the_first_image_follow_the_released_thresholds(success, thresholded, passes):
    edit(success, "portrait_grey", lambda r: r.update(evaluation=thresholded))
    read, problems = read_released(success)
    assert ("portrait_grey" in by_key(read)) is passes and len(problems) == (not passes)
    trajectory = by_key(read_released(success, strict=False)[0])["portrait_grey"].trajectory
    assert trajectory.rounds[0].evaluation.passed is passes


def test_a_step_needs_quality_4(success):
    edit(success, "cat_dusk", lambda r: r["multi_step"][0].update(evaluation=scores(quality=3)))
    _, (problem,) = read_released(success)
    assert problem.path == success / "cat_dusk" and "image 2 fails as a step (quality 3)" in problem.reason


@pytest.mark.parametrize(
    "key, change, reason",
    [
        (
            "portrait_grey",
            lambda r: r.update(evaluation=scores(instruction=2)),
            "the final image fails (instruction 2)",
        ),
        ("coffee_mirrored", lambda r: r.update(evaluation=scores()), "image 1 passes"),
        (
            "portrait_grey",
            lambda r: r.update(failure_reason="Direct edit failed"),
            "the sample failed: Direct edit failed",
        ),
        (
            "coffee_mirrored",
            lambda r: r.update(final_edited_image_path=r["direct_edit_image_path"]),
            "is not the last one drawn",
        ),
    ],
)
def test_what_a_model_should_not_learn_from_is_quarantined_unless_asked_for(success, key, change, reason):
    edit(success, key, change)
    read, (problem,) = read_released(success)
    assert reason in problem.reason and str(success / key / "result.json") in problem.reason and len(read) == 4
    assert key in by_key(read_released(success, strict=False)[0])


def test_the_final_path_of_several_references_may_be_a_list_as_the_released_script_writes_it(success):
    edit(
        success,
        "cat_and_cup",
        lambda r: r.update(final_edited_image_path=[*r["original_image_path"], r["final_edited_image_path"]]),
    )
    assert read_released(success)[1] == []


@pytest.mark.parametrize(
    "key, change, field",
    [
        ("cat_dusk", lambda r: r.pop("evaluation"), "evaluation is missing"),
        ("cat_dusk", lambda r: r.update(evaluation={}), "evaluation.instruction_reasoning is missing"),
        ("cat_dusk", lambda r: r["multi_step"][1].pop("evaluation"), "multi_step[1].evaluation is missing"),
        (
            "cat_dusk",
            lambda r: r["multi_step"][0]["evaluation"].update(quality_score=7),
            "multi_step[0].evaluation.quality_score is 7",
        ),
        (
            "cat_dusk",
            lambda r: r["multi_step"][0].update(step_instruction=" "),
            "multi_step[0].step_instruction is ' '",
        ),
        ("cat_dusk", lambda r: r.update(multi_step=["Mirror"]), "multi_step is ['Mirror']"),
        ("cat_dusk", lambda r: r.update(multi_step=r["multi_step"] * 3), "at most 5"),
        (
            "coffee_mirrored",
            lambda r: r["reflect"][0]["reflect_thinking"].pop("improvement_plan"),
            "reflect[0].reflect_thinking.improvement_plan is missing",
        ),
        (
            "coffee_mirrored",
            lambda r: r["reflect"][0]["evaluation"].update(instruction_score="five"),
            "reflect[0].evaluation.instruction_score is 'five'",
        ),
        (
            "coffee_mirrored",
            lambda r: r["reflect"][0]["evaluation"].update(instruction_score=True),
            "instruction_score is True",
        ),
        (
            "coffee_mirrored",
            lambda r: r["reflect"][0]["evaluation"].update(instruction_score=float("nan")),
            "instruction_score is nan",
        ),
        ("cat_dusk", lambda r: r.update(edit_key={"a": float("nan")}), "edit_key holds NaN"),
        ("cat_dusk", lambda r: r.update(edit_prompt="half \ud83d"), "surrogate"),
        (
            "coffee_mirrored",
            lambda r: r["reflect"][0].pop("reflect_image_path"),
            "reflect[0].reflect_image_path is missing",
        ),
        ("portrait_grey", lambda r: r.pop("edit_prompt"), "edit_prompt is missing"),
        ("portrait_grey", lambda r: r.update(original_image_path=3), "original_image_path is 3"),
        ("portrait_grey", lambda r: r.update(task_id="../../x"), "cannot name a folder"),
        ("portrait_grey", lambda r: r.update(task_id="cat_dusk"), "is also that of"),
    ],
)
def test_a_faulty_folder_is_a_problem_that_names_file_and_field(success, key, change, field):
    edit(success, key, change)
    read, (problem,) = read_released(success)
    assert field in problem.reason and f"{problem.path / 'result.json'}: " in problem.reason
    assert problem.path.name == key and len(read) == 4 and "\n" not in problem.reason


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "<html>", "[" * 100_000], ids=["empty", "half", "list", "html", "deep"]
)
def test_unreadable_json_is_a_problem(success, text):
    (success / "portrait_grey" / "result.json").write_text(text)
    read, (problem,) = read_released(success)
    assert "result.json" in problem.reason and len(read) == 4


def test_missing_and_corrupt_images_are_problems(success):
    (success / "portrait_grey" / "original_image.png").unlink()
    (success / "coffee_mirrored" / "step2_reflect_edit_result_0.png").write_bytes(b"no image")
    read, problems = read_released(success)
    assert len(read) == 3
    assert (
        "step2_reflect_edit_result_0.png" in problems[0].reason
        and "photographs/portrait_grey.png" in problems[1].reason
    )


def test_images_elsewhere_are_found_under_the_image_root_and_nowhere_outside_it(success, tmp_path):
    source = success / "portrait_grey" / "original_image.png"
    (tmp_path / "photographs").mkdir()
    shutil.move(source, tmp_path / "photographs" / "portrait_grey.png")
    assert len(read_released(success)[1]) == 1
    assert read_released(success, image_root=tmp_path)[1] == []
    for path in ("../photographs/portrait_grey.png", str(tmp_path / "photographs" / "portrait_grey.png")):
        edit(success, "portrait_grey", lambda r, path=path: r.update(original_image_path=path))
        (problem,) = read_released(success, image_root=success)[1]
        assert "neither in the folder nor under" in problem.reason


def test_an_import_takes_the_image_root_and_names_each_folder_once(success, tmp_path, capsys):
    (tmp_path / "photographs").mkdir()
    shutil.move(success / "portrait_grey" / "original_image.png", tmp_path / "photographs" / "portrait_grey.png")
    config = config_from_argv(["--config=micro_construct", f"--config.released={success}"])
    assert import_released(config, tmp_path / "without")["left_out"] == 1
    line, resized = capsys.readouterr().out.splitlines()
    assert "photographs/portrait_grey.png" in line and line.count(str(success)) == 1
    assert "--config.image_area=" in resized
    config.image_root = str(tmp_path)
    assert import_released(config, tmp_path / "with")["left_out"] == 0


def test_what_a_killed_writer_left_is_no_sample(success):
    shutil.copytree(success / "cat_dusk", success / ".partial-abc")
    assert len(read_released(success)[0]) == 5


def test_a_directory_without_samples_is_an_error(tmp_path):
    with pytest.raises(UserError, match="absent"):
        read_released(tmp_path / "absent")
    with pytest.raises(UserError):
        read_released(tmp_path)


@pytest.mark.parametrize(
    "key", ["", ".", "..", "../x", "a/b", "/etc", "a\\b", ".hidden", "a\x00b", "a\n", " a", "x" * 201, 5, None]
)
def test_a_key_that_cannot_name_a_folder_is_refused(key):
    with pytest.raises(UserError, match="here"):
        checked_key(key, "here")


def test_the_vectors_keep_only_the_two_samples_that_end_well():
    read, problems = read_released(VECTORS, with_images=False)
    assert {key: r.trajectory.mode for key, r in by_key(read).items()} == {"s005": Mode.DIRECT, "s014": Mode.REFLECTION}
    assert len(problems) == 22


def test_the_vectors_without_strictness_are_all_read_but_those_without_a_reflection_text():
    read, problems = read_released(VECTORS, with_images=False, strict=False)
    modes = {key: r.trajectory.mode for key, r in by_key(read).items()}
    assert {key for key, mode in modes.items() if mode is Mode.MULTI_STEP} == {"s003", "s013", "s017", "s018", "s021"}
    assert {key for key, mode in modes.items() if mode is Mode.DIRECT} == {"s001", "s005", "s007", "s020", "s022"}
    assert {p.path.name for p in problems} == {"s000", "s010", "s011", "s023"}
    assert all("reflect_thinking.failure_analysis is missing" in p.reason for p in problems)
    assert by_key(read)["s009"].trajectory.sample.sources == ("images/s009_a.png", "images/s009_b.png")


def test_specific_issues_join_the_failure_analysis_and_part_again():
    result = load_result(VECTORS / "s008" / "result.json")
    trajectory = trajectory_from_result(result, "s008")
    assert trajectory.rounds[1].cause.failure_analysis == "the sofa bench; 夕暮れ a left make the Specific issues: red"
    assert trajectory.rounds[2].cause.failure_analysis == "bench; above <b>tag</b> the the else; make left"
    back, _ = result_from_trajectory(trajectory, "outputs/success/s008")
    assert [r["reflect_thinking"] for r in back["reflect"]] == [r["reflect_thinking"] for r in result["reflect"]]


def test_a_released_result_without_pruning_or_steps_is_written_as_it_was_read():
    for folder in sorted(VECTORS.iterdir()):
        result = load_result(folder / "result.json")
        if result["multi_step"] or any(not r["reflect_thinking"] for r in result["reflect"]):
            continue
        back, _ = result_from_trajectory(trajectory_from_result(result, folder.name), f"outputs/success/{folder.name}")
        assert back | {"original_image_path": result["original_image_path"]} == result


def test_written_steps_keep_the_released_fields_and_add_the_evaluation_of_the_whole():
    result = load_result(VECTORS / "s017" / "result.json")
    back, _ = result_from_trajectory(trajectory_from_result(result, "s017"), "outputs/success/s017")
    assert back["reflect"] == [] and len(back["multi_step"]) == 4
    for written, read in zip(back["multi_step"], result["multi_step"], strict=True):
        whole = written.pop("request_evaluation")
        assert written == read and whole["quality_score"] == read["evaluation"]["quality_score"]


@given(trajectories())
def test_writing_and_reading_any_trajectory_loses_nothing(tmp_path_factory, trajectory):
    root = tmp_path_factory.mktemp("written")
    folder = write_trajectory(root, trajectory, PICTURES)
    (found,) = iter_released(root, strict=False)
    assert isinstance(found, Released), found
    assert found.trajectory == trajectory
    assert all(np.array_equal(found.images[n], PICTURES[n]) for n in found.images)
    assert len(list(folder.iterdir())) == 1 + len(trajectory.sample.sources) + len(trajectory.rounds)
    shutil.rmtree(root)


def test_a_verdict_without_a_score_is_written_as_5_or_1():
    mixed = Evaluation(AxisVerdict(False, "no"), *(AxisVerdict(True, "yes") for _ in AXES[1:]))
    result, _ = result_from_trajectory(Trajectory(Sample("k", "p"), (Round(None, "i", mixed),)), "out")
    assert [result["evaluation"][f"{axis}_score"] for axis in AXES] == [1, 5, 5, 5]
    assert not any(field.endswith("_passed") for field in result["evaluation"])


def test_writing_is_whole_or_not_at_all_and_never_over_something(tmp_path):
    trajectory = Trajectory(
        Sample("k", "p"), (Round(None, name(1), Evaluation(*(AxisVerdict(True, "y", 5) for _ in AXES))),)
    )
    with pytest.raises(UserError, match=name(1)):
        write_trajectory(tmp_path, trajectory, {})
    assert list(tmp_path.iterdir()) == []
    write_trajectory(tmp_path, trajectory, PICTURES)
    with pytest.raises(UserError, match=str(tmp_path)):
        write_trajectory(tmp_path, trajectory, PICTURES)
    evil = Trajectory(Sample("../k", "p"), trajectory.rounds)
    with pytest.raises(UserError, match="../k"):
        write_trajectory(tmp_path / "sub", evil, PICTURES)


def outcome_of(steps: list[bool], whole: list[bool]):
    services = Services(steps, whole)
    return asyncio.run(construct(Sample("k", "p", (name(0),)), {name(0): pixels(0)}, None, services, services, Rules()))


def test_a_success_is_written_with_its_failed_reflections_and_read_back_pruned(tmp_path):
    outcome = outcome_of([False, True, True], [False] * 4 + [False, True])
    folder = write_outcome(tmp_path / "success", tmp_path / "fail", outcome)
    result = load_result(folder / "result.json")
    assert folder == tmp_path / "success" / "k" and result["failure_reason"] is None
    assert len(result["reflect"]) == 3 and [s["step_instruction"] for s in result["multi_step"]] == ["one", "two"]
    assert result["final_edited_image_path"] == f"{folder}/step4_multi_step_edit_result_1.png"
    (found,) = iter_released(tmp_path / "success")
    assert found.trajectory == outcome.trajectory


def test_a_dropped_sample_goes_to_the_fail_tree_with_its_reason_and_its_last_try(tmp_path):
    outcome = outcome_of([True, False, False, False], [False] * 5)
    assert outcome.drop is Drop.STEP_FAILED
    folder = write_outcome(tmp_path / "success", tmp_path / "fail", outcome)
    result = load_result(folder / "result.json")
    assert folder == tmp_path / "fail" / "k" and not (tmp_path / "success").exists()
    assert result["failure_reason"] == "step_failed" and result["final_edited_image_path"] is None
    assert [s["evaluation"]["instruction_score"] for s in result["multi_step"]] == [5, 1]
    assert "request_evaluation" in result["multi_step"][0] and "request_evaluation" not in result["multi_step"][1]


def test_the_user_s_own_candidate_that_passes_is_an_original_success(success):
    edit(success, "portrait_grey", lambda r: r.update(original_success=True))
    trajectory = by_key(read_released(success)[0])["portrait_grey"].trajectory
    assert trajectory.sample.facts["candidate"] is True
    assert result_from_trajectory(trajectory, "out")[0]["original_success"] is True


def test_released_rules_are_those_of_the_released_scripts():
    whole, steps = RELEASED_RULES.thresholds, RELEASED_RULES.step_thresholds
    assert [getattr(whole, axis) for axis in AXES] == [5, 3, 3, 3]
    assert [getattr(steps, axis) for axis in AXES] == [5, 3, 4, 3]
    assert (
        RELEASED_RULES.min_steps,
        RELEASED_RULES.max_steps,
        RELEASED_RULES.step_tries,
        RELEASED_RULES.max_step_chars,
    ) == (1, 5, 3, 500)


@pytest.mark.parametrize("place", ["reason", "plan", "prompt", "explanation"])
def test_a_control_token_in_a_text_is_caught_on_entry_with_the_sample_s_name(success, place):
    file = success / "coffee_mirrored" / "result.json"
    result = json.loads(file.read_text())
    if place == "reason":
        result["evaluation"]["quality_reasoning"] += "<|im_end|>"
    elif place == "plan":
        result["reflect"][0]["reflect_thinking"]["improvement_plan"] = "Draw </Evaluate> there."
    else:
        result["edit_prompt" if place == "prompt" else "explanation"] = "<|im_start|>system"
    file.write_text(json.dumps(result))
    read, (problem,) = read_released(success, strict=False)
    assert "'coffee_mirrored'" in problem.reason and "control token" in problem.reason
    assert "coffee_mirrored" not in by_key(read) and len(read) >= 3


def test_a_byte_order_mark_and_windows_paths_are_read(success):
    file = success / "coffee_mirrored" / "result.json"
    result = json.loads(file.read_text())
    for record, field in ((result, "direct_edit_image_path"), (result["reflect"][0], "reflect_image_path")):
        record[field] = "C:\\out\\" + record[field].rpartition("/")[2]
    result["final_edited_image_path"] = result["reflect"][-1]["reflect_image_path"]
    file.write_text("\ufeff" + json.dumps(result).replace("\n", "\r\n"), encoding="utf-8")
    assert "coffee_mirrored" in by_key(read_released(success, strict=False)[0])


def test_what_a_library_raises_for_an_odd_file_concerns_one_folder(success, monkeypatch):
    def odd(path):
        if "coffee_mirrored" in str(path):
            raise struct.error("ushort format requires 0 <= number <= 65535")
        return load_image(path)

    monkeypatch.setattr("ivr_jax.construct.released.load_image", odd)
    read, (problem,) = read_released(success, strict=False)
    assert read and "coffee_mirrored" in problem.reason and "ushort" in problem.reason
