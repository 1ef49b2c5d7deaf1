"""Objects in a bucket, through TensorStore's drivers for Google Cloud Storage and S3.

TensorStore finds credentials as Google's and Amazon's own tools do.  Two variables name another server, an emulator
for example: TENSORSTORE_GCS_HTTP_URL (with STORAGE_EMULATOR_HOST for what goes through fsspec) and AWS_ENDPOINT_URL.

A conditional write replaces an object only if it is still the generation that was seen (GCS: ifGenerationMatch; S3:
If-Match and If-None-Match): locks and manifests rest on it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ivr_jax import files
from ivr_jax.errors import UserError

SCHEMES = ("gs:/", "s3:/")  # one slash, as some programs leave of two, makes no folder of this machine either
SIDE = ".ivr_jax"  # objects of ours beside the user's: manifest, lock
_DRIVERS = {"gs": "gcs", "s3": "s3"}
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}  # half a minute, then it is an error
_TIMEOUTS = {  # of a server that takes requests and says nothing, for every user of TensorStore in this process
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",  # without a byte; then the request is tried again
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_IN_FLIGHT = 1 << 28  # bytes that are read or written at once
_PART = 1 << 26  # bytes of one read of a large object
_LARGE = 1 << 29  # bytes from which a file is written in parts, by fsspec


def is_url(path: object) -> bool:
    """Whether a path names something in a bucket."""
    return str(path).startswith(SCHEMES)


def absolute(path: str | os.PathLike[str]) -> str:
    """`os.path.abspath`, which leaves URLs of buckets as they are."""
    return str(path).rstrip("/") if is_url(path) else os.path.abspath(path)


def split(url: str) -> tuple[str, str, str]:
    """gs://bucket/a/b -> ("gs", "bucket", "a/b").  Raises UserError for what names no bucket."""
    scheme, _, rest = url.partition(":/")
    bucket, _, key = rest[1:].partition("/") if rest.startswith("/") else ("", "", "")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise UserError(f"{url!r} names no bucket.", f"Write it as {scheme}://BUCKET/FOLDER.")
    if any(part in ("", ".", "..") for part in key.rstrip("/").split("/")) and key.rstrip("/"):
        raise UserError(f"{url!r} is not a plain path.", "Write it without empty parts, `.` and `..`.")
    return scheme, bucket, key.rstrip("/")


def kvstore(url: str) -> dict[str, Any]:
    """TensorStore's description of the objects whose names start with a URL."""
    scheme, bucket, key = split(url.rstrip("/"))
    found: dict[str, Any] = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{key}/" if key else ""}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        found |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    return found


