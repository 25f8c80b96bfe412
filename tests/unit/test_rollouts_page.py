"""The page of an iteration's rollouts: what it holds, the command that writes it, and how it looks in headless Chromium."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import Image

from megatron_omni.evaluation.rollouts_page import MOST_CHARACTERS, last_iteration, write_rollouts_page
from megatron_omni.rewards.rollouts import Rollout, write_rollouts
from tests.unit.in_browser import browser, keep, wait_for
from tests.unit.media_files import CODECS, scene, tone, write_scenes
from tests.unit.test_rollouts import rollout
from tools.show_rollouts import main

__all__ = ["browser"]
HOSTILE = '</script><img src=x onerror="window.hit = 1"><!--<script>\u2028 & "quoted"'


def group(prompt: int, answers: list[str | None], *, iteration: int, **fields: Any) -> list[Rollout]:
    """Responses to one prompt, whose solution is 3; None was left out."""
    rows = []
    for g, answer in enumerate(answers):
        total = None if answer is None else float(answer == "3") + 0.5
        rewards = {"number": None if answer is None else float(answer == "3"), "think_format": 0.5}
        spread = len(set(answers) - {None}) > 1
        defaults = {
            "text": f"<think>I count one, two, {answer}.</think>\n{answer}", "total": total, "rewards": rewards,
            "advantage": None if total is None or not spread else (1.0 if answer == "3" else -1.0), "tokens": 9 + g,
        }  # fmt: skip
        rows.append(rollout(prompt, g, iteration, **(defaults | fields)))
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with iterations 1 and 2, which share two prompts, on two ranks."""
    folder = tmp_path_factory.mktemp("run")
    Image.fromarray(scene(75, 51)).save(folder / "a.png")
    soundfile.write(folder / "b.wav", tone(0.5), 16_000)
    write_scenes(folder / "c.mp4", codec=CODECS[".mp4"], sound=tone(1, rate=48_000))
    media = {
        "picture": {"media": [{"kind": "image", "path": str(folder / "a.png")}]},
        "sound": {
            "source": "spoken", "turns": [{"role": "system", "content": "Think first."},
                                          {"role": "user", "content": "<audio> How many words?"}],
            "media": [{"kind": "audio", "path": str(folder / "b.wav")}],
        },
        "clip": {
            "turns": [{"role": "user", "content": "<video> How many turns?"}],
            "media": [{"kind": "video", "path": str(folder / "c.mp4")}],
        },
    }  # fmt: skip
    before = [*group(0, ["2", "4", "3", "2"], iteration=1, **media["picture"]),
              *group(1, ["1", "1", "1", "1"], iteration=1, **media["sound"])]  # fmt: skip
    write_rollouts(folder, before, iteration=1, rank=0, ranks=1)
    after = [*group(0, ["3", "3", "2", None], iteration=2, **media["picture"]),
             *group(1, ["3", "1", "3", "1"], iteration=2, **media["sound"]),
             *group(2, ["3", "3", "3", "3"], iteration=2, **media["clip"]),
             *group(3, [HOSTILE, "3"], iteration=2, media=[], turns=[{"role": "user", "content": HOSTILE}],
                    finish="length", text=HOSTILE, solution=[3, HOSTILE]),
             *group(4, ["5"], iteration=2, media=[{"kind": "image", "path": "absent.png"}],
                    text="<think>for ever " * 900)]  # fmt: skip
    for rank in range(2):
        mine = [one for one in after if one.prompt % 2 == rank]
        write_rollouts(folder, mine, iteration=2, rank=rank, ranks=2)
    return folder


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def test_what_the_page_holds(run: Path, tmp_path: Path) -> None:
    assert last_iteration(run) == 2
    data = data_of(write_rollouts_page(tmp_path / "page.html", (run, 2), (run, 1)))
    first, second, third, hostile, endless = data["groups"]
    assert [one["total"] for one in first["responses"]] == [1.5, 1.5, 0.5, None]  # the best first, left out last
    assert [one["total"] for one in first["before"]] == [1.5, 0.5, 0.5, 0.5]
    assert first["responses"][0]["thought"] == "I count one, two, 3." and first["responses"][0]["answer"] == "3"
    assert second["media"][0]["file"].startswith("media/") and (tmp_path / second["media"][0]["file"]).is_file()
    assert third["before"] is None and third["spread"] is False
    assert hostile["responses"][0]["answer"] == HOSTILE and hostile["solution"] == f"3\nor {HOSTILE}"
    assert endless["responses"][0]["answer"] == ""  # a thought without an end
    assert len(endless["responses"][0]["thought"]) < MOST_CHARACTERS + 60
    figures = {row["name"]: row for row in data["figures"]}
    assert figures["reward/number"]["before"] == pytest.approx(1 / 8)
    assert figures["groups with a spread"]["now"] == pytest.approx(3 / 5)
    assert figures["cut"]["now"] == pytest.approx(2 / 15)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    page = run / "rollouts" / "iter_0000002.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert data_of(page)["before"] is None
    assert main([str(run), "--iteration", "2", "--before", "1", "--out", str(tmp_path / "deep" / "index.html")]) == 0
    assert data_of(tmp_path / "deep" / "index.html")["before"]["iteration"] == 1
    assert main([str(run), "--before-run", str(run), "--before", "1", "--out", str(tmp_path / "x.html")]) == 0
    capsys.readouterr()
    assert main([str(run), "--iteration", "9"]) == 2
    assert "no rollouts of iteration 9" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "a run of task reinforce writes them" in capsys.readouterr().err


