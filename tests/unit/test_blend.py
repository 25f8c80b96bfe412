"""Classes of samples for balancing: the rows of each, found without a list of them."""

import numpy as np
import pytest

from megatron_omni.data import blend
from megatron_omni.data.blend import CLASSES, ClassRows
from megatron_omni.data.index import HAS_ANSWER, HAS_SYSTEM, HOLDS


@pytest.mark.parametrize("lengths", [[0], [1], [1000], [37, 0, 500, 128, 1]])
def test_rows_of_a_class_are_those_of_a_list(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    monkeypatch.setattr(blend, "_BLOCK", 16)
    monkeypatch.setattr(blend, "_SLAB", 64)
    random = np.random.default_rng(sum(lengths))
    every = HAS_SYSTEM | HAS_ANSWER | sum(HOLDS.values())
    files = [random.integers(0, every + 1, length).astype(np.uint8) for length in lengths]
    flags = np.concatenate(files)
    answered, taken = (flags & HAS_ANSWER) > 0, np.zeros(len(flags), bool)
    for name in CLASSES:
        held = np.ones(len(flags), bool) if name == "text" else (flags & HOLDS[name]) > 0
        expected = np.flatnonzero(held & answered & ~taken).tolist()
        taken |= held
        rows = ClassRows(files, name)
        assert len(rows) == len(expected) and [rows[i] for i in range(len(rows))] == expected, name
    assert taken.all()


def test_what_is_kept_of_a_class_is_a_number_a_thousand_rows() -> None:
    flags = np.full(10_000_000, HAS_ANSWER, np.uint8)
    flags[::3] |= HOLDS["image"]
    rows = ClassRows([flags], "image")
    assert len(rows) == 3_333_334 and rows[3_333_333] == 9_999_999 and rows[1_234_567] == 3_703_701
    assert rows._ends.nbytes < 80_000
