"""Bad input of a benchmark run: one clear line, or a recorded state; nothing is counted twice, nothing is lost."""

from __future__ import annotations

import errno
import json
import shutil

import benchmark_fixtures as fixtures
import commands
import pytest
from benchmark_kills import questions_on_record
from benchmark_runs import Prepared, judging, summary_of
from judge_service import REFUSAL
from openai_service import Behaviour

from ivr_jax.evaluate.benchmarks import judgements
from ivr_jax.evaluate.benchmarks.interface import State

RIGHT = {"reasoning": "Seen.", "score": 1}


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    return Prepared("wise", tmp_path)


def complaint(prepared: Prepared, tmp_path, *more: str, **changes: str | None) -> str:
    """The one line that a command ends with; `changes` replaces flags by name, None leaves one out."""
    given = prepared.arguments("http://127.0.0.1:9/v1", tmp_path / "run")
    flags = dict(flag.partition("=")[::2] for flag in given)
    flags.update({"--" + name.replace("__", "."): value for name, value in changes.items()})
    given = {name: value for name, value in flags.items() if value is not None}
    words = [name if name == "--judge_only" else f"{name}={value}" for name, value in given.items()]
    return commands.run("evaluate", *words, *more).complaint


def states(workdir) -> dict[str, State]:
    return {address[0]: judgement.state for address, judgement in judgements.read(workdir).items()}


def test_flags_that_say_too_little_or_too_much(prepared, tmp_path):
    assert "nothing" in complaint(prepared, tmp_path, benchmark="nothing")
    assert "--data" in complaint(prepared, tmp_path, data=None)
    assert "--judge_only" in complaint(prepared, tmp_path, "--generate_only")
    assert "--answers" in complaint(prepared, tmp_path, judge_only=None)
    assert "--checkpoint" in complaint(prepared, tmp_path, judge_only=None, answers=None)
    assert "--figures" in complaint(prepared, tmp_path, figures="loose")
    assert "--retry" in complaint(prepared, tmp_path, retry="ok")
    assert "judge" in complaint(prepared, tmp_path, config__judge__model="")
    assert "detector" in complaint(prepared, tmp_path, detector="somewhere")
    assert "work" in complaint(prepared, tmp_path, workdir=None)
    assert "--compare" in commands.run("evaluate", "--compare", tmp_path).complaint


def test_a_missing_prompt_file_and_a_folder_of_another_benchmark(prepared, tmp_path):
    assert "data_verified" not in complaint(prepared, tmp_path, data=str(tmp_path / "nowhere"))
    fixtures.write_imgedit(tmp_path / "other")
    assert "WISE" in complaint(prepared, tmp_path, data=str(tmp_path / "other"))
    assert not (tmp_path / "run/judgements.jsonl").exists()


def test_a_changed_prompt_file_is_told_with_its_hash(prepared, tmp_path):
    with judging(lambda text, images: None) as (_, url):
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        path = next(prepared.data.rglob("natural*"))
        before = path.read_text()
        path.write_text(before.replace("Prompt 701.", "Prompt seven hundred and one."))
        told = prepared.judge(url, tmp_path / "run").complaint
        recorded = json.loads((tmp_path / "run/run.json").read_text())["data"]
        assert recorded[path.relative_to(prepared.data).as_posix()][:12] in told
        path.write_text(before)
        assert prepared.judge(url, tmp_path / "run").returncode == 0


def test_missing_reference_images_are_told_before_anything_is_asked(tmp_path):
    prepared = Prepared("kris", tmp_path)
    shutil.move(prepared.data / "physics/1.png", tmp_path / "kept.png")
    with judging() as (service, url):
        assert "physics/1.png" in prepared.judge(url, tmp_path / "run").complaint
        assert sum(service.log.answered.values()) == 0
        shutil.move(tmp_path / "kept.png", prepared.data / "physics/1.png")
        assert prepared.judge(url, tmp_path / "run").returncode == 0


