"""Packing: nothing lost or repeated, no row over its capacity, rows nearly full, encoder work spread evenly."""

import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.data.packing import LOOKAHEAD, deal, fill_rows


class Item(NamedTuple):
    number: int
    length: int


def steps(lengths, *, num_rows: int, capacity: int, num_steps: int):
    """``num_steps`` filled steps over an endless stream of lengths."""
    stream = (Item(i, length) for i, length in enumerate(lengths))
    waiting: list[Item] = []
    for _ in range(num_steps):
        filled = fill_rows(waiting, stream, num_rows=num_rows, capacity=capacity)
        yield waiting, filled
        waiting = filled.waiting


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9), st.integers(50, 120), st.integers(1, 12)
)
def test_every_sample_is_used_once_and_rows_hold_what_fits(lengths, num_rows, capacity, num_steps):
    used: list[int] = []
    for waiting, filled in steps(itertools.cycle(lengths), num_rows=num_rows, capacity=capacity, num_steps=num_steps):
        assert len(filled.rows) == num_rows and all(filled.rows)
        assert all(sum(item.length for item in row) <= capacity for row in filled.rows)
        here = [item.number for row in filled.rows for item in row]
        left = [item.number for item in filled.waiting]
        assert left == sorted(left)  # oldest first
        assert all([item.number for item in row] == sorted(item.number for item in row) for row in filled.rows)
        assert len(left) <= LOOKAHEAD + max(map(len, filled.rows))
        if waiting:  # what waited longest is never passed over
            assert waiting[0].number in here
        used += here
        assert sorted(used + left) == list(range(max(used + left) + 1))


@pytest.mark.parametrize("num_rows", [4, 32])
def test_rows_are_at_least_97_percent_full(num_rows):
    rng = random.Random(0)
    # Lengths of the tiny corpus: text, single pictures and words, pairs, clips.
    tiny = (rng.choice([24, 26, 40, 40, 41, 42, 44, 38, 112]) for _ in itertools.count())
    # Long-tailed: log-normal around 550 tokens, up to the row length.
    tail = (min(8192, 20 + int(math.exp(rng.gauss(6.3, 1.2)))) for _ in itertools.count())
    for lengths, capacity in ((tiny, 160), (tiny, 512), (tail, 8192)):
        fill = [
            sum(item.length for row in filled.rows for item in row) / (num_rows * capacity)
            for _, filled in steps(lengths, num_rows=num_rows, capacity=capacity, num_steps=100)
        ]
        assert np.mean(fill) >= 0.97, np.mean(fill)


def test_a_row_takes_the_oldest_sample_and_what_fills_it_best():
    lengths = [50, 30, 30, 41, 60, 9, 20]
    filled = fill_rows([], iter([Item(i, n) for i, n in enumerate(lengths)]), num_rows=1, capacity=100)
    assert [item.number for item in filled.rows[0]] == [0, 3, 5]  # 50 + 41 + 9; the first that fit leave 20 free
    assert [item.number for item in filled.waiting] == [1, 2, 4]  # the last was not looked at
    filled = fill_rows(filled.waiting, iter([]), num_rows=2, capacity=100)  # the end of the samples
    assert [[item.number for item in row] for row in filled.rows] == [[1, 4], [2]] and not filled.waiting
    assert fill_rows([], iter([Item(0, 5)]), num_rows=2, capacity=100).rows == [[Item(0, 5)]]


def test_hundreds_of_short_samples_fill_a_long_row():
    filled = fill_rows([], (Item(i, 40) for i in itertools.count()), num_rows=3, capacity=8192)
    assert [len(row) for row in filled.rows] == [204] * 3 and len(filled.waiting) <= LOOKAHEAD


def test_a_sample_waits_at_most_until_the_next_step_here():
    rng = random.Random(1)
    stream = (rng.choice([30, 90]) for _ in itertools.count())
    for waiting, filled in steps(stream, num_rows=8, capacity=100, num_steps=50):
        assert {item.number for item in waiting[:8]} <= {item.number for row in filled.rows for item in row}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.integers(1, 8))
def test_hands_are_equal_in_size_and_close_in_cost(costs, num_hands):
    costs = costs * num_hands
    hands = deal(costs, num_hands)
    assert sorted(i for hand in hands for i in hand) == list(range(len(costs)))
    assert {len(hand) for hand in hands} == {len(costs) // num_hands}
    totals = [sum(costs[i] for i in hand) for hand in hands]
    assert max(totals) - min(totals) <= max(costs) - min(costs) + 1e-6 * max(costs)


def test_one_heavy_row_does_not_meet_the_next_heavy_one():
    assert deal([1.0, 9.0, 8.0, 0.0], 2) == [[1, 3], [2, 0]]
