"""The input list of data construction: the released example's shapes go in, and every fault is named."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photographs import photograph

from ivr_jax.construct.escalation import Outcome, construct
from ivr_jax.construct.released import load_result, write_outcome
from ivr_jax.construct.samples import InputSample, sort_samples
from ivr_jax.errors import UserError
from ivr_jax.images import image_name, save_png
from ivr_jax.trajectory import AXES, AxisVerdict, Evaluation


def read_samples(file: Path, image_root: Path | None = None) -> list[InputSample]:
    """The samples of a list; raises what is wrong with the first bad entry."""
    samples, quarantined = sort_samples(file, image_root)
    if quarantined:
        raise quarantined[0].reason
    return samples


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("astronaut", "coffee", "chelsea"):
        save_png(tmp_path / "photographs" / f"{name}.png", photograph(name, 16))
    return tmp_path


def entry(**changes: Any) -> dict[str, Any]:
    return {"key": "a", "src_path": None, "edit_prompt": "A cup.", "edit_path": None} | changes


def write(folder: Path, *entries: Any) -> Path:
    file = folder / "samples.json"
    file.write_text(json.dumps(list(entries)), encoding="utf-8")
    return file


def test_a_list_that_was_written_on_windows_names_the_same_files(folder):
    file = write(folder, entry(src_path=r"photographs\coffee.png", edit_path=r"C:\mine\photographs\chelsea.png"),
                 entry(key="b", src_path=[r".\photographs\coffee.png", "photographs/chelsea.png"]))  # fmt: skip
    save_png(folder / "chelsea.png", photograph("chelsea", 16))
    first, second = read_samples(file)
    assert first.sources == (folder / "photographs" / "coffee.png",) and first.candidate == folder / "chelsea.png"
    assert second.sources[1] == folder / "photographs" / "chelsea.png" and second.load().sample.sources


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "", ".", "http://host/a.png", "~/a.png"])
def test_what_names_no_file_is_set_aside(folder, path):
    samples, quarantined = sort_samples(write(folder, entry(src_path=path), entry(key="b")))
    assert [sample.key for sample in samples] == ["b"] and [one.key for one in quarantined] == ["entry 0"]


def test_one_source_several_and_none_with_and_without_a_candidate(folder):
    file = write(
        folder,
        {
            "__field_docs": {"key": "names it"},
            "__comment": "one source",
            **entry(
                key="one",
                src_path="photographs/coffee.png",
                edit_path="photographs/chelsea.png",
                edit_key={"category": "replacement", "benchmark": "b"},
                explanation="cups hold coffee",
            ),
        },
        entry(key="two", src_path=["photographs/coffee.png", str(folder / "photographs" / "astronaut.png")]),
        entry(key="none", edit_key="free", explanation=None),
    )
    one, two, none = (sample.load() for sample in read_samples(file))
    coffee, cat, portrait = (photograph(name, 16) for name in ("coffee", "chelsea", "astronaut"))
    assert one.sample.sources == (image_name(coffee),) and np.array_equal(one.images[image_name(coffee)], coffee)
    assert np.array_equal(one.first_image, cat)
    assert (one.sample.category, one.sample.explanation) == ("replacement", "cups hold coffee")
    assert one.sample.facts == {"edit_key": {"category": "replacement", "benchmark": "b"}, "candidate": True}
    assert two.sample.sources == (image_name(coffee), image_name(portrait)) and two.first_image is None
    assert none.sample.sources == () and none.sample.task == "t2i" and none.sample.facts == {"edit_key": "free"}


def test_relative_paths_start_at_the_list_or_where_asked(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    file = write(lists, entry(src_path="photographs/coffee.png"))
    with pytest.raises(UserError, match="src_path"):
        read_samples(file)
    assert read_samples(file, folder)[0].sources == (folder / "photographs" / "coffee.png",)


@pytest.mark.parametrize(
    "entries, fault",
    [
        ([entry(), entry()], "entry 1: the key 'a' is taken"),
        ([entry(key="../../x")], "entry 0: the key '../../x' cannot name a folder"),
        ([entry(key="/abs")], "cannot name a folder"),
        ([entry(key=7)], "cannot name a folder"),
        ([entry(edit_prompt=" ")], "edit_prompt is ' '"),
        ([entry(edit_prompt=None)], "edit_prompt is None"),
        ([entry(src_path=5)], "src_path is 5"),
        ([entry(src_path=["photographs/coffee.png", None])], "src_path is ['photographs/coffee.png', None]"),
        ([entry(src_path="absent.png")], "absent.png is no file"),
        ([entry(src_path="photographs")], "photographs is no file"),
        ([entry(src_path="a\0b")], "src_path is 'a\\x00b'"),
        ([entry(edit_path="absent.png")], "the edit_path"),
        ([entry(explanation=3)], "explanation is 3"),
        ([entry(prompt="x")], "unknown field 'prompt'"),
        ([{k: v for k, v in entry().items() if k != "src_path"}], "lacks the field 'src_path'"),
        (["text"], "entry 0 is no object"),
        ([], "is not a list of samples"),
    ],
    ids=lambda value: value.replace("\0", "")[:40] if isinstance(value, str) else "",
)
def test_a_faulty_list_is_an_error_that_names_the_entry_and_the_field(folder, entries, fault):
    with pytest.raises(UserError) as caught:
        read_samples(write(folder, *entries))
    assert fault in str(caught.value) and "samples.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "{}", "3"])
def test_a_list_that_is_none_is_an_error(folder, text):
    (folder / "samples.json").write_text(text)
    with pytest.raises(UserError, match="samples.json"):
        read_samples(folder / "samples.json")


def test_a_missing_list_is_an_error(folder):
    with pytest.raises(UserError, match="absent.json"):
        read_samples(folder / "absent.json")


def test_an_image_that_is_none_is_an_error_when_it_is_loaded(folder):
    (folder / "text.png").write_text("no image")
    (sample,) = read_samples(write(folder, entry(src_path="text.png")))
    with pytest.raises(UserError, match="text.png"):
        sample.load()


class Content:
    """An analyzer to whom everything passes."""

    async def evaluate(self, *_):
        return Evaluation(*(AxisVerdict(True, "fine", 5) for _ in AXES))


def test_a_candidate_that_passes_goes_through_construction_to_a_released_folder(folder):
    (sample,) = read_samples(
        write(folder, entry(src_path="photographs/coffee.png", edit_path="photographs/chelsea.png", edit_key={"n": 1}))
    )
    request = sample.load()
    outcome = asyncio.run(construct(request.sample, request.images, request.first_image, Content(), Content()))
    assert isinstance(outcome, Outcome)
    result = load_result(write_outcome(folder / "success", folder / "fail", outcome) / "result.json")
    assert result["original_success"] is True and result["edit_key"] == {"n": 1} and result["edit_prompt"] == "A cup."


def test_a_list_saved_on_windows_is_read(folder):
    file = write(folder, entry())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b",", b",\r\n"))
    assert [sample.key for sample in read_samples(file)] == ["a"]


def test_control_tokens_in_a_request_are_caught_with_the_sample_s_name(folder):
    for field in ("edit_prompt", "explanation"):
        with pytest.raises(UserError) as error:
            read_samples(write(folder, entry(**{field: "Write <|im_start|> on it."})))
        assert "'a'" in error.value.what and field in error.value.what


def test_a_file_that_goes_away_after_the_list_was_checked_is_said_when_it_is_read(folder):
    (sample,) = read_samples(write(folder, entry(src_path="photographs/coffee.png")))
    before = sample.fingerprint
    (folder / "photographs" / "coffee.png").unlink()
    assert sample.fingerprint != before
    with pytest.raises(UserError):
        sample.load()
