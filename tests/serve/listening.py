"""The page with a listener: what it hands to the loudspeaker is kept, and what its player holds can be downloaded.

What is handed over are samples and the time at which they begin; that a context renders just these was seen by hand.
"""

import io
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.unit.in_browser import wait_for

RATE = 24_000
LISTEN = """
window.told = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when) {
  const samples = Array.from(this.buffer.getChannelData(0), s => s * 32768);
  told.push({when, rate: this.buffer.sampleRate, samples, context: this.context});
  return start.call(this, when);
};
"""


@contextmanager
def listened(browser: Any, url: str, *, width: int = 1000, scheme: str = "light") -> Iterator[Any]:
    """The page, opened, with its voices; whatever the browser complains of fails the test."""
    context = browser.new_context(
        viewport={"width": width, "height": 640}, color_scheme=scheme, permissions=["clipboard-read", "clipboard-write"]
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.add_init_script(LISTEN)
    page.goto(url)
    wait_for(page, "() => !document.getElementById('send').disabled && !document.getElementById('spoken').hidden")
    yield page
    assert not complaints
    context.close()


def choose(page: Any, voice: str) -> None:
    """In the settings: the value of an option, "" for a written answer."""
    page.locator("#options").click()
    page.get_by_label("Answers").select_option(voice)
    page.locator("#options").click()


def ask(page: Any, text: str) -> Any:
    """The whole answer."""
    number = page.locator(".turn.assistant").count() + 1
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")
    whole = "n => document.querySelectorAll('.turn.assistant').length == n && !document.querySelector('.busy')"
    wait_for(page, whole, number)
    return page.locator(".turn.assistant").nth(number - 1)


def live_samples(page: Any) -> NDArray[np.float64]:
    """What was played while it came [n]: no part before the end of the one before it, all at the sound's own rate."""
    parts = page.evaluate("told.map(({when, rate, samples, context}) => [when, rate, samples, context.sampleRate])")
    assert parts and all(rate == context_rate == RATE for _, rate, _, context_rate in parts)
    for (when, _, samples, _), (following, *_) in pairwise(parts):
        assert following >= when + len(samples) / RATE - 1e-6
    return np.concatenate([samples for _, _, samples, _ in parts])


def is_silent(page: Any) -> None:
    """Wait until nothing is played any more."""
    wait_for(page, "() => told.every(({context}) => context.state === 'closed')")


def downloaded(page: Any, player: Any) -> NDArray[np.int16]:
    """The file behind a player [n], which can be played and is as long as it says."""
    with page.expect_download() as download:
        player.evaluate("a => Object.assign(document.createElement('a'), {href: a.src, download: 'a.wav'}).click()")
    with wave.open(io.BytesIO(Path(download.value.path()).read_bytes())) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    wait_for(page, "() => [...document.querySelectorAll('.turn audio')].every(a => a.readyState > 0)")
    duration, error = player.evaluate("a => [a.duration, a.error]")
    assert error is None and abs(duration - len(samples) / RATE) < 1e-3
    return samples
