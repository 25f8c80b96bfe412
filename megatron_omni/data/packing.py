"""Several samples in one row: which samples share a row of ``capacity`` tokens, and which rows share a micro-batch.

``fill_rows`` fills row after row from a window of the run's order. A row takes the oldest sample that waits, and of the
others the set that fills it best (subset sums: bit n of an integer says whether n tokens can be reached, so a sample of L
tokens costs ``reached | reached << L``). The window grows, sample by sample, until the row is full but for 1 / 128 or
``lookahead`` samples more were seen than fit into it. First fit, without the choice, leaves a gap of part of a sample: 4 %
of rows of 288 tokens on the quickstart's mix, where the choice leaves 1 %. What is not placed waits and comes first in
the next step; every row takes the oldest, so nothing waits for ever. So the step is a function of the order and of the few
samples that wait, not of the number of ranks.

``deal`` spreads rows over micro-batches so that each holds the same number of them and about the same encoder cost:
rows hold nearly the same number of tokens, but one may be all video and another all text, and ranks wait for the
slowest. Dealt in a snake (0 1 2 2 1 0 ..), heaviest first.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

LOOKAHEAD = 32
"""Samples that a row may choose from beyond those that fit into it."""
_GAP = 128
"""A row is full when less than one in so many of its tokens are free."""


class Sized(Protocol):
    """What packing asks of a sample."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...


class Filled[S: Sized](NamedTuple):
    """The rows of a step."""

    rows: list[list[S]]
    """Samples of each row, in the run's order; none is empty. Fewer than wanted when the samples came to an end."""
    waiting: list[S]
    """Samples seen and not placed, oldest first."""


def fill_rows[S: Sized](
    waiting: Sequence[S], samples: Iterator[S], *, num_rows: int, capacity: int, lookahead: int = LOOKAHEAD
) -> Filled[S]:
    """Fill ``num_rows`` rows of ``capacity`` tokens with ``waiting``, oldest first, and what ``samples`` brings.

    Takes from ``samples`` no more than it places or keeps waiting. No sample may be longer than ``capacity``.
    """
    window, rows = list(waiting), list[list[S]]()
    enough = capacity - capacity // _GAP
    while len(rows) < num_rows:
        chosen = _choose(window, samples, capacity=capacity, enough=enough, most=lookahead)
        if not chosen:
            break
        rows.append([window[i] for i in chosen])
        taken = set(chosen)
        window = [sample for i, sample in enumerate(window) if i not in taken]
    return Filled(rows, window)


def _choose[S: Sized](window: list[S], samples: Iterator[S], *, capacity: int, enough: int, most: int) -> list[int]:
    """Places in ``window`` of the samples of a row, ascending; ``window`` grows by what was drawn. Empty at the end."""
    reached: list[int] = []
    """As bits: the sums of the oldest sample and any of those behind it, up to each."""
    within = (1 << (capacity + 1)) - 1
    tokens = fitting = 0
    """Of all so far, and how many of the oldest fit together."""
    while not reached or reached[-1].bit_length() <= enough:
        if len(reached) == len(window):
            sample = next(samples, None) if len(window) < most + fitting else None
            if sample is None:
                break
            assert sample.length <= capacity, f"a sample of {sample.length} tokens in sequences of {capacity}"
            window.append(sample)
        length = window[len(reached)].length
        before = reached[-1] if reached else 1
        sums = before << length & within
        reached.append(sums | before if reached else sums)
        tokens += length
        fitting += tokens <= capacity
    if not reached:
        return []
    left, chosen = reached[-1].bit_length() - 1, [0]
    for i in range(len(reached) - 1, 0, -1):
        if not reached[i - 1] >> left & 1:  # cannot be had without it
            chosen.append(i)
            left -= window[i].length
    return sorted(chosen)


def deal(costs: Sequence[float], num_hands: int) -> list[list[int]]:
    """Indices of ``costs`` in ``num_hands`` hands of equal size and about equal total cost."""
    assert len(costs) % num_hands == 0, f"{len(costs)} rows cannot be dealt into {num_hands} equal hands"
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    heaviest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    for turn, index in enumerate(heaviest_first):
        round_, place = divmod(turn, num_hands)
        hands[place if round_ % 2 == 0 else num_hands - 1 - place].append(index)
    return hands
