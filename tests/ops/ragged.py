"""What the tests of the grouped ops share: ragged groups, the choice of CPU kernels, the rule about rounding."""

import torch
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


FEW = 256


def assert_twice_eager(
    got: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    magnitude: torch.Tensor,
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Error in the norm at most twice that of same-dtype eager; ``magnitude`` is the result without any cancellation.

    Eager may hit a few numbers exactly by luck: of up to ``FEW``, one rounding of the largest magnitude is allowed as
    well, in ``dtype``, what the result was computed from (default: its own). In float64 eager is the definition: there,
    a few roundings.
    """
    assert got.dtype == eager.dtype and got.shape == exact.shape, what
    eps = torch.finfo(dtype or got.dtype).eps
    error, other = (got.double() - exact).norm(), (eager.double() - exact).norm()
    if got.dtype == torch.float64:
        allowed = 32 * eps * magnitude.norm()
    else:
        largest = magnitude.abs().max() if magnitude.numel() else 0.0
        allowed = 2 * other + (eps * largest if exact.numel() <= FEW else 0.0)
    assert error <= allowed, (
        f"{what}: error {error:.3g}, allowed {allowed:.3g}, eager's {other:.3g} of {exact.norm():.3g}"
    )
