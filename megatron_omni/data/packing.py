"""Several samples in one row: which samples share a row of ``capacity`` tokens, and which rows share a micro-batch.

``fill_rows`` is first-fit over the rows of a whole step, on samples in the run's order. A sample that fits nowhere waits,
and comes first in the next step; filling stops when ``lookahead`` samples wait or when no row could take the shortest
sample seen. So the step is a function of the order and of the few samples that wait, not of the number of ranks.

``deal`` spreads rows over micro-batches so that each holds the same number of them and about the same encoder cost:
rows hold nearly the same number of tokens, but one may be all video and another all text, and ranks wait for the
slowest. Dealt in a snake (0 1 2 2 1 0 ..), heaviest first.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

LOOKAHEAD = 64
"""Samples that may wait for the next step. Measured on lengths of the tiny corpus and on a long-tailed distribution
(log-normal, rows of 8192): 64 fills 98 to 99.8 % of the tokens, 8 about 1 % less, 256 no more than 0.1 % more."""


class Sized(Protocol):
    """What packing asks of a sample."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...


class Filled[S: Sized](NamedTuple):
    """The rows of a step."""

    rows: list[list[S]]
    """Samples of each row, in the order in which they were placed; none is empty."""
    waiting: list[S]
    """Samples seen and not placed, oldest first."""


def fill_rows[S: Sized](
    waiting: Sequence[S], samples: Iterator[S], *, num_rows: int, capacity: int, lookahead: int = LOOKAHEAD
) -> Filled[S]:
    """Fill ``num_rows`` rows of ``capacity`` tokens: first with ``waiting``, then with what ``samples`` brings.

    Takes from ``samples`` no more than it places or keeps waiting. No sample may be longer than ``capacity``.
    """
    rows: list[list[S]] = [[] for _ in range(num_rows)]
    room = [capacity] * num_rows
    left_over: list[S] = []
    shortest = capacity

    def place(sample: S) -> None:
        nonlocal shortest
        assert sample.length <= capacity, f"a sample of {sample.length} tokens cannot be packed into rows of {capacity}"
        shortest = min(shortest, sample.length)
        for row, free in enumerate(room):
            if sample.length <= free:
                rows[row].append(sample)
                room[row] = free - sample.length
                return
        left_over.append(sample)

    for sample in waiting:
        place(sample)
    while len(left_over) < lookahead and max(room) >= shortest:
        place(next(samples))
    return Filled(rows, left_over)


def deal(costs: Sequence[float], num_hands: int) -> list[list[int]]:
    """Indices of ``costs`` in ``num_hands`` hands of equal size and about equal total cost."""
    assert len(costs) % num_hands == 0, f"{len(costs)} rows cannot be dealt into {num_hands} equal hands"
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    heaviest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    for turn, index in enumerate(heaviest_first):
        round_, place = divmod(turn, num_hands)
        hands[place if round_ % 2 == 0 else num_hands - 1 - place].append(index)
    return hands