@contextlib.contextmanager
def explained(url: str, *others: type[Exception]) -> Iterator[None]:
    """Turns an error of TensorStore or fsspec in the block into a UserError that names `url`.

    `others`: further types, of libraries that have many.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError, *others) as error:
        raise _user_error(url, error) from error


def _user_error(url: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    if re.search(r"RequestTimeTooSkewed|invalid_grant", text):  # requests are signed with the time
        return UserError(f"{url} does not accept what this machine signs.", "Set its clock, or renew the credentials.")
    variables = "GOOGLE_APPLICATION_CREDENTIALS" if url.startswith("gs://") else "AWS_ACCESS_KEY_ID, AWS_PROFILE"
    if isinstance(error, PermissionError) or re.search(r"PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|AccessDenied|"
                                                       r"credentials.*not found", text):
        return UserError(f"no permission to use {url}.", f"Check the credentials ({variables}) and the bucket's roles.")
    # Google's server answers a listing of no bucket with NOT_FOUND, others with a page that is no listing.
    if re.search(r"NoSuchBucket|NOT_FOUND|parse response metadata", text) or isinstance(error, FileNotFoundError):
        return UserError(f"{url} is not there.", "Check the name of the bucket; buckets are not created here.")
    if "UNAVAILABLE" in text or "DEADLINE_EXCEEDED" in text or isinstance(error, OSError) or "ABORTED" in text:
        return UserError(f"{url} cannot be reached ({text[:120]}).",
                         "Check the network; the same command resumes from what was copied.")
    return UserError(f"{url} cannot be used ({text[:200]}).", "Check the path, the credentials and the bucket.")


class Changed(Exception):
    """An object is not what a listing or a manifest said: it was replaced or removed meanwhile."""


class Objects:
    """The objects under one URL, by the rest of their names ("a/b.json").

    Every method raises UserError when the bucket is not there, cannot be reached, or may not be used.

    Args:
      url: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
    """

    def __init__(self, url: str):
        for name, value in _TIMEOUTS.items():
            os.environ.setdefault(name, value)
        import tensorstore as ts  # not for those who use no bucket

        self.url = url.rstrip("/")
        spec = kvstore(self.url)
        spec["context"] = {f"{spec['driver']}_request_retries": _RETRIES}
        if spec["driver"] == "s3":
            spec["use_conditional_write"] = True
            if os.environ.get("AWS_ACCESS_KEY_ID"):
                spec["context"]["aws_credentials"] = {"type": "environment"}
        self._range = ts.KvStore.KeyRange
        with explained(self.url):
            self._store = ts.KvStore.open(spec).result()

    def names(self, under: str = "") -> list[str]:
        """Names of all objects that start with `under`, sorted."""
        with explained(self.url):
            end = under[:-1] + chr(ord(under[-1]) + 1) if under else ""
            names = (name.decode() for name in self._store.list(self._range(under, end)).result())
            return sorted(name for name in names if name.startswith(under))

    def read(self, name: str, unless: bytes | None = None) -> tuple[bytes | None, bytes]:
        """An object's content and generation.  None without one, and where its generation is still `unless`."""
        with explained(f"{self.url}/{name}"):
            found = self._store.read(name, if_not_equal=unless).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def generations(self, names: Iterable[str]) -> dict[str, bytes]:
        """The generations of objects, whose content is not read."""
        reads = {name: self._store.read(name, byte_range=slice(0, 1)) for name in names}
        found = {}
        for name, future in reads.items():
            with explained(f"{self.url}/{name}"):
                try:
                    found[name] = future.result().stamp.generation
                except ValueError as error:
                    if "OUT_OF_RANGE" not in str(error):
                        raise
                    found[name] = self.read(name)[1]  # an empty one
        return found

    def write(self, name: str, content: bytes | None, expected: bytes | None = None) -> bytes | None:
        """Writes an object (None: deletes it) and returns its generation.

        With `expected`, the generation that a `read` gave, only if the object is still that; else returns None.
        """
        with explained(f"{self.url}/{name}"):
            generation = self._store.write(name, content, if_equal=expected).result().generation
        if expected is None or generation:
            return generation
        now, found = self.read(name)  # an attempt whose answer was lost may have been carried out
        return found if content is not None and now == content else None

    def upload(self, sources: Mapping[str, Path]) -> None:
        """Writes files as objects, several at once.  Raises FileNotFoundError for a file that is gone."""
        waiting: collections.deque[tuple[str, int, Any]] = collections.deque()
        total = 0
        for name, file in sources.items():
            size = file.stat().st_size
            if size >= _LARGE:
                self._upload_parts(name, file)
                continue
            while waiting and total + size > _IN_FLIGHT:
                total -= self._settled(waiting.popleft())
            waiting.append((name, size, self._store.write(name, file.read_bytes())))
            total += size
        while waiting:
            self._settled(waiting.popleft())

    def _settled(self, write: tuple[str, int, Any]) -> int:
        name, size, future = write
        with explained(f"{self.url}/{name}"):
            future.result()
        return size

    def _upload_parts(self, name: str, file: Path) -> None:
        with explained(f"{self.url}/{name}"):
            try:
                import fsspec

                system, key = fsspec.core.url_to_fs(f"{self.url}/{name}")
            except ImportError:
                raise UserError(f"{file} is larger than {_LARGE >> 20} MiB.",
                                "pip install 'ivr_jax[buckets]', which copies large files in parts.") from None
            system.put_file(str(file), key)

    def download(self, wanted: Iterable[tuple[str, int, Path]]) -> None:
        """Writes objects into files, whose folders are made.  Raises Changed for one that is not as said.

        Args:
          wanted: names, bytes (-1: not known; such an object is held in memory as a whole) and files.
        """
        waiting: collections.deque[tuple[str, int, Path, Any]] = collections.deque()
        for name, size, target in wanted:
            waiting.append((name, size, target, self._read_part(name, 0, size)))
            if len(waiting) >= _IN_FLIGHT // _PART:
                self._save(*waiting.popleft())
        while waiting:
            self._save(*waiting.popleft())

    def _read_part(self, name: str, start: int, size: int) -> Any:
        return self._store.read(name, byte_range=slice(start, min(start + _PART, size)) if size > 0 else None)

    def _save(self, name: str, size: int, target: Path, future: Any) -> None:
        url = f"{self.url}/{name}"
        with files.writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                while True:
                    file.write(_part(future, url))
                    if file.tell() >= size:
                        break
                    future = self._read_part(name, file.tell(), size)


def _part(future: Any, url: str) -> bytes:
    """The bytes of a read.  Raises Changed where there is no object, or a shorter one."""
    with explained(url):
        try:
            found = future.result()
        except ValueError as error:
            if "OUT_OF_RANGE" not in str(error):
                raise
            found = None
    if found is None or found.state == "missing":
        raise Changed(url)
    return found.value
