"""Review: decisions that survive anything, agreement as scikit-learn has it, and a server that lets nobody else in."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from commands import run, succeed
from dataset_fixtures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from review_server import ROOT, Server, serving
from sklearn.metrics import cohen_kappa_score

from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.images import load_image
from ivr_jax.review.agreement import agreement, agreement_text
from ivr_jax.review.decisions import Decision, Decisions

NAMES = ("Ana", "Ben")


def opened(path: Path, reviewers=NAMES) -> Decisions:
    return Decisions(path / "d.sqlite3", "fingerprint", reviewers)


def decide(decisions: Decisions, reviewer: str, position: int, verdict: str, request: str = "") -> Decision:
    return decisions.decide(reviewer, position, f"key/{position}", verdict, "", request or os.urandom(8).hex())


def verdicts(decisions: Decisions, reviewer: str) -> dict[int, str]:
    return {d.position: d.verdict for d in decisions.standing(reviewer)}


# -- decisions --


@settings(max_examples=25)  # every decision waits for the disk
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["accept", "reject", "undo"]), st.integers(0, 3))))
def test_any_sequence_of_verdicts_and_undos_leaves_what_a_stack_leaves(tmp_path_factory, acts):
    decisions = opened(tmp_path_factory.mktemp("d"))
    stacks: dict[str, list[tuple[int, str]]] = {name: [] for name in NAMES}
    for reviewer, act, position in acts:
        if act == "undo":
            undone = decisions.undo(reviewer)
            expected = stacks[reviewer].pop() if stacks[reviewer] else None
            assert (undone and (undone.position, undone.verdict)) == expected
        else:
            decide(decisions, reviewer, position, act)
            stacks[reviewer].append((position, act))
    for reviewer in NAMES:
        assert verdicts(decisions, reviewer) == dict(stacks[reviewer])
        latest = decisions.latest(reviewer)
        assert (latest and (latest.position, latest.verdict)) == (stacks[reviewer][-1] if stacks[reviewer] else None)
        for position in range(4):
            found = decisions.at(reviewer, position)
            assert (found and found.verdict) == dict(stacks[reviewer]).get(position)
    decisions.close()


def test_a_retry_counts_once_and_a_second_undo_of_one_decision_does_nothing(tmp_path):
    decisions = opened(tmp_path)
    first = decide(decisions, "Ana", 0, "accept")
    again = [decide(decisions, "Ana", 1, "reject", "same-request") for _ in range(2)]
    assert again[0] == again[1]
    assert decisions.undo("Ana", again[0].number) == again[0]
    assert decisions.undo("Ana", again[0].number) is None
    assert decisions.standing("Ana") == [first]


def test_nothing_is_ever_deleted(tmp_path):
    decisions = opened(tmp_path)
    decide(decisions, "Ana", 0, "accept")
    decide(decisions, "Ana", 0, "reject")
    decisions.undo("Ana")
    rows = sqlite3.connect(tmp_path / "d.sqlite3").execute("SELECT verdict, undone FROM decisions").fetchall()
    assert rows == [("accept", 0), ("reject", 1)]


def test_the_file_is_in_write_ahead_mode_and_fully_synchronised(tmp_path):
    decisions = opened(tmp_path)
    assert decisions._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert decisions._connection.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_many_threads_and_connections_lose_nothing(tmp_path):
    files = [opened(tmp_path) for _ in range(2)]

    def work(number: int) -> None:
        for position in range(20):
            decide(files[number % 2], NAMES[number % 2], 20 * number + position, "accept")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files[0].standing()) == 80


@pytest.mark.parametrize(
    "reviewers, fingerprint, complaint",
    [((), "fingerprint", ""), (("Ben", "Ana"), "fingerprint", ""), (("Ana", "Cem"), "fingerprint", "belongs to"),
     (("Ana",), "fingerprint", "Name two"), (("Ana", "Ana"), "fingerprint", "Name two"),
     ((), "other", "another dataset")],
)
def test_a_file_belongs_to_its_reviewers_and_its_dataset(tmp_path, reviewers, fingerprint, complaint):
    opened(tmp_path).close()
    if not complaint:
        assert Decisions(tmp_path / "d.sqlite3", fingerprint, reviewers).reviewers == NAMES
        return
    with pytest.raises(UserError, match=complaint):
        Decisions(tmp_path / "d.sqlite3", fingerprint, reviewers)


def test_faulty_decisions_and_files_are_clear_errors(tmp_path):
    decisions = opened(tmp_path)
    with pytest.raises(UserError):
        decide(decisions, "Eve", 0, "accept")
    with pytest.raises(UserError, match="'maybe'"):
        decide(decisions, "Ana", 0, "maybe")
    with pytest.raises(UserError, match="2000"):
        decisions.decide("Ana", 0, "k", "accept", "x" * 2001, "r")
    (tmp_path / "bad.sqlite3").write_text("this is no database" * 100)
    for path in (tmp_path / "bad.sqlite3", tmp_path / "absent" / "d.sqlite3"):
        with pytest.raises(UserError, match=path.name):
            Decisions(path, "f", NAMES)


# -- agreement --


def decided(reviewer: str, marks: str) -> list[Decision]:
    return [Decision(i, reviewer, i, f"k{i}", {"a": "accept", "r": "reject"}[mark], "", "")
            for i, mark in enumerate(marks) if mark != "."]


@given(st.lists(st.sampled_from(["aa", "ar", "ra", "rr", "a.", ".r", ".."]), max_size=40))
def test_kappa_is_that_of_scikit_learn(pairs):
    first, second = ("".join(pair[i] for pair in pairs) for i in (0, 1))
    found = agreement([*decided("Ana", first), *decided("Ben", second)], NAMES)
    both = [(a, b) for a, b in zip(first, second, strict=True) if "." not in (a, b)]
    assert found.both == len(both) and found.judged == (sum(m != "." for m in first), sum(m != "." for m in second))
    if not both or len({mark for pair in both for mark in pair}) == 1:
        assert found.kappa is None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cohen_kappa_score([a for a, _ in both], [b for _, b in both])
    assert found.kappa == pytest.approx(expected, abs=1e-12)
    assert found.observed == pytest.approx(np.mean([a == b for a, b in both]))


def test_kappa_by_hand():
    found = agreement([*decided("Ana", "aaaaar" + "rrrr"), *decided("Ben", "aaaara" + "rrrr")], NAMES)
    assert found.pairs == {("accept", "accept"): 4, ("accept", "reject"): 1, ("reject", "accept"): 1,
                           ("reject", "reject"): 4}
    assert found.observed == 0.8 and found.kappa == pytest.approx((0.8 - 0.5) / 0.5)
    assert "agreement: 80.0%; Cohen's kappa: 0.600" in agreement_text(found, 12)


# -- the reviewed dataset and the command --


def test_only_unanimous_accepts_become_the_dataset(tmp_path):
    data = build(tmp_path / "data", 6)
    dataset = TrajectoryDataset(data)
    decisions = Decisions(tmp_path / "data.review.sqlite3", dataset.fingerprint, NAMES)
    for reviewer, marks in zip(NAMES, ("aaarr.", "araara"), strict=True):
        for position, mark in enumerate(marks):
            if mark != ".":
                decide(decisions, reviewer, position, "accept" if mark == "a" else "reject")
    decisions.close()
    report = succeed("review", data, "--report")
    assert "judged: Ana 5 of 6, Ben 6 of 6, both 5" in report and "Cohen's kappa: 0.167" in report
    printed = succeed("review", f"--write={tmp_path / 'reviewed'}", data)
    assert printed.startswith(f"{tmp_path / 'reviewed'}: 2 of 6 samples\n") and report.strip() in printed
    reviewed = TrajectoryDataset(tmp_path / "reviewed")
    assert [t for t in reviewed] == [dataset[0], dataset[2]]
    assert np.array_equal(reviewed.image(dataset[2].images[-1]), dataset.image(dataset[2].images[-1]))
    review = reviewed.manifest["provenance"]["review"]
    assert review["accepted_by_both"] == 2 and review["reviewers"] == list(NAMES)
    assert review["kappa"] == pytest.approx(1 / 6)
    assert reviewed.manifest["provenance"]["source_provenance"] == {"seed": 7}
    card = (tmp_path / "reviewed" / "README.md").read_text()
    assert "Cohen's kappa 0.167" in card and "| review: judged_by_both | 5 |" in card


@pytest.mark.parametrize(
    "flags, complaint",
    [([], "no reviewers were named"), (["--reviewers=Ana"], "Name two people"),
     (["--report"], "there are no decisions"), (["--write=out"], "there are no decisions"),
     (["--reviewers=Ana,Ben", "--port=70000"], "port")],
)
def test_mistakes_of_the_command_are_one_clear_line(tmp_path, flags, complaint):
    data = build(tmp_path / "data", 1)
    assert complaint in run("review", data, *flags).complaint
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_nothing_accepted_by_both_writes_nothing(tmp_path):
    data = build(tmp_path / "data", 2)
    decisions = Decisions(tmp_path / "data.review.sqlite3", TrajectoryDataset(data).fingerprint, NAMES)
    decide(decisions, "Ana", 0, "accept")
    assert "no sample in common" in run("review", data, f"--write={tmp_path / 'out'}").complaint
    assert not (tmp_path / "out").exists()


# -- the server --


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("review") / "data", 4)


@pytest.fixture(scope="module")
def server(data):
    with serving(data, "--reviewers=Ana,Ben") as running:
        yield running


def test_each_reviewer_has_an_own_address_and_own_decisions(server: Server):
    assert server.tokens.keys() == {"Ana", "Ben"} and len(set(server.tokens.values())) == 2
    assert all(len(token) >= 32 for token in server.tokens.values())
    server.decide("Ana", 0, "reject", "  blurred  ")
    assert server.get("Ana", "state")["verdicts"] == "r..." and server.get("Ben", "state")["verdicts"] == "...."
    assert server.get("Ana", "sample/0")["decision"]["comment"] == "blurred"
    assert server.get("Ben", "sample/0")["decision"] is None


def test_a_sample_is_told_whole_and_its_images_are_the_stored_ones(server: Server, data: Path, tmp_path):
    dataset = TrajectoryDataset(data)
    told, trajectory = server.get("Ana", "sample/2"), dataset[2]
    assert (told["prompt"], told["mode"], told["category"]) == ("tu es", "multi_step", "addition")
    assert [r["image"]["name"] for r in told["rounds"]] == list(trajectory.images)
    assert told["rounds"][1]["said"] == [["Step", "first"]]
    assert told["rounds"][1]["step_evaluation"][0]["passed"] is True
    status, headers, body = server.request("GET", f"/{server.tokens['Ana']}/image/{trajectory.images[0]}")
    assert status == 200 and headers["content-type"] == "image/png"
    (tmp_path / "x.png").write_bytes(body)
    assert np.array_equal(load_image(tmp_path / "x.png"), dataset.image(trajectory.images[0]))
    assert told["rounds"][0]["image"] == {"name": trajectory.images[0], "width": 8, "height": 6}


def test_it_listens_on_the_loopback_address_alone(server: Server):
    code = f"""
