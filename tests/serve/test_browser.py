"""The page in a real headless Chromium: every mode, stop and go on, side by side, history, download, bad uploads."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest
import serving
from PIL import Image
from serving import PROMPT, encoded, png

from ivr_jax.sampling.engine import Engine
from ivr_jax.serve.limits import Limits

ARTEFACTS = Path(__file__).resolve().parents[2] / ".cache" / "screenshots"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 720}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models = serving.tiny("tiny"), serving.tiny("other", seed=1)
    limits = Limits(upload_bytes=300_000, upload_pixels=1_000_000, references=3)
    with serving.serving(tmp_path_factory.mktemp("answers"), *models, limits=limits) as running:
        yield running


class Calls:
    """The engine's model calls, one a segment: it waits where it is until the test lets it go on."""

    def __init__(self):
        self.permits, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def one(self) -> None:
        """Lets one call happen, and waits for it."""
        self.permits.release()
        assert self.done.acquire(timeout=90)


@pytest.fixture
def calls(monkeypatch):
    step, made = Engine.step, Calls()

    def one_call(engine, calls=None, until=0):
        made.permits.acquire(timeout=90)
        work = step(engine, 1, until)
        made.done.release()
        return work

    monkeypatch.setattr(Engine, "step", one_call)
    yield made
    made.permits.release(10_000)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(server, browser):
    """Opens pages as different users; fails the test when a console or the policy complained, or another host was
    asked."""
    contexts, complaints = [], []

    def opened(path: str = "/", viewport=WIDE, scheme: str = "light", url: str = ""):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, accept_downloads=True)
        context.set_default_timeout(90_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        home = url or server.url
        page.on("request", lambda r: None if r.url.startswith((home, "data:", "blob:")) else complaints.append(r.url))
        page.goto(home + path)
        page.wait_for_selector("body[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def ask(page, prompt: str = PROMPT, mode: str = "", seed: int | None = 5) -> None:
    """Fills the form and draws."""
    page.fill("#prompt", prompt)
    if mode:
        page.locator(f"input[name=mode][value={mode}]").check(force=True)
    if seed is not None:
        if not page.locator("#seed").is_visible():
            page.click("#more summary")
        page.uncheck("#new-seed")
        page.fill("#seed", str(seed))
    page.evaluate("document.querySelectorAll('.answer').forEach((answer) => { answer.dataset.earlier = 'yes'; })")
    page.click("#draw")


def until(page, expression: str, seconds: float = 90) -> None:
    """Waits for an expression; Playwright's own `wait_for_function` needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.02)


def finished(page, answers: int = 1) -> None:
    """Waits until this many answers are complete, none of which was there when the last request was sent."""
    until(page, "!document.querySelector('.answer.busy, .answer[data-earlier]')")
    until(page, f"document.querySelectorAll('.answer').length === {answers} && !document.querySelector('.answer.busy')")


def kinds(page, answer: int = 0) -> list[str]:
    """The kinds of the parts of an answer, in order."""
    parts = page.locator(".answer").nth(answer).locator(".part").evaluate_all("x => x.map((p) => p.className)")
    return [name.split()[-1] for name in parts]


def keep(page, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"serve_{name}.png", full_page=True)


def audit(page) -> None:
    """No violation of axe's rules that is serious."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    serious = [(v["id"], [node["html"][:120] for node in v["nodes"]]) for v in found
               if v["impact"] in ("serious", "critical")]  # fmt: skip
    assert serious == []


@pytest.mark.parametrize("mode", ["direct", "reflection", "multi_step", "auto"])
def test_each_mode_from_text_alone(server, open_page, mode):
    page = open_page()
    ask(page, mode=mode)
    finished(page)
    found = kinds(page)
    assert found[:2] == ["image", "evaluation"]
    other = {"direct": None, "reflection": "reflection", "multi_step": "step", "auto": found[2] if found[2:] else None}
    assert set(found) == {"image", "evaluation"} | ({other[mode]} if other[mode] else set())
    assert len(page.locator(".part.evaluation").first.locator(".mark").all()) == 5  # four axes, and the whole
    cost = page.text_content(".cost")
    images = int(re.match(r"(\d+) image", cost)[1])
    assert images == found.count("image") and re.search(r"\d+ tokens · \d+ model calls · \d+\.\d s", cost)
    keep(page, mode)


def test_an_edit_with_one_and_with_two_references(server, open_page):
    page = open_page()
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png()})
    page.wait_for_selector("#references li")
    ask(page, mode="direct")
    finished(page)
    one = page.locator(".part.image img").get_attribute("src")
    page.set_input_files("#files", {"name": "b.png", "mimeType": "image/png", "buffer": png(grey=20)})
    until(page, "document.querySelectorAll('#references li').length === 2")
    until(page, "[...document.querySelectorAll('#references img')].every((i) => i.naturalWidth === 32)")
    ask(page, mode="direct")
    finished(page)
    assert kinds(page) == ["image", "evaluation"] and one.startswith("data:image/png")
    keep(page, "references")
    page.click("[aria-label='Remove reference 1']")
    assert page.locator("#references li").count() == 1


