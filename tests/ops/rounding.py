"""How far a right result may lie from the exact one: first-order rounding analysis, carried along with the value.

A ``Rounded`` is what exact arithmetic gives, in float64, and the most that the roundings made on the way can do to each
entry: every single rounding counts with its largest size (half a unit in the last place of what it rounds), and those
of different operations are added as the root of the sum of their squares. Roundings are independent of each other to
first order, bounded and without a preferred sign, so an error is a sum of independent bounded terms b_i, and by
Hoeffding's inequality beyond t times sqrt(sum b_i^2) with a probability of at most 2 exp(-t^2 / 2); for the norm of many
entries, beyond (1 + t) times with at most exp(-t^2 / 2). ``assert_rounded`` allows ENTRY = 8 for each entry (1e-14 each)
and NORM = 6 for all together (4e-6; in truth far less: a rounding is rarely at its largest). No other implementation is
asked, so no luck of it decides.

Rules, u = eps / 2 of the dtype that rounds:

    sum of K products in dtype A      e^2 = (e_a^2 @ b^2) + (a^2 @ e_b^2) + K u_A^2 (|a| @ |b|)^2     any order of summation
    elementwise f(a, b, ..) in A      e^2 = (f_a e_a)^2 + (f_b e_b)^2 + .. + (OPS u_A f)^2           OPS roundings at most
    stored in dtype D                 e^2 + max(u_D |v|, half of D's smallest number)^2
"""

from typing import NamedTuple

import torch
from torch import Tensor

ENTRY, NORM = 8.0, 6.0
OPS = 16
"""Roundings of an elementwise formula (SwiGLU and its slope), the approximation of exp included."""


class Rounded(NamedTuple):
    """A value and the size of its rounding error, entry by entry."""

    value: Tensor
    error: Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def exact(x: Tensor) -> Rounded:
    """A number that is what it is."""
    return Rounded(x.detach().double(), torch.zeros_like(x, dtype=torch.float64))


def stored(x: Rounded, dtype: torch.dtype) -> Rounded:
    """Rounded to ``dtype``."""
    once = (unit(dtype) * x.value.abs()).clamp(min=torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2)
    return Rounded(x.value, (x.error**2 + once.where(x.value != 0, 0.0) ** 2).sqrt())


def product(a: Rounded, b: Rounded, dtype: torch.dtype) -> Rounded:
    """a @ b with sums in ``dtype``."""
    terms = a.value.shape[-1]
    square = a.error**2 @ b.value**2 + a.value**2 @ b.error**2
    square += terms * (unit(dtype) * (a.value.abs() @ b.value.abs())) ** 2
    return Rounded(a.value @ b.value, square.sqrt())


def elementwise(value: Tensor, dtype: torch.dtype, *parts: Tensor) -> Rounded:
    """A formula in ``dtype``; ``parts``: its derivative by each argument times that argument's error."""
    square = (OPS * unit(dtype) * value) ** 2
    for part in parts:
        square = square + part**2
    return Rounded(value, square.sqrt())


def row_sums(x: Rounded, dtype: torch.dtype, dim: int) -> Rounded:
    """Sum of the entries along a side, in ``dtype``."""
    square = (x.error**2).sum(dim) + x.value.shape[dim] * (unit(dtype) * x.value.abs().sum(dim)) ** 2
    return Rounded(x.value.sum(dim), square.sqrt())


def transpose(x: Rounded) -> Rounded:
    """Both parts, transposed."""
    return Rounded(x.value.t(), x.error.t())


def assert_rounded(got: Tensor, right: Rounded, what: str = "") -> None:
    """``got`` differs from the exact value by its roundings at most: each entry, and all together."""
    assert got.shape == right.value.shape, f"{what}: {tuple(got.shape)} for {tuple(right.value.shape)}"
    difference = (got.detach().double() - right.value).abs()
    beyond = difference > ENTRY * right.error
    assert not beyond.any() and not difference.isnan().any(), (
        f"{what}: {int(beyond.sum())} of {beyond.numel()} entries are off by more than {ENTRY:g} times their rounding "
        f"error; the worst by {(difference / right.error.clamp(min=1e-300)).max():.3g} times"
    )
    error, allowed = difference.norm(), NORM * right.error.norm()
    assert error <= allowed, f"{what}: error {error:.3g} in the norm, allowed {allowed:.3g}"
