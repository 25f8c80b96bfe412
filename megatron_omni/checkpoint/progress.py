"""How far a long copy has come: a bar on a terminal, a line every few seconds elsewhere; bytes/s and the time left."""

import sys
import time
from typing import TextIO

LINE_SECONDS, BAR_SECONDS = 10.0, 0.2


class ByteProgress:
    """Counts bytes towards ``total`` and says so on ``stream`` (standard error)."""

    def __init__(self, label: str, total: int, *, stream: TextIO | None = None) -> None:
        self.label, self.total, self.done = label, total, 0
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """``num_bytes`` more are done."""
        self.done += num_bytes
        if time.monotonic() - self._shown >= (BAR_SECONDS if self._terminal else LINE_SECONDS):
            self._show(end="\r" if self._terminal else "\n")

    def finish(self) -> None:
        """The last line."""
        self._show(end="\n")

    def text(self) -> str:
        """``import 4.2/15.2 GB  28 %  410 MB/s  27 s left``."""
        seconds = max(time.monotonic() - self._started, 1e-6)
        rate = self.done / seconds
        share = self.done / self.total if self.total else 1.0
        left = (
            f"{(self.total - self.done) / rate:.0f} s left" if self.done < self.total and rate else f"{seconds:.0f} s"
        )
        size, unit = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB") if self.total >= 1e6 else (1e3, "kB")
        speed = f"{rate / 1e6:.0f} MB/s" if rate >= 1e7 else f"{rate / 1e3:.0f} kB/s"
        return f"{self.label} {self.done / size:.2f}/{self.total / size:.2f} {unit}  {share:4.0%}  {speed}  {left}"

    def _show(self, *, end: str) -> None:
        self._shown = time.monotonic()
        bar = ""
        if self._terminal:
            filled = int(20 * self.done / self.total) if self.total else 20
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] "
        self._stream.write(f"{bar}{self.text()}{'   ' if self._terminal else ''}{end}")
        self._stream.flush()
