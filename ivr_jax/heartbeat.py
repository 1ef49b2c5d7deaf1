"""What takes long without a progress of its own is said: on a progress bar, or in one line where there is none."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

SLOW = 5.0  # seconds


@contextlib.contextmanager
def announced(activity: str) -> Iterator[None]:
    """Writes `activity` to stderr once, if the block takes more than `SLOW` seconds."""
    timer = threading.Timer(SLOW, lambda: print(f"{activity} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Heartbeat:
    """Says on a progress bar what is being done and for how long, once it takes long.

    Args:
      bar: its text after the counts is replaced.
      activity: what is being done, "" where that is not known.
    """

    EVERY = 10.0  # seconds

    def __init__(self, bar: tqdm, activity: Callable[[], str] = str):
        self._bar, self._activity = bar, activity
        self._began, self._first, self._said = time.monotonic(), "", ""
        self._due = self._began + self.EVERY
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def begin(self, first: str) -> None:
        """Something begins; `first` is shown while its activity is not known."""
        self._began, self._first = time.monotonic(), first
        self._due = self._began + self.EVERY
        if self._said and self._bar.postfix == self._said:  # what was said of the thing before
            self._bar.set_postfix_str("", refresh=False)

    def _run(self) -> None:
        while not self._ended.wait(self.EVERY / 20):  # what begins between two looks is still spoken of in time
            now = time.monotonic()
            if now < self._due:
                continue
            self._due = now + self.EVERY
            words = self._activity() or self._first or "step"
            self._said = f"{words}, {now - self._began:.0f} s"
            self._bar.set_postfix_str(self._said)

    def __enter__(self) -> Heartbeat:
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