def test_missing_images_are_a_state_and_are_judged_when_they_come(prepared, tmp_path):
    shutil.move(prepared.images / "801.png", tmp_path / "kept.png")
    with judging(lambda text, images: None) as (service, url):
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        made = summary_of(tmp_path / "run")
        assert states(tmp_path / "run")["801"] == State.NO_IMAGE and made["states"] == {
            "ok": 6, "refused": 0, "unparsable": 0, "transport": 0, "no_image": 1,
        }  # fmt: skip
        assert made["figures"]["Overall"]["fixed"]["coverage"] == {"prompts": [6, 7], "judgements": [6, 7]}
        asked = sum(service.log.answered.values())
        shutil.move(tmp_path / "kept.png", prepared.images / "801.png")
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        assert sum(service.log.answered.values()) == asked + 1
    assert summary_of(tmp_path / "run")["states"]["ok"] == 7


def test_no_image_at_all_and_two_images_for_a_prompt(prepared, tmp_path):
    shutil.copy(prepared.images / "1.png", prepared.images / "1.jpg")
    assert "1.jpg" in complaint(prepared, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(prepared, tmp_path, answers=str(tmp_path / "empty"))


BAD_REPLIES = {  # one an item; the others of WISE's seven prompts are answered well
    "1": ("I would rather not put a number on it.", State.UNPARSABLE),
    "2": ('{"reasoning": "x", "score": NaN}', State.UNPARSABLE),
    "401": ({"reasoning": "x", "score": 7}, State.UNPARSABLE),
    "568": ({"reasoning": "x", "score": "8/10"}, State.UNPARSABLE),
    "701": ("", State.UNPARSABLE),
    "801": (REFUSAL, State.REFUSED),
}


def test_a_judge_that_answers_something_else_leaves_a_state_and_no_number(prepared, tmp_path):
    script = prepared.script(lambda item, *_: BAD_REPLIES.get(item.key, (RIGHT, State.OK))[0])
    with judging(script) as (service, url):
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        found = {judgement.item: judgement for judgement in judgements.read(tmp_path / "run").values()}
        for key, (_, state) in BAD_REPLIES.items():
            assert found[key].state == state and found[key].value is None and found[key].detail
        made = summary_of(tmp_path / "run")
        assert made["states"] == {"ok": 1, "refused": 1, "unparsable": 5, "transport": 0, "no_image": 0}
        assert made["figures"]["space"]["strict"]["value"] is None and made["headline"] is None
        assert made["figures"]["Overall"]["fixed"]["value"] == 1  # over what was judged
        assert made["figures"]["Overall"]["fixed"]["coverage"]["judgements"] == [1, 7]
        asked = sum(service.log.answered.values())
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        assert sum(service.log.answered.values()) == asked  # what is known is not asked again
        service.script = prepared.script(lambda *_: RIGHT)
        assert prepared.judge(url, tmp_path / "run", "--retry=unparsable").returncode == 0
        assert summary_of(tmp_path / "run")["states"]["refused"] == 1
        assert prepared.judge(url, tmp_path / "run", "--retry=refused").returncode == 0
    assert summary_of(tmp_path / "run")["states"]["ok"] == 7


def test_an_error_inside_a_reply_with_status_200_is_a_fault_of_the_way(prepared, tmp_path):
    with judging(prepared.script(lambda *_: RIGHT)) as (service, url):
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        (tmp_path / "run/judgements.jsonl").unlink()
        shutil.rmtree(tmp_path / "run/judge_cache")
        service.behaviour.raw = b'{"error": {"message": "overloaded", "code": 529}}'
        done = prepared.judge(url, tmp_path / "run", "--skip_sanity", "--config.judge.breaker_failures=1000")
        assert done.returncode == 0, done
        made = summary_of(tmp_path / "run")
        assert made["states"]["transport"] == 7 and made["headline"] is None
        assert made["figures"]["Overall"]["fixed"]["value"] is None
        service.behaviour.raw = None
        assert prepared.judge(url, tmp_path / "run").returncode == 0  # asked again without being told to
    assert summary_of(tmp_path / "run")["states"]["ok"] == 7


def test_a_wrong_key_and_a_judge_that_fails_the_sanity_check_end_the_run(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "right-key")
    with judging(behaviour=Behaviour(key="another-key")) as (service, url):
        flags = [flag for flag in prepared.arguments(url, tmp_path / "run") if "key_variable" not in flag]
        done = commands.run("evaluate", *flags, "--config.judge.key_variable=JUDGE_KEY")
        assert "401" in done.complaint and "right-key" not in done.stdout + done.stderr
    with judging(lambda text, images: {"score": 1}) as (service, url):  # everything is true to this judge
        assert "sanity" in prepared.judge(url, tmp_path / "run").complaint
        assert not states(tmp_path / "run")
        assert prepared.judge(url, tmp_path / "run", "--skip_sanity").returncode == 0
    made = summary_of(tmp_path / "run")
    assert made["run"]["sanity"] == "skipped" and any("sanity" in reason for reason in made["reasons"])


def test_faults_on_the_way_do_not_change_the_summary(prepared, tmp_path):
    with judging() as (_, url):
        assert prepared.judge(url, tmp_path / "calm").returncode == 0
    faults = ("429", "503", "cut", "html", "prose", "empty")
    with judging(behaviour=Behaviour(fault_rate=0.4, faults=faults, seed=3)) as (_, url):
        more = ("--config.judge.tries=30", "--config.judge.breaker_failures=1000")
        assert prepared.judge(url, tmp_path / "rough", *more).returncode == 0
    calm, rough = summary_of(tmp_path / "calm"), summary_of(tmp_path / "rough")
    assert calm["figures"] == rough["figures"] and rough["states"]["ok"] == 7


def test_a_full_disk_is_one_line_and_the_run_goes_on_where_it_was(prepared, tmp_path, monkeypatch):
    written = 0
    write = judgements.Writer.add

    def full(self, judgement):
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, judgement)

    with judging() as (service, url):
        monkeypatch.setattr(judgements.Writer, "add", full)
        done = prepared.judge(url, tmp_path / "run")
        assert "full" in done.complaint and len(states(tmp_path / "run")) == 3
        monkeypatch.setattr(judgements.Writer, "add", write)
        known, asked = questions_on_record(tmp_path / "run"), service.log.answered.copy()
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        assert len(known) >= 3 and all(service.log.answered[question] == asked[question] for question in known)
    assert summary_of(tmp_path / "run")["states"]["ok"] == 7


