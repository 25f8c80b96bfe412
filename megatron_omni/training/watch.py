"""Who is stuck when a run hangs, and how the stuck rank ends: one thread per rank beside the training loop.

Every rank's thread writes where its rank is (step, part of the step, for how long) into the ranks' store every
``BEAT_SECONDS``. A collective that waits longer than ``parallel.distributed_timeout_seconds`` fails on the ranks that
wait; the first of them to report (failure.py) reads the store and prints which ranks were elsewhere, or have not been
heard of. That report also marks the run as failed: a rank that sees the mark and is still there ``GRACE_SECONDS``
later, in a read that does not return or in a collective whose backend does not notice, writes its stacks and ends.
A process that is stopped as a whole (SIGSTOP, a dead machine) can only be ended by its launcher.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_omni.foreign import parse_json
from megatron_omni.training.hooks import PartTimer

BEAT_SECONDS = 2.0
GRACE_SECONDS = 10.0
_FAILED = "megatron_omni/failed"
_BEAT = "megatron_omni/beat/{rank}"


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

    def __init__(self, step: Callable[[], int], timer: PartTimer) -> None:
        self._step, self._timer = step, timer
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; a run of one rank has nobody to tell."""
        if dist.get_world_size() > 1:
            # A connection of its own: the loop may sit in a call that holds the other one.
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            args = (store, dist.get_rank())
            self._say(*args)  # here, not in the thread: a rank that hangs at once has been heard of
            self._thread = threading.Thread(target=self._run, args=args, name="watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The loop is done; whatever follows is not watched."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _say(self, store: dist.Store, rank: int) -> None:
        part, seconds = self._timer.current()
        store.set(_BEAT.format(rank=rank), json.dumps(Place(self._step(), part, seconds, time.time())))

    def _run(self, store: dist.Store, rank: int) -> None:
        seen: float | None = None
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._say(store, rank)
                failed = store.check([_FAILED])
            except Exception:  # the store is gone, and with it the rank or launcher that kept it
                failed = True
            if failed and seen is None:
                seen = time.monotonic()
            if seen is not None and time.monotonic() - seen > GRACE_SECONDS:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(
                    f"[rank {rank}] ends: another rank failed first; this one was in {self._timer.current()[0]!r} of "
                    f"step {self._step()}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def mark_failed(store: dist.Store) -> None:
    """Tell every rank that the run has failed."""
    store.set(_FAILED, "1")


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
