"""What happens between steps: stop signals, held-out evaluation, the decision to save.

Signals: SIGTERM, SIGINT and SIGUSR1 set a flag. The flag rides on the reduction that every step begins with, so all
ranks act on it after the same step: they save a checkpoint and leave with status 75 ("saved, requeue me"). A second
signal ends the process at once with 128 + its number. Launchers deliver one interruption several times within
milliseconds (the terminal to the whole process group, then torchrun to its workers); copies that arrive within half a
second count as one signal.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from megatron_omni.config.run import Recipe

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_REQUEUE = 75
SAME_SIGNAL_SECONDS = 0.5


class StopSignals:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        now = time.monotonic()
        if self.received is not None and now - self._first > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        if self.received is None:
            self.received = signal.Signals(number)
            self._first = now

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handle the stop signals inside the block, and the previous way after it."""
        previous = {number: signal.signal(number, self) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def save_due(recipe: Recipe, step: int) -> bool:
    """Whether a checkpoint follows ``step``: at the interval, and after the last step of the run."""
    interval = recipe.checkpoint.save_interval
    return step >= recipe.train_iters or (interval > 0 and step % interval == 0)


def eval_due(recipe: Recipe, step: int) -> bool:
    """Whether the held-out sets are evaluated after ``step``: at the interval, and after the last step of the run."""
    interval = recipe.log.eval_interval
    if interval <= 0 or not recipe.data.eval_sources:
        return False
    return step >= recipe.train_iters or step % interval == 0


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Modules in evaluation mode (no dropout) inside the block."""
    model.eval()
    try:
        yield
    finally:
        model.train()


class PartTimer:
    """Wall seconds by part of the step, summed since the last :meth:`take`; one part runs at a time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the block's wall time to ``part``."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """The sums so far; starts again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds
