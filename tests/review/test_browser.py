"""The review page in a real headless Chromium: keys, comments, undo, zoom, hostile texts; a screenshot is kept."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from photographs import write_success
from review_server import serving

from ivr_jax.construct.released import iter_released
from ivr_jax.data.store import TrajectoryWriter
from ivr_jax.trajectory import Reflection, Round, Trajectory

ARTEFACTS = Path(__file__).resolve().parents[2] / ".cache" / "screenshots"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e&amp; {{7*7}}"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")


def hostile(trajectory: Trajectory) -> Trajectory:
    """The same rounds with every text replaced."""
    def evaluation(before):
        return dataclasses.replace(before, quality=dataclasses.replace(before.quality, reason=HOSTILE))

    rounds = tuple(Round(Reflection(HOSTILE, HOSTILE) if r.cause else None, r.image, evaluation(r.evaluation))
                   for r in trajectory.rounds)
    sample = dataclasses.replace(trajectory.sample, key=f"{trajectory.sample.key}</title>", prompt=HOSTILE,
                                 explanation=HOSTILE, category=HOSTILE)
    return Trajectory(sample, rounds)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    with TrajectoryWriter(root / "data") as writer:
        for found in iter_released(write_success(root, 192)):
            writer.add(found.trajectory, found.images)
            if found.trajectory.sample.key == "coffee_mirrored":
                writer.add(hostile(found.trajectory), found.images)
    with serving(root / "data", "--reviewers=Ana,Ben") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(server, browser):
    """Ana's page, ready; fails the test when the console or the policy complained."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    context.set_default_timeout(60_000)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.text} {message.location['url']}")
            if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(server.address("Ana"))
    settled(page)
    yield page
    context.close()
    assert [text for text in complaints if "favicon.ico" not in text and "ERR_FAILED" not in text] == []


def settled(page) -> None:
    page.wait_for_selector("#main[aria-busy='false']")


def at(page, number: int) -> None:
    """Waits until sample `number` (from 1) is shown."""
    from playwright.sync_api import expect

    expect(page.locator("#position")).to_have_value(str(number), timeout=60_000)
    settled(page)


def marks(server, reviewer: str = "Ana") -> str:
    return server.get(reviewer, "state")["verdicts"]


def test_a_reviewer_works_through_the_samples_with_the_keyboard(server, page):
    assert page.text_content("#reviewer") == "Ana" and page.text_content("#total") == "6"
    prompt = page.text_content("#prompt")
    page.keyboard.press("a")
    at(page, 2)
    assert page.text_content("#prompt") != prompt and page.text_content("#n-accept") == "1"
    page.keyboard.press("c")
    page.keyboard.type("ra: not dusk yet")  # letters in the comment are no commands
    page.keyboard.press("Enter")
    page.keyboard.press("r")
    at(page, 3)
    assert marks(server) == "ar...." and marks(server, "Ben") == "......"
    assert server.get("Ana", "sample/1")["decision"]["comment"] == "ra: not dusk yet"

    page.keyboard.press("u")
    at(page, 2)
    assert marks(server) == "a....." and page.input_value("#comment") == "ra: not dusk yet", "the comment comes back"
    page.keyboard.press("a")
    at(page, 3)
    page.keyboard.press("ArrowLeft")
    at(page, 2)
    assert page.text_content("#mine") == "you accepted this"
    page.keyboard.press("r")  # a changed mind
    at(page, 3)
    assert marks(server) == "ar...."
    page.keyboard.press("u")
    at(page, 2)
    assert marks(server) == "aa....", "undoing brings the earlier verdict back"

    page.reload()
    at(page, 2)
    assert page.text_content("#mine") == "you accepted this" and page.text_content("#n-open") == "4"
    page.keyboard.press("n")
    at(page, 3)
    page.keyboard.press("g")
    page.keyboard.type("6")
    page.keyboard.press("Enter")
    at(page, 6)
    page.click("#undo")
    at(page, 2)
    page.keyboard.press("ArrowLeft")
    at(page, 1)
    page.keyboard.press("u")
    page.wait_for_selector("#undo:disabled")
    assert marks(server) == "......"


