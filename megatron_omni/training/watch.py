"""Who is stuck when a run hangs, and how the stuck rank ends: one thread per rank beside the training loop.

Every rank's thread writes where its rank is (step, part of the step, for how long) into the ranks' store every
``BEAT_SECONDS``. A collective fails after ``parallel.distributed_timeout_seconds``, and how depends on its backend: gloo
raises in the ranks that wait, NCCL's watchdog ends their processes without a word of Python. So the thread is earlier:
where its rank has been in one part for the time-out less a margin (:func:`margin_seconds`), the first thread to claim
the report prints where every rank was last heard of and the stacks of its own rank, and marks the run as failed.

A rank that sees the mark and is still there ``GRACE_SECONDS`` later, in a read that does not return or in a collective
whose backend does not notice, writes its stacks and ends. After a hang it first waits for the margin, so that the
backend's own time-out comes before, and NCCL's watchdog writes what every rank last exchanged (flight recorder).
A process whose threads all wait for the interpreter's lock, this one too, is ended by a timer of C (faulthandler).
A process that is stopped as a whole (SIGSTOP, a dead machine) can only be ended by its launcher.

A checkpoint may take longer than a collective: files of any size are written and hashed between its collectives. There
the report is a warning, once a save, and nothing is marked.
"""

import faulthandler
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from megatron_omni.foreign import parse_json
from megatron_omni.training.hooks import PartTimer

BEAT_SECONDS = 2.0
GRACE_SECONDS = 10.0
MARGIN_SECONDS = 30.0
CLAIM = "megatron_omni/first_failure"
"""Counts the ranks that wanted to report the cause; the first does."""
_FAILED = "megatron_omni/failed"
_BEAT = "megatron_omni/beat/{rank}"
_SLOW_SAVE = "megatron_omni/slow_save/{step}"
_SAVING = "checkpoint"
_STDERR = 2
"""faulthandler writes to a descriptor: sys.stderr may be held by the thread that is stuck."""


def margin_seconds(timeout_seconds: float) -> float:
    """How long before a collective's time-out a hang is reported."""
    return min(MARGIN_SECONDS, timeout_seconds / 4)


class Place(NamedTuple):
    """Where a rank said it was."""

    step: int
    part: str
    seconds: float
    """In this part, when it said so."""
    said_at: float
    """Unix time."""


