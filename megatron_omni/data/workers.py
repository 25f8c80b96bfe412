"""Threads that prepare the coming steps while the present one trains.

Each thread in turn plans the next step (a pure function of the cursor), waits until there is room for it, and loads it;
``take`` hands the steps out in order. Room is counted in planned bytes and in steps, so memory is bounded however long
training takes.

A thread that dies by anything but a ValueError, or that works on one record for longer than ``stall_seconds``, costs a
restart: the whole crew is left behind (its threads end at their next record; a thread cannot be killed) and a new one
starts from the last step that was taken. Nothing is lost or repeated, because what a crew had prepared was not yet
consumed. Threads are daemons, so one that never returns does not keep the process alive.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


class Planned[C](Protocol):
    """What this module asks of a plan."""

    @property
    def after(self) -> C:
        """The cursor behind the step."""
        ...


class Stalled(RuntimeError):
    """A thread that made no progress; ``record`` is what it works on."""

    def __init__(self, record: object, seconds: float) -> None:
        super().__init__(f"a data thread has worked on {record} for {seconds:.0f} s (data.stall_seconds)")
        self.record = record


class _Left(BaseException):
    """Ends a thread of a crew that is not used any more; no fault of the record that it works on."""


@dataclass
class _Step[P, R]:
    plan: P
    num_bytes: int
    result: R | None = None
    error: BaseException | None = None
    done: bool = False


@dataclass
class _Beat:
    """What a thread works on, and since when."""

    crew: "_Crew"
    record: object = None
    since: float = field(default_factory=time.monotonic)
    busy: bool = False


_here = threading.local()


def working_on(record: object) -> None:
    """Told by the loader at every record; in a thread of a crew it is the sign of life."""
    beat: _Beat | None = getattr(_here, "beat", None)
    if beat is not None:
        if beat.crew.closed:
            raise _Left
        beat.record, beat.since = record, time.monotonic()


class Workers[C, P: Planned, R]:
    """Steps from ``plan`` and ``load``, prepared by ``num_workers`` threads."""

    def __init__(
        self,
        plan: Callable[[C], P],
        load: Callable[[P], R],
        *,
        num_bytes: Callable[[P], int],
        num_workers: int,
        most_bytes: int,
        stall_seconds: float,
        give_up: Callable[[object], bool],
    ) -> None:
        """``give_up`` is told a record that stalled twice; whether it can be left out."""
        self.plan, self.load, self.num_bytes = plan, load, num_bytes
        self.num_workers, self.most_bytes, self.stall_seconds = num_workers, most_bytes, stall_seconds
        self.give_up = give_up
        self.restarts: Counter[str] = Counter()
        self._stalls: Counter[object] = Counter()
        self._crew: _Crew[C, P, R] | None = None
        self._left: list[_Crew[C, P, R]] = []  # crews left behind whose threads have not ended yet

    def take(self, cursor: C) -> R:
        """The step at ``cursor``, which is where the last step taken ended, or where ``forget`` was called."""
        died = False
        while True:
            if self._crew is None:
                self._crew = _Crew(self, cursor)
            try:
                return self._crew.take()
            except Stalled as stall:
                self.forget()
                self.restarts["stalled"] += 1
                self._stalls[stall.record] += 1
                logger.warning("%s; restarted", stall)
                if self._stalls[stall.record] > 1 and not self.give_up(stall.record):
                    raise
            except ValueError:
                self.forget()  # the data or the recipe: trying again would not help
                raise
            except BaseException as error:
                self.forget()
                if died or isinstance(error, KeyboardInterrupt):
                    raise
                died = True
                self.restarts["died"] += 1
                logger.warning("a data thread died (%s: %s); restarted", type(error).__name__, error)

    def forget(self) -> None:
        """Leave behind what was prepared."""
        if self._crew is not None:
            self._crew.leave()
            self._left = [crew for crew in [*self._left, self._crew] if crew.alive()]
            self._crew = None

    def close(self) -> None:
        """End the threads; each first finishes its record, one that stalls is not waited for."""
        self.forget()
        for crew in self._left:
            crew.join()
        self._left.clear()


class _Crew[C, P: Planned, R]:
    """The threads that prepare steps from one cursor on."""

    def __init__(self, workers: Workers[C, P, R], cursor: C) -> None:
        self.workers, self.closed = workers, False
        self._planned_to = cursor
        self._steps: deque[_Step[P, R]] = deque()
        self._turn = threading.Lock()  # held by the thread that plans, so that steps come in order
        self._changed = threading.Condition()  # guards _steps and closed
        self._planning_error: BaseException | None = None
        self._beats = [_Beat(self) for _ in range(workers.num_workers)]
        self._threads = [
            threading.Thread(target=self._run, args=(beat,), name=f"data-{i}", daemon=True)
            for i, beat in enumerate(self._beats)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> R:
        """The first step, when it is there."""
        with self._changed:
            while not (self._steps and self._steps[0].done):
                if self._planning_error is not None and not self._steps:
                    raise self._planning_error
                self._check_beats()
                self._changed.wait(_POLL_SECONDS)
            step = self._steps.popleft()
            self._changed.notify_all()
        if step.error is not None:
            raise step.error
        assert step.result is not None
        return step.result

    def leave(self) -> None:
        with self._changed:
            self.closed = True
            self._steps.clear()
            self._changed.notify_all()

    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread, beat in zip(self._threads, self._beats):
            while thread.is_alive() and not self._overdue(beat):
                thread.join(_POLL_SECONDS)

    def _check_beats(self) -> None:
        for beat in self._beats:
            if self._overdue(beat):
                raise Stalled(beat.record, time.monotonic() - beat.since)

    def _overdue(self, beat: _Beat) -> bool:
        return beat.busy and time.monotonic() - beat.since > self.workers.stall_seconds

    def _run(self, beat: _Beat) -> None:
        _here.beat = beat
        try:
            while (step := self._next(beat)) is not None:
                self._work(beat, step)
        except _Left:
            pass

    def _next(self, beat: _Beat) -> _Step[P, R] | None:
        """Plan the next step and wait for room; None when the crew was left behind or cannot plan on."""
        with self._turn:
            if self.closed or self._planning_error is not None:
                return None
            beat.record, beat.since, beat.busy = "a plan", time.monotonic(), True
            try:
                plan = self.workers.plan(self._planned_to)
                step = _Step[P, R](plan, self.workers.num_bytes(plan))
            except _Left:
                raise
            except BaseException as error:
                with self._changed:
                    self._planning_error = error
                    self._changed.notify_all()
                return None
            finally:
                beat.busy = False
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._has_room(step))
                if self.closed:
                    return None
                self._planned_to = plan.after
                self._steps.append(step)
            return step

    def _has_room(self, step: _Step[P, R]) -> bool:
        ahead = sum(other.num_bytes for other in self._steps)
        most = self.workers.num_workers + 1
        return not self._steps or (len(self._steps) < most and ahead + step.num_bytes <= self.workers.most_bytes)

    def _work(self, beat: _Beat, step: _Step[P, R]) -> None:
        beat.record, beat.since, beat.busy = "a step", time.monotonic(), True
        try:
            step.result = self.workers.load(step.plan)
        except _Left:
            raise
        except BaseException as error:
            step.error = error
        finally:
            beat.busy = False
        with self._changed:
            step.done = True
            self._changed.notify_all()
