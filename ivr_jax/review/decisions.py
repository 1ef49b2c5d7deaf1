"""Review decisions in SQLite: every one is on disk before the page says so, and none is ever overwritten.

The table `decisions` only grows.  Of each reviewer and sample the latest row that is not undone stands; undoing marks
the reviewer's latest decision, so the one before it stands again.  WAL and full synchronisation: a crash of the
program, or of the machine, loses nothing that was acknowledged.  The file belongs to one dataset (by its fingerprint)
and to two reviewers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ivr_jax.errors import UserError

VERDICTS = ("accept", "reject")
MAX_COMMENT = 2000  # characters

_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS decisions (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  request TEXT NOT NULL UNIQUE,
  reviewer TEXT NOT NULL,
  position INTEGER NOT NULL,
  key TEXT NOT NULL,
  verdict TEXT NOT NULL CHECK (verdict IN ('accept', 'reject')),
  comment TEXT NOT NULL,
  decided_at TEXT NOT NULL,
  undone INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS standing ON decisions (reviewer, undone, position, number);
"""
_STANDING = "number IN (SELECT MAX(number) FROM decisions WHERE undone = 0 GROUP BY reviewer, position)"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One verdict.

    Attributes:
      number: grows with time.
      reviewer: who.
      position, key: of which sample.
      verdict: "accept" or "reject".
      comment: free text, or "".
      decided_at: ISO 8601, UTC.
    """

    number: int
    reviewer: str
    position: int
    key: str
    verdict: str
    comment: str
    decided_at: str


class Decisions:
    """The decisions on one dataset; safe to share between threads, and between processes.

    Args:
      path: the SQLite file; made when missing.
      fingerprint: of the dataset that is judged.
      reviewers: the two names; empty takes those of an existing file.

    Raises:
      UserError: the names are not two different ones, the file is another dataset's or other reviewers', or it cannot
        be opened.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str, reviewers: Sequence[str] = ()):
        self.path = Path(path)
        names = tuple(name.strip() for name in reviewers)
        if names and (len(names) != 2 or len(set(names)) != 2 or not all(names)):
            raise UserError(
                f"{len(names)} reviewers were named: {', '.join(names)}.", "Name two people: --reviewers=ANA,BEN."
            )
        if not names and not self.path.exists():
            raise UserError("no reviewers were named.", "Name two people: --reviewers=ANA,BEN.")
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(self.path, timeout=10, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            with self._transaction() as connection:
                for statement in filter(str.strip, _TABLES.split(";")):
                    connection.execute(statement)
                self.reviewers = self._claim(connection, fingerprint, names)
        except sqlite3.Error as error:
            raise UserError(f"cannot use {self.path}: {error}.", "Name another file with --decisions=….") from error

    def decide(self, reviewer: str, position: int, key: str, verdict: str, comment: str, request: str) -> Decision:
        """Stores one decision and returns it once it is on disk.

        Args:
          request: names the attempt; the same one a second time (a retry) changes nothing and returns the first.

        Raises:
          UserError: an unknown reviewer or verdict, a comment that is too long, or a disk that cannot be written.
        """
        if reviewer not in self.reviewers:
            raise UserError(f"{reviewer!r} is no reviewer of {self.path}.", f"Those are {', '.join(self.reviewers)}.")
        if verdict not in VERDICTS:
            raise UserError(f"the verdict {verdict!r} is unknown.", f"Choose one of {', '.join(VERDICTS)}.")
        if len(comment) > MAX_COMMENT:
            raise UserError(f"the comment has {len(comment)} characters.", f"At most {MAX_COMMENT} are kept.")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO decisions (request, reviewer, position, key, verdict, comment, decided_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (request) DO NOTHING",
                (request, reviewer, position, key, verdict, comment, now),
            )
            row = connection.execute("SELECT * FROM decisions WHERE request = ?", (request,)).fetchone()
        return _decision(row)

    def undo(self, reviewer: str, number: int | None = None) -> Decision | None:
        """Takes back the reviewer's latest decision; returns it, or None when there is none.

        With `number`, only when that is the latest: undoing twice by a retry takes back one decision.
        """
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT * FROM decisions WHERE reviewer = ? AND undone = 0 ORDER BY number DESC LIMIT 1", (reviewer,)
            ).fetchone()
            if row is None or number not in (None, row["number"]):
                return None
            connection.execute("UPDATE decisions SET undone = 1 WHERE number = ?", (row["number"],))
        return _decision(row)

    def standing(self, reviewer: str | None = None) -> list[Decision]:
        """The decisions that count, by position; of one reviewer, or of both."""
        with self._lock:
            rows = self._connection.execute(
                f"SELECT * FROM decisions WHERE {_STANDING} AND (? IS NULL OR reviewer = ?) ORDER BY position, number",
                (reviewer, reviewer),
            ).fetchall()
        return [_decision(row) for row in rows]

    def at(self, reviewer: str, position: int) -> Decision | None:
        """The reviewer's standing decision on one sample."""
        with self._lock:
            row = self._connection.execute(
                "SELECT * FROM decisions WHERE reviewer = ? AND undone = 0 AND position = ?"
                " ORDER BY number DESC LIMIT 1",
                (reviewer, position),
            ).fetchone()
        return None if row is None else _decision(row)

    def latest(self, reviewer: str) -> Decision | None:
        """What `undo` would take back."""
        with self._lock:
            row = self._connection.execute(
                "SELECT * FROM decisions WHERE reviewer = ? AND undone = 0 ORDER BY number DESC LIMIT 1", (reviewer,)
            ).fetchone()
        return None if row is None else _decision(row)

    def close(self) -> None:
        """Closes the database."""
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, on disk when the block ends, or nothing of it."""
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise UserError(f"cannot write {self.path}: {error}.", "Make room on the disk, and try again.") \
                        from error
                raise

    def _claim(self, connection: sqlite3.Connection, fingerprint: str, names: tuple[str, ...]) -> tuple[str, ...]:
        about = dict(connection.execute("SELECT name, value FROM about").fetchall())
        if not about:
            about = {"dataset": fingerprint, "reviewer 1": names[0] if names else "", "reviewer 2": (*names, "", "")[1]}
            connection.executemany("INSERT INTO about VALUES (?, ?)", about.items())
        if about.get("dataset") != fingerprint:
            raise UserError(
                f"{self.path} holds decisions on another dataset, or on an earlier state of this one.",
                "Restore that dataset, or name another file with --decisions=….",
            )
        stored = (about["reviewer 1"], about["reviewer 2"])
        if names and set(names) != set(stored):
            raise UserError(f"{self.path} belongs to {stored[0]} and {stored[1]}.",
                            "Leave out --reviewers, or name another file with --decisions=….")
        return stored


def _decision(row: sqlite3.Row) -> Decision:
    return Decision(*(row[field.name] for field in dataclasses.fields(Decision)))
