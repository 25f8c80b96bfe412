"""The page of a results folder: what it holds, what becomes of its media, and how it behaves in headless Chromium.

The tests in the browser are skipped, with the reason, where Chromium or playwright is not installed. OMNI_SCREENSHOTS=DIR
keeps pictures to look at.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from megatron_omni.data.decode.cpu import decode_audio, decode_image
from megatron_omni.evaluation.page import MOST_CHARACTERS, write_page
from megatron_omni.evaluation.page_media import PageMedia
from megatron_omni.evaluation.results import (
    SAMPLES,
    SUMMARY,
    CheckpointFacts,
    GroupSummary,
    Line,
    SampleResult,
    SkippedSample,
    Summary,
    TaskSummary,
    write_samples,
)
from tests.unit.in_browser import browser, keep, wait_for
from tests.unit.media_files import CODECS, scene, tone, write_scenes

HOSTILE = '</script><img src=x onerror="window.hit = 1"><!--<script>\u2028 & "quoted"'
LONG = "so it goes. " * 1000
__all__ = ["browser"]


def answered(row: int, question: str, answer: str, expected: str, **fields: Any) -> SampleResult:
    correct = answer == expected
    defaults: dict[str, Any] = {
        "id": f"r{row}", "prompt": [{"role": "user", "content": question}], "media": [], "expected": [expected],
        "options": None, "thought": None, "extracted": answer, "score": float(correct), "correct": correct,
        "statistics": None, "finish_reason": "stop", "seconds": 0.25, "tokens": 3,
    }  # fmt: skip
    return SampleResult(row=row, answer=answer, **(defaults | fields))


def media_files(folder: Path) -> dict[str, Path]:
    """Of each kind one that browsers play and one that they do not."""
    folder.mkdir()
    files = {name: folder / name for name in ("a.png", "b.tiff", "c.wav", "d.aiff", "e.mp4", "f.avi")}
    for name in ("a.png", "b.tiff"):
        Image.fromarray(scene(75, 51)).save(files[name])
    for name in ("c.wav", "d.aiff"):
        soundfile.write(files[name], tone(0.5), 16_000)
    write_scenes(files["e.mp4"], codec=CODECS[".mp4"], sound=tone(3, rate=48_000))
    write_scenes(files["f.avi"], codec=CODECS[".avi"])
    return files


def medium(kind: str, path: Path) -> dict[str, str]:
    return {"kind": kind, "path": str(path)}


def write_results(folder: Path, tasks: dict[str, dict[int, Line]], *, iteration: int = 7) -> Path:
    (folder / SAMPLES).mkdir(parents=True)
    for task, lines in tasks.items():
        write_samples(folder, task, lines)
    path = f"runs/tiny/checkpoints/iter_{iteration:07d}"
    summary = Summary(
        checkpoint=CheckpointFacts(path=path, iteration=iteration, digest="d" * 64), version="0.1.0", ranks=1,
        wall_seconds=1.0, step_seconds=0.9, tasks={task: summed_up(task, lines) for task, lines in tasks.items()},
        groups={"all": GroupSummary(score=0.5, tasks=list(tasks))},
    )  # fmt: skip
    (folder / SUMMARY).write_text(summary.to_json())
    return folder


def summed_up(task: str, lines: dict[int, Line]) -> TaskSummary:
    scores = [line.score for line in lines.values() if isinstance(line, SampleResult) and line.score is not None]
    lower = task == "sounds"
    return TaskSummary(
        file=f"{task}.jsonl", digest="0" * 64, metric="wer" if lower else "exact_match",
        metric_settings={}, metric_version="1", rule="whole",
        higher_is_better=not lower, score=sum(scores) / max(len(scores), 1), stderr=0.05, count=len(scores),
        skipped={"missing_media": len(lines) - len(scores)} if len(lines) > len(scores) else {}, unparsed=0,
        changed_by_rule=0, not_scored=0, finish_reasons={"stop": len(scores)}, first_prompt="", group="all",
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return media_files(tmp_path_factory.mktemp("page") / "data")


@pytest.fixture(scope="module")
def results(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A results folder, and an earlier one to compare it with."""
    folder = tmp_path_factory.mktemp("results")
    pictures = [medium("image", files["a.png"]), medium("image", files["b.tiff"])]
    clips = [medium("video", files["e.mp4"]), medium("video", files["f.avi"])]
    tasks: dict[str, dict[int, Line]] = {
        "pictures": {
            0: answered(0, "<image> and <image> what is there?", "a square", "a square", media=pictures),
            1: answered(1, "<video> then <video> where to?", "to the left", "to the right", media=clips),
            2: SkippedSample(row=2, id="", skipped="missing_media", message="media file 'x.png': no such file"),
            3: answered(3, HOSTILE, HOSTILE, "fine", thought=HOSTILE, id=HOSTILE),
            4: answered(4, "<image> gone?", "yes", "yes", media=[medium("image", files["a.png"].with_name("no.png"))]),
        },
        "sounds": {
            0: answered(0, "<audio><audio> what is said?", "la la", "la lo", score=0.5, correct=False,
                        media=[medium("audio", files["c.wav"]), medium("audio", files["d.aiff"])]),
            1: answered(1, "and now?", "la", "la", score=0.0, finish_reason="length"),
        },
        "choices": {
            row: answered(row, f"question {row}", "B" if row % 3 else "the answer is A", "B", extracted="B" if row % 3 else None,
                          options=["red", "green", "blue"],
                          prompt=[{"role": "system", "content": "answer with a letter"},
                                  {"role": "user", "content": "an example"}, {"role": "assistant", "content": "C"},
                                  {"role": "user", "content": f"question {row}"}])
            for row in range(60)
        },
    }  # fmt: skip
    tasks["sounds"][2] = answered(2, "long?", "yes", "yes", thought=LONG, score=0.0)
    earlier = {task: dict(lines) for task, lines in tasks.items()}
    earlier["pictures"][0] = answered(0, "q", "a circle", "a square")
    earlier["pictures"][4] = SkippedSample(row=4, id="", skipped="too_long", message="")
    earlier["sounds"][0] = answered(0, "q", "la lo", "la lo", score=0.0)
    earlier["sounds"][1] = answered(1, "q", "La", "la", score=0.0, correct=True)
    now, before = write_results(folder / "now", tasks), write_results(folder / "before", earlier, iteration=6)
    return now, before


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert "<" not in data
    return json.loads(data)


