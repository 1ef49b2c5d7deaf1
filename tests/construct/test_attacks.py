"""Servers and inputs that mean ill: none of it ends a run with a traceback, leaks a key, or becomes a verdict."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import commands
import numpy as np
import pytest
from asked_service import ENVIRONMENT, IMAGES, PIXELS, SAMPLE
from construct_worker import KEY, arguments, contents, write_samples
from openai_service import Behaviour, OpenAIService, serving
from openai_service import service_config as config
from PIL import Image

from ivr_jax.construct.__main__ import PENDING
from ivr_jax.errors import UserError
from ivr_jax.interfaces import ServiceFailed
from ivr_jax.services.build import analyzer_from_configs, generator_from_config
from ivr_jax.services.config import Secrets
from ivr_jax.services.journal import Journal


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def judged(url: str, journal: Journal | None = None, **settings: object):
    """One evaluation by the service at `url`."""

    async def run():
        analyzer = analyzer_from_configs([config(url, **settings)], journal, environment=ENVIRONMENT)
        try:
            return await analyzer.evaluate(SAMPLE, IMAGES, PIXELS)
        finally:
            await analyzer.close()

    return asyncio.run(run())


def drawn(url: str, **settings: object) -> np.ndarray:
    """One image by the service at `url`."""

    async def run():
        generator = generator_from_config(config(url, **settings), None, ENVIRONMENT)
        try:
            return await generator.generate(SAMPLE, "Make it grey [direct].", [PIXELS])
        finally:
            await generator.close()

    return asyncio.run(run())


def completion(content: object, **more: object) -> bytes:
    """The body of a chat answer."""
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"index": 0, "message": message}], **more}).encode()


# -- bodies --


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"3", b'"text"', b"null", b"\xff\xfe{", b"[" * 100_000, b'{"choices": {}}', b'{"choices": [[]]}',
     b'{"choices": [{"message": "x"}]}', b'{"choices": [{"message": null}]}', b'{"data": 5}', b'{"data": [{}]}',
     b'{"data": [{"b64_json": 7}]}', b'{"data": [{"b64_json": "AAAA"}]}', b'{"data": [{"url": "http://127.0.0.1/x"}]}',
     completion([1]), completion(5), completion({"score": 4})],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_a_body_of_any_shape_is_an_unusable_answer(body):
    with serving(OpenAIService(Behaviour(raw=body))) as url:
        for ask in (judged, drawn):
            with pytest.raises(ServiceFailed):
                ask(url, tries=2)


def test_counts_of_tokens_that_cannot_be_are_not_counted(tmp_path):
    usage = {"prompt_tokens": 10**40, "completion_tokens": -5}
    with (
        serving(OpenAIService(Behaviour(raw=completion('{"score": 4, "reason": "fine"}', usage=usage)))) as url,
        Journal(tmp_path) as journal,
    ):
        assert judged(url, journal).scores == (4, 4, 4, 4)
        used = journal.usage()["openai:test-model"]
    assert (used["answers"], used["tokens_in"], used["tokens_out"]) == (4, 0, 0)


def test_halves_of_characters_are_replaced_before_anything_is_written(tmp_path):
    answer = completion('{"score": 4, "reason": "half \ud83d of \\udc00 it"}')
    with serving(OpenAIService(Behaviour(raw=answer))) as url, Journal(tmp_path) as journal:
        reason = judged(url, journal).quality.reason
        assert judged(url, journal).quality.reason == reason == "half ? of ? it"


def test_a_key_that_comes_back_in_escapes_is_hidden(tmp_path):
    escaped = "".join(f"\\u{ord(c):04X}" if i % 2 else c for i, c in enumerate(KEY))
    with serving(OpenAIService(Behaviour(raw=completion(f'{{"score": 4, "reason": "it is {escaped}"}}')))) as url:
        with Journal(tmp_path) as journal:
            assert judged(url, journal).quality.reason == "it is [secret]"
        assert not [name for name, data in contents(tmp_path).items() if KEY.encode() in data]
    assert Secrets(["a/b+c=="]).hide(r"a\/b\u002bc=\u003d, a/b+c==, a/b") == "[secret], [secret], a/b"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed(status):
    other = OpenAIService()
    other.log.keep = True
    with serving(other) as elsewhere, serving(OpenAIService(
        Behaviour(raw=b"", status=status, headers={"location": f"{elsewhere}/chat/completions"})
    )) as url:
        with pytest.raises(UserError, match=str(status)):
            judged(url)
    assert not other.log.headers


# -- what is no HTTP --


@contextmanager
def talking(answer: bytes, drip: float = 0.0) -> Iterator[str]:
    """A socket that says `answer` to everyone: at once and hangs up, or a byte every `drip` seconds for ever."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def speak(connection: socket.socket) -> None:
            with closing(connection), suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(answer)
                while drip:
                    time.sleep(drip)
                    connection.sendall(b" ")

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=speak, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 999999 What\r\n\r\n", OK + b"Content-Length: 99\r\n\r\nshort",
     OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
     OK + b"X: " + b"y" * 200_000 + b"\r\n\r\n", b"\0" * 1000],
    ids=lambda answer: repr(answer[:40]),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["openai", "gateway"])
