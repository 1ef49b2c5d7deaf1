"""Who may call, and what happens when many do: hosts, origins, tokens, the queue, limits of time."""

from __future__ import annotations

import threading
import time

import pytest
import serving
from serving import PROMPT

from ivr_jax.sampling.engine import Engine
from ivr_jax.serve.guard import COOKIE
from ivr_jax.serve.limits import Limits

TOKEN = "correct-horse-battery"
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "mode": "direct"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    limits = Limits(waiting=2, queue_seconds=60, unwatched_seconds=0.3)
    with serving.serving(tmp_path_factory.mktemp("answers"), slots=1, limits=limits) as running:
        yield running


def test_another_host_and_another_sites_page_are_refused(server):
    with server.client() as http:
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
            assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 403
        reply = http.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert reply.status_code == 200 and "access-control-allow-origin" not in reply.headers
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]


def test_a_token_opens_everything_and_nothing_is_open_without(tmp_path, caplog):
    with serving.serving(tmp_path, token=TOKEN) as closed, closed.client() as http:
        for path in ("/", "/v1/models", "/metrics", "/api/server", "/api/answers/0123456789abcdef", "/a/x"):
            assert http.get(path).status_code == 401, path
        assert http.get("/", headers={"Accept": "text/html"}).status_code == 303
        assert http.get("/healthz").status_code == 200
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 401
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x"):
            assert http.get("/v1/models", headers={"Authorization": wrong}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert http.post("/sign-in", json={"token": "wrong"}).status_code == 401
        signed = http.post("/sign-in", json={"token": TOKEN})
        cookie = signed.headers["set-cookie"].lower()
        assert signed.status_code == 200 and TOKEN not in cookie and "httponly" in cookie and "strict" in cookie
        assert http.get("/v1/models", headers={"Cookie": f"{COOKIE}={signed.cookies[COOKIE]}"}).status_code == 200
        assert TOKEN not in http.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert TOKEN not in caplog.text


@pytest.fixture
def gate(monkeypatch):
    """Model calls wait until it is set."""
    step, opened = Engine.step, threading.Event()

    def waiting(engine, calls=None, until=0):
        opened.wait(timeout=90)
        return step(engine, calls, until)

    monkeypatch.setattr(Engine, "step", waiting)
    yield opened
    opened.set()


def asked(server, replies: list, body: dict) -> threading.Thread:
    def ask() -> None:
        with server.client() as http:
            replies.append(http.post("/v1/chat/completions", json=body))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_beyond_slots_and_queue_a_request_is_told_when_to_come_back(server, gate):
    replies: list = []
    admitted = server.metric("ivr_queue_seconds_count")
    threads = [asked(server, replies, {**CHAT, "seed": 1})]
    until(lambda: server.metric("ivr_queue_seconds_count") == admitted + 1)
    threads += [asked(server, replies, {**CHAT, "seed": seed}) for seed in (2, 3)]
    until(lambda: server.metric("ivr_waiting") == 2)
    with server.client() as http:
        refused = http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["message"] and http.get("/healthz").status_code == 200
    gate.set()
    for thread in threads:
        thread.join(timeout=90)
    assert [reply.status_code for reply in replies] == [200] * 3
    assert server.metric("ivr_refused_total") == 1
    server.idle()


def test_several_answers_of_one_call_are_all_waited_for(server, gate):
    """One after the other goes through the only slot; none of them counts as watched by nobody meanwhile."""
    stopped = 'ivr_answers_total{state="stopped"}'
    before, replies = server.metric(stopped), []
    thread = asked(server, replies, {**CHAT, "n": 2, "seed": 1})
    time.sleep(1)
    gate.set()
    thread.join(timeout=90)
    assert server.metric(stopped) == before
    assert [choice["finish_reason"] for choice in replies[0].json()["choices"]] == ["stop", "stop"]
    server.idle()
