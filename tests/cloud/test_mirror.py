"""Folders that are copied to a bucket: whole states, kills between any two requests, two writers, faults."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from ivr_jax.cloud import inputs, manifest, mirror
from ivr_jax.cloud.lease import NAME, TakenOver
from ivr_jax.cloud.mirror import Follower, Mirror, open_folder
from ivr_jax.cloud.objects import Objects
from ivr_jax.errors import UserError


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_folder_comes_back_on_another_machine(bucket, cache):
    url = f"{bucket}/folder"
    with open_folder(url) as folder:
        assert folder.name == "folder"
        write(folder, log="1\n", data__a="a", data__b="b", checkpoints__1__state="s")
        (folder / ".writing-1").write_text("half")
        (folder / ".next.partial").mkdir()
        (folder / ".next.partial" / "c").write_text("half")
        mirror.push(folder)
        write(folder, log="1\n2\n")
        (folder / "data" / "b").unlink()
    assert Objects(url).names() == [".ivr_jax/manifest.json", "checkpoints/1/state", "data/a", "log"]
    shutil.rmtree(cache)
    with open_folder(url) as folder:
        assert contents(folder) == {"log": "1\n2\n", "data/a": "a", "checkpoints/1/state": "s"}
    assert contents(inputs.local(f"{url}/data")) == {"a": "a"} and inputs.local(f"{url}/log").read_text() == "1\n2\n"
    assert inputs.local(url) == inputs.local(url) and inputs.local("runs/x") == Path("runs/x")


class Killed(BaseException):
    """As abrupt as a kill, for the bucket."""


def killed_after(requests: int, monkeypatch) -> None:
    """Every write to a bucket from the given number on fails."""
    count, write_one = itertools.count(), Objects.write

    def write(self, *args, **kwargs):
        if next(count) >= requests:
            raise Killed
        return write_one(self, *args, **kwargs)

    def upload(self, sources):
        for name, file in sources.items():
            write(self, name, file.read_bytes())

    monkeypatch.setattr(Objects, "write", write)
    monkeypatch.setattr(Objects, "upload", upload)


def test_whenever_it_is_killed_the_bucket_shows_one_whole_state(bucket, cache, monkeypatch):
    """The log says how many files there are, and each of them says it too: all of one state, or of the next."""

    def states(number: int) -> dict[str, str]:
        return {"log": str(number), **{f"data/{i}": str(number) for i in range(number)}}

    seen = set()
    for requests in (0, 2, 3, 5, 6, 9, 11, 30):
        url = f"{bucket}/killed{requests}"
        with open_folder(url) as folder:
            write(folder, **{name.replace("/", "__"): text for name, text in states(3).items()})
        copied = Mirror(url, lease=1000.0)  # its thread writes nothing meanwhile
        copied.start()
        shutil.rmtree(copied.folder / "data")
        write(copied.folder, **{name.replace("/", "__"): text for name, text in states(2).items()})
        with monkeypatch.context() as patch:
            killed_after(requests, patch)
            try:
                copied.push()
                seen.add("all")
            except Killed:
                pass
        copied._ended.set()
        mirror._open.pop(copied.folder)
        copied._local_lock.close()
        Objects(url).write(NAME, None)  # its lease has ended
        shown = contents(inputs.local(url))
        assert shown in (states(3), states(2))
        seen.add(len(shown))
        with open_folder(url) as folder:  # and the next one on this machine has one of the two as well
            assert contents(folder) in (states(3), states(2))
            write(folder, more="x")
        assert contents(inputs.local(url)).keys() <= set(Objects(url).names())
        assert Objects(url).names(".ivr_jax/") == [".ivr_jax/manifest.json"]
    assert seen == {4, 3, "all"}


def test_what_was_not_copied_is_there_on_the_same_machine_only(bucket, cache, monkeypatch):
    url = f"{bucket}/same"
    with open_folder(url) as folder:
        write(folder, log="1")
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "push", lambda self: (_ for _ in ()).throw(UserError("the bucket vanished.", "Wait.")))
        with pytest.raises(UserError) as error:
            with open_folder(url) as folder:
                write(folder, log="1 2")
    assert "vanished" in error.value.what
    Objects(url).write(NAME, None)  # its lease has ended
    assert inputs.local(f"{url}/log").read_text() == "1"
    with open_folder(url) as folder:
        assert contents(folder) == {"log": "1 2"}
    assert inputs.local(f"{url}/log").read_text() == "1 2"


def test_a_folder_that_is_written_from_elsewhere_is_left_alone(bucket):
    url = f"{bucket}/elsewhere"
    with pytest.raises(TakenOver):
        with open_folder(url) as folder:
            write(folder, log="1")
            mirror.push(folder)
            found = manifest.read(Objects(url))
            manifest.write(Objects(url), {}, found.generation)
            write(folder, log="2")
            mirror.push(folder)
    Objects(url).write(NAME, None)
    with open_folder(url) as folder:  # what is there now is what the other one wrote
        assert contents(folder) == {}


def test_another_process_of_the_same_run_follows_on_its_own_disk(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/followed"
    with open_folder(url) as folder:
        write(folder, examples__a="1", log="1")
        mirror.push(folder)
        monkeypatch.setenv(inputs.CACHE_VARIABLE, str(tmp_path / "other machine"))
        other = Follower(url)
        assert contents(other.folder) == {"examples/a": "1", "log": "1"} and mirror.url_of(other.folder) == url
        write(other.folder, judge__own="2")
        write(folder, examples__a="longer", log="1")
        mirror.push(folder)
        mirror.refresh(other.folder)
        assert contents(other.folder) == {"examples/a": "longer", "log": "1", "judge/own": "2"}
        other.close()


def test_two_writers(bucket):
    url = f"{bucket}/two"
    with open_folder(url) as folder:
        write(folder, log="1")
        with pytest.raises(UserError) as error:
            with open_folder(url):
                raise AssertionError
        assert url in error.value.what


def test_a_command_that_is_asked_to_stop_copies_what_it_made_and_gives_the_lock_back(bucket):
    """SIGTERM, where the command itself does nothing about it; the bucket of another machine has what was made."""
    url = f"{bucket}/stopped"
    with pytest.raises(KeyboardInterrupt):
        with open_folder(url) as folder:
            write(folder, log="1")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    shutil.rmtree(inputs.cache_folder())
    assert contents(inputs.local(url)) == {"log": "1"} and Objects(url).read(NAME)[0] is None


def test_a_journal_is_copied_whole_while_it_is_written(bucket, cache):
    url = f"{bucket}/journal"
    with open_folder(url) as folder:
        database = sqlite3.connect(folder / "journal.sqlite")
        database.execute("pragma journal_mode=wal")
        database.execute("create table answers (text)")
        for number in range(3):
            database.execute("insert into answers values (?)", [f"{number}" * 3000])
            database.commit()
            database.execute("insert into answers values ('not committed')")
            mirror.push(folder)
            copied = sqlite3.connect(inputs.local(url) / "journal.sqlite")
            rows = [text for (text,) in copied.execute("select text from answers")]
            assert rows == [f"{i}" * 3000 for i in range(number + 1)]
            copied.close()
            database.rollback()
        database.close()


def test_the_thread_copies_by_itself_and_as_soon_as_an_awaited_file_is_there(bucket):
    url = f"{bucket}/thread"
    copied = Mirror(url, every=0.3)
    copied.start()
    write(copied.folder, log="1")
    assert "log" in until(lambda: Objects(url).names("log"))
    copied.close()
    copied = Mirror(url, every=1000.0)
    copied.start()
    copied.push_once_there(copied.folder / "step")
    write(copied.folder, step__state="s")
    assert until(lambda: Objects(url).names("step/"))
    copied.close()


def until(found) -> list[str]:
    for _ in range(200):
        if names := found():
            return names
        time.sleep(0.05)
    raise AssertionError("it did not happen")
