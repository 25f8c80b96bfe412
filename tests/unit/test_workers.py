"""Threads that prepare steps: order, room, deaths, stalls. No sleeping: threads wait for events."""

import threading
from typing import NamedTuple

import pytest

from megatron_omni.data.workers import Stalled, Workers, working_on
from tests.unit.tiny_data import hang_until


class Plan(NamedTuple):
    after: int


class Job:
    """Steps 0, 1, .. whose loading can be held, killed or made to hang."""

    def __init__(self, *, num_workers=2, most_bytes=1 << 30, stall_seconds=30.0, size=1):
        self.loaded: list[int] = []
        self.given_up: list[object] = []
        self.hang: dict[int, threading.Event] = {}
        self.die: dict[int, list[BaseException]] = {}
        self.started = threading.Semaphore(0)
        self.lock = threading.Lock()
        self.workers = Workers[int, Plan, int](
            lambda cursor: Plan(cursor + 1), self.load, num_bytes=lambda plan: size, num_workers=num_workers,
            most_bytes=most_bytes, stall_seconds=stall_seconds, give_up=self.give_up,
        )  # fmt: skip

    def load(self, plan: Plan) -> int:
        step = plan.after - 1
        working_on((step, "sample"))
        with self.lock:
            self.loaded.append(step)
        self.started.release()
        if step in self.hang and (step, "sample") not in self.given_up:
            hang_until(self.hang[step])
            working_on("the next record")
        if self.die.get(step):
            raise self.die[step].pop()
        return step

    def give_up(self, record: object) -> bool:
        self.given_up.append(record)
        return True


@pytest.mark.parametrize("num_workers", [1, 3])
def test_steps_come_in_order_and_start_again_where_they_were_forgotten(num_workers):
    job = Job(num_workers=num_workers)
    assert [job.workers.take(step) for step in range(50)] == list(range(50))
    job.workers.forget()
    assert [job.workers.take(step) for step in range(7, 20)] == list(range(7, 20))
    job.workers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("data-")]
    assert not job.workers.restarts


@pytest.mark.parametrize(("most_bytes", "ahead"), [(1 << 30, 3), (25, 2), (5, 1)])
def test_no_more_is_prepared_than_there_is_room_for(most_bytes, ahead):
    job = Job(num_workers=2, most_bytes=most_bytes, size=10)
    job.workers.take(0)
    for _ in range(1 + ahead):
        job.started.acquire(timeout=30)
    assert not job.started.acquire(timeout=0.2)  # step 0 and ``ahead`` more were loaded, and nothing else is
    assert sorted(job.loaded) == list(range(1 + ahead))
    job.workers.close()


def test_a_thread_that_dies_is_replaced_and_counted_once_more_is_an_error():
    job = Job()
    job.die = {3: [OSError("stale handle")], 6: [RuntimeError("second"), RuntimeError("first")]}
    assert [job.workers.take(step) for step in range(6)] == list(range(6))
    assert job.workers.restarts == {"died": 1}
    with pytest.raises(RuntimeError, match="second"):
        job.workers.take(6)
    assert job.workers.restarts == {"died": 2}
    assert job.workers.take(6) == 6  # nothing was lost
    job.die = {7: [ValueError("too many bad records")]}
    job.workers.forget()
    with pytest.raises(ValueError, match="too many bad records"):
        job.workers.take(7)
    assert job.workers.restarts == {"died": 2}  # the data's fault: not tried again
    job.workers.close()


def test_a_record_that_stalls_is_tried_again_and_then_left_out():
    job = Job(num_workers=2)
    job.hang = {2: threading.Event()}
    assert [job.workers.take(step) for step in range(5)] == list(range(5))
    assert job.workers.restarts == {"stalled": 2} and job.given_up == [(2, "sample")]
    left_behind = [t for t in threading.enumerate() if t.name.startswith("data-") and t.is_alive()]
    job.hang[2].set()  # the threads that were left behind end at their next record
    job.workers.close()
    for thread in left_behind:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_stall_that_cannot_be_left_out_is_an_error():
    job = Job(num_workers=1)
    job.workers.give_up = lambda record: False
    job.hang = {0: threading.Event()}
    with pytest.raises(Stalled, match=r"a data thread has worked on \(0, 'sample'\) for .*data.stall_seconds"):
        job.workers.take(0)
    assert job.workers.restarts == {"stalled": 2}
    job.hang[0].set()