import socket
addresses = {{info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}} - {{"127.0.0.1", "::1"}}
for address in addresses | {{"127.0.0.2"}}:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as s:
        assert s.connect_ex((address, {server.port})) != 0, address
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", ["/", "/state", "/wrong/", "/wrong/state", "/wrong/sample/0", "/wrong/page.js",
                                  "/favicon.ico", "/{token}", "/{token}/../../etc/passwd", "/{token}/app.py",
                                  "/{token}/sample/9", "/{token}/sample/-1", "/{token}/sample/x"])
def test_what_leads_nowhere_says_nothing(server: Server, path):
    status, _, body = server.request("GET", path.format(token=server.tokens["Ana"]))
    assert status == 404 and b"tu es" not in body and server.tokens["Ana"].encode() not in body


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost:1", ""])
def test_another_host_is_turned_away(server: Server, host):
    status, _, body = server.request("GET", f"/{server.tokens['Ana']}/state", Host=host.format(port=server.port))
    assert status in (400, 421) and b"verdicts" not in body


def test_localhost_is_this_machine_too(server: Server):
    name = f"localhost:{server.port}"
    assert server.request("GET", f"/{server.tokens['Ana']}/state", Host=name)[0] == 200


@pytest.mark.parametrize(
    "headers, status",
    [({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": ""}, 403),
     ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/x-www-form-urlencoded"}, 415)],
)
def test_no_other_page_can_decide(server: Server, headers, status):
    body = {"position": 3, "verdict": "accept", "comment": "", "request": "12345678"}
    path = f"/{server.tokens['Ben']}/decide"
    assert server.request("POST", path, body, **headers)[0] == status
    assert server.get("Ben", "state")["verdicts"][3] == "."


@pytest.mark.parametrize(
    "body, status",
    [(b"{", 400), (b"[" * 20_000, 400), (b"[]", 400), (b"x" * 70_000, 413), ({}, 404),
     ({"position": 0, "verdict": "accept", "comment": "", "request": ""}, 400),
     ({"position": True, "verdict": "accept", "comment": "", "request": "12345678"}, 404),
     ({"position": 9, "verdict": "accept", "comment": "", "request": "12345678"}, 404),
     ({"position": 0, "verdict": 1, "comment": "", "request": "12345678"}, 400),
     (b'{"position": 0, "verdict": "accept", "comment": "\\ud800", "request": "12345678"}', 400),
     ({"position": 0, "verdict": "maybe", "comment": "", "request": "12345678"}, 409),
     ({"position": 0, "verdict": "accept", "comment": "x" * 2001, "request": "12345678"}, 409)],
    ids=lambda value: str(value)[:40],
)
def test_faulty_decisions_are_refused(server: Server, body, status):
    found, _, answer = server.request("POST", f"/{server.tokens['Ben']}/decide", body)
    assert found == status and json.loads(answer)["error"]
    assert server.request("GET", f"/{server.tokens['Ben']}/decide")[0] in (404, 405)


@pytest.mark.parametrize("number", [None, "1", True, -1, 1.5, 1 << 63, 10**30])
def test_undoing_needs_the_number_of_a_decision(server: Server, number):
    status, _, answer = server.request("POST", f"/{server.tokens['Ben']}/undo", {"number": number})
    assert status == 400 and json.loads(answer)["error"]


def test_every_answer_carries_the_safety_headers_and_no_cookie(server: Server):
    for path in ("/", f"/{server.tokens['Ana']}/", f"/{server.tokens['Ana']}/state"):
        _, headers, _ = server.request("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in headers and "server" not in headers


def test_the_page_never_makes_markup_of_text():
    script = (ROOT / "ivr_jax" / "review" / "page" / "page.js").read_text()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert sink not in script


def test_a_decision_that_was_acknowledged_survives_kill_9_and_a_new_start_knows_everything(tmp_path):
    data = build(tmp_path / "data", 3)
    with serving(data, "--reviewers=Ana,Ben") as running:
        running.decide("Ana", 1, "accept", "fine")
        old = running.tokens
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
    with serving(data) as running:
        assert running.get("Ana", "state")["verdicts"] == ".a."
        assert running.get("Ana", "sample/1")["decision"]["comment"] == "fine"
        assert not set(old.values()) & set(running.tokens.values()), "addresses end with the server"
        status, _, body = running.request("POST", f"/{running.tokens['Ana']}/undo",
                                          {"number": running.get("Ana", "state")["latest"]["number"]})
        assert status == 200 and json.loads(body)["undone"]["position"] == 1
        assert running.get("Ana", "state")["verdicts"] == "..."
        running.process.send_signal(signal.SIGINT)
        rest = running.process.communicate(timeout=30)[0]
        assert running.process.returncode == 130 and "Traceback" not in rest
        assert not any(token in rest for token in running.tokens.values()), "tokens are printed once and never logged"
