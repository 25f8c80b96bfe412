"""Making the next tensors in a thread of its own while the last one is written.

Reading, checking and rearranging a tensor is one stage of a conversion, writing and hashing it another. Both spend their
time in torch, ``os`` and ``hashlib``, which let go of the interpreter's lock, so that they keep two cores and the disk busy.
Memory is that of ``depth`` tensors more than the one being written.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

DEPTH = 2


@contextmanager
def made_ahead[Item, Made](
    make: Callable[[Item], Made], items: Iterable[Item], *, depth: int = DEPTH
) -> Iterator[Iterator[tuple[Item, Made]]]:
    """Pairs (item, ``make(item)``) in order; at most ``depth`` are made ahead, one at a time. An error is raised in its turn.

    ``make`` is called in one thread only. Leaving the context waits for the item in the making and makes no other.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="made-ahead")

    waiting: deque[tuple[Item, Future[Made]]] = deque()

    def first() -> tuple[Item, Made]:
        item, future = waiting.popleft()
        return item, future.result()

    def pairs() -> Iterator[tuple[Item, Made]]:
        for item in items:
            waiting.append((item, pool.submit(make, item)))
            if len(waiting) > depth:
                yield first()
        while waiting:
            yield first()

    try:
        yield pairs()
    finally:
        pool.shutdown(cancel_futures=True)
