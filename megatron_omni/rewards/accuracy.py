"""The reward ``accuracy``: whether the answer equals the solution as mathematics, by math-verify (extra ``rl``).

Comparisons run in child processes, so that one that does not end costs one process: it is killed after
``timeout_seconds``, scores 0, is counted as ``hung``, and another process takes its place. (In a thread math-verify
raises; with its guard off it would hang the run.) A child is a fresh interpreter without torch that reads lines
(``math_child.py``): nothing of the training process is copied into it.

Not what one might expect of math-verify 0.9: ``50\\%`` is 0.5, ``x=3`` is 3, ``5 cm`` is 5; ``3.4286`` is not ``24/7``;
the letter of a choice is none of its business (reward ``choice``).
"""

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_omni.foreign import parse_json
from megatron_omni.rewards.answer import Value, Values, answer_text, references

START_SECONDS = 120.0
"""A process that has not done its imports by then has failed: the file system may be busy."""
MOST_FAILED_STARTS = 3
"""One after the other."""
HUNG, LOST = "hung", "lost"
"""Counts: processes that were killed at the limit, and that ended by themselves (out of memory): those comparisons are
made once more, then they score 0."""


class Accuracy:
    """1 or 0; None where the record has no solution that is an expression."""

    def __init__(
        self,
        *,
        run_dir: Path | None = None,
        rank: int = 0,
        timeout_seconds: float = 10.0,
        processes: int | None = None,
        thinking: bool = True,
    ) -> None:
        """ValueError without math-verify. Processes start when they are first needed."""
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "rewards: accuracy needs math-verify, which is not installed: pip install 'megatron-omni[rl]'"
            )
        most = processes if processes is not None else min(8, os.cpu_count() or 1)
        if most < 1 or not timeout_seconds > 0:
            raise ValueError(f"rewards: accuracy: processes = {most}, timeout_seconds = {timeout_seconds}: above 0")
        self._seconds, self._most, self._thinking = timeout_seconds, most, thinking
        self._children: list[_Child] = []
        self._counts: dict[str, int] = {}
        self._failed_starts = 0

    def __call__(self, *, completions: Sequence[str], solution: Sequence[Any] | None = None, **_: Any) -> Values:
        if solution is None:
            raise ValueError("the records have no column 'solution', and no answer at their end to stand for it")
        asked: dict[tuple[tuple[str, ...], str], list[int]] = {}
        values: Values = [None] * len(completions)
        for place, (said, cell) in enumerate(zip(completions, solution, strict=True)):
            if gold := tuple(references(cell)):  # responses of a group often agree: each comparison is made once
                asked.setdefault((gold, answer_text(said, self._thinking)), []).append(place)
        for places, value in zip(asked.values(), self._compare(list(asked)), strict=True):
            for place in places:
                values[place] = value
        return values

    def take_counts(self) -> dict[str, int]:
        """``hung`` and ``lost`` processes since the last call."""
        counts, self._counts = self._counts, {}
        return counts

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.end()
        self._children = []

    def _compare(self, asked: Sequence[tuple[tuple[str, ...], str]]) -> Values:
        waiting = deque(range(len(asked)))
        values: Values = [0.0] * len(asked)
        repeated: set[int] = set()
        while waiting or any(child.place is not None for child in self._children):
            while len(self._children) < min(self._most, len(waiting)):
                self._children.append(_Child(self._seconds))
            for child in self._children:
                if child.is_free and waiting:
                    place = waiting.popleft()
                    child.ask(place, *asked[place])
            for child in self._wait():
                lost = self._hear(child, values)
                if lost is not None and lost not in repeated:  # the machine may have taken the process
                    repeated.add(lost)
                    waiting.appendleft(lost)
        return values

    def _wait(self) -> list["_Child"]:
        """Children that have said something, have ended or are over their time."""
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                if not child.is_free:
                    selector.register(child.output, selectors.EVENT_READ, child)
            now = time.monotonic()
            until = min(child.deadline for child in self._children if not child.is_free)
            heard = [key.data for key, _ in selector.select(max(0.0, until - now))]
        now = time.monotonic()
        return heard + [
            child for child in self._children if child not in heard and not child.is_free and child.deadline <= now
        ]

    def _hear(self, child: "_Child", values: Values) -> int | None:
        """Take what a child has said; of one that has ended by itself, the comparison that it worked at."""
        over = child.deadline <= time.monotonic()
        said = None if over else child.hear()
        if said is not None:
            if child.place is not None:
                values[child.place] = said["value"]
            child.is_free, child.place, self._failed_starts = True, None, 0
            return None
        self._children.remove(child)
        child.end()
        if child.place is None:  # it never began
            self._failed_starts += 1
            if self._failed_starts == MOST_FAILED_STARTS:
                self.close()
                problem = f"did not start within {START_SECONDS:g} s" if over else "ended at its start"
                raise RuntimeError(
                    f"math-verify's process {problem}, {MOST_FAILED_STARTS} times; python -m megatron_omni.rewards.math_child "
                    "shows why"
                )
            return None
        name = HUNG if over else LOST
        self._counts[name] = self._counts.get(name, 0) + 1
        return None if over else child.place


class _Child:
    """One process: it has one question at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_omni.rewards.math_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # an interrupt from the keyboard is for the training alone
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        self.place: int | None = None
        """Number of the comparison that it works at."""
        self.is_free = False
        self.deadline = time.monotonic() + START_SECONDS

    def ask(self, place: int, gold: Sequence[str], answer: str) -> None:
        """A process that has ended does not answer, which is noticed then."""
        self.place, self.is_free, self.deadline = place, False, time.monotonic() + self._seconds
        line = json.dumps({"gold": list(gold), "answer": answer, "seconds": self._seconds}) + "\n"
        try:
            self._input.write(line.encode())
            self._input.flush()
        except OSError:
            return

    def hear(self) -> dict[str, Value] | None:
        """What it said; None where it has ended."""
        line = self.output.readline()
        return parse_json(line, "math-verify's answer") if line.endswith(b"\n") else None

    def end(self) -> None:
        """Killed: it may be in a computation that hears nothing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self.output):
            try:
                pipe.close()
            except OSError:
                continue