def test_references_are_dropped_and_pasted_too(server, open_page):
    page = open_page()
    made = "const d = new DataTransfer(); const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)); " \
           "d.items.add(new File([bytes], 'a.png', { type: 'image/png' })); const o = { bubbles: true };"  # fmt: skip
    fired = (
        (20, "window.dispatchEvent(new DragEvent('drop', { ...o, dataTransfer: d }))"),
        (30, "window.dispatchEvent(new ClipboardEvent('paste', { ...o, clipboardData: d }))"),
    )
    for number, (grey, event) in enumerate(fired, 1):
        data = base64.b64encode(png(grey=grey)).decode()
        page.evaluate(f"(data) => {{ {made} {event}; }}", data)
        until(page, f"document.querySelectorAll('#references li').length === {number}")
    assert page.is_hidden("#alert")


def test_rows_appear_and_an_answer_is_stopped_inside_an_image_and_goes_on(server, open_page, calls):
    page = open_page()
    ask(page, mode="reflection")
    until(page, "document.querySelector('.answer') !== null")
    rows = "[...document.querySelectorAll('.part.image figcaption')].pop()?.textContent"
    seen = []
    while not (page.locator(".part.reflection").count() and seen[-1:] == ["1 of 2 rows"]):
        calls.one()
        page.wait_for_timeout(250)
        seen.append(page.evaluate(rows))
        assert len(seen) < 120
    assert {"0 of 2 rows", "1 of 2 rows", "32 × 32 pixels"} <= set(seen)
    keep(page, "partial")
    with page.expect_response("**/stop"):
        page.keyboard.press("Escape")
    calls.permits.release(1000)
    finished(page)
    assert page.text_content(".status") == "stopped" and "not finished" in page.text_content(".cost")
    stopped = kinds(page)
    assert stopped[-1] == "image"
    keep(page, "stopped")
    before = page.url
    page.get_by_role("button", name="Continue", exact=True).click()
    until(page, f"location.href !== {json.dumps(before)}")
    finished(page)
    assert page.text_content(".status") == "done" and kinds(page)[: len(stopped)] == stopped
    assert kinds(page)[-1] == "evaluation"
    server.idle()


def test_a_critique_is_edited_and_the_model_goes_on_from_there(server, open_page):
    page = open_page()
    ask(page, mode="reflection")
    finished(page)
    first = page.url
    page.locator(".part.reflection").first.get_by_role("button", name="Edit").click()
    box = page.locator(".part.reflection textarea")
    box.nth(0).fill("much longer than the model itself may write")
    page.click("text=Continue from here")
    page.wait_for_selector("#alert:not([hidden])")
    box.nth(0).fill("no")
    box.nth(1).fill("ok")
    page.click("text=Continue from here")
    until(page, f"location.href !== {json.dumps(first)}")
    finished(page)
    texts = page.locator(".part.reflection").first.locator(".said").all_text_contents()
    assert texts == ["no", "ok"]
    assert kinds(page)[:4] == ["image", "evaluation", "reflection", "image"]
    page.go_back()
    until(page, f"location.href === {json.dumps(first)}")
    until(page, "!['no', undefined].includes(document.querySelector('.part.reflection .said')?.textContent)")


def test_a_verdict_is_turned_and_an_image_replaced(server, open_page):
    page = open_page()
    ask(page, mode="auto", seed=5)
    finished(page)
    before = page.url
    name = {"name": "mine.png", "mimeType": "image/png", "buffer": png(64, 64, grey=30)}
    page.locator(".part.image").first.locator("input[type=file]").set_input_files(name)
    until(page, f"location.href !== {json.dumps(before)}")
    finished(page)
    colour = page.locator(".part.image img").first.evaluate(
        "(image) => { const c = new OffscreenCanvas(1, 1).getContext('2d'); c.drawImage(image, 0, 0, 1, 1);"
        " return c.getImageData(0, 0, 1, 1).data[0]; }"
    )
    assert colour == 30
    page.locator(".part.evaluation").first.get_by_role("button", name="Edit").click()
    check = page.locator(".part.evaluation input[type=checkbox]").first
    wanted = not check.is_checked()
    check.set_checked(wanted)
    for box in page.locator(".part.evaluation textarea").all():
        if not box.input_value().strip():
            box.fill("so")
    before = page.url
    page.click("text=Continue from here")
    until(page, f"location.href !== {json.dumps(before)} || !document.querySelector('#alert').hidden")


