"""Files and folders that appear whole or not at all, and locks between processes.

What a crash leaves, everywhere in this program:

* A file or folder is written under a hidden name beside its place and renamed when it is complete.  Whoever reads sees
  the old content or the new, never a part, also after `kill -9` or on a full disk.
* An exception removes the hidden file or folder.  A killed process leaves it: `.writing-…` files are ignored by every
  reader, `.NAME.partial` folders are emptied by the next writer of NAME.
* `overwrite=True` renames twice: a process killed between the two leaves the earlier folder as `.NAME.old`, and the
  next writer of NAME renames it back first.
* Renaming orders what other processes see, not what survives a power failure: only `durable` files are flushed to the
  disk (fsync) before they get their name.

Modes follow the umask, as those of files that are simply opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from ivr_jax.errors import UserError


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}.", "Make room, or name a place that you may write to."
        ) from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block succeeds, and replaces an earlier one.

    Args:
      path: its folder is made when missing.
      durable: whether the content is on the disk before the file gets its name.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(path)
    hidden = path.with_name(f".writing-{os.getpid()}-{secrets.token_hex(4)}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(hidden, "xb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise


def write_file(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file whole or not at all; a text is written as UTF-8.  Raises UserError as `new_file`."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_file` of a JSON value.  Raises TypeError or ValueError for what is none, NaN included."""
    write_file(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 or UTF-32 (PowerShell writes it).

    Raises OSError, or ValueError for another encoding.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save the file in that encoding") from None


def parse_json(text: str, what: str, remedy: str = "Correct it.") -> Any:
    """A JSON value; `what` names it in errors.

    Raises:
      UserError: it is none, however deep or odd it is, or an object has a key twice, of which others take the last.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "too many levels" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise UserError(f"{what} is not JSON ({reason}).", remedy) from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict, for `json.loads(object_pairs_hook=)`.  Raises ValueError for a repeated key."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the key {next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))!r} stands twice")
    return value


def read_json(path: str | os.PathLike[str], remedy: str = "Correct the file.") -> Any:
    """The JSON value in a file.  Raises UserError when it cannot be read or is none; FileNotFoundError stays one."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.", remedy) from error
    return parse_json(text, str(path), remedy)


def read_json_object(
    path: str | os.PathLike[str], remedy: str = "Correct the file.", schema: str = ""
) -> dict[str, Any]:
    """The JSON object in a file; with a `schema`, one whose field "schema" has that value.

    Raises:
      UserError: the file is missing, cannot be read, or holds anything else.
    """
    try:
        value = read_json(path, remedy)
    except FileNotFoundError:
        raise UserError(f"there is no {path}.", remedy) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.", remedy)
    if schema and value.get("schema") != schema:
        raise UserError(f"{path} is not of schema {schema}.", remedy)
    return value


def read_json_lines(path: str | os.PathLike[str], remedy: str = "Correct the file.") -> Iterator[tuple[str, Any]]:
    """The JSON values of a file with one a line, each after the words that name its line; blank lines are left out.

    Lines end at "\\n" or "\\r\\n" alone: a text may contain other line separators.

    Raises:
      UserError: the file cannot be read, or, when its turn comes, a line is not JSON.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.", remedy) from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, remedy)


def written_path(root: str | os.PathLike[str], written: str) -> Path:
    """The path that a file of the user's names, from `root`; one that was written on Windows is found here as well.

    `images\\cat.png` is `images/cat.png`; where there is none, as for `C:\\data\\cat.png`, it is `cat.png` in `root`.
    """
    plain, windows = Path(root) / written, PureWindowsPath(written)
    if is_file(plain):
        return plain
    if "\\" in written or windows.drive:
        below = Path(root, *windows.parts[bool(windows.anchor) :])
        by_name = Path(root) / windows.name
        return below if is_file(below) or not is_file(by_name) else by_name
    forms = (Path(root) / unicodedata.normalize(form, written) for form in ("NFC", "NFD"))  # macOS takes letters apart
    return next((path for path in forms if is_file(path)), plain)


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class Lock:
    """The operating system's exclusive lock on an existing file or folder, until `close` or the end of the process.

    A file system without locks gives none.

    Raises:
      UserError: another process has it, or the path cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = path
        with writing(path):
            self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise in_use(path) from None
        except OSError:
            pass

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether `path` still names what was locked."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InUse(UserError):
    """Another process is writing there; it may end."""


def in_use(path: str | os.PathLike[str]) -> InUse:
    """The error that says that another process holds the lock of `path`."""
    return InUse(f"another process is writing to {path}.", "Wait for it, stop it, or name another place.")


class NewFolder:
    """A folder that takes its name when it is complete.  As a context manager it gives `partial`, and publishes it.

    Args:
      path: the folder to make.
      overwrite: whether an earlier folder with content is replaced, when the new one is complete.

    Attributes:
      partial: the hidden folder to write into, empty; one process at a time has it.

    Raises:
      UserError: `path` is a file, has content already, is being written by another process, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False):
        self.path = Path(os.path.abspath(path))
        self.partial = partial_folder(path)
        self._old, self._open = self.path.with_name(f".{self.path.name}.old"), False
        if self._old.exists():
            with writing(self.path):
                shutil.rmtree(self._old) if self.path.exists() else self._old.rename(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file.", "Name a folder that does not exist yet.")
        if not overwrite and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} exists and is not empty.", "Name another folder, or remove this one first.")
        self._overwrite = overwrite
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        with writing(self.path):
            self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.partial)
        if not self._lock.holds(self.partial):  # its earlier writer has just published it
            self._lock.close()
            raise in_use(self.path)
        self._open = True
        for stale in self.partial.iterdir():
            shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()

    def publish(self) -> None:
        """Gives the folder its name.  Raises UserError when that is not possible; what is there stays then."""
        try:
            with writing(self.path):
                if self._overwrite and self.path.is_dir():
                    self.path.rename(self._old)
                try:
                    self.partial.rename(self.path)
                except OSError:
                    if self._old.exists():
                        self._old.rename(self.path)
                    raise
        finally:
            self.abandon()
        shutil.rmtree(self._old, ignore_errors=True)

    def abandon(self) -> None:
        """Removes what was written, and the folders that were made around it; nothing after `publish`."""
        if not self._open:
            return
        self._open = False
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # in use, or gone
                folder.rmdir()
        self._lock.close()

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.publish()
            return
        self.abandon()
        if isinstance(error, OSError):
            with writing(self.path):
                raise error


def partial_folder(path: str | os.PathLike[str]) -> Path:
    """The hidden folder in which the folder `path` is written, for further processes that write into it."""
    final = Path(os.path.abspath(path))
    return final.with_name(f".{final.name}.partial")