def test_what_is_no_http_is_a_fault_and_no_crash(answer, kind):
    with talking(answer) as url, pytest.raises(ServiceFailed):
        judged(url, tries=2, timeout=1.0, kind=kind, app_variable="TEST_APP")


def test_a_server_that_drips_is_a_time_out():
    begun = time.monotonic()
    with talking(OK + b"Content-Length: 1000000\r\n\r\n", drip=0.02) as url:
        with pytest.raises(ServiceFailed, match="time-out"):
            judged(url, tries=2, timeout=0.3)
    assert time.monotonic() - begun < 60  # it drips for hours


def test_nobody_there_is_a_fault():
    with pytest.raises(ServiceFailed):
        judged("http://127.0.0.1:9/v1", tries=2)


# -- inputs --


def test_entries_that_cannot_be_written_are_quarantined(tmp_path):
    entries = json.loads(write_samples(tmp_path, 3).read_text())
    Image.new("RGB", (40_000, 1)).save(tmp_path / "line.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    bad = [
        {"edit_prompt": "half \ud83d"}, {"explanation": "\udc00"}, {"edit_key": float("nan")},
        {"edit_key": {"a": [float("inf")]}}, {"key": "half \ud83d"}, {"key": "界" * 100}, {"key": "a\0b"},
        {"key": ".."}, {"key": "a\\b"}, {"key": " a"}, {"src_path": "line.png", "key": "line"},
        {"src_path": "folder.png"}, {"src_path": "pipe.png"}, {"src_path": "loop.png"},
        {"edit_prompt": ""}, {"explanation": ["x"]}, {"src_path": [["a.png"]]}, {"edit_path": ""},
    ]  # fmt: skip
    listed = entries + [entries[0] | {"key": f"bad {i}"} | change for i, change in enumerate(bad)]
    (tmp_path / "samples.json").write_text(json.dumps(listed))
    with serving(OpenAIService(Behaviour(key=KEY))) as url:
        commands.succeed("construct", *arguments(url, tmp_path / "samples.json", tmp_path / "run", folders=True))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["quarantined"]) == len(bad), summary["quarantined"]
    assert sum(summary["constructed"].values()) + sum(summary["dropped"].values()) == 3
    assert "pixels a side" in summary["quarantined"]["line"]


@pytest.mark.parametrize("text", ['"\\ud800"', "{", "[1", "\ufeff[]", '[{"key": 1e9999}', "[" * 100_000])
def test_lists_that_are_none_are_said_in_one_line(tmp_path, text):
    (tmp_path / "samples.json").write_text(text)
    command = arguments("http://127.0.0.1:9/v1", tmp_path / "samples.json", tmp_path / "run")
    assert "samples.json" in commands.run("construct", *command).complaint