# ------------------------------------------------------------------------------------------------ the file


def test_the_data_are_those_of_the_folder(results: tuple[Path, Path]) -> None:
    now, before = results
    page = write_page(now, before)
    assert page == now / "index.html"
    data = data_of(page)
    assert [(s["task"], s["row"]) for s in data["samples"]][:6] == [
        *(("pictures", row) for row in range(5)), ("sounds", 0)
    ]  # fmt: skip
    assert data["samples"][3]["answer"] == HOSTILE
    assert data["samples"][7]["thought"].startswith(LONG[:MOST_CHARACTERS] + " …")
    assert f"({len(LONG) - MOST_CHARACTERS:,} more" in data["samples"][7]["thought"]
    assert data["samples"][0]["before"] == {"answer": "a circle", "score": 0.0, "correct": False, "same": False}
    assert data["samples"][2] == {
        "task": "pictures", "row": 2, "id": "", "skipped": "missing_media", "message": "media file 'x.png': no such file",
        }  # fmt: skip
    assert data["samples"][4]["before"] == {"skipped": "too_long"}
    assert data["facts"]["against_iteration"] == 6 and data["facts"]["iteration"] == 7
    assert [(t["name"], t["higher"]) for t in data["tasks"]] == [
        ("pictures", True),
        ("sounds", False),
        ("choices", True),
    ]
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="?(?:https?:)?//', text), "nothing comes from elsewhere"
    assert "before" not in data_of(write_page(now))["samples"][0]