@pytest.fixture
def opened(browser: Any, run: Path, tmp_path: Path) -> Iterator[Any]:
    """The page from the disk; what the browser complains of fails the test."""
    file = write_rollouts_page(tmp_path / "page.html", (run, 2), (run, 1))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.goto(file.as_uri())
    page.locator(".group").first.wait_for()
    yield page
    assert not complaints
    page.close()


def places(page: Any) -> list[str]:
    return page.locator(".group .where").all_text_contents()


def test_media_responses_and_texts_that_are_text(opened: Any) -> None:
    keep(opened, "rollouts_wide")
    assert opened.locator(".thought").first.inner_text() == "I count one, two, 3."
    assert opened.locator("h1").inner_text().endswith("iteration 2")
    first = opened.locator(".group").first
    assert first.locator(".prompt").inner_text().startswith("picture 1 How many?")
    wait_for(opened, "() => document.querySelector('.group img').naturalWidth === 75")
    wait_for(opened, "() => document.querySelector('audio').duration > 0.4")
    wait_for(opened, "() => document.querySelector('video').duration > 2.5")
    then, now = first.locator("section").nth(0), first.locator("section").nth(1)
    assert then.locator(".total").all_text_contents() == ["1.5", "0.5", "0.5", "0.5"]
    assert now.locator(".total").all_text_contents() == ["1.5", "1.5", "0.5", "left out"]
    assert "advantage +1" in now.inner_text() and "number 1" in now.inner_text()
    hostile = opened.locator(".group").nth(3)
    assert HOSTILE.split("\u2028")[0] in hostile.locator(".answer").first.text_content()
    assert hostile.locator("img").count() == 0 and opened.evaluate("window.hit") is None
    assert "absent.png: not a file" in opened.locator(".missing").inner_text()


def test_filters_orders_search_and_keys(opened: Any) -> None:
    state, order = opened.get_by_label("Which prompts"), opened.get_by_label("Order")
    assert places(opened) == ["counting 10", "spoken 11", "counting 12", "counting 13", "counting 14"]
    expected = {
        "spread": ["counting 10", "spoken 11", "counting 13"], "equal": ["counting 12", "counting 14"],
        "left": ["counting 10"], "cut": ["counting 13"], "both": ["counting 10", "spoken 11"],
        "better": ["counting 10", "spoken 11"], "worse": [],
    }  # fmt: skip
    for value, rows in expected.items():
        state.select_option(value)
        assert places(opened) == rows, value
    assert opened.locator("#empty").is_visible()
    state.select_option("all")
    order.select_option("high")
    assert places(opened)[0] == "counting 12"
    order.select_option("gain")
    assert places(opened)[:2] == ["spoken 11", "counting 10"]
    opened.keyboard.press("Escape")
    opened.keyboard.press("ArrowRight")
    assert opened.locator(".group.current .where").inner_text() == "spoken 11"
    opened.keyboard.press("t")
    assert opened.locator("details").first.evaluate("d => d.open")
    keep(opened, "rollouts_thoughts")
    opened.get_by_label("Source").select_option("spoken")
    assert places(opened) == ["spoken 11"]
    opened.get_by_label("Search in texts").fill("no such words")
    wait_for(opened, "() => document.querySelectorAll('.group').length === 0")


def test_phone_width_and_darkness(opened: Any) -> None:
    opened.emulate_media(color_scheme="dark")
    keep(opened, "rollouts_dark")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    opened.set_viewport_size({"width": 390, "height": 844})
    for colour in ("dark", "light"):
        opened.emulate_media(color_scheme=colour)
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        keep(opened, f"rollouts_phone_{colour}")
