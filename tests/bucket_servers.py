"""Emulators of Google Cloud Storage and S3, as processes of their own, and the variables that lead to them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

BUCKET = "runs"
SCHEMES = ("gs", "s3")
_WAIT = 60


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def command(scheme: str, port: int) -> list[str]:
    if scheme == "s3":
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return [sys.executable, str(Path(__file__).with_name("gcs_emulator.py")), str(port)]


def variables(scheme: str, port: int) -> dict[str, str]:
    url = f"http://127.0.0.1:{port}"
    if scheme == "s3":
        return {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_REGION": "us-east-1"}
    return {"TENSORSTORE_GCS_HTTP_URL": url, "STORAGE_EMULATOR_HOST": url, "GOOGLE_CLOUD_PROJECT": "tests",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


def started(scheme: str, **environment: str) -> tuple[subprocess.Popen[bytes], int]:
    """A server process that answers, and its port; it has the bucket `runs`."""
    port = free_port()
    process = subprocess.Popen(command(scheme, port), env={**os.environ, **environment},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, method = (f"/{BUCKET}", "PUT") if scheme == "s3" else (f"/storage/v1/b/{BUCKET}", "GET")
    until = time.monotonic() + _WAIT
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)).close()
            return process, port
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)


@contextlib.contextmanager
def server(scheme: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server to which this process and its children's paths of `scheme` lead."""
    process, port = started(scheme, **environment)
    with mock.patch.dict(os.environ, variables(scheme, port)):
        try:
            yield process
        finally:
            process.kill()
            process.wait()
