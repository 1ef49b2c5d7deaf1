"""Local copies of what a bucket holds: folders, files, lists with their neighbours; damaged and hostile manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivr_jax.cloud import inputs, manifest
from ivr_jax.cloud.mirror import open_folder
from ivr_jax.cloud.objects import Objects
from ivr_jax.errors import UserError


def contents(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_other_tools_put_there_is_copied_as_it_is_listed(bucket):
    url = f"{bucket}/plain"
    for name in ("a/b", "c", "run/checkpoints/1"):
        Objects(url).write(name, name.encode())
    Objects(url).write("empty", b"")
    assert contents(inputs.local(url, without="checkpoints")) == {"a/b": "a/b", "c": "c", "empty": ""}
    assert inputs.local(f"{url}/a/b").read_text() == "a/b"
    assert contents(inputs.local_list(f"{url}/a/b").parent) == {"b": "a/b"}
    Objects(url).write("c", b"changed")
    assert (inputs.local(url) / "c").read_text() == "changed"
    with open_folder(url) as folder:  # and a command may go on with it
        assert contents(folder) == {"a/b": "a/b", "c": "changed", "empty": "", "run/checkpoints/1": "run/checkpoints/1"}
    for missing in ("nothing", "a/nothing"):
        with pytest.raises(UserError) as error:
            inputs.local(f"{url}/{missing}")
        assert f"{url}/{missing}" in error.value.what
    with pytest.raises(UserError):
        inputs.local_list(f"{url}/a/nothing")


def test_a_copy_is_made_once_and_local_paths_are_left_alone(bucket):
    url = f"{bucket}/once"
    Objects(url).write("a", b"1")
    first = inputs.local(url)
    (first / "a").write_text("edited")
    assert inputs.local(url) == first and (inputs.local(url) / "a").read_text() == "edited"
    assert inputs.local("runs/x") == Path("runs/x") == inputs.local_list("runs/x")
    assert inputs.local("~/x") == Path.home() / "x" and inputs.local("~nobody at all/x") == Path("~nobody at all/x")


def test_an_object_that_is_not_what_the_manifest_says_is_not_taken(bucket, monkeypatch):
    url = f"{bucket}/damaged"
    with open_folder(url) as folder:
        (folder / "a").write_text("right")
    Objects(url).write("a", b"wrong")
    with pytest.raises(UserError) as error:
        inputs.local(url)
    assert url in error.value.what
    assert not list((inputs.cache_folder() / "read").glob("*"))  # nothing half-copied becomes visible


@pytest.mark.parametrize("path", ["../outside", "/etc/outside", "a/../../b", "a\\b", ""])
def test_a_manifest_cannot_lead_out_of_the_folder(bucket, path):
    url = f"{bucket}/hostile"
    entry = {"size": 1, "sha256": "0", "object": "a"}
    Objects(url).write(manifest.NAME, json.dumps({"version": 1, "files": {path: entry}}).encode())
    with pytest.raises(UserError):
        inputs.local(url)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2, "files": {}}', b'{"version": 1, "files": 3}'])
def test_a_damaged_manifest_is_an_error(bucket, content):
    url = f"{bucket}/broken"
    Objects(url).write(manifest.NAME, content)
    with pytest.raises(UserError) as error:
        inputs.local(url)
    assert manifest.NAME in error.value.what
