"""Figures, judgement records, the run folder, the summary, tables and comparisons."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from benchmark_fixtures import JUDGE, Records, load_items, picture

from ivr_jax.errors import UserError
from ivr_jax.evaluate.benchmarks import (
    compare,
    datafiles,
    figures,
    judgements,
    prompts,
    registry,
    run_folder,
    summary,
    tables,
)
from ivr_jax.evaluate.benchmarks.figures import Score, flat, macro
from ivr_jax.evaluate.benchmarks.interface import Item, Judgement, Kind, Question, State
from ivr_jax.evaluate.benchmarks.run_folder import AnswerRecord
from ivr_jax.images import save_png

# -- figures --


def test_missing_scores_are_outside_of_the_mean_and_inside_the_coverage():
    figure = flat("x", [Score("a", 1.0), Score("b", None, 0, 2), Score("c", 4.0, 2, 2)])
    assert figure.value == 2.5 and (figure.got, figure.wanted) == (3, 5)
    assert flat("y", [Score("a", None, 0)]).value is None


def test_groups_are_weighted_equally_whatever_their_size():
    figure = macro("x", {"one": [Score("a", 1.0)] * 3, "two": [Score("b", 5.0)], "none": [Score("c", None, 0)]})
    assert figure.value == 3


def test_intervals_hold_the_value_shrink_with_n_and_repeat():
    rng = np.random.default_rng(0)
    scores = [Score(f"{i}", float(v)) for i, v in enumerate(rng.random(400))]
    strata = dict.fromkeys((score.item for score in scores), "all")
    wide = figures.estimate(flat("x", scores[:40]), strata, 0)
    narrow = figures.estimate(flat("x", scores), strata, 0)
    assert wide["low"] < wide["value"] < wide["high"]
    assert narrow["high"] - narrow["low"] < wide["high"] - wide["low"]
    assert narrow == figures.estimate(flat("x", scores), strata, 0)
    # 1.96 standard errors of a mean of 400 uniform numbers
    assert narrow["high"] - narrow["low"] == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 400), rel=0.1)
    assert figures.estimate(flat("x", scores[:1]), strata, 0)["low"] is None


def test_samples_of_one_prompt_are_resampled_together():
    twice = [Score(f"{i // 2}", float(i // 2 % 2)) for i in range(80)]
    once = [Score(f"{i}", float(i % 2)) for i in range(40)]
    strata = {}
    ends = [figures.estimate(flat("x", scores), strata, 1) for scores in (twice, once)]
    assert ends[0]["low"] == pytest.approx(ends[1]["low"]) and ends[0]["n"] == 40


@pytest.mark.parametrize(("wins", "losses", "p"), [(0, 0, None), (5, 0, 0.0625), (1, 1, 1.0), (8, 2, 0.109375)])
def test_sign_test(wins, losses, p):
    assert figures.sign_test(wins, losses) == p


def test_a_paired_difference_ignores_what_only_one_run_has():
    before = flat("x", [Score(str(i), 0.1 * i) for i in range(20)])
    after = flat("x", [Score(str(i), 0.1 * i + 0.5) for i in range(1, 25)])
    found = figures.compare(after, before, {}, 0)
    assert found["difference"] == pytest.approx(0.5) and found["n"] == 19
    assert (found["wins"], found["losses"], found["ties"]) == (19, 0, 0)
    assert found["low"] == pytest.approx(0.5) and found["clear"]  # every resample has the same difference
    assert figures.compare(after, flat("x", []), {}, 0)["difference"] is None


# -- judgements --


def judgement(**changes) -> Judgement:
    base = Judgement("a/1", 0, "quality", JUDGE, State.OK, {"scores": {"quality_score": 4}, "reasoning": "é"}, "f00")
    return dataclasses.replace(base, **changes)


def test_judgements_are_read_as_written_and_the_last_one_counts(tmp_path):
    with judgements.Writer(tmp_path) as writer:
        writer.add(judgement(state=State.TRANSPORT, value=None, detail="time-out"))
        writer.add(judgement(metric="consistency", state=State.REFUSED, value=None))
        writer.add(judgement())
    found = judgements.read(tmp_path)
    assert found["a/1", 0, "quality", JUDGE] == judgement() and len(found) == 2


def test_a_cut_line_is_no_judgement_and_is_removed_before_writing(tmp_path):
    with judgements.Writer(tmp_path) as writer:
        writer.add(judgement())
    path = tmp_path / judgements.FILE
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert len(judgements.read(tmp_path)) == 1
        with judgements.Writer(tmp_path) as writer:
            writer.add(judgement(metric="other"))
        assert {address[2] for address in judgements.read(tmp_path)} == {"quality", "other"}
        path.write_bytes(whole)


def test_a_damaged_line_in_the_middle_is_told(tmp_path):
    with judgements.Writer(tmp_path) as writer:
        writer.add(judgement())
    path = tmp_path / judgements.FILE
    for damaged in (b"{}\n", b"nonsense\n", path.read_bytes().replace(b'"ok"', b'"fine"')):
        kept = path.read_bytes()
        path.write_bytes(damaged + kept)
        with pytest.raises(UserError):
            judgements.read(tmp_path)
        path.write_bytes(kept)


def test_two_processes_do_not_write_one_record(tmp_path):
    with judgements.Writer(tmp_path):
        with pytest.raises(UserError):
            judgements.Writer(tmp_path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    import errno

    with judgements.Writer(tmp_path) as writer:
        writer.add(judgement())

        class Full:
            def __init__(self, file):
                self._file = file

            def write(self, data):
                self._file.write(bytes(data)[:7])
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name):
                return getattr(self._file, name)

        monkeypatch.setattr(writer, "_file", Full(writer._file))
        with pytest.raises(UserError):
            writer.add(judgement(metric="lost"))
    assert (tmp_path / judgements.FILE).read_bytes().endswith(b"}\n")
    assert len(judgements.read(tmp_path)) == 1


# -- the run folder --


def run_of(data: dict[str, str], **more) -> dict:
    return {"schema": run_folder.SCHEMA, "benchmark": "wise", "model": "ours", "samples": 1, "data": data,
            "generation": {"seed": 0}, "rewriter": None, "seed": 0, "sanity": "passed",
            "judge": {"name": "scripted", "prompts": "abc", "date": "today"}, **more}  # fmt: skip


def test_changed_prompt_files_are_told_with_their_hashes(tmp_path):
    wise = registry.load("wise")
    load_items(wise, tmp_path / "data")
    before = datafiles.fingerprint(wise.prompt_files(tmp_path / "data"), tmp_path / "data")
    run_folder.claim(tmp_path, run_of(before))
    path = wise.prompt_files(tmp_path / "data")[0]
    path.write_text(path.read_text().replace("Prompt 1.", "Prompt one."))
    after = datafiles.fingerprint(wise.prompt_files(tmp_path / "data"), tmp_path / "data")
    with pytest.raises(UserError) as error:
        run_folder.claim(tmp_path, run_of(after))
    name = path.relative_to(tmp_path / "data").as_posix()
    assert before[name][:12] in str(error.value) and after[name][:12] in str(error.value)
    run_folder.claim(tmp_path, run_of(before, judge={"name": "another"}))  # the judge may change
    assert run_folder.read_run(tmp_path)["judge"] == {"name": "another"}
    with pytest.raises(UserError):
        run_folder.claim(tmp_path, run_of(before, samples=4))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError):
        run_folder.read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError):
        run_folder.read_run(tmp_path)


def test_answers_without_any_image_are_an_error_that_says_what_became_of_them(tmp_path):
    items = [Item(key, "p", "c") for key in ("a", "b")]
    run_folder.check_drawn(tmp_path, items, 1)  # no answers: images of another model may be there
    for item in items:
        run_folder.write_answer(tmp_path, item, AnswerRecord(item.key, 0, "invalid", 0, 640, error="It was cut."))
    with pytest.raises(UserError) as raised:
        run_folder.check_drawn(tmp_path, items, 1)
    assert "It was cut." in raised.value.what and "640" in raised.value.what
    run_folder.write_answer(tmp_path, items[1], AnswerRecord("b", 0, "direct", 1, 40))
    run_folder.check_drawn(tmp_path, items, 1)


def test_answers_are_there_or_not(tmp_path):
    item = Item("a/1", "p", "c")
    assert run_folder.read_answer(tmp_path, item, 0) is None
    record = AnswerRecord("a/1", 0, "reflection", 2, 99, content={"rounds": []})
    run_folder.write_answer(tmp_path, item, record)
    assert run_folder.read_answer(tmp_path, item, 0) == record
    (tmp_path / "answers/a/1/0/answer.json").write_text("{")
    with pytest.raises(UserError):
        run_folder.read_answer(tmp_path, item, 0)


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/./b", ""])
def test_keys_that_would_leave_the_folder_are_refused(key):
    with pytest.raises(UserError):
        Item(key, "p", "c")


# -- summary, tables, comparisons --


def wise_run(tmp_path, scores: dict[str, int | None], images=None):
    """The summary of a run of WISE's seven prompts with these judgements."""
    wise = registry.load("wise")
    items = load_items(wise, tmp_path / "data")
    for item in items:
        if images is None or item.key in images:
            save_png(tmp_path / "images" / f"{item.key}.png", picture(int(item.key)))
    found = run_folder.find_images(wise, tmp_path / "images", items, 1)
    records = Records()
    for key, score in scores.items():
        if score is None:
            records.add(key, "right", state=State.REFUSED)
        else:
            records.add(key, "right", score=score)
    return wise, items, records, found


