"""A local folder that is copied to a bucket: how a command writes to gs:// or s3://.

`open_folder` takes the lock, makes the local folder equal to the bucket's, and gives it to the command, which works
there as on any disk.  A thread renews the lock and copies what has changed every `PUSH_SECONDS`; `push` does so at
once; closing does so for the last time.  The bucket shows one whole state after the other (see `manifest`).

What a kill costs: in the bucket, what was written since the last copy.  On the same machine nothing: the local folder
stays when a process dies, and the next one continues with it if nobody has written to the bucket since.

SQLite files are copied through SQLite's own backup, so that a copy made while one is written is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from ivr_jax import files
from ivr_jax.cloud import manifest
from ivr_jax.cloud.inputs import cache_folder, fetch
from ivr_jax.cloud.lease import LEASE, Lease, TakenOver
from ivr_jax.cloud.objects import SIDE, Changed, Objects
from ivr_jax.errors import UserError

PUSH_SECONDS = 60.0
_POLL = 0.2  # seconds between two looks at whether an awaited file is there
_NOTHING = b"nothing"  # no generation
_SCANS = 5  # tries at a folder that changes while it is read
_SMALL = 1 << 24  # bytes up to which a changed file is copied beside before it is hashed: it may be growing
_LEFT_OUT_SUFFIXES = ("-wal", "-shm", "-journal", ".partial")
_LEFT_OUT_PARTS = (".orbax-checkpoint-tmp", ".writing-")

_open: dict[Path, Mirror | Follower] = {}  # by local folder
_urls: dict[str, str] = {}  # of all local folders that were named so far


@dataclasses.dataclass(frozen=True)
class _Known:
    """A local file as it was last hashed: bytes, modification in ns, inode, SHA-256."""

    size: int
    modified: int
    inode: int
    sha256: str


def local_folder(url: str) -> Path:
    """The local folder of a URL; its last part is the URL's."""
    url = url.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cache_folder() / "written" / digest / url.rpartition("/")[2]
    _urls[str(folder)] = url
    return folder


def with_urls(text: str) -> str:
    """A message with the URLs of buckets in place of their local folders."""
    for folder, url in _urls.items():
        text = text.replace(folder, url)
    return text


def url_of(folder: str | os.PathLike[str]) -> str | None:
    """The URL of an open folder in a bucket, by its local folder; None for every other folder."""
    found = _open.get(Path(folder).absolute())
    return None if found is None else found.url


def mirror_of(folder: str | os.PathLike[str]) -> Mirror | None:
    """The open mirror whose local folder this is."""
    found = _open.get(Path(folder).absolute())
    return found if isinstance(found, Mirror) else None


def push(folder: str | os.PathLike[str]) -> None:
    """Copies a folder to its bucket now; nothing for one that is only local."""
    if (mirror := mirror_of(folder)) is not None:
        mirror.push()


def refresh(folder: str | os.PathLike[str]) -> None:
    """Copies what the writer of a followed folder has written; nothing for every other folder."""
    found = _open.get(Path(folder).absolute())
    if isinstance(found, Follower):
        found.refresh()


@contextlib.contextmanager
def open_folder(url: str, *, without: tuple[str, ...] = ()) -> Iterator[Path]:
    """The local folder of a URL, which is copied there until the block ends, however it ends.

    SIGTERM, which a machine sends that is taken away, ends it as Ctrl-C does, unless somebody else handles it.

    Args:
      url: gs://… or s3://….
      without: names of subfolders that are not copied.

    Raises:
      UserError: another process writes there, or the bucket cannot be used.
    """
    mirror = Mirror(url, without=without)
    mirror.start()
    try:
        with _sigterm_interrupts():
            yield mirror.folder
    except BaseException:
        try:
            mirror.close()
        except UserError as error:  # the block's own error is the one to be seen
            logging.warning("%s", error)
        raise
    mirror.close()
    print(f"{mirror.url}: copied, {mirror.count} files")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block, where nobody has a handler for it and this is the main thread."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Follower:
    """A copy of a folder that another process of the same run writes: on another machine, or its own local folder.

    Attributes:
      url: the folder in the bucket.
      folder: the local one.
    """

    def __init__(self, url: str):
        self.url, self.folder = url.rstrip("/"), local_folder(url)
        with files.writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        _open[self.folder] = self
        self.refresh()

    def refresh(self) -> None:
        """Copies what is missing or other here.  Raises UserError when the bucket cannot be read.

        Further files stay: records of this process's own.
        """
        try:
            lock = files.Lock(self.folder.parent)
        except UserError:  # the writer, or another follower, has the same local folder
            return
        with lock, files.writing(self.folder):
            objects = Objects(self.url)
            for _ in range(_SCANS):
                found = manifest.read(objects)
                entries = found.files if found else {}
                missing = {path: entry for path, entry in entries.items() if not _is_there(self.folder / path, entry)}
                try:
                    fetch(objects, missing, self.folder)
                except Changed:
                    continue
                self.folder.with_name(f"{self.folder.name}.state.json").unlink(missing_ok=True)
                return
            raise UserError(f"{self.url} changes while it is read.", "Start the run again.")

    def close(self) -> None:
        """The folder is followed no longer."""
        _open.pop(self.folder, None)