class Watch:
    """This rank's thread. ``step`` returns the step that the loop is in, ``timer`` knows the part."""

    def __init__(self, step: Callable[[], int], timer: PartTimer, *, timeout_seconds: float) -> None:
        self._step, self._timer, self._timeout = step, timer, timeout_seconds
        self._margin = margin_seconds(timeout_seconds)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._showed_stacks, self._why = False, "the run has failed"
        self._slow_save = -1

    def start(self) -> None:
        """Begin; a run of one rank has nobody to tell."""
        if dist.get_world_size() > 1:
            # A connection of its own: the loop may sit in a call that holds the other one.
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            args = (store, dist.get_rank())
            self._say(*args)  # here, not in the thread: a rank that hangs at once has been heard of
            self._set_timer()
            self._thread = threading.Thread(target=self._run, args=args, name="watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The loop is done; whatever follows is not watched."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _say(self, store: dist.Store, rank: int) -> None:
        part, seconds = self._timer.current()
        store.set(_BEAT.format(rank=rank), json.dumps(Place(self._step(), part, seconds, time.time())))

    def _set_timer(self) -> None:
        """The timer of C: it ends a process none of whose threads has run Python since."""
        faulthandler.dump_traceback_later(self._timeout + GRACE_SECONDS, exit=True, file=_STDERR)

    def _run(self, store: dist.Store, rank: int) -> None:
        ends_at: float | None = None
        while not self._ended.wait(min(BEAT_SECONDS, self._margin / 2)):
            self._set_timer()
            try:
                self._say(store, rank)
                grace = float(store.get(_FAILED)) if store.check([_FAILED]) else None
                if grace is None and self._is_stuck(store, rank):
                    grace = self._margin + GRACE_SECONDS
                    self._report(store, rank, grace=grace)
            except Exception as error:  # the store is gone, and with it the rank or launcher that kept it
                grace, self._why = GRACE_SECONDS, f"the ranks' store is gone ({type(error).__name__}: {error})"
            if grace is not None and ends_at is None:
                ends_at = time.monotonic() + grace
            if ends_at is not None and time.monotonic() > ends_at:
                self._end(rank)

    def _is_stuck(self, store: dist.Store, rank: int) -> bool:
        """Whether this rank's part has lasted so long that a collective is about to fail; warns of a slow save."""
        part, seconds = self._timer.current()
        if seconds < self._timeout - self._margin:
            return False
        if part != _SAVING:
            return True
        if (step := self._step()) != self._slow_save:
            self._slow_save = step
            if store.add(_SLOW_SAVE.format(step=step), 1) == 1:
                _print([f"[rank {rank}] saving after step {step} has taken {seconds:.0f} s so far", *where(store)])
        return False

    def _report(self, store: dist.Store, rank: int, *, grace: float) -> None:
        """Print the hang, unless another rank has; tell every rank that the run has failed."""
        if claim(store):
            part, seconds = self._timer.current()
            _print(
                [
                    f"error: [rank {rank}] has been in {part!r} of step {self._step()} for {seconds:.0f} s: a rank hangs",
                    f"a collective fails after parallel.distributed_timeout_seconds={self._timeout:g}",
                    *where(store),
                    f"[rank {rank}] its threads:",
                ]
            )
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
            self._showed_stacks = True
        mark_failed(store, grace_seconds=grace)

    def _end(self, rank: int) -> NoReturn:
        if not self._showed_stacks:
            faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        here = f"this one was in {self._timer.current()[0]!r} of step {self._step()}"
        _print([f"[rank {rank}] ends: {self._why}; {here}"])
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


def claim(store: dist.Store) -> bool:
    """Whether this rank is the first that wants to report the cause."""
    return bool(store.add(CLAIM, 1) == 1)


def mark_failed(store: dist.Store, *, grace_seconds: float | None = None) -> None:
    """Tell every rank that the run has failed; one that is still there after the grace ends itself."""
    store.set(_FAILED, str(GRACE_SECONDS if grace_seconds is None else grace_seconds))


def where(store: dist.Store) -> list[str]:
    """Where every rank was last heard of, as lines of a report."""
    lines = describe_places(places(store, dist.get_world_size()), now=time.time())
    return ["the ranks were last heard of in:", *lines] if lines else []


def _print(lines: Sequence[str]) -> None:
    """One write, so that the lines of several ranks do not mix."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def places(store: dist.Store, world_size: int) -> list[Place | None]:
    """What every rank last said, None for one that said nothing."""
    keys = [_BEAT.format(rank=rank) for rank in range(world_size)]
    return [Place(*parse_json(store.get(key), key)) if store.check([key]) else None for key in keys]


def describe_places(told: Sequence[Place | None], *, now: float) -> list[str]:
    """Lines that group the ranks by where they are, the fewest first; a rank not heard of for three beats is silent."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    longest: dict[tuple[Any, ...], float] = {}
    for rank, place in enumerate(told):
        if place is None:
            continue
        silent = now - place.said_at
        key = (place.step, place.part, silent > 3 * BEAT_SECONDS)
        groups.setdefault(key, []).append(rank)
        longest[key] = max(longest.get(key, 0.0), silent if key[2] else place.seconds)
    unknown = [rank for rank, place in enumerate(told) if place is None]
    lines = [f"  nowhere: {ranges(unknown)} (never heard of)"] if unknown and groups else []
    for (step, part, is_silent), ranks in sorted(groups.items(), key=lambda item: (not item[0][2], len(item[1]))):
        what = "silent for" if is_silent else "there for"
        lines.append(f"  step {step}, {part}: {ranges(ranks)} ({what} {longest[step, part, is_silent]:.0f} s)")
    return lines


def ranges(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-6, 8``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