ALL = {"1": 1, "2": 0, "401": 1, "568": 0, "701": 1, "801": 1, "901": 0}


def summarise(wise, items, records, found, **options):
    answers = [(item, AnswerRecord(item.key, 0, "direct" if n % 2 else "reflection", 1 + (n + 1) % 2, 10))
               for n, item in enumerate(items)]  # fmt: skip
    run = {**run_of({}), **options.pop("run", {})}
    return summary.summarise(wise, items, records.judged, records.all.values(), found, answers, run, **options)


def test_there_is_no_headline_below_full_coverage_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(type(registry.load("wise")), "count", 7)
    whole = summarise(*wise_run(tmp_path / "whole", ALL))
    assert whole["headline"] == {"strict": pytest.approx(0.56), "fixed": pytest.approx(0.56)}
    assert whole["reasons"] == [] and whole["states"]["ok"] == 7
    refused = summarise(*wise_run(tmp_path / "refused", {**ALL, "901": None}))
    assert refused["headline"] is None and len(refused["reasons"]) == 2  # a line for each mode
    assert refused["states"]["refused"] == 1
    assert refused["figures"]["Overall"]["fixed"]["coverage"] == {"prompts": [7, 7], "judgements": [6, 7]}
    asked = summarise(*wise_run(tmp_path / "asked", {**ALL, "901": None}), partial=True)
    assert asked["headline"]["fixed"] == pytest.approx((0.4 * 0.5 + 0.12 * 3) / 0.88)
    missing = summarise(*wise_run(tmp_path / "missing", ALL, images={"1", "2"}))
    assert missing["headline"] is None
    assert missing["figures"]["Overall"]["strict"]["coverage"]["prompts"] == [2, 7]
    unchecked = summarise(*wise_run(tmp_path / "unchecked", ALL), run={"sanity": "failed"})
    assert unchecked["headline"] is None


