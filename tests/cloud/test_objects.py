"""Objects in buckets of both emulators: conditional writes, parts, faults."""

from __future__ import annotations

import socket
import time

import bucket_servers
import commands
import pytest

from ivr_jax.cloud import objects
from ivr_jax.cloud.objects import Changed, Objects, absolute, explained, is_url, split
from ivr_jax.errors import UserError


def test_a_conditional_write_succeeds_for_the_generation_that_was_seen(bucket):
    here = Objects(f"{bucket}/conditional")
    content, none = here.read("a")
    assert content is None
    first = here.write("a", b"1", expected=none)
    assert first and here.write("a", b"2", expected=none) is None
    assert here.write("a", b"1", expected=none) == first  # carried out, though the answer may have been lost
    second = here.write("a", b"3", expected=first)
    assert here.write("a", b"4", expected=first) is None
    assert here.read("a") == (b"3", second) and here.read("a", unless=second) == (None, second)
    assert here.generations(["a"]) == {"a": second}


def test_files_come_back_in_parts_and_empty_ones_too(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_PART", 1000)
    here, names = Objects(f"{bucket}/files"), {"a/large": bytes(range(256)) * 20, "a/b/small": b"x", "empty": b""}
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    here.upload({name: tmp_path / name for name in names})
    assert here.names() == ["a/b/small", "a/large", "empty"] and here.names("a/l") == ["a/large"]
    here.download((name, len(content), tmp_path / "back" / name) for name, content in names.items())
    here.download([("a/large", -1, tmp_path / "unknown size")])
    assert {name: (tmp_path / "back" / name).read_bytes() for name in names} == names
    assert (tmp_path / "unknown size").read_bytes() == names["a/large"]
    for name, size in (("gone", 5), ("a/b/small", 5)):
        with pytest.raises(Changed):
            here.download([(name, size, tmp_path / "none")])


def test_a_large_file_is_written_in_parts_by_fsspec(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "_LARGE", 100)
    (tmp_path / "large").write_bytes(bytes(5000))
    here = Objects(f"{bucket}/parts")
    here.upload({"large": tmp_path / "large"})
    assert here.read("large")[0] == bytes(5000)


def test_a_bucket_that_is_not_there_is_an_error(bucket):
    with pytest.raises(UserError) as error:
        Objects(f"{bucket}-without/x").write("a", b"1")
    assert f"{bucket}-without/x/a" in error.value.what
    with pytest.raises(UserError) as listing:
        Objects(f"{bucket}-without/x").names()
    assert listing.value.remedy == error.value.remedy  # both ask for the bucket's name, whatever the server answers


@pytest.mark.parametrize("scheme", bucket_servers.SCHEMES)
def test_without_permission_and_without_a_server_it_says_so(scheme, monkeypatch):
    # moto checks nothing for the first request, which makes the bucket, and knows no key for the others
    with bucket_servers.server(scheme, INITIAL_NO_AUTH_ACTION_COUNT="1") as process:
        name = bucket_servers.BUCKET if scheme == "s3" else "forbidden"
        for act in (lambda here: here.read("a"), lambda here: here.write("a", b"1")):
            with pytest.raises(UserError) as error:
                act(Objects(f"{scheme}://{name}/x"))
            assert "permission" in error.value.what
        process.kill()
        process.wait()
        monkeypatch.setattr(objects, "_RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "10ms"})
        began = time.monotonic()
        with pytest.raises(UserError) as error:
            Objects(f"{scheme}://{name}/x").read("a")
        assert "cannot be reached" in error.value.what and time.monotonic() - began < 20


SILENT = """
import sys
from ivr_jax.cloud import objects
from ivr_jax.errors import UserError
objects._RETRIES = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
try:
    objects.Objects(sys.argv[1]).read("a")
except UserError as error:
    print(error.what)
"""


@pytest.mark.parametrize("scheme", bucket_servers.SCHEMES)
def test_a_server_that_takes_requests_and_says_nothing_is_not_waited_for(scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = bucket_servers.variables(scheme, server.getsockname()[1])
        there["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "1"
        lines = commands.on_devices(1, SILENT, f"{scheme}://runs/x", **there)
    assert "cannot be reached" in lines[-1]


def test_a_clock_that_is_off_is_named():
    """What S3 answers to a request that was signed 15 minutes ago or later, as TensorStore says it."""
    text = "PERMISSION_DENIED: RequestTimeTooSkewed: The difference between the request time and the current time"
    with pytest.raises(UserError) as error:
        with explained("s3://runs/x"):
            raise ValueError(text)
    assert "clock" in error.value.remedy and "permission" not in error.value.what


def test_urls():
    assert split("gs://bucket-1/a/b/") == ("gs", "bucket-1", "a/b") and split("s3://bucket") == ("s3", "bucket", "")
    for wrong in ("gs://", "gs:///a", "s3://A b/c", "gs://bucket/../c", "gs://bucket//c", "gs:/bucket/c"):
        with pytest.raises(UserError):
            split(wrong)
    assert is_url("gs://a") and is_url("s3://a") and is_url("gs:/a") and not is_url("/gs://a") and not is_url("runs/a")
    assert absolute("gs://bucket/a/") == "gs://bucket/a" and absolute("/a/../b") == "/b"
