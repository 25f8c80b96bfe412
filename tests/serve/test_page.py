"""The page in headless Chromium, against a real server: asking with media, streams, editing, errors, keyboard, phone width.

Skipped, with its reason, where Chromium or playwright is not installed. OMNI_SCREENSHOTS=DIR keeps pictures to look at.
"""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.serve.harness import Running, serving
from tests.trained import Trained

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed; Debian: apt-get install chromium")

SECONDS = 60_000.0
"""Milliseconds, for a busy machine."""


@pytest.fixture(scope="module")
def browser(trained: Trained) -> Iterator[Any]:
    """Chromium with a microphone that plays a file; the name lan.test is this machine."""
    flags = [
        "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={trained.media / '2.wav'}", "--host-resolver-rules=MAP lan.test 127.0.0.1",
        "--autoplay-policy=no-user-gesture-required", "--disable-gpu", "--disable-dev-shm-usage",
    ]  # fmt: skip
    with playwright.sync_playwright() as runner:
        started = runner.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The page, opened; what the browser complains of fails the test."""
    context = browser.new_context(permissions=["microphone", "clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    opened.goto(server.url)
    opened.locator("#model", has_text="tiny").wait_for()
    opened.locator("#options").click()
    opened.get_by_label("Most tokens").fill("12")
    opened.locator("#options").click()
    opened.complaints = complaints
    yield opened
    expected = [said for said in complaints if "Failed to load resource" not in said]
    assert not expected
    context.close()


def keep(page: Any, name: str) -> None:
    if directory := os.environ.get("OMNI_SCREENSHOTS"):
        page.screenshot(path=str(Path(directory) / f"{name}.png"))


def finished(page: Any, number: int = 1) -> Any:
    """The last answer, when ``number`` answers are whole."""
    page.wait_for_function(
        "n => document.querySelectorAll('.turn.assistant').length == n && !document.querySelector('.busy')", arg=number
    )
    return page.locator(".turn.assistant").last


def test_a_conversation_with_media(page: Any, server: Running, trained: Trained) -> None:
    page.locator("#files").set_input_files([trained.media / "1.png", trained.media / "2.wav", trained.media / "v.mp4"])
    page.wait_for_function("() => document.querySelectorAll('#waiting figure').length == 3")
    page.get_by_label("Remove 2.wav").click()
    page.get_by_label("Message").fill("what is it?\nand <image>?")
    keep(page, "attached")
    page.get_by_label("Message").press("Enter")
    answer = finished(page)
    assert answer.locator(".body").inner_text().strip()
    assert "tokens" in answer.locator(".row").inner_text() and "first after" in answer.locator(".row").inner_text()
    assert answer.locator("audio").count() == 0 and page.locator("#spoken").is_hidden(), "nothing speaks here"
    mine = page.locator(".turn.user").first
    assert mine.locator(".body").inner_text() == "what is it?\nand <image>?"
    assert mine.locator("img").count() == mine.locator("video").count() == 1 and mine.locator("audio").count() == 0
    assert page.evaluate("document.querySelector('.turn.user img').naturalWidth") == 16
    keep(page, "answered")

    answer.get_by_role("button", name="Copy as curl").click()
    page.wait_for_function("() => document.body.innerText.includes('Copied')")
    command = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)["choices"][0]["message"]["content"]
    assert said.strip() == answer.locator(".body").inner_text().strip(), shlex.quote(command[:200])

    page.get_by_label("Message").fill("and now?")
    page.get_by_role("button", name="Send").click()
    second = finished(page, 2)
    second.get_by_role("button", name="Again").click()
    finished(page, 2)
    page.locator(".turn.user").first.get_by_role("button", name="Edit").click()
    assert page.locator(".turn").count() == 0 and page.locator("#waiting figure").count() == 2
    assert page.get_by_label("Message").input_value() == "what is it?\nand <image>?"


def test_the_microphone(page: Any, server: Running) -> None:
    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(1200)
    page.get_by_role("button", name="Record").click()
    page.wait_for_function("() => document.querySelectorAll('#waiting audio').length == 1")
    before = server.metrics().get('omni:prompt_tokens_total{modality="audio"}', 0.0)
    page.get_by_role("button", name="Send").click()
    finished(page)
    assert server.metrics()['omni:prompt_tokens_total{modality="audio"}'] > before
    assert page.evaluate("turns[0].media[0].url.slice(0, 15)") == "data:audio/wav;"
    data = base64.b64decode(page.evaluate("turns[0].media[0].url.split(',')[1]"))
    assert numpy.abs(numpy.frombuffer(data[44:], dtype="<i2")).max() > 1000, "not silence"


def test_paste_and_drop(page: Any, trained: Trained) -> None:
    hand_over = """([data, kind]) => {
      const files = new DataTransfer();
      const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
      files.items.add(new File([bytes], "p.png", {type: "image/png"}));
      const event = kind === "paste" ? new ClipboardEvent("paste", {clipboardData: files, bubbles: true, cancelable: true})
        : new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true});
      document.body.dispatchEvent(event);
    }"""
    data = base64.b64encode((trained.media / "0.png").read_bytes()).decode()
    for count, kind in enumerate(("paste", "drop"), 1):
        page.evaluate(hand_over, [data, kind])
        page.wait_for_function(f"() => document.querySelectorAll('#waiting img').length == {count}")
    page.evaluate("attach([new File(['x'], 'x.zip', {type: 'application/zip'})])")
    assert "x.zip is no picture, sound or clip." in page.get_by_role("alert").inner_text()


def test_a_stopped_answer_and_an_error_with_a_second_try(page: Any, server: Running) -> None:
    page.locator("#options").click()
    page.get_by_label("Most tokens").fill("200")
    page.get_by_label("Temperature").fill("1")
    page.locator("#options").click()
    # An answer of 200 tokens at some ten a second: no drawn end and no fast machine is sooner than the key.
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True})),
    )
    network = page.context.new_cdp_session(page)
    speed = {"offline": False, "latency": 0, "uploadThroughput": -1, "downloadThroughput": 4000}
    network.send("Network.emulateNetworkConditions", speed)
    page.get_by_label("Message").fill("red")
    page.get_by_label("Message").press("Enter")
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    page.wait_for_function("() => document.querySelector('.busy .body')?.textContent.length > 2")
    page.keyboard.press("Escape")
    assert "stopped" in finished(page).inner_text()
    network.send("Network.emulateNetworkConditions", speed | {"downloadThroughput": -1})
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="New chat").click()  # what was said may be long
    page.locator("#options").click()
    page.get_by_label("Most tokens").fill("5000")
    page.locator("#options").click()
    page.get_by_label("Message").fill("more")
    page.get_by_label("Message").press("Enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "together" in alert.inner_text() and "traceback" not in alert.inner_text().lower()
    keep(page, "error")
    page.locator("#options").click()
    page.get_by_label("Most tokens").fill("5")
    alert.get_by_role("button", name="Try again").click()
    finished(page)
    assert page.get_by_role("alert").count() == 0


def test_a_server_that_is_gone_is_a_sentence(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("Message").fill("red")
    page.get_by_label("Message").press("Enter")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("The server does not answer.")
    page.unroute("**/v1/chat/completions")
    alert.get_by_role("button", name="Try again").click()
    finished(page)


def test_thoughts_are_folded_and_nothing_becomes_html(page: Any) -> None:
    """What a model could say, sent in place of the answer: no tiny model thinks."""
    parts = [
        {"reasoning_content": "let me <b>see</b>"},
        {"content": "<img src=x onerror=alert(1)>"},
        {"content": " done"},
    ]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in parts]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ": ping\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.get_by_label("Message").fill("red")
    page.get_by_label("Message").press("Enter")
    answer = finished(page)
    assert answer.locator(".body").inner_text() == "<img src=x onerror=alert(1)> done"
    assert answer.locator("img, b").count() == 0
    fold = answer.locator("details")
    assert not fold.locator("div").is_visible()
    fold.locator("summary").click()
    assert fold.locator("div").inner_text() == "let me <b>see</b>"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width_in_light_and_dark_and_by_keyboard(
    browser: Any, server: Running, trained: Trained, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(server.url)
    page.locator("#model", has_text="tiny").wait_for()
    page.evaluate("document.getElementById('max_tokens').value = 12")
    page.locator("#files").set_input_files([trained.media / "1.png", trained.media / "2.wav"])
    page.wait_for_function("() => document.querySelectorAll('#waiting figure').length == 2")
    page.get_by_label("Message").fill("which colour " * 12)
    page.get_by_label("Message").press("Enter")
    finished(page)
    keep(page, f"phone_{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
    style = "name => getComputedStyle(document.body)[name]"
    background, text = page.evaluate(style, "backgroundColor"), page.evaluate(style, "color")
    levels = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, text)]
    assert (levels[0] > levels[1]) == (scheme == "light") and abs(levels[0] - levels[1]) > 400
    reached = []
    page.get_by_label("Message").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert {"Attach", "Record", "Send"} <= set(reached), reached
    context.close()


def test_no_microphone_on_a_page_that_is_not_safe(browser: Any, server: Running) -> None:
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(server.url.replace("127.0.0.1", "lan.test"))
    page.locator("#model", has_text="tiny").wait_for()
    page.get_by_role("button", name="Record").click()
    assert "over https" in page.get_by_role("alert").inner_text()
    page.close()


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One that goes by the name lan.test as well."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(trained.run_dir, "--allowed-hosts", "lan.test", log=log) as running:
        yield running