def test_part_of_the_published_prompts_gives_no_headline(tmp_path):
    found = summarise(*wise_run(tmp_path, ALL))
    assert found["headline"] is None and len(found["reasons"]) == 1 and "1000" in found["reasons"][0]


def test_images_an_answer_and_modes_by_category(tmp_path):
    found = summarise(*wise_run(tmp_path, ALL))["answers"]
    assert found["overall"]["images"]["value"] == pytest.approx(11 / 7)
    assert found["overall"]["modes"] == {"direct": 3 / 7, "reflection": 4 / 7}
    assert found["by_category"]["culture"]["modes"] == {"direct": 0.5, "reflection": 0.5}
    assert found["overall"]["tokens"]["value"] == 10


def test_tables_hold_the_published_rows_and_ours(tmp_path):
    found = summarise(*wise_run(tmp_path, ALL), partial=True)
    text = tables.markdown(found, 3)
    assert "| Emu3.5 | 0.633 |" in text and "| ours | 0.560 | 1.57 | scripted | this run |" in text
    assert "Not a full result" in text
    latex = tables.latex({**found, "run": {**found["run"], "model": "a_b & 50%"}}, 3)
    assert r"a\_b \& 50\%" in latex and latex.count(r"\\") == 3
    withheld = summarise(*wise_run(tmp_path / "other", {**ALL, "1": None}))
    assert "| ours | withheld |" in tables.markdown(withheld, 3)


