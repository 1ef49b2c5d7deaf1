"""What takes long is said: on a bar that nothing advances, or in one line."""

from __future__ import annotations

import time
import types
from unittest import mock

from tqdm import tqdm

from ivr_jax import heartbeat as heartbeats
from ivr_jax.heartbeat import Heartbeat, announced


def test_it_speaks_once_something_takes_long_and_stops_with_its_block(monkeypatch, capsys):
    monkeypatch.setattr(Heartbeat, "EVERY", 0.05)
    bar = mock.Mock(wraps=tqdm(total=1), disable=False)
    with Heartbeat(bar) as heartbeat:
        heartbeat.begin("compiling")
        while not bar.set_postfix_str.called:
            time.sleep(0.01)
    said = [call.args[0] for call in bar.set_postfix_str.call_args_list]
    assert all(words.startswith("compiling, ") for words in said)
    time.sleep(0.12)
    assert bar.set_postfix_str.call_count == len(said)


def test_what_is_known_goes_before_what_was_said_first(monkeypatch):
    monkeypatch.setattr(Heartbeat, "EVERY", 0.05)
    bar = mock.Mock(disable=False)
    with Heartbeat(bar, lambda: "judging") as heartbeat:
        heartbeat.begin("compiling")
        while not bar.set_postfix_str.called:
            time.sleep(0.01)
    assert bar.set_postfix_str.call_args.args[0].startswith("judging, ")


def test_what_begins_next_takes_back_what_was_said_and_leaves_other_words(monkeypatch):
    monkeypatch.setattr(Heartbeat, "EVERY", 0.05)
    with tqdm(total=1) as bar, Heartbeat(bar) as heartbeat:
        heartbeat.begin("compiling")
        while not bar.postfix:
            time.sleep(0.01)
        monkeypatch.setattr(Heartbeat, "EVERY", 1000.0)
        heartbeat.begin("drawing")
        assert bar.postfix == ""
        bar.set_postfix_str("loss 1")
        heartbeat.begin("drawing")
        assert bar.postfix == "loss 1"


def test_what_begins_late_is_spoken_of_as_soon_as_it_has_taken_long(monkeypatch):
    """One second after its own begin, wherever the heartbeat's last look was; the clock is the test's."""
    clock = [0.0]
    monkeypatch.setattr(Heartbeat, "EVERY", 1.0)
    monkeypatch.setattr("ivr_jax.heartbeat.time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    bar = mock.Mock(disable=False)
    with Heartbeat(bar) as heartbeat:
        clock[0] = 0.9
        heartbeat.begin("compiling")
        clock[0] = 1.8
        time.sleep(0.2)  # several looks
        assert not bar.set_postfix_str.called
        clock[0] = 1.95
        while not bar.set_postfix_str.called:
            time.sleep(0.01)
    assert bar.set_postfix_str.call_args.args[0] == "compiling, 1 s"


def test_a_slow_block_is_announced_once_and_a_quick_one_never(monkeypatch, capsys):
    with announced("quick"):
        pass
    monkeypatch.setattr(heartbeats, "SLOW", 0.01)
    said = ""
    with announced("reading x"):
        while not said:
            time.sleep(0.01)
            said = capsys.readouterr().err
    time.sleep(0.05)
    assert said.splitlines() == ["reading x ..."] and capsys.readouterr().err == ""