def test_another_runs_folder_is_refused(prepared, tmp_path):
    with judging() as (_, url):
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        other = Prepared("imgedit", tmp_path / "other")
        assert "benchmark" in other.judge(url, tmp_path / "run").complaint
        assert "samples" in prepared.judge(url, tmp_path / "run", "--samples=2").complaint


def test_rewritten_prompts_name_known_items(prepared, tmp_path):
    path = tmp_path / "rewritten.json"
    path.write_text(json.dumps({"99999": "A plant."}))
    assert "rewritten.json" in complaint(prepared, tmp_path, rewritten=str(path))
    path.write_text("[]")
    assert "rewritten.json" in complaint(prepared, tmp_path, rewritten=str(path))
    with judging() as (_, url):
        path.write_text(json.dumps({"1": "A plant."}))
        assert prepared.judge(url, tmp_path / "run", f"--rewritten={path}").returncode == 0
    assert summary_of(tmp_path / "run")["run"]["rewriter"].startswith("rewritten.json#")


def test_changed_images_are_judged_again(prepared, tmp_path):
    with judging() as (service, url):
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        asked = sum(service.log.answered.values())
        shutil.copy(prepared.images / "1.png", prepared.images / "2.png")
        assert prepared.judge(url, tmp_path / "run").returncode == 0
        assert sum(service.log.answered.values()) == asked + 1
