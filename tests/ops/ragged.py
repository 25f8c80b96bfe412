"""What the tests of the grouped ops share: ragged groups, the choice of CPU kernels."""

import os

import torch
from hypothesis import settings
from hypothesis import strategies as st

from megatron_omni.ops import extension

ENGINES = extension.cpu_engines()
"""Of the CPU kernels: all that this machine can run. A test takes one as ``with use_cpu_engine(engine):``."""

counts = st.lists(st.one_of(st.just(0), st.integers(1, 7), st.integers(20, 130)), min_size=0, max_size=5)
"""Rows by expert: none, few, many; experts from none at all."""
sides = st.one_of(st.integers(1, 5), st.integers(15, 70), st.sampled_from([128, 129, 200]))
"""A side of a weight: odd ones, whole tiles, a column past one."""


def offsets_of(rows_by_expert: list[int] | tuple[int, ...]) -> torch.Tensor:
    """[E + 1] int64."""
    return torch.tensor([0, *rows_by_expert], dtype=torch.int64).cumsum(0)


def examples(count: int) -> settings:
    """``count`` examples, the same in each run; OMNI_SEARCH=N draws N new ones instead, by hand (docs/kernels.md)."""
    search = os.environ.get("OMNI_SEARCH")
    return settings(max_examples=int(search or count), deadline=None, derandomize=search is None)