def test_media_lie_beside_the_page_in_forms_that_browsers_play(files: dict[str, Path], tmp_path: Path) -> None:
    media = PageMedia(tmp_path)
    kinds = {
        "a.png": "image",
        "b.tiff": "image",
        "c.wav": "audio",
        "d.aiff": "audio",
        "e.mp4": "video",
        "f.avi": "video",
    }
    shown = {name: media.show(kind, str(files[name])) for name, kind in kinds.items()}
    placed = {name: tmp_path / (item.file or "") for name, item in shown.items()}
    for name in ("a.png", "c.wav", "e.mp4"):
        assert placed[name].read_bytes() == files[name].read_bytes() and placed[name].suffix == files[name].suffix
    assert np.array_equal(np.asarray(Image.open(placed["b.tiff"])), np.asarray(decode_image(str(files["b.tiff"]))))
    assert placed["b.tiff"].suffix == ".png"
    wave, rate = soundfile.read(placed["d.aiff"], dtype="float32")
    assert rate == 16_000 and np.abs(wave - decode_audio(str(files["d.aiff"]))).max() < 1e-4
    with av.open(str(files["f.avi"])) as given, av.open(str(placed["f.avi"])) as made:
        assert made.streams.video[0].codec_context.name == "h264"
        theirs, ours = list(given.decode(video=0)), list(made.decode(video=0))
        assert [frame.time for frame in ours] == pytest.approx([frame.time for frame in theirs], abs=2e-3)
        for a, b in zip(theirs, ours, strict=True):
            difference = a.to_ndarray(format="rgb24").astype(int) - b.to_ndarray(format="rgb24")
            assert np.abs(difference).mean() < 8
    again = media.show("image", str(files["a.png"]))
    assert again == shown["a.png"] and len(list((tmp_path / "media").iterdir())) == 6


