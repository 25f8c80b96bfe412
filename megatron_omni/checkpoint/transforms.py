"""Invertible transforms between tensors of a foreign checkpoint ("theirs") and one tensor of ours.

``to_ours(parts)`` makes our tensor of their parts, ``to_theirs(tensor)`` gives the parts back, bit for bit: only copies,
no arithmetic, so any dtype passes. Our shape follows from theirs by running ``to_ours`` on the meta device. ``str()`` of
a transform is what the ledger records.

H hidden size, F expert width, q query rows, g query groups, d head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STRIP_ROWS = 128


class Transform(Protocol):
    """What a row of ``names.py`` needs of its transform."""

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        """Our tensor of their ``parts``."""
        ...

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """Their parts of our ``tensor``; views of it where the layout allows."""
        ...


@dataclass(frozen=True)
class Identity:
    """One part, as it is."""

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class QkvInterleave:
    """q [heads d, ..], k and v [groups d, ..] to Megatron's linear_qkv: for each group its queries, its key, its value."""

    num_heads: int
    num_groups: int

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        q, k, v = (part.unflatten(0, (self.num_groups, -1)) for part in parts)
        return torch.cat([q, k, v], dim=1).flatten(0, 1)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        grouped = tensor.unflatten(0, (self.num_groups, -1))
        queries = self.num_heads // self.num_groups
        head = grouped.shape[1] // (queries + 2)
        return [part.flatten(0, 1) for part in grouped.split([queries * head, head, head], dim=1)]


@dataclass(frozen=True)
class Concat:
    """``parts`` equal parts joined along ``dim``: gate and up to linear_fc1 [2 F, H]."""

    parts: int = 2
    dim: int = 0

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        assert len(parts) == self.parts
        return torch.cat(list(parts), dim=self.dim)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(self.parts, self.dim))


@dataclass(frozen=True)
class PadRows:
    """A vocabulary matrix [rows, H] to [padded, H]; the rows that nobody uses are zero."""

    rows: int
    padded: int

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        if self.padded == self.rows:
            return part
        return torch.cat([part, part.new_zeros(self.padded - self.rows, *part.shape[1:])])

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[: self.rows]]


@dataclass(frozen=True)
class Transpose:
    """One matrix [H, F] to [F, H]: ``nn.Linear``'s down projection to an expert's second matrix."""

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return _transposed([part])

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [_transposed([tensor])]


@dataclass(frozen=True)
class GateUpTransposed:
    """Pairs (gate, up) [F, H] of ``experts`` experts to one matrix [H, 2 experts F] = (all gates | all ups).

    A routed expert has one pair; the shared experts of a layer lie side by side.
    """

    experts: int = 1

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        assert len(parts) == 2 * self.experts
        return _transposed([*parts[0::2], *parts[1::2]])

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        gates, ups = tensor.chunk(2, dim=1)
        pairs = zip(gates.chunk(self.experts, dim=1), ups.chunk(self.experts, dim=1))
        return [_transposed([part]) for pair in pairs for part in pair]


@dataclass(frozen=True)
class DownTransposed:
    """Down projections [H, F] of ``experts`` shared experts to one matrix [experts F, H]."""

    experts: int = 1

    def to_ours(self, parts: Sequence[Tensor]) -> Tensor:
        assert len(parts) == self.experts
        return torch.cat([_transposed([part]) for part in parts]) if self.experts > 1 else _transposed(parts)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        return [_transposed([part]) for part in tensor.chunk(self.experts)]


def _transposed(parts: Sequence[Tensor]) -> Tensor:
    """Transposes [c, r] of ``parts`` [r, c], side by side.

    torch transposes whole contiguous matrices in blocks, and anything else element by element at a fifth of the speed:
    so in strips of rows that stay in the cache.
    """
    whole = parts[0].new_empty(parts[0].shape[1], sum(part.shape[0] for part in parts))
    if whole.is_meta:
        return whole
    column = 0
    for part in parts:
        for strip in part.split(STRIP_ROWS):
            whole[:, column : column + len(strip)] = strip.contiguous().t().contiguous()
            column += len(strip)
    return whole
