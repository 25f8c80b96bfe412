"""Samples of tasks through the engine, on every layout; all ranks call these together.

The leaders of all replicas take samples one by one from one count that they share, so a replica with long answers takes
fewer of them. Threads of each leader decode media and build requests ahead of the engine, which therefore rarely waits. What a
sample says depends neither on the replica nor on the samples beside it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.data.sample import SampleBuilder
from megatron_omni.evaluation.asking import Asked, prepare
from megatron_omni.evaluation.results import Line, SkippedSample
from megatron_omni.evaluation.task import Task
from megatron_omni.generation.batches import answered, shared
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.request import Request
from megatron_omni.parallel.long_work import Work, long_work

AHEAD = 32
"""Most samples that are built ahead of the engine."""


@dataclass(kw_only=True)
class Times:
    """Of a leader, in seconds."""

    wall: float = 0.0
    """From its first request to its last result."""
    step: float = 0.0
    """Of these, inside the engine's step."""

    def __add__(self, other: "Times") -> "Times":
        """One after the other."""
        return Times(wall=self.wall + other.wall, step=self.step + other.step)


def limits_for(batch_size: int, *, deterministic: bool = False) -> EngineLimits:
    """Of an engine that computes ``batch_size`` answers together."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    tokens = max(EngineLimits().max_batch_tokens, 2 * batch_size)
    return EngineLimits(max_running=batch_size, max_batch_tokens=tokens, deterministic=deterministic)


def ask_all(
    model: nn.Module,
    builder: SampleBuilder,
    tasks: Sequence[Task],
    *,
    pg: ProcessGroupCollection,
    limits: EngineLimits,
    finished: Callable[[str, Line], None],
    done: Mapping[str, set[int]] | None = None,
    threads: int = 2,
    moved: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Times:
    """Ask every sample that is not ``done`` (rows by task, the same on all ranks).

    ``finished(task, line)`` is called for each on the leader that computed it, ``progress(finished, all)`` besides, and
    ``moved`` on every rank again and again.
    """
    done = done or {}
    todo = [(task, row) for task in tasks for row in range(len(task)) if row not in done.get(task.name, ())]
    times = Times()
    if not todo:
        return times
    with (
        long_work("answering the samples of tasks", measured=False) as work,
        Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits) as engine,
    ):
        if engine.leads:

            def tell(task: str, line: Line) -> None:
                finished(task, line)
                progress(work.add("finished"), len(todo))

            with engine.leading():
                times = _lead(engine, work, todo, builder, threads=threads, tell=tell, moved=moved)
        else:
            engine.follow(moved)
        work.exchange(None, waiting=moved)  # the slowest replica may take longer than a collective waits
    return times


def answers_of(
    model: nn.Module,
    builder: SampleBuilder,
    tasks: Sequence[Task],
    *,
    pg: ProcessGroupCollection,
    limits: EngineLimits,
    threads: int = 2,
    moved: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, Line]]:
    """The lines of all samples of ``tasks``, by task and row, on every rank."""
    mine: dict[tuple[str, int], Line] = {}

    def finished(task: str, line: Line) -> None:
        mine[task, line.row] = line

    ask_all(model, builder, tasks, pg=pg, limits=limits, finished=finished, threads=threads, moved=moved)
    everything = shared(mine, pg)
    return {task.name: {row: everything[task.name, row] for row in range(len(task))} for task in tasks}


def _lead(
    engine: Engine,
    work: Work,
    todo: Sequence[tuple[Task, int]],
    builder: SampleBuilder,
    *,
    threads: int,
    tell: Callable[[str, Line], None],
    moved: Callable[[], None],
) -> Times:
    """Take samples until none is left."""
    waiting: dict[str, Asked] = {}
    start: list[float] = []
    # No leader hoards what another could compute meanwhile.
    share = max(1, len(todo) // (4 * engine.pg.dp.size()))
    ahead = _Ahead(work, todo, builder, threads=threads, most=max(threads, min(AHEAD, share)))

    def requests() -> Iterator[Request]:
        for task, prepared in ahead:
            moved()
            if isinstance(prepared, SkippedSample):
                tell(task.name, prepared)
                continue
            prepared.submitted = perf_counter()
            start.append(prepared.submitted)
            for request in prepared.requests:
                waiting[request.name] = prepared
                yield request

    def refused(request: Request, error: ValueError) -> None:
        asked = waiting.pop(request.name)
        if not asked.refused:  # the other requests of a choice are let run out
            asked.refused = True
            tell(asked.task.name, asked.refuse(error))

    with ahead:
        before = engine.step_seconds
        for result in answered(engine, requests(), ready=ahead.ready, refused=refused, most_waiting=share):
            asked = waiting.pop(result.name)
            line = asked.take(int(result.name.rpartition(".")[2]), result)
            if line is not None:
                tell(asked.task.name, line)
            moved()
    return Times(wall=perf_counter() - start[0] if start else 0.0, step=engine.step_seconds - before)


class _Ahead:
    """Samples in the order in which this leader took them, built by threads a few ahead."""

    def __init__(
        self, work: Work, todo: Sequence[tuple[Task, int]], builder: SampleBuilder, *, threads: int, most: int
    ) -> None:
        self._work, self._todo, self._builder, self._most = work, todo, builder, most
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="evaluate")
        self._building: deque[tuple[Task, Future[Asked | SkippedSample]]] = deque()
        self._left = True

    def __enter__(self) -> "_Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def ready(self) -> bool:
        """Whether the next sample is built, or there is none."""
        self._fill()
        return not self._building or self._building[0][1].done()

    def __iter__(self) -> Iterator[tuple[Task, Asked | SkippedSample]]:
        self._fill()
        while self._building:
            task, future = self._building.popleft()
            built = future.result()
            self._fill()
            yield task, built

    def _fill(self) -> None:
        if len(self._building) > self._most // 2:
            return  # several at a time: each hand-over to a thread that sleeps costs this one its turn
        while self._left and len(self._building) < self._most:
            number = self._work.add("taken") - 1
            if number >= len(self._todo):
                self._left = False
                return
            task, row = self._todo[number]
            self._building.append((task, self._threads.submit(prepare, task, row, self._builder, name=str(number))))
