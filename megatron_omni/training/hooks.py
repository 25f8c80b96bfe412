"""What happens between steps: stop signals, held-out evaluation, the decision to save.

Signals: SIGTERM, SIGINT and SIGUSR1 set a flag. The flag rides on the reduction that every step begins with, so all
ranks act on it after the same step: they save a checkpoint and leave with status 75 ("saved, requeue me"). A second
signal ends the process at once with 128 + its number. Launchers deliver one interruption several times (the terminal
to the whole process group, or SLURM to every process of a job, and then torchrun to its workers); copies that arrive
within five seconds count as one signal.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch

from megatron_omni.config.run import Recipe

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 5.0


class StopSignals:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first = 0.0

    def asked(self) -> bool:
        """Whether a stop signal has come."""
        return self.received is not None

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
    """Wall seconds by part of a step. Parts may lie inside each other; then a second counts for the innermost alone.

    ``synchronize`` is called before the clock is read while ``exact`` is set: an accelerator works asynchronously, and
    what it still has to do would be counted where the host happens to wait for it. ``named`` is entered for every part
    with its name: tools that watch a run show it (platform/ranges.py).
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
        named: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.exact = False
        self._clock, self._synchronize, self._named = clock, synchronize, named
        self._stack: list[str] = []
        self._last = self._moved = -math.inf
        self._seconds: dict[str, float] = {}
        self._total: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the block's wall time as ``part``."""
        self._tick()
        self._stack.append(part)
        try:
            with self._named(part):
                yield
        finally:
            self._tick()
            self._stack.pop()

    def moved(self) -> None:
        """A part of many steps (an evaluation) has done one of them: it is not stuck."""
        self._moved = self._clock()

    def _tick(self) -> None:
        if self.exact:
            self._synchronize()
        now = self._clock()
        if self._stack:
            part = self._stack[-1]
            self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; starts again from zero."""
        seconds, self._seconds = self._seconds, {}
        for part, value in seconds.items():
            self._total[part] = self._total.get(part, 0.0) + value
        return seconds

    def total(self) -> dict[str, float]:
        """Seconds by part since the beginning; call it outside of all parts."""
        parts = {**self._total, **self._seconds}
        return {part: self._total.get(part, 0.0) + self._seconds.get(part, 0.0) for part in parts}

    def current(self) -> tuple[str, float]:
        """The part that is being measured, and for how long it has been or since it :meth:`moved`; another thread may ask."""
        innermost, since = self._stack[-1:], max(self._last, self._moved)  # a copy: the stack may change meanwhile
        seconds = self._clock() - since if since > -math.inf else 0.0
        return (innermost[0] if innermost else "between parts"), seconds