def _is_there(file: Path, entry: manifest.Entry) -> bool:
    return file.is_file() and file.stat().st_size == entry.size and manifest.sha256(file) == entry.sha256


class Mirror:
    """See the module.  Between `start` and `close` it holds the lock in the bucket and one on the local folder.

    Args:
      url: the folder in the bucket.
      without: subfolders that are not copied.
      lease: seconds without a sign of life after which another process may take over.
      every: seconds between two copies; `PUSH_SECONDS` by default.

    Attributes:
      folder: the local one.

    Raises:
      UserError: another process writes there, or the bucket cannot be used.
    """

    def __init__(self, url: str, *, without: tuple[str, ...] = (), lease: float = LEASE, every: float | None = None):
        self.url, self.folder = url.rstrip("/"), local_folder(url)
        self._without, self._every = without, PUSH_SECONDS if every is None else every
        self._objects = Objects(self.url)
        self._state = self.folder.with_name(f"{self.folder.name}.state.json")
        with files.writing(self.folder):
            if not self.folder.is_dir():  # an empty folder must not be taken for the state that it had
                self._state.unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self._local_lock = self._lock_locally()
        try:
            self._lease = Lease(self._objects, lease)
        except BaseException:
            self._local_lock.close()
            raise
        self._turn, self._ended = threading.RLock(), threading.Event()
        self._known: dict[str, _Known] = {}
        self._manifest = manifest.Manifest({}, b"")
        self._lost: TakenOver | None = None
        self._threads = [
            threading.Thread(target=self._repeat, args=(self._lease.renew, lease / 4), name="lease", daemon=True),
            threading.Thread(target=self._repeat, args=(self._push_in_turn, 0), name="bucket", daemon=True),
        ]
        self._awaited: Path | None = None

    def _lock_locally(self) -> files.Lock:
        try:
            return files.Lock(self.folder.parent)
        except UserError:
            raise files.in_use(self.url) from None

    def start(self) -> None:
        """Makes the local folder equal to the bucket's, and begins to copy."""
        try:
            self._pull()
        except BaseException:
            self._lease.release()
            self._local_lock.close()
            raise
        _open[self.folder] = self
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raises TakenOver when another process writes to the folder now."""
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Copies for the last time and gives the lock back.  Raises UserError when that is not possible."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        _open.pop(self.folder, None)
        try:
            self.push()
            self._lease.release()
        except UserError as error:
            raise UserError(f"{error.what} What was written since the last copy is kept on this machine.",
                            "The same command resumes with it here.") from error
        finally:
            self._local_lock.close()

    def push_once_there(self, path: Path) -> None:
        """Lets the thread copy as soon as `path` is there: a checkpoint, which gets its name when it is complete."""
        self._awaited = path

    def _push_in_turn(self) -> None:
        until = time.monotonic() + self._every
        while time.monotonic() < until and not self._ended.is_set():
            awaited = self._awaited
            if awaited is not None and awaited.exists():
                self._awaited = None
                break
            self._ended.wait(_POLL)
        if not self._ended.is_set():
            self.push()

    def _repeat(self, act: Callable[[], None], seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                act()
            except TakenOver as error:
                self._lost = error
                return
            except (UserError, OSError) as error:  # tried again
                logging.warning("%s", error)
                self._ended.wait(_POLL)

    @property
    def count(self) -> int:
        """Files in the bucket."""
        return len(self._manifest.files)

    # From the local folder to the bucket

    def push(self) -> None:
        """Copies what has changed, as one step.  Raises UserError when the bucket cannot be written to."""
        self.check()
        with self._turn:
            for _ in range(_SCANS):
                try:
                    return self._push()
                except FileNotFoundError:  # removed or changed between the listing and the copy
                    continue
            raise UserError(f"{self.folder} changes faster than it can be copied.", "Copy it when the command ended.")

    def _push(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as snapshots:
            sources = self._scan(Path(snapshots))
            before = self._manifest.files
            entries, renamed = {}, {}
            for path, (file, known) in sources.items():
                old = before.get(path)
                if old is None:
                    entries[path] = manifest.Entry(known.size, known.sha256, path)
                    continue
                changed = old.sha256 != known.sha256
                name = manifest.NEW + known.sha256 if changed else old.object
                entries[path] = manifest.Entry(known.size, known.sha256, name)
                if name != path:
                    renamed[path] = file
            if entries == before and not renamed:
                return
            fresh = [path for path in sorted(entries) if entries[path] != before.get(path)]
            self._objects.upload({entries[path].object: sources[path][0] for path in fresh})
            self._check_unchanged({sources[path] for path in fresh})
            self._write_manifest(entries)
            if renamed:
                self._objects.upload(renamed)
                self._write_manifest({path: dataclasses.replace(e, object=path) for path, e in entries.items()})
            gone = [path for path in before if path not in entries]
            for name in (*gone, *self._objects.names(manifest.NEW)):
                self._objects.write(name, None)

    def _write_manifest(self, entries: dict[str, manifest.Entry]) -> None:
        self._lease.renew()
        self._manifest = manifest.write(self._objects, entries, self._manifest.generation)
        known = {path: dataclasses.asdict(known) for path, known in self._known.items()}
        files.write_json(self._state, {"generation": self._manifest.generation.hex(), "known": known})

    def _check_unchanged(self, sources: set[tuple[Path, _Known]]) -> None:
        """Raises FileNotFoundError when a large file, which is not copied beside first, is not what was hashed."""
        for file, known in sources:
            stat = file.stat()
            if known.size > _SMALL and (stat.st_size, stat.st_mtime_ns) != (known.size, known.modified):
                raise FileNotFoundError(file)

    def _scan(self, snapshots: Path) -> dict[str, tuple[Path, _Known]]:
        """The files to be copied by path: where each can be read, and its hash.

        SQLite files come first: what they refer to was there before they were, and is in the later listing.
        """
        found: dict[str, tuple[Path, _Known]] = {}
        numbers = itertools.count()
        for path in [path for path in self._listing() if path.endswith(".sqlite")]:
            copy = snapshots / str(next(numbers))
            _back_up(self.folder / path, copy)
            found[path] = copy, _Known(copy.stat().st_size, 0, 0, manifest.sha256(copy))
        for path in self._listing():
            if path in found:
                continue
            file = self.folder / path
            stat, known = file.stat(), self._known.get(path)
            stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if known is None or (known.size, known.modified, known.inode) != stamp:
                if stat.st_size <= _SMALL:
                    file = Path(shutil.copyfile(file, snapshots / str(next(numbers))))
                known = _Known(*stamp, manifest.sha256(file))
                if file.stat().st_size != stat.st_size:  # it grew: what was copied is sent, and looked at again
                    known = dataclasses.replace(known, size=file.stat().st_size, modified=0)
                self._known[path] = known
            found[path] = file, known
        self._known = {path: known for path, known in self._known.items() if path in found}
        return found

    def _listing(self) -> Iterator[str]:
        for root, folders, names in os.walk(self.folder):
            inside = Path(root).relative_to(self.folder)
            folders[:] = [f for f in sorted(folders) if _is_kept(f) and (inside / f).as_posix() not in self._without]
            yield from ((inside / name).as_posix() for name in sorted(names) if _is_kept(name))

    # From the bucket to the local folder

    def _pull(self) -> None:
        """Makes the local folder what the bucket holds, unless the last run here wrote exactly that: then it is newer.

        What other tools put into the bucket is taken over when there is no manifest.
        """
        found = manifest.read(self._objects)
        self._manifest = found or manifest.Manifest({}, manifest.absent(self._objects))
        if self._last_copied() == (found.generation if found else b""):
            return
        entries = dict(found.files) if found else {
            name: manifest.Entry(-1, "", name)
            for name in self._objects.names()
            if name.split("/")[0] not in (SIDE, *self._without) and not name.endswith("/")
        }
        self._known = {}
        with files.writing(self.folder):
            self._state.unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        try:
            fetch(self._objects, entries, self.folder)
        except Changed as error:
            raise UserError(f"{self.url} is damaged: {error} is not what its manifest says.",
                            "Restore the object, or name another folder.") from error

    def _last_copied(self) -> bytes:
        """The manifest's generation at the last copy from here; b"" when a run left files before the first one."""
        try:
            value = json.loads(self._state.read_text())
            self._known = {path: _Known(**known) for path, known in value["known"].items()}
            return bytes.fromhex(value["generation"])
        except (OSError, ValueError, KeyError, TypeError):
            return b"" if any(self.folder.iterdir()) else _NOTHING


def _is_kept(name: str) -> bool:
    return name != SIDE and not name.endswith(_LEFT_OUT_SUFFIXES) and not any(part in name for part in _LEFT_OUT_PARTS)


def _back_up(source: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(source)) as database, contextlib.closing(sqlite3.connect(target)) as copy:
        database.backup(copy)
