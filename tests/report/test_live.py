"""The live page over HTTP, with runs that grow while it looks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx2
import pytest
import uvicorn

from ivr_jax.errors import UserError
from ivr_jax.report import __main__ as command
from ivr_jax.report import live
from ivr_jax.report.pages import write_report

ARTEFACTS = Path(__file__).resolve().parents[2] / ".cache" / "screenshots"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def write(folder, steps, **extra):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 1 / step, "tokens_per_second": 100.0, **extra}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def page(tmp_path):
    """(folder, client): a served folder of two runs."""
    write(tmp_path / "sft", range(1, 1001))
    write(tmp_path / "rl", range(10, 50, 10), alarm_zero_variance=1.0, judge_cost=0.5)
    (tmp_path / "rl" / "config.json").write_text('{"stage": "rl", "steps": 60}')
    (tmp_path / "rl" / "gallery").mkdir()
    for step in (20, 40):
        (tmp_path / "rl" / "gallery" / f"step_{step:06d}.html").write_text(f"<p>{step}")
    (tmp_path / "secret.html").write_text("secret")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(live.make_app([tmp_path], port), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield tmp_path, client
    server.should_exit = True
    thread.join(timeout=30)
    listener.close()


def test_runs_are_followed_while_they_go_on(page):
    folder, client = page
    runs = {run["name"]: run for run in client.get("/state.json").json()["runs"]}
    rl = runs["rl"]
    assert (rl["stage"], rl["step"], rl["steps"], rl["gallery"]) == ("rl", 40, 60, "step_000040.html")
    assert rl["alarms"] == ["zero_variance"] and rl["judge"] == {"judge_cost": 0.5}
    curve = runs["sft"]["curves"]["loss"]
    assert len(curve) <= live.POINTS + 1 and curve[0] == [1, 1.0] and curve[-1] == [1000, 0.001]

    write(folder / "rl", range(10, 60, 10), alarm_zero_variance=0.0)
    write(folder / "later", [1])
    (folder / "sft" / "metrics.jsonl").write_text("no metrics\n")
    os.utime(folder / "rl" / "metrics.jsonl", (0, 0))
    runs = {run["name"]: run for run in client.get("/state.json").json()["runs"]}
    assert runs["rl"]["step"] == 50 and runs["rl"]["alarms"] == [] and runs["rl"]["age"] > 1e6
    assert set(runs) == {"later", "rl", "sft"} and runs["sft"]["error"]


def test_only_the_pages_own_files_are_served(page):
    _, client = page
    assert client.get("/gallery/rl/step_000040.html").text == "<p>40"
    hidden = ("rl/secret.html", "rl/../secret.html", "rl/..%2fsecret.html", "none/step_000040.html")
    for path in (*(f"/gallery/{name}" for name in hidden), "/secret.html", "/../metrics.jsonl"):
        assert client.get(path).status_code == 404, path
    home = client.get("/")
    assert home.status_code == 200 and "frame-ancestors 'none'" in home.headers["content-security-policy"]
    assert client.get("/live.js").status_code == client.get("/live.css").status_code == 200
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 421


def test_what_cannot_be_followed(tmp_path):
    with pytest.raises(UserError):
        live.serve([tmp_path / "missing"], 0)
    with pytest.raises(UserError):
        live.serve([tmp_path], 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        write(tmp_path / "run", [1])
        with pytest.raises(UserError):
            live.serve([tmp_path], taken.getsockname()[1])


def test_the_folder_may_follow_the_flag():
    assert command.with_live_folder(["report", "--live", "a", "--live=b"]) == ["report", "--live=a", "--live=b"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_the_page_follows_runs_in_a_browser(page):
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    folder, client = page
    write_report(folder / "rl/gallery/step_000040.html", "Rollouts of step 40", (), {}, (), (), ())
    complaints: list[str] = []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for scheme, width in (("light", 1280), ("dark", 390)):
            seen = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}).new_page()
            seen.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            seen.on("pageerror", lambda error: complaints.append(str(error)))
            seen.on("request", lambda r: None if r.url.startswith(str(client.base_url)) else complaints.append(r.url))
            seen.goto(str(client.base_url))
            seen.wait_for_selector("body[data-ready]")
            assert seen.locator("#runs h2").all_inner_texts() == ["rl", "sft"]
            assert seen.locator("#runs .alarm").all_inner_texts() == ["zero variance"]
            seen.frame_locator("iframe").locator("h1").wait_for()
            assert seen.frame_locator("iframe").locator("h1").inner_text() == "Rollouts of step 40"
            assert seen.evaluate("document.documentElement.scrollWidth") <= width
            violations = Axe().run(seen).response["violations"]
            assert [v["id"] for v in violations if v["impact"] in ("serious", "critical")] == []
            seen.locator("iframe").scroll_into_view_if_needed()
            seen.wait_for_timeout(300)  # what was out of sight is painted
            ARTEFACTS.mkdir(parents=True, exist_ok=True)
            seen.screenshot(path=ARTEFACTS / f"live_{scheme}.png", full_page=True)
        write(folder / "rl", range(10, 60, 10), reward=0.5)
        seen.locator("#runs article", has_text="step 50 of 60").wait_for()  # without a reload
        seen.fill("#filter", "reward")
        assert seen.locator("#charts h2").all_inner_texts() == ["reward"]
        chromium.close()
    assert complaints == []
