"""GenEval and GenEval2: rules, quirks and summaries, worked out by hand and by an independent implementation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from benchmark_fixtures import figure_values, geneval2_records, geneval_records, load_items

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import registry
from ivr_jax.evaluate.benchmarks.interface import Kind
from ivr_jax.evaluate.benchmarks.suites.geneval import judge_objects, keep_boxes, relations
from ivr_jax.evaluate.benchmarks.suites.geneval2 import accepted_tokens, first_token_value
from ivr_jax.images import save_png

GENEVAL, GENEVAL2 = registry.load("geneval"), registry.load("geneval2")


def test_boxes_are_kept_above_the_threshold_of_the_tag_best_first_and_at_most_sixteen():
    boxes = {"dog": [[0, 0, 1, 1, 0.3], [0, 0, 2, 2, 0.5], [0, 0, 3, 3, 0.95]], "cat": [[0, 0, 1, 1, 0.1]]}
    assert keep_boxes(boxes, "colors") == {"dog": [[0, 0, 3, 3, 0.95], [0, 0, 2, 2, 0.5]]}  # .3 is not above .3
    assert keep_boxes(boxes, "counting") == {"dog": [[0, 0, 3, 3, 0.95]]}
    many = {"cup": [[i, 0, i + 1, 1, 0.31 + i / 100] for i in range(20)]}
    kept = keep_boxes(many, "colors")["cup"]
    assert [box[0] for box in kept] == list(range(19, 3, -1))


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        # 10 x 10 boxes, so each axis is shortened by .1 x 20 = 2.
        ([0, 0, 10, 10], [20, 0, 30, 10], {"left of"}),  # offset -20: -18 / 20 = -.9
        ([20, 0, 30, 10], [0, 0, 10, 10], {"right of"}),
        ([0, 0, 10, 10], [0, 20, 10, 30], {"above"}),  # y grows downward
        ([0, 20, 10, 30], [0, 0, 10, 10], {"below"}),
        ([0, 0, 10, 10], [20, 20, 30, 30], {"left of", "above"}),  # -18 / 28.28 = -.636 on both axes
        ([0, 0, 10, 10], [2, 0, 12, 10], set()),  # shortened to nothing
        ([0, 0, 10, 10], [4, 0, 14, 10], set()),  # -2 / 4 = -.5: not strictly more
        ([0, 0, 10, 10], [4.01, 0, 14.01, 10], {"left of"}),
    ],
)
def test_relations_divide_the_shortened_offset_by_the_unshortened_one(box, other, expected):
    assert relations(box, other) == expected


def judged(entry_list, objects, colors=None, **more):
    metadata = {"tag": "any", "include": entry_list, "prompt": "p", **more}
    return judge_objects(metadata, objects, lambda name, number: (colors or {})[name][number])


def test_an_image_is_right_when_every_entry_holds():
    box = [0, 0, 10, 10, 0.9]
    assert judged([{"class": "dog", "count": 1}], {"dog": [box]}) == (True, "")
    assert judged([{"class": "dog", "count": 2}], {"dog": [box]})[0] is False
    assert judged([{"class": "dog", "count": 1}], {"dog": [box] * 5})[0] is True  # more than wanted is no fault
    found = judged([{"class": "dog", "count": 2}], {"dog": [box] * 3}, exclude=[{"class": "dog", "count": 3}])
    assert found == (False, "expected dog<3, found 3")


def test_colors_are_asked_of_the_most_confident_boxes_and_all_must_carry_them():
    box = [0, 0, 10, 10, 0.9]
    entry = {"class": "car", "count": 2, "color": "red"}
    assert judged([entry], {"car": [box] * 3}, {"car": ["red", "red", "blue"]})[0] is True
    assert judged([entry], {"car": [box] * 3}, {"car": ["red", "blue", "red"]})[0] is False


def test_position_counts_only_when_its_own_and_its_targets_entry_hold():
    left, right = [0, 0, 10, 10, 0.9], [30, 0, 40, 10, 0.9]
    entries = [{"class": "cat", "count": 1}, {"class": "bus", "count": 1, "position": ["left of", 0]}]
    assert judged(entries, {"cat": [right], "bus": [left]}) == (True, "")
    assert judged(entries, {"cat": [left], "bus": [right]})[0] is False
    correct, reason = judged(entries, {"bus": [left]})
    assert correct is False and reason.splitlines() == ["expected cat>=1, found 0", "no target for bus to be left of"]
    colored = [{**entries[0], "color": "red"}, entries[1]]
    correct, reason = judged(colored, {"cat": [right], "bus": [left]}, {"cat": ["blue"]})
    assert correct is False and reason.splitlines()[1] == "no target for bus to be left of"


def official_geneval(lines: list[str]) -> dict[str, float]:
    """The official summary, from its result file alone."""
    rows = [json.loads(line) for line in lines]
    tags, prompts = {}, {}
    for row in rows:
        tags.setdefault(row["tag"], []).append(row["correct"])
        prompts.setdefault(row["metadata"], []).append(row["correct"])
    return {
        "Overall": float(np.mean([np.mean(values) for values in tags.values()])),
        "Correct images": float(np.mean([row["correct"] for row in rows])),
        "Correct prompts": float(np.mean([any(values) for values in prompts.values()])),
        **{tag: float(np.mean(values)) for tag, values in tags.items()},
    }


def test_geneval_summary_by_hand_and_by_the_official_rule(tmp_path):
    items = load_items(GENEVAL, tmp_path)
    records = geneval_records(items)
    for mode in ("strict", "fixed"):
        values = figure_values(GENEVAL, items, records.judged, mode)
        assert values["Overall"] == pytest.approx((0.75 + 0 + 1 + 0.5 + 0 + 0.5) / 6, abs=1e-15)
        assert values["Correct images"] == 7 / 14 and values["Correct prompts"] == 4 / 6
        assert values["single_object"] == 0.75 and values["counting"] == 1 and values["position"] == 0
    results = GENEVAL.result_files(items, records.judged, "ours", "judge")["results.jsonl"].splitlines()
    official = official_geneval(results)
    assert official == {name: values[name] for name in official}
    first = json.loads(results[0])
    assert list(first) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(first["metadata"]) == dict(items[0].data) and json.loads(first["details"]) == {}


def test_geneval_layout_takes_four_or_five_digits_and_any_number_of_samples(tmp_path):
    items = load_items(GENEVAL, tmp_path / "data")
    images, pixels = tmp_path / "images", np.zeros((8, 8, 3), np.uint8)
    assert GENEVAL.image_path(items[3], 2) == "00003/samples/00002.png"
    for name in ("0003/samples/0000.png", "0003/samples/0002.png", "0003/samples/grid.png", "0003/samples/x.txt"):
        save_png(images / name, pixels)
    assert [path.name for path in GENEVAL.find_images(images, items[3])] == ["0000.png", "0002.png"]
    assert GENEVAL.find_images(images, items[0]) == []
    save_png(images / "0003/samples/2.png", pixels)
    with pytest.raises(UserError):  # two images of sample 2
        GENEVAL.find_images(images, items[3])
    save_png(images / "00003/samples/00000.png", pixels)
    with pytest.raises(UserError):  # two folders
        GENEVAL.find_images(images, items[3])


def test_geneval_images_of_other_prompts_are_refused(tmp_path):
    items = load_items(GENEVAL, tmp_path / "data")
    folder = tmp_path / "images/00000"
    save_png(folder / "samples/00000.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "metadata.jsonl").write_text(json.dumps(dict(items[1].data)) + "\n")
    with pytest.raises(UserError):
        GENEVAL.find_images(tmp_path / "images", items[0])
    (folder / "metadata.jsonl").write_text(GENEVAL.side_files(items[0])["00000/metadata.jsonl"])
    assert len(GENEVAL.find_images(tmp_path / "images", items[0])) == 1


@pytest.mark.parametrize("change", [{"tag": "sizes"}, {"include": []}, {"include": [{"class": "cat", "count": "1"}]},
                                    {"include": [{"class": "a", "count": 1, "position": ["near", 0]}]},
                                    {"include": [{"class": "a", "count": 1, "color": "mauve"}]}])  # fmt: skip
def test_geneval_records_are_checked(tmp_path, change):
    load_items(GENEVAL, tmp_path)
    path = tmp_path / "evaluation_metadata.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]))
    with pytest.raises(UserError):
        GENEVAL.items(tmp_path, tmp_path)


def test_geneval_asks_a_detector_or_a_judge_with_the_requirements_in_words(tmp_path):
    items = load_items(GENEVAL, tmp_path)
    (question,) = GENEVAL.questions(items[4], 0, "detector")
    assert question.kind == Kind.DETECTION and question.data == items[4].data
    (question,) = GENEVAL.questions(items[4], 0, "chat")
    assert question.fields["requirements"] == "- at least 1 cat\n- at least 1 bus\n- the bus is left of the cat"
    (question,) = GENEVAL.questions(items[2], 0, "chat")
    assert question.fields["requirements"].endswith("- fewer than 3 clock")


# -- GenEval2 --


def test_accepted_tokens_of_counts_and_of_other_questions():
    assert accepted_tokens("Yes", "object") == ("Yes", "yes", " Yes", " yes")
    expected = {"three", "Three", " three", " Three", "3", " "}
    assert set(accepted_tokens("three", "count")) == expected == set(accepted_tokens("3", "count"))
    with pytest.raises(UserError):
        accepted_tokens("several", "count")


def test_a_bare_space_counts_in_strict_alone_and_only_for_counts():
    tokens = [("three", math.log(0.5)), (" ", math.log(0.2)), ("3", math.log(0.1)), ("four", math.log(0.05))]
    value = first_token_value(tokens, accepted_tokens("3", "count"))
    assert value["probability"] == pytest.approx(0.6) and value["with_space"] == pytest.approx(0.8)
    assert value["mass"] == pytest.approx(0.85)
    value = first_token_value([("Yes", math.log(0.5)), (" ", math.log(0.2))], accepted_tokens("Yes", "object"))
    assert value["probability"] == value["with_space"] == pytest.approx(0.5)


def test_geneval2_summary_by_hand(tmp_path):
    items = load_items(GENEVAL2, tmp_path)
    strict = figure_values(GENEVAL2, items, geneval2_records().judged, "strict")
    fixed = figure_values(GENEVAL2, items, geneval2_records().judged, "fixed")
    assert strict["AM"] == pytest.approx(100 * (1.9 / 3 + 1.65 / 4) / 2)
    assert fixed["AM"] == pytest.approx(100 * (1.7 / 3 + 1.55 / 4) / 2)
    assert strict["GM"] == pytest.approx(100 * ((0.5 * 0.4) ** (1 / 3) + (0.8 * 0.1 * 0.5 * 0.25) ** 0.25) / 2)
    assert fixed["GM"] == pytest.approx(100 * (0.1 ** (1 / 3) + 0) / 2)  # an atom of 0 makes its prompt 0
    assert strict["skill count"] == pytest.approx(25) and fixed["skill count"] == pytest.approx(10)
    assert strict["skill object"] == fixed["skill object"] == pytest.approx(65)
    assert strict["3 atoms"] == pytest.approx(100 * 1.9 / 3) and strict["4 atoms"] == pytest.approx(41.25)


def test_geneval2_result_file_gives_the_official_summary(tmp_path):
    items = load_items(GENEVAL2, tmp_path)
    records = geneval2_records()
    files = GENEVAL2.result_files(items, records.judged, "ours", "judge")
    scores = json.loads(files["scores.json"])
    am = 100 * sum(sum(atoms) / len(atoms) for atoms in scores) / len(scores)
    gm = 100 * sum(math.prod(atoms) ** (1 / len(atoms)) for atoms in scores) / len(scores)
    ours = figure_values(GENEVAL2, items, records.judged, "strict")
    assert (f"{am:.10f}", f"{gm:.10f}") == (f"{ours['AM']:.10f}", f"{ours['GM']:.10f}")
    assert list(json.loads(files["image_paths.json"])) == [item.prompt for item in items]
    del records.all["00001", 0, "atom 2"]
    assert GENEVAL2.result_files(items, records.judged, "ours", "judge") == {}
    values = figure_values(GENEVAL2, items, records.judged, "fixed")
    assert values["AM"] == pytest.approx(170 / 3)  # the incomplete prompt is outside of the mean
    figure = next(f for f in GENEVAL2.figures(items, records.judged, "fixed") if f.name == "AM")
    assert (figure.got, figure.wanted) == (6, 7)


def test_geneval2_images_by_the_official_list_of_paths(tmp_path):
    items = load_items(GENEVAL2, tmp_path)
    images = tmp_path / "images"
    save_png(images / "deep/one.png", np.zeros((8, 8, 3), np.uint8))
    (images / "image_paths.json").write_text(json.dumps({items[0].prompt: "deep/one.png", items[1].prompt: "no.png"}))
    assert GENEVAL2.find_images(images, items[0]) == [images / "deep/one.png"]
    assert GENEVAL2.find_images(images, items[1]) == []