def test_every_image_stands_beside_its_text_and_can_be_enlarged_in_place(server, page):
    page.goto(server.address("Ana") + "#2")
    page.reload()
    at(page, 2)
    assert "atomic" not in page.text_content("#tags") and "multi-step" in page.text_content("#tags")
    labels = [text.strip() for text in page.locator(".card .head span:first-child").all_text_contents()]
    assert labels == ["Source", "First image", "Step 1", "Step 2"]
    steps = page.locator(".said p").all_text_contents()
    assert steps == ["Mirror the cat; keep all else.", "Make it dusk; keep all else."]
    page.wait_for_load_state("networkidle")
    widths = page.locator(".frame img").evaluate_all("images => images.map((image) => image.naturalWidth)")
    assert widths == [192] * 4
    boxes = [frame.bounding_box() for frame in page.locator(".frame").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({round(box["height"]) for box in boxes}) == 1, "in one row"
    assert max(box["x"] + box["width"] for box in boxes) <= 1440
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / "review.png")

    page.keyboard.press("z")
    assert page.text_content("#zoom-label") == "Step 2"
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#zoom-label") == "Step 1"
    page.keyboard.down(" ")
    assert page.text_content("#zoom-label") == "Source"
    page.keyboard.up(" ")
    assert page.text_content("#zoom-label") == "Step 1"
    before = page.locator("#zoom-image").bounding_box()["width"]
    page.keyboard.press("+")
    assert page.locator("#zoom-image").bounding_box()["width"] == pytest.approx(1.5 * before, rel=0.01)
    page.screenshot(path=ARTEFACTS / "review_zoom.png")
    page.keyboard.press("a")  # decides nothing while an image is enlarged
    page.keyboard.press("Escape")
    assert not page.is_visible("#zoom") and marks(server) == "......"
    page.keyboard.press("1")
    assert page.text_content("#zoom-label") == "Source"


def test_hostile_texts_are_shown_as_texts(server, page):
    number = next(i for i in range(6) if server.get("Ana", f"sample/{i}")["key"].endswith("</title>")) + 1
    page.goto(server.address("Ana") + f"#{number}")
    page.reload()
    at(page, number)
    assert page.text_content("#prompt") == HOSTILE and page.text_content("#explanation") == HOSTILE
    assert page.locator(".said p").all_text_contents() == [HOSTILE, HOSTILE]
    assert page.locator("main script, main img[src='x']").count() == 0
    assert page.title() == f"{number} / 6 – review"


def test_a_verdict_that_could_not_be_saved_is_said_so_and_not_counted(server, page):
    page.route("**/decide", lambda route: route.abort())
    page.goto(server.address("Ana") + "#3")
    page.reload()
    at(page, 3)
    page.keyboard.press("a")
    page.wait_for_selector("#alert:not([hidden])")
    assert page.text_content("#alert").startswith("Not saved:") and page.text_content("#n-accept") == "0"
    assert page.input_value("#position") == "3" and marks(server) == "......"
    page.unroute("**/decide")
    page.keyboard.press("a")
    at(page, 4)
    assert marks(server) == "..a..." and page.is_hidden("#alert")
    page.keyboard.press("u")
    at(page, 3)


def test_another_site_can_neither_decide_nor_read_nor_frame(server, browser):
    page = browser.new_page()
    page.goto("about:blank")
    address = server.address("Ben")
    attempt = """async (address) => {
        const body = JSON.stringify({position: 0, verdict: "accept", comment: "", request: "from-elsewhere"});
        const read = await fetch(address + "state").then((r) => r.text()).catch(() => "refused");
        await fetch(address + "decide", {method: "POST", mode: "no-cors", body}).catch(() => null);
        return read;
    }"""
    assert page.evaluate(attempt, address) == "refused"
    assert marks(server, "Ben") == "......"
    page.set_content(f"<iframe id=f src='{address}'></iframe>")
    page.wait_for_timeout(300)
    assert all(frame.locator("#accept").count() == 0 for frame in page.frames)
    page.close()


def test_the_page_fits_a_small_dark_window(server, browser):
    context = browser.new_context(viewport={"width": 800, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.goto(server.address("Ben"))
    settled(page)
    for button in ("#accept", "#reject", "#undo", "#comment"):
        box = page.locator(button).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 800 and box["y"] + box["height"] <= 700, button
    page.keyboard.press("?")
    page.screenshot(path=ARTEFACTS / "review_help.png")
    context.close()
