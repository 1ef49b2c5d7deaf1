"""One writer at a time: locks that are held, given back, lost, and left by the dead; clocks that are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from ivr_jax.cloud import lease
from ivr_jax.cloud.lease import NAME, Lease, TakenOver
from ivr_jax.cloud.objects import Objects
from ivr_jax.errors import UserError

SECONDS = 1.0


def elsewhere(content: bytes) -> bytes:
    """The same lock, of a process on another machine, whose clock is a year ahead."""
    return json.dumps(json.loads(content) | {"machine": "another", "time": time.time() + 3e7}).encode()


def test_a_lock_that_is_renewed_is_respected_and_one_that_is_given_back_is_free(bucket):
    here = Objects(f"{bucket}/held")
    first = Lease(here, SECONDS)
    with pytest.raises(UserError):  # this process is alive, and renews while the other one watches
        with renewing(first):
            Lease(here, SECONDS)
    first.renew()
    first.release()
    assert here.read(NAME)[0] is None
    Lease(here, SECONDS).release()


def test_a_bucket_that_is_not_there_is_no_other_writer(bucket):
    scheme = bucket.partition("://")[0]
    with pytest.raises(UserError) as error:
        Lease(Objects(f"{scheme}://nosuchbucket/held"), SECONDS)
    assert "nosuchbucket" in error.value.what and error.value.what != lease.in_use(f"{scheme}://nosuchbucket/held").what


class renewing:
    """Renews a lease in a thread."""

    def __init__(self, held: Lease):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(held,))

    def _run(self, held: Lease) -> None:
        while not self._ended.wait(SECONDS / 5):
            held.renew()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_a_lock_without_a_sign_of_life_is_taken_over_whatever_its_clock_says(bucket, capsys):
    here = Objects(f"{bucket}/stale")
    first = Lease(here, SECONDS)
    here.write(NAME, elsewhere(here.read(NAME)[0]))
    began = time.monotonic()
    second = Lease(here, SECONDS)
    assert SECONDS <= time.monotonic() - began < 10 * SECONDS and here.url in capsys.readouterr().err
    with pytest.raises(TakenOver):
        first.renew()
    first.release()  # does not take the second's
    second.renew()
    second.release()


def test_the_lock_of_a_process_of_this_machine_that_was_killed_is_not_waited_for(bucket):
    here = Objects(f"{bucket}/dead")
    Lease(here, SECONDS)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here.write(NAME, json.dumps(json.loads(here.read(NAME)[0]) | {"process": ended.pid}).encode())
    began = time.monotonic()
    Lease(here, 60.0).release()
    assert time.monotonic() - began < 30


def test_of_two_that_take_a_lock_at_once_one_gets_it(bucket, monkeypatch):
    here = Objects(f"{bucket}/race")
    _, none = here.read(NAME)
    Lease(here, SECONDS)
    monkeypatch.setattr(Objects, "read", lambda *_, **__: (None, none))  # what both had seen
    monkeypatch.setattr(lease, "_has_ended", lambda _: False)
    with pytest.raises(UserError):
        Lease(here, SECONDS)