def test_side_by_side_history_permalink_and_download(server, open_page):
    page = open_page()
    page.check("#compare")
    page.select_option("#model2", "other")
    page.select_option("#mode2", "direct")
    page.fill("#seed2", "6")
    ask(page, mode="multi_step")
    finished(page, 2)
    assert kinds(page, 1) == ["image", "evaluation"] and "step" in kinds(page, 0)
    chips = page.locator(".answer").nth(1).locator(".chip").all_text_contents()
    assert chips == ["Direct", "seed 6", "other"]
    boxes = [box.bounding_box() for box in page.locator(".answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    keep(page, "side_by_side")
    shared = page.url
    with page.expect_download() as download:
        page.locator(".answer").nth(0).get_by_text("Download").click()
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        names = {Path(name).name for name in archive.namelist()}
        record = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("answer.json"))))
    assert {"answer.html", "answer.json", "G1.png", "final.png"} <= names and "page.json" not in names
    assert record["about"]["seed"] == 5 and record["sample"]["prompt"] == PROMPT

    other = open_page(shared.removeprefix(server.url))
    finished(other, 2)
    assert kinds(other, 0) == kinds(page, 0) and other.input_value("#prompt") == PROMPT
    other.keyboard.press("h") if other.evaluate("document.activeElement === document.body") else None

    page.goto(server.url)
    page.wait_for_selector("body[data-ready]")
    page.click("#history-button")
    assert page.locator("#entries button").count() == 1
    keep(page, "history")
    page.click("#entries button")
    finished(page, 2)
    assert page.url == shared


def test_an_image_becomes_a_reference(server, open_page):
    page = open_page()
    ask(page, mode="direct")
    finished(page)
    page.click("text=Use as reference")
    page.wait_for_selector("#references li")
    ask(page, mode="direct", seed=6)
    finished(page)
    assert page.locator("#references li").count() == 1


BAD = {
    "text": b"this is no image",
    "empty": b"",
    "cut": png()[:40],
    "too many bytes": os.urandom(300_001),
    "bomb": encoded(Image.new("1", (4000, 4000)), "PNG"),
    "narrow": encoded(Image.new("RGB", (1, 5000)), "PNG"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_upload_is_one_message(server, open_page, kind):
    page = open_page()
    page.set_input_files("#files", {"name": f"{kind}.png", "mimeType": "image/png", "buffer": BAD[kind]})
    page.wait_for_selector("#alert:not([hidden])")
    assert len(page.text_content("#alert")) < 300 and page.locator("#references li").count() == 0


def test_images_of_other_kinds_are_taken_as_they_look(server):
    rotated = Image.new("RGB", (48, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    files = {
        "cmyk": (encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG"), (32, 32)),
        "sixteen bits": (encoded(Image.new("I;16", (32, 32), 40_000), "PNG"), (32, 32)),
        "exif": (encoded(rotated, "JPEG", exif=exif), (32, 48)),
        "transparent": (encoded(Image.new("RGBA", (32, 32), (0, 0, 0, 0)), "PNG"), (32, 32)),
    }
    with server.client() as http:
        for name, (data, size) in files.items():
            reply = http.post("/api/images", content=data)
            assert reply.status_code == 200, (name, reply.text)
            assert (reply.json()["width"], reply.json()["height"]) == size, name


def test_a_hostile_prompt_is_a_message_or_text(server, open_page):
    page = open_page()
    ask(page, prompt="Draw <|image start|> now")
    page.wait_for_selector("#alert:not([hidden])")
    hostile = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    ask(page, prompt=hostile, mode="direct")
    finished(page)
    assert page.text_content(".asked") == hostile and page.locator(".asked *").count() == 0
    assert page.title() == "ivr_jax" and page.is_hidden("#alert")


def test_two_users_at_once_see_their_own_answers(server, open_page):
    pages = [open_page(), open_page()]
    for seed, page in zip((5, 6), pages, strict=True):
        ask(page, mode="direct", seed=seed)
    for page in pages:
        finished(page)
    together = [page.locator(".part.image img").get_attribute("src") for page in pages]
    ask(pages[1], mode="direct", seed=5)
    finished(pages[1])
    assert pages[1].locator(".part.image img").get_attribute("src") == together[0]
    pages[1].click("#history-button")
    assert pages[1].locator("#entries button").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_no_serious_accessibility_finding(server, open_page, scheme):
    page = open_page(scheme=scheme)
    audit(page)
    page.check("#compare")
    page.click("#more summary")
    ask(page, mode="reflection")
    finished(page, 2)
    audit(page)
    page.locator(".part.reflection").first.get_by_role("button", name="Edit").click()
    page.click("#history-button")
    audit(page)


def test_the_page_fits_a_phone_and_is_used_by_keyboard(server, open_page):
    page = open_page(viewport=PHONE, scheme="dark")
    page.keyboard.press("/")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    keep(page, "phone")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    page.keyboard.press("h")
    assert page.is_visible("#history")


def test_a_token_is_asked_for_and_never_shown(tmp_path, browser, open_page):
    token = "correct-horse-battery"
    with serving.serving(tmp_path, token=token) as closed:
        page = browser.new_page()
        page.goto(closed.url)
        page.wait_for_selector("#token")
        audit(page)
        page.fill("#token", "wrong-horse-battery")
        page.keyboard.press("Enter")
        page.wait_for_selector("#alert:not([hidden])")
        page.fill("#token", token)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        assert page.evaluate("document.cookie") == "" and token not in page.content()
        page.close()