def test_a_start_that_came_to_nothing_does_not_bind_the_work_directory(tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    for name, words in (("gone.json", "there is no list of samples"), ("empty.json", "is not a list of samples")):
        command = arguments("http://127.0.0.1:9/v1", tmp_path / name, tmp_path / "run")
        assert words in commands.run("construct", *command).complaint


def test_a_journal_has_begun_with_its_first_record_or_while_somebody_writes_it(tmp_path):
    assert not Journal.begun(tmp_path) and os.listdir(tmp_path) == []
    with Journal(tmp_path) as journal:
        assert Journal.begun(tmp_path)
    assert not Journal.begun(tmp_path)
    with Journal(tmp_path) as journal:
        journal.record_outcome("key", "request", {})
    assert Journal.begun(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [f"base_url=https://user:{KEY}@host/v1", f"base_url=https://host/v1?key={KEY}", f"key_variable={KEY}",
     f"app_variable={KEY}"],
)  # fmt: skip
def test_a_key_in_the_config_is_refused_and_not_saved(tmp_path, setting):
    samples = write_samples(tmp_path, 2)
    command = arguments("http://127.0.0.1:9/v1", samples, tmp_path / "run")
    complaint = commands.run("construct", *command, f"--config.services.generator.{setting}").complaint
    assert KEY not in complaint
    assert not [name for name, data in contents(tmp_path).items() if KEY.encode() in data]


# -- runs --


def test_complaints_that_no_file_takes_leave_samples_pending(tmp_path):
    samples = write_samples(tmp_path, 2)
    error = json.dumps({"error": {"message": f"half \ud83d, key {KEY}"}}).encode()
    with serving(OpenAIService(Behaviour(raw=error, status=400))) as url:
        done = commands.run("construct", *arguments(url, samples, tmp_path / "run", passes=1))
    assert done.returncode == PENDING, done.stderr
    pending = json.loads((tmp_path / "run" / "summary.json").read_text())["pending"]
    assert len(pending) == 2 and all("half ?, key [secret]" in reason for reason in pending.values())
    assert not [name for name, data in contents(tmp_path / "run").items() if KEY.encode() in data]


def test_a_fallback_that_rejects_one_question_does_not_stop_the_run(tmp_path):
    """The first is down; the second, well, refuses everything: samples are pending, each for itself."""
    samples, refusing = write_samples(tmp_path, 3), OpenAIService(Behaviour(status=422))
    refusing.log.keep = True
    with serving(OpenAIService(Behaviour(key=KEY))) as draws, serving(refusing) as url:
        command = arguments(draws, samples, tmp_path / "run", passes=1, concurrency=1)
        down = {"base_url": "http://127.0.0.1:9/v1", "breaker_failures": 1, "tries": 1}
        command += [f"--config.services.analyzer.{name}={value}" for name, value in down.items()]
        fallback = {"kind": "openai", "model": "second", "base_url": url, "key_variable": "TEST_KEY"}
        command += [f"--config.services.fallback.{name}={value}" for name, value in fallback.items()]
        assert commands.run("construct", *command).returncode == PENDING
    pending = json.loads((tmp_path / "run" / "summary.json").read_text())["pending"]
    assert len(pending) == 3 and not any("keeps failing" in reason for reason in pending.values()), pending
    assert len(refusing.log.headers) >= 2 * 3, "every sample was tried"


def test_a_damaged_journal_is_said_so(tmp_path):
    samples = write_samples(tmp_path, 2)
    command = arguments("http://127.0.0.1:9/v1", samples, tmp_path / "run")
    (tmp_path / "run" / "journal").mkdir(parents=True)
    (tmp_path / "run" / "journal" / "journal.sqlite").write_bytes(b"no database at all" * 1000)
    for _ in range(2):  # the lock does not stay behind
        assert "journal.sqlite" in commands.run("construct", *command).complaint

