"""Headless Chromium for tests of pages; they are skipped, with the reason, where it or playwright is not installed.

OMNI_SCREENSHOTS=DIR keeps pictures to look at. A test file imports the fixture ``browser``.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; Debian: apt-get install chromium")
    with playwright.sync_playwright() as runner:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--autoplay-policy=no-user-gesture-required",
        ]
        started = runner.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


def keep(page: Any, name: str) -> None:
    if directory := os.environ.get("OMNI_SCREENSHOTS"):
        page.screenshot(path=str(Path(directory) / f"{name}.png"))


def wait_for(page: Any, expression: str, argument: Any = None) -> None:
    """Not by playwright's own polling: the page's policy lets no string become a script."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)
