"""Alarms go on and off where they should, the limit of missing judgements stops the run, and all of it is resumed."""

from __future__ import annotations

import json
import logging
import types

import pytest

from ivr_jax.data.pipeline import Indexed
from ivr_jax.errors import UserError
from ivr_jax.training.monitor import ALARMS, Monitor, MonitorOptions
from ivr_jax.training.prompts import PromptIterator, SameSize, Tasks
from ivr_jax.training.scoring import calibration

MODES = ("direct", "reflection", "multi_step")
OPTIONS = MonitorOptions(window=3, missing_window=8)


def healthy(**changes) -> dict:
    row = {
        "frac_groups_nonzero_std": (3.0, 4.0), "grad_norm": (0.5, 1.0), "pass_given_wrong": (1.0, 10.0),
        "mode_direct": (5.0, 8.0), "mode_reflection": (2.0, 8.0), "mode_multi_step": (1.0, 8.0),
    }  # fmt: skip
    return row | changes


BROKEN = {
    "zero_variance": healthy(frac_groups_nonzero_std=(0.0, 4.0)),
    "zero_gradient": healthy(grad_norm=(0.0, 1.0)),
    "mode_collapse": healthy(mode_direct=(8.0, 8.0), mode_reflection=(0.0, 8.0), mode_multi_step=(0.0, 8.0)),
    "calibration_drift": healthy(pass_given_wrong=(9.0, 10.0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_alarm_goes_on_and_off_again_and_no_other_does(name, caplog):
    watch = Monitor(OPTIONS, MODES)
    with caplog.at_level(logging.WARNING, logger="absl"):
        seen = [watch.observe(step, healthy()) for step in range(1, 5)]
        assert not any(value for row in seen for value in row.values()) and not caplog.records
        for step in range(5, 8):
            row = watch.observe(step, BROKEN[name])
        assert row == {f"alarm_{other}": float(other == name) for other in ALARMS}
        assert sum(f"ALARM {name}" in record.getMessage() for record in caplog.records) == 1
        for step in range(8, 12):
            row = watch.observe(step, healthy())
        assert not any(row.values())
        assert f"alarm {name} is over" in caplog.text


def test_that_every_answer_is_cut_is_told_at_the_first_step():
    watch = Monitor(OPTIONS, MODES)
    assert watch.observe(1, healthy(truncated=(8.0, 8.0)))["alarm_truncation"] == 1.0
    assert watch.observe(2, healthy(truncated=(1.0, 8.0)))["alarm_truncation"] == 0.0
    assert Monitor(OPTIONS, MODES).observe(1, healthy(truncated=(7.0, 8.0)))["alarm_truncation"] == 0.0


def test_calibration_counts_every_image_that_was_judged():
    def said(*verdicts: str) -> types.SimpleNamespace:
        own = [types.SimpleNamespace(passed=verdict == "pass") for verdict in verdicts]
        rounds = [types.SimpleNamespace(evaluation=evaluation) for evaluation in own]
        return types.SimpleNamespace(trajectory=types.SimpleNamespace(rounds=rounds))

    def judged(*truth: bool | None) -> types.SimpleNamespace:
        return types.SimpleNamespace(truth=[None if t is None else types.SimpleNamespace(passed=t) for t in truth])

    rollout = types.SimpleNamespace(answers=[said("fail", "pass"), said("fail", "fail", "pass"), said("pass"), None])
    every = [judged(True, False), judged(False, None, True), judged(False), judged()]
    assert calibration(rollout, types.SimpleNamespace(judged=every)) == {
        "pass_given_right": (1.0, 2.0), "pass_given_wrong": (2.0, 3.0)}  # fmt: skip
    final = [judged(False), judged(True), judged(False), judged()]
    assert calibration(rollout, types.SimpleNamespace(judged=final)) == {
        "pass_given_right": (1.0, 1.0), "pass_given_wrong": (2.0, 2.0)}  # fmt: skip


def test_an_update_that_was_skipped_has_no_gradient():
    watch = Monitor(OPTIONS, MODES)
    row = healthy()
    del row["grad_norm"]
    for step in range(3):
        seen = watch.observe(step, row)
    assert seen["alarm_zero_gradient"] == 1


def test_one_mode_alone_is_no_collapse_where_no_other_is_allowed():
    watch = Monitor(OPTIONS, ("direct",))
    for step in range(3):
        seen = watch.observe(step, BROKEN["mode_collapse"])
    assert seen["alarm_mode_collapse"] == 0


def test_too_many_missing_judgements_stop_the_run_and_say_why():
    watch = Monitor(OPTIONS, MODES)
    watch.count_missing(4, 4, {"time-out": 4})  # fewer than the window: too early to tell
    watch.count_missing(0, 4, {})  # 4 of 8: the limit is not passed
    watch.count_missing(4, 4, {"time-out": 4})
    with pytest.raises(UserError, match="time-out"):
        watch.count_missing(4, 4, {"time-out": 4})


def test_old_misses_are_forgotten():
    watch = Monitor(OPTIONS, MODES)
    for missing in (4, 0, 0, 4, 0, 0, 4):
        watch.count_missing(missing, 4, {})


def test_a_resumed_watch_goes_on_as_if_undisturbed():
    rows = [healthy(), healthy(), BROKEN["calibration_drift"], BROKEN["calibration_drift"], healthy(), healthy()] * 2
    whole = Monitor(OPTIONS, MODES)
    expected = [whole.observe(step, row) for step, row in enumerate(rows)]
    for cut in range(len(rows)):
        first = Monitor(OPTIONS, MODES)
        seen = [first.observe(step, row) for step, row in enumerate(rows[:cut])]
        second = Monitor(OPTIONS, MODES)
        second.set_state(json.loads(json.dumps(first.get_state())))
        seen += [second.observe(step, row) for step, row in enumerate(rows[cut:], cut)]
        assert seen == expected


@pytest.mark.parametrize("wrong", [{"window": 0}, {"max_missing": 1.5}, {"missing_window": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        MonitorOptions(**wrong)


class Counting:
    """Batches [0, 1], [2, 3] ... with a position."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 2
        return [self.at - 2, self.at - 1]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_prompts_go_on_where_they_were_with_a_look_ahead_or_without(ahead):
    def fresh() -> PromptIterator:
        return PromptIterator(Counting(), Monitor(OPTIONS, MODES), ahead)

    def upcoming(k: int) -> tuple[tuple[int, int], ...]:
        return tuple((k + 2 * later, k + 2 * later + 1) for later in range(1, ahead + 1))

    expected = [Tasks((k, k + 1), upcoming(k)) for k in range(0, 10, 2)]
    whole = fresh()
    assert [next(whole) for _ in range(5)] == expected
    for cut in range(5):
        first, second = fresh(), fresh()
        seen = [next(first) for _ in range(cut)]
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert seen + [next(second) for _ in range(5 - cut)] == expected


def test_prompts_of_one_size_come_together_each_once_an_epoch_and_go_on_where_they_were():
    def fresh() -> SameSize:
        return SameSize(Indexed(lambda index: index, 12), 2, 0, lambda index: index % 3)

    whole = fresh()
    expected = [next(whole) for _ in range(12)]
    assert all(a % 3 == b % 3 for a, b in expected)
    assert sorted(sum(expected[:6], [])) == list(range(12))  # 4 of each size: nothing is left over
    for cut in range(12):
        first, second = fresh(), fresh()
        seen = [next(first) for _ in range(cut)]
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert seen + [next(second) for _ in range(12 - cut)] == expected