def test_every_reference_row_names_its_source():
    for benchmark, rows in tables.REFERENCES.items():
        assert benchmark in registry.names()
        for name, value, images, source in rows:
            assert name and value > 0 and source and (images is None or images >= 1)


def test_runs_that_cannot_be_compared(tmp_path):
    first = run_of({"a.json": "1"})
    assert compare.obstacles(first, {**first, "judge": {**first["judge"], "date": "yesterday"}}) == []
    judges = ({**first["judge"], "name": "another"}, {**first["judge"], "prompts": "x"})
    others = ({"data": {"a.json": "2"}}, {"rewriter": "gpt"}, {"samples": 4}, *({"judge": judge} for judge in judges))
    for change in others:
        with pytest.raises(UserError):
            compare.check_comparable(first, {**first, **change})
        assert len(compare.check_comparable(first, {**first, **change}, force=True)) == 1
    with pytest.raises(UserError):
        compare.check_comparable(first, {**first, "benchmark": "kris"}, force=True)


def test_a_comparison_by_hand(tmp_path):
    wise, items, before, _ = wise_run(tmp_path / "a", ALL)
    _, _, after, _ = wise_run(tmp_path / "b", {"1": 1, "2": 1, "401": 0, "568": 1, "701": 1, "801": None, "901": 1})
    found = compare.compare(wise, items, before.judged, after.judged)
    overall = found["figures"]["fixed"]["Overall"]
    assert (overall["wins"], overall["losses"], overall["ties"], overall["n"]) == (3, 1, 2, 6)
    # Without prompt 801: before .4 x .5 + .12 x 2 = .44, after .4 + .12 x 3 = .76, both over .88.
    assert overall["difference"] == pytest.approx((0.76 - 0.44) / 0.88)
    assert overall["sign_test"] == 0.625
    assert found["wins"]["fixed"]["culture"] == [1, 0, 1] and found["wins"]["fixed"]["time"] == [0, 1, 0]
    assert found["items"]["fixed"]["2"] == 1


def test_own_prompts_replace_the_installed_ones_and_change_the_hash(tmp_path):
    wise = registry.load("wise")
    question = Question("right", Kind.SCORES, "wise_right", {"prompt": "A $5 note.", "explanation": "E."})
    assert "A $5 note." in prompts.render(question)
    (tmp_path / "wise_right.txt").write_text("Is it $prompt?")
    assert prompts.render(question, tmp_path) == "Is it A $5 note.?"
    assert prompts.digest(wise, tmp_path) != prompts.digest(wise)
    (tmp_path / "wise_right.txt").write_text("Is it $nothing?")
    prompts._template.cache_clear()
    with pytest.raises(UserError):
        prompts.render(question, tmp_path)


def test_no_image_at_all_is_told(tmp_path):
    wise = registry.load("wise")
    items = load_items(wise, tmp_path / "data")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError):
        run_folder.find_images(wise, tmp_path / "images", items, 1)
