"""Files and folders appear whole or not at all; locks; modes by the umask."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ivr_jax import files
from ivr_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700),
                                                          (0o002, 0o664, 0o775)])  # fmt: skip
def test_modes_follow_the_umask(tmp_path, mask, file_mode, folder_mode):
    before = os.umask(mask)
    try:
        files.write_file(tmp_path / "file", "text")
        with files.NewFolder(tmp_path / "folder") as folder:
            files.write_json(folder / "value.json", {"a": "é"})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == folder_mode
    assert (tmp_path / "folder/value.json").read_text("utf-8") == '{\n "a": "é"\n}\n'


def test_a_file_that_fails_leaves_the_earlier_one(tmp_path):
    files.write_file(tmp_path / "a" / "file", b"old")
    with pytest.raises(ZeroDivisionError), files.new_file(tmp_path / "a" / "file", durable=True) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "a" / "file").read_bytes() == b"old" and names(tmp_path / "a") == ["file"]
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a" / "file", float("nan"))
    assert (tmp_path / "a" / "file").read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        files.write_file(tmp_path / "file" / "inner", "text")
    assert str(tmp_path / "file" / "inner") in caught.value.what
    with pytest.raises(UserError) as caught:
        files.NewFolder(tmp_path / "file")
    assert str(tmp_path / "file") in caught.value.what


def test_a_folder_is_published_whole_and_never_over_content(tmp_path):
    place = tmp_path / "deep" / "er" / "folder"
    with pytest.raises(ZeroDivisionError), files.NewFolder(place) as folder:
        (folder / "part").write_text("")
        assert not place.exists()
        raise ZeroDivisionError
    assert names(tmp_path) == [], "the folders around it go as well"
    with files.NewFolder(place) as folder:
        (folder / "whole").write_text("1")
    assert names(place.parent) == ["folder"] and names(place) == ["whole"]
    with pytest.raises(UserError):
        files.NewFolder(place)
    with files.NewFolder(tmp_path / "late") as folder:  # taken meanwhile
        (folder / "mine").write_text("")
        (tmp_path / "late").mkdir()
    assert names(tmp_path / "late") == ["mine"], "an empty folder is no content"
    with pytest.raises(UserError), files.NewFolder(tmp_path / "taken"):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "theirs").write_text("")
    assert names(tmp_path / "taken") == ["theirs"] and names(tmp_path) == ["deep", "late", "taken"]


def test_overwriting_keeps_the_earlier_folder_until_the_new_one_is_complete(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    (place / "old").write_text("")
    with pytest.raises(ZeroDivisionError), files.NewFolder(place, overwrite=True):
        raise ZeroDivisionError
    assert names(place) == ["old"]
    with files.NewFolder(place, overwrite=True) as folder:
        (folder / "new").write_text("")
        assert names(place) == ["old"]
    assert names(place) == ["new"] and names(tmp_path) == ["folder"]


def test_what_a_kill_between_the_two_renames_moved_away_comes_back(tmp_path):
    old = tmp_path / ".folder.old"
    old.mkdir()
    (old / "content").write_text("")
    with pytest.raises(UserError):
        files.NewFolder(tmp_path / "folder")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["content"]


def test_one_writer_a_folder_and_what_a_killed_one_left_is_removed(tmp_path):
    place = tmp_path / "folder"
    code = (
        "import time; from ivr_jax import files\n"
        f"with files.NewFolder({str(place)!r}) as folder:\n"
        "    (folder / 'part').mkdir(); print('ready', flush=True); time.sleep(60)"
    )
    writer = run_python(code)
    try:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(UserError):
            files.NewFolder(place)
        assert names(files.partial_folder(place)) == ["part"], "what the other one writes is not touched"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert names(tmp_path) == [".folder.partial"]
    with files.NewFolder(place) as folder:
        assert names(folder) == []
        (folder / "whole").write_text("")
    assert names(tmp_path) == ["folder"] and names(place) == ["whole"]


def test_a_lock_is_gone_with_its_process(tmp_path):
    with files.Lock(tmp_path):
        with pytest.raises(UserError) as caught:
            files.Lock(tmp_path)
        assert str(tmp_path) in caught.value.what
    code = f"import time; from ivr_jax import files; lock = files.Lock({str(tmp_path)!r})\n"
    holder = run_python(code + "print('ready', flush=True); time.sleep(60)")
    try:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(UserError):
            files.Lock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    time.sleep(0)
    files.Lock(tmp_path).close()


def test_a_json_object_of_the_schema_is_read_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"schema": "x/1",\r\n"n": 2}\r\n')
    assert files.read_json_object(path, schema="x/1") == {"schema": "x/1", "n": 2}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
def test_texts_are_read_as_windows_saves_them(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # JSON tells the encoding without one as well
    (tmp_path / "a.jsonl").write_bytes((mark + '{"prompt": "Größe 😀"}\r\n').encode(encoding))
    assert [value for _, value in files.read_json_lines(tmp_path / "a.jsonl")] == [{"prompt": "Größe 😀"}]


@pytest.mark.parametrize("content", [None, b"[1]", b'{"schema": "y/1"}', b"\xff\xfe", b"[" * 100_000, b"\0" * 9,
                                     '{"é": 1}'.encode("latin-1")])  # fmt: skip
def test_anything_else_than_a_json_object_of_the_schema_is_one_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        files.read_json_object(path, schema="x/1")
    assert str(path) in raised.value.what


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "c": 0, "a": 1}}]'])
def test_a_key_that_stands_twice_is_an_error_and_none_is_taken(text):
    with pytest.raises(UserError) as error:
        files.parse_json(text, "x")
    assert "'a'" in error.value.what


def test_json_lines_end_at_newlines_alone_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "one\u2028two"}\r\n\n[3]\n{"b":\n'.encode())
    lines = files.read_json_lines(path)
    assert next(lines) == (f"{path}, line 1", {"a": "one\u2028two"})
    assert next(lines) == (f"{path}, line 3", [3])
    with pytest.raises(UserError) as raised:
        next(lines)
    assert f"{path}, line 4" in raised.value.what


@pytest.mark.parametrize("written, found", [
    ("images/cat.png", "images/cat.png"), (r"images\cat.png", "images/cat.png"),
    (r".\images\cat.png", "images/cat.png"), (r"C:\data\dog.png", "dog.png"),
    (r"\\server\share\dog.png", "dog.png"), (r"a\b.png", r"a\b.png"),
    (r"gone\away.png", "gone/away.png"), ("C:/data/dog.png", "dog.png"), ("A\u0308.png", "Ä.png"),
    ("x" * 5000, "x" * 5000), (r"C:\x" + "y" * 5000, "x" + "y" * 5000),
])  # fmt: skip
def test_paths_that_were_written_on_windows_are_found(tmp_path, written, found):
    (tmp_path / "images").mkdir()
    for name in ("images/cat.png", "dog.png", r"a\b.png", "Ä.png"):
        (tmp_path / name).touch()
    assert files.written_path(tmp_path, written) == tmp_path / found
