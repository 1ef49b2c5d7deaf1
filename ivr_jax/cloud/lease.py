"""One writer at a time to a folder in a bucket: an object that its holder rewrites again and again.

Clocks are never compared: whoever finds a lock watches it by the own monotonic clock, and takes it over when its
generation has not changed for `LEASE` seconds.  A process of the same machine that has ended is not waited for.
Taking, renewing and giving back are conditional writes, so that of two at once one succeeds.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from ivr_jax.cloud.objects import SIDE, Objects
from ivr_jax.errors import UserError
from ivr_jax.files import in_use

LEASE = 60.0  # seconds without a renewal after which a lock is no longer respected
NAME = f"{SIDE}/lock.json"


class TakenOver(UserError):
    """Another process writes to the folder now."""


class Lease:
    """The lock of a folder in a bucket, until `release` or until it is not renewed for `seconds`.

    Raises:
      UserError: another process has it, or the bucket cannot be written to.
    """

    def __init__(self, objects: Objects, seconds: float = LEASE):
        self._objects, self.seconds = objects, seconds
        self._owner, self._count = secrets.token_hex(8), 0
        self._generation: bytes | None = None
        self._turn = threading.Lock()
        found, generation = objects.read(NAME)
        if found is not None and not _has_ended(found):
            generation = self._watch(generation)
        self._generation = objects.write(NAME, self._content(), expected=generation)
        if self._generation is None:
            objects.names(NAME)  # S3 takes a conditional write into no bucket for a conflict; this raises
            raise in_use(objects.url)

    def _watch(self, generation: bytes) -> bytes:
        """The generation to replace, when the lock's holder gives no sign of life for a lease or gives it back."""
        print(f"{self._objects.url} has a lock; seeing for {self.seconds:.0f} s whether its holder is alive.",
              file=sys.stderr)
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(self.seconds / 20)
            found, now = self._objects.read(NAME, unless=generation)
            if now != generation:
                if found is not None:
                    raise in_use(self._objects.url)
                return now
        return generation

    def _content(self) -> bytes:
        self._count += 1
        about = {"owner": self._owner, "renewed": self._count, "machine": _machine(), "process": os.getpid()}
        return json.dumps(about).encode()

    def renew(self) -> None:
        """Proves that the holder is alive.  Raises TakenOver when the lock was lost meanwhile."""
        with self._turn:
            if self._generation is not None:
                self._generation = self._objects.write(NAME, self._content(), expected=self._generation)
            if self._generation is None:
                raise TakenOver(f"another process has taken over {self._objects.url}.",
                                f"This one did not reach the bucket for {self.seconds:.0f} s; it must stop.")

    def release(self) -> None:
        """Gives the lock back, if it is still held."""
        with self._turn:
            if self._generation is not None:
                self._objects.write(NAME, None, expected=self._generation)
                self._generation = None


def _machine() -> str:
    """This host since it was started, and its process ids' namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_ended(content: bytes) -> bool:
    """Whether a lock's holder was a process of this machine that runs no more."""
    try:
        about = json.loads(content)
        machine, process = about["machine"], int(about["process"])
    except (ValueError, KeyError, TypeError):
        return False
    if not machine or machine != _machine():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
