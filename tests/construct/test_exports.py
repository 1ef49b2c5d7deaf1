"""The training text equals what the released converter wrote, record by record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from photographs import write_success
from released_reader import read_released

from ivr_jax.construct.exports import FORMS, ExportOptions, export_records, export_success
from ivr_jax.construct.released import load_result, result_from_trajectory
from ivr_jax.errors import UserError

VECTORS = Path(__file__).parents[1] / "vectors"
DEFAULT, CAPPED = ExportOptions(), ExportOptions(skip_direct=True, max_reflections=1)


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix, options", [("", DEFAULT), (".max1_skip", CAPPED)], ids=["default", "max1_skip"])
def test_every_record_equals_the_released_converter_s(tmp_path, form, suffix, options):
    written, problems = export_success(VECTORS / "success", tmp_path / "deep" / "out.jsonl", form, options)
    expected = records(VECTORS / f"{form}{suffix}.jsonl")
    assert records(tmp_path / "deep" / "out.jsonl") == expected and written == len(expected) > 0
    assert problems == [] and len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_equal_too(tmp_path, form):
    export_success(VECTORS / "success", tmp_path / "out.jsonl", form)
    assert (tmp_path / "out.jsonl").read_bytes() == (VECTORS / f"{form}.jsonl").read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_trajectories_that_were_read_say_the_same_as_their_files(form):
    """Where nothing was pruned; sources are written beside the answer, so they have other paths."""
    files, read = [], []
    for found in read_released(VECTORS / "success", with_images=False, strict=False)[0]:
        key = found.trajectory.sample.key
        result = load_result(VECTORS / "success" / key / "result.json")
        if not result["multi_step"]:
            files.append(result)
            read.append(
                result_from_trajectory(found.trajectory, f"outputs/success/{key}")[0]
                | {"original_image_path": result["original_image_path"]}
            )
    assert len(files) == 15
    assert list(export_records(read, form)) == list(export_records(files, form))


def test_a_pruned_multi_step_trajectory_by_hand(tmp_path):
    found = {r.trajectory.sample.key: r.trajectory for r in read_released(write_success(tmp_path, 16))[0]}
    result, _ = result_from_trajectory(found["cat_dusk"], "out")
    options = ExportOptions(image_token="[I]", think_open="<<", think_close=">>")
    (record,) = export_records([result], "chatml", options)
    mirror, dusk = "Mirror the cat; keep all else.", "Make it dusk; keep all else."
    assert record["text"] == (
        "<|im_start|>user\n[I]{out/original_image.png}Mirror the cat, then make it dusk.<|im_end|>"
        "<|im_start|>assistant\n"
        f"<<I will decompose this task into the following atomic edits:\n1. {mirror}\n2. {dusk}>>"
        "[I]{out/step1_direct_edit_result.png}"
        f"<<Next sub-step: {mirror}>>[I]{{out/step4_multi_step_edit_result_0.png}}"
        f"<<Next sub-step: {dusk}>>[I]{{out/step4_multi_step_edit_result_1.png}}<|im_end|>"
    )


def test_a_thought_without_an_image_has_no_image_token():
    result = {"task_id": "k", "edit_prompt": " p ", "direct_edit_image_path": None}
    (record,) = export_records([result], "sharegpt")
    assert record == {
        "id": "k",
        "images": [],
        "conversations": [
            {"from": "human", "value": " p "},
            {"from": "gpt", "value": "<think>I will perform the requested edit: p</think>"},
        ],
    }
    (record,) = export_records([result], "messages")
    assert record["messages"][1]["content"] == [
        {"type": "text", "text": "<think>I will perform the requested edit: p</think>"}
    ]


def test_an_unknown_form_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="'alpaca'"):
        export_success(VECTORS / "success", tmp_path / "out.jsonl", "alpaca")
    assert list(tmp_path.iterdir()) == []


def test_faulty_folders_are_reported_and_the_others_written(tmp_path):
    root = write_success(tmp_path, 16)
    (root / "cat_dusk" / "result.json").write_text("{")
    (root / "cup_alone" / "result.json").write_text('{"task_id": "cup_alone"}')
    (root / "coffee_mirrored" / "result.json").write_text('{"task_id": "c", "edit_prompt": "p", "reflect": [3]}')
    written, problems = export_success(root, tmp_path / "out.jsonl", "chatml")
    assert written == 2 and [p.path.name for p in problems] == ["cat_dusk", "coffee_mirrored", "cup_alone"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out.jsonl"):
        export_success(VECTORS / "success", tmp_path / "file" / "out.jsonl", "chatml")


TOKENS = ["an <image> of a cat", "write </think> there", "<|im_start|>system", "a <|vision_pad|>", "<VIDEO>"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", TOKENS)
@pytest.mark.parametrize("place", ["edit_prompt", "reflect", "multi_step"])
def test_a_sample_whose_text_contains_a_token_of_the_forms_is_left_out_by_name(tmp_path, form, text, place):
    """In every record that is written the tags are as many as the images."""
    results = [load_result(folder / "result.json") for folder in sorted((VECTORS / "success").iterdir())]
    bad = next(result for result in results if place == "edit_prompt" or result[place])
    if place == "edit_prompt":
        bad[place] = text
    elif place == "reflect":
        bad[place][0]["reflect_thinking"]["improvement_plan"] = text
    else:
        bad[place][0]["step_instruction"] = text
    for result in results:
        folder = tmp_path / "success" / result["task_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
    written, (problem,) = export_success(tmp_path / "success", tmp_path / "out.jsonl", form)
    assert written == len(results) - 1 and repr(bad["task_id"]) in problem.reason
    for record in records(tmp_path / "out.jsonl") if form == "sharegpt" else ():
        said = "".join(turn["value"] for turn in record["conversations"])
        assert said.count("<image>") == len(record["images"])
        assert said.count("<think>") == said.count("</think>")


def test_own_tokens_are_reserved_too(tmp_path):
    result = load_result(next((VECTORS / "success").iterdir()) / "result.json") | {"edit_prompt": "write [I] here"}
    assert list(export_records([result], "sharegpt"))
    with pytest.raises(UserError) as error:
        list(export_records([result], "sharegpt", ExportOptions(image_token="[I]")))
    assert repr(result["task_id"]) in error.value.what
