"""SIGTERM is answered while a step runs, although Python's own handlers wait for its end."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time

from ivr_jax.training import loop


def test_the_answer_does_not_wait_for_the_end_of_a_compiled_program(monkeypatch):
    said: list[tuple[float, str]] = []
    write = os.write

    def noted(descriptor: int, content: bytes) -> int:
        if descriptor != 2:
            return write(descriptor, content)
        said.append((time.monotonic(), content.decode()))
        return len(content)

    monkeypatch.setattr(os, "write", noted)
    before = signal.getsignal(signal.SIGTERM)
    with loop._Preemption("rl") as preempted:
        preempted._began -= 30.0  # what the first step took
        assert not preempted(1)
        stop = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        stop.start()
        for _ in range(20):  # each a call into C that lets other threads run, as a compiled program does
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2_000_000)
            ended = time.monotonic()
            if not stop.is_alive():
                break
        assert preempted(2)
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
    (when, text), = said
    assert when < ended and re.search(r"rl: .*about (2\d|30) s", text)