def test_media_of_another_file_system_are_linked_too(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    for _ in range(2):  # a second page takes the place of the first one's links, not of what they lead to
        placed = tmp_path / (PageMedia(tmp_path).show("image", str(files["a.png"])).file or "")
        assert placed.is_symlink() and placed.resolve() == files["a.png"].resolve()
    assert files["a.png"].is_file()


def test_a_medium_that_cannot_be_shown_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x.tiff").write_bytes(b"hello")
    (tmp_path / "x.mp4").write_bytes(b"hello")
    (tmp_path / "x.html").write_text("<script>window.hit = 1</script>")
    media = PageMedia(tmp_path / "out")
    for kind, name, said in (
        ("image", "x.tiff", "x.tiff"), ("video", "x.mp4", "x.mp4"), ("image", "x.html", "x.html"),
        ("audio", "shard.tar/1.wav", "not a file"), ("image", "none.png", "not a file"),
    ):  # fmt: skip
        shown = media.show(kind, str(tmp_path / name))
        assert shown.file is None and said in (shown.problem or "")
    assert not list((tmp_path / "out").rglob("*.*"))


def test_a_folder_without_results_is_named(tmp_path: Path, results: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"nothing: no summary\.json"):
        write_page(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"nothing: no summary\.json"):
        write_page(results[0], tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def opened(browser: Any, results: tuple[Path, Path]) -> Iterator[Any]:
    """The page from the disk; what the browser complains of fails the test."""
    file = write_page(*results)
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on(
        "request",
        lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    page.goto(file.as_uri())
    page.locator(".sample").first.wait_for()
    yield page
    assert not complaints
    page.close()


def cards(page: Any) -> list[str]:
    return page.locator(".sample .where").all_text_contents()


def test_media_play_and_texts_are_text(opened: Any) -> None:
    keep(opened, "results_wide")
    assert opened.locator("h1").inner_text() == "runs/tiny, iteration 7"
    first, second, _, hostile, gone = (opened.locator(".sample").nth(i) for i in range(5))
    assert first.locator("dd.prompt").inner_text() == "picture 1 and picture 2 what is there?"
    for i in range(2):
        first.locator("img").nth(i).scroll_into_view_if_needed()
        wait_for(opened, "i => document.querySelectorAll('.sample img')[i].naturalWidth === 75", i)
    for i in range(2):
        wait_for(opened, "i => document.querySelectorAll('video')[i].duration > 2.5", i)
    assert second.locator("video").count() == 2
    assert HOSTILE.split("\u2028")[0] in hostile.locator("dd.answer").text_content()
    assert hostile.locator("img").count() == 0 and opened.evaluate("window.hit") is None
    assert "no.png: not a file on this machine" in gone.locator(".missing").inner_text()
    opened.get_by_label("Task").select_option("sounds")
    for i in range(2):
        wait_for(opened, "i => Math.abs(document.querySelectorAll('audio')[i].duration - 0.5) < 0.05", i)


def test_filters_and_search(opened: Any) -> None:
    state, task, count = opened.get_by_label("Which samples"), opened.get_by_label("Task"), opened.locator("#count")
    assert count.inner_text() == "1–20 of 68" and len(cards(opened)) == 20
    state.select_option("wrong")
    assert cards(opened)[:3] == ["pictures 1", "pictures 3", "sounds 0"] and count.inner_text() == "1–20 of 23"
    task.select_option("pictures")
    assert cards(opened) == ["pictures 1", "pictures 3"]
    expected = {
        "skipped": ["pictures 2"], "right": ["pictures 0", "pictures 4"], "better": ["pictures 0"], "worse": [],
        "changed": ["pictures 0"], "unparsed": [], "length": [],
    }  # fmt: skip
    for value, rows in expected.items():
        state.select_option(value)
        assert cards(opened) == rows, value
    assert opened.locator("#empty").is_visible()
    task.select_option("sounds")
    assert cards(opened) == ["sounds 1"]
    state.select_option("worse")  # of an error rate more is worse
    assert cards(opened) == ["sounds 0"]
    assert (
        "before" in opened.locator(".sample dl").inner_text() and "got worse" in opened.locator(".sample").inner_text()
    )
    state.select_option("changed")
    assert (
        cards(opened) == ["sounds 0", "sounds 1"] and "another answer" in opened.locator(".sample").nth(1).inner_text()
    )
    state.select_option("all")
    opened.locator("tr.task[data-task=choices]").click()
    assert task.input_value() == "choices" and count.inner_text() == "1–20 of 60"
    opened.locator("tr.task[data-task=choices]").click()
    assert task.input_value() == ""
    opened.get_by_label("Search in texts").fill("QUESTION 57")
    wait_for(opened, "document.querySelectorAll('.sample').length === 1")
    assert cards(opened) == ["choices 57"]
    card = opened.locator(".sample")
    assert card.locator(".options .expected").inner_text() == "green"
    assert "nothing found by the rule" in card.inner_text()
    keep(opened, "results_choice")


def test_leafing_by_keys(opened: Any) -> None:
    current = lambda: opened.locator(".sample.current .where").inner_text()  # noqa: E731
    opened.keyboard.press("ArrowRight")
    assert current() == "pictures 0"
    opened.keyboard.press("ArrowRight")
    assert current() == "pictures 1"
    opened.keyboard.press("w")
    for _ in range(21):
        opened.keyboard.press("ArrowRight")
    assert current() == "choices 51" and opened.locator("#count").inner_text() == "21–23 of 23"
    opened.keyboard.press("ArrowLeft")
    assert current() == "choices 48"
    opened.keyboard.press("a")
    opened.keyboard.press("t")
    hostile = opened.locator(".sample", has_text="pictures 3")
    assert hostile.locator("details").first.evaluate("d => d.open")
    opened.keyboard.press("/")
    opened.keyboard.type("a wall of text")
    wait_for(opened, "document.querySelectorAll('.sample').length === 0")
    opened.keyboard.press("Escape")
    assert opened.evaluate("document.activeElement === document.body")


def test_phone_width_and_darkness(opened: Any) -> None:
    opened.emulate_media(color_scheme="dark")
    keep(opened, "results_dark")
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    opened.set_viewport_size({"width": 390, "height": 844})
    for colour in ("dark", "light"):
        opened.emulate_media(color_scheme=colour)
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390
        keep(opened, f"results_phone_{colour}")


def test_ten_thousand_samples_are_one_page_at_a_time(browser: Any, tmp_path: Path) -> None:
    lines: dict[int, Line] = {
        i: answered(i, f"how much is {i} + {i}?", str(2 * i + (i % 7 == 0)), str(2 * i)) for i in range(10_000)
    }
    file = write_page(write_results(tmp_path / "many", {"sums": lines}))
    page = browser.new_page()
    page.goto(file.as_uri())
    assert page.locator("#count").inner_text() == "1–20 of 10,000" and page.locator(".sample").count() == 20
    page.keyboard.press("w")
    assert page.locator("#count").inner_text() == "1–20 of 1,429"
    page.get_by_label("Search in texts").fill("9996 + 9996")
    wait_for(page, "document.querySelectorAll('.sample').length === 1")
    assert cards(page) == ["sums 9996"]
    page.close()
