"""Waiting for the slowest rank, however long it works: through the ranks' store, outside any collective.

A collective fails after ``parallel.distributed_timeout_seconds``, whatever the rank that it waits for is doing; hashing
or reading hundreds of gigabytes may take longer than that. Here nobody waits for a rank that is at work without hearing
of it: each says through the store that it lives, from a thread of its own, and how far it has come. A rank whose process
is gone, that is silent (a dead machine, stopped) or that lives without moving (a file system that hangs) ends the wait
with its number. Of another machine's process only the silence is noticed; its own launcher is faster.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_omni.foreign import parse_json

BEAT_SECONDS = 1.0
DEAD_SECONDS = 30.0
"""Without a sign of life."""
STUCK_SECONDS = 600.0
"""Alive, without having moved."""
LONGEST_SLEEP = 0.25
LOOKS_PER_SECOND = 2000
"""Of all waiting ranks together, each of which asks the store a few questions: one process answers them."""

_numbers = count()


@contextmanager
def long_work(what: str, *, measured: bool = True) -> Iterator["Work"]:
    """Enter and leave together on all ranks; ``what`` they do, for messages. An error inside ends the others' waiting.

    ``measured``: the work says how far it has come (:meth:`Work.advance`); else only that its rank lives.
    """
    if dist.get_world_size() > 1:
        dist.barrier()  # so that nobody is missed who has not begun
    work = Work(what, measured=measured)
    try:
        yield work
    except BaseException as error:
        work.fail(f"[rank {dist.get_rank()}] {what}: {type(error).__name__}: {error}")
        raise
    finally:
        work.end()


def nothing(_: list[Any]) -> None:
    """The answer where it matters alone that all ranks have come so far (:meth:`Work.exchange`)."""


class Work:
    """One piece of work of all ranks; made by :func:`long_work`."""

    def __init__(self, what: str, *, measured: bool) -> None:
        self.what, self._measured = what, measured
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._moves = 0
        self._counts: dict[str, int] = {}
        self._peers: dict[int, _Peer] = {}
        self._looked = 0.0
        """When it last looked at the others: not anew for each of them, or their number would count twice."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        # A launcher that starts the ranks again keeps its store: what an earlier attempt wrote must not be taken for this.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"megatron_omni/work/{attempt}/{next(_numbers)}"
        if self._world_size > 1:
            default: Any = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore(self._prefix, default)
            self._say(self._store)
            # A connection of its own: the other one may be in use.
            store = dist.PrefixStore(self._prefix, default.clone())
            self._thread = threading.Thread(target=self._beat, args=(store,), name="long-work", daemon=True)
            self._thread.start()

    def advance(self) -> None:
        """This rank has done a piece more. Cheap: call it for every few megabytes."""
        self._moves += 1

    def add(self, name: str, amount: int = 1) -> int:
        """A count that all ranks share, with ``amount`` added: dealing out numbers one by one is ``add("taken") - 1``."""
        if self._world_size == 1:
            self._counts[name] = self._counts.get(name, 0) + amount
            return self._counts[name]
        return int(self._store.add(f"count/{name}", amount))

    def exchange(
        self,
        value: Any,
        *,
        waiting: Callable[[], None] = lambda: None,
        answer: Callable[[list[Any]], Any] = lambda values: values,
    ) -> Any:
        """What every rank gives, in rank order, when all have given: plain values, as JSON knows them.

        ``answer``: what rank 0 makes of them and every rank gets instead. Where that is short, what a rank reads does not grow
        with their number. ``waiting`` is called again and again until then. RuntimeError when a rank fails, dies or hangs
        meanwhile, naming it.
        """
        if self._world_size == 1:
            return answer([value])
        self._store.set(f"value/{self._rank}", json.dumps(value))
        if self._rank == 0:  # one rank watches all, and all watch that one: the store answers few questions
            values = []
            for rank in range(self._world_size):
                self._wait(f"value/{rank}", list(range(rank, self._world_size)), waiting)
                values.append(parse_json(self._store.get(f"value/{rank}"), f"value/{rank}"))
            answered = answer(values)
            self._store.set("all", json.dumps(answered))
            return answered
        self._wait("all", [0], waiting)
        return parse_json(self._store.get("all"), "all")

    def fail(self, text: str) -> None:
        """End the waiting of the others with ``text``."""
        if self._world_size > 1:
            try:
                self._store.set("failed", text)
            except Exception:  # the store is gone, and with it the run
                return

    def end(self) -> None:
        """No more signs of life."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _say(self, store: dist.Store) -> None:
        store.set(f"beat/{self._rank}", f"{time.time()} {_machine()} {os.getpid()} {self._moves}")

    def _beat(self, store: dist.Store) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._say(store)
            except Exception:  # the store is gone, and with it the rank or launcher that kept it
                return

    def _wait(self, key: str, watched: list[int], waiting: Callable[[], None]) -> None:
        """Until ``key`` is there; RuntimeError for a rank of ``watched`` that gives no hope of it."""
        pause, longest = 0.001, max(LONGEST_SLEEP, self._world_size / LOOKS_PER_SECOND)
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise RuntimeError(self._store.get("failed").decode())
            if time.monotonic() - self._looked > longest:
                self._looked = time.monotonic()
                for rank in watched:
                    self._look_at(rank)
            waiting()
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _look_at(self, rank: int) -> None:
        if rank == self._rank or (self._rank == 0 and self._store.check([f"value/{rank}"])):
            return
        peer, now = self._peers.setdefault(rank, _Peer()), time.monotonic()
        beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
        if beat and beat != peer.beat:
            _, machine, pid, moves = beat.split()
            peer.beat, peer.heard, peer.here = beat, now, int(pid) if machine == _machine() else None
            if moves != peer.moves:
                peer.moves, peer.moved = moves, now
        silent, still = now - peer.heard, now - peer.moved
        if peer.here is not None and not _lives(peer.here):
            text = f"rank {rank} has died: {self.what}"
        elif silent > DEAD_SECONDS:
            text = f"rank {rank} gives no sign of life for {silent:.0f} s: {self.what}"
        elif self._measured and still > STUCK_SECONDS:
            text = f"rank {rank} has not come any further for {still:.0f} s: {self.what}; does the file system hang?"
        else:
            return
        self.fail(text)
        raise RuntimeError(text)


class _Peer:
    """What is known of another rank."""

    def __init__(self) -> None:
        self.beat, self.moves = "", ""
        self.heard = self.moved = time.monotonic()
        self.here: int | None = None
        """Its process, where that is on this machine."""


@cache
def _machine() -> str:
    """Equal for processes that see each other under the same numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux: its own machine, so that nobody looks for its process
        return f"unknown-{os.getpid()}"


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][:1]
    except OSError:
        return False
    return state not in "ZX"
