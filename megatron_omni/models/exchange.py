"""Rows of tensors between the ranks of a group, and their gradients on the way back.

The gradient of a gather is a reduce-scatter and the other way round, of an all-to-all the reverse all-to-all. Sums are in
at least fp32. Ranks may hold different numbers of rows.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _all_to_all(x: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(output_splits), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
    return out


def _gather(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of every rank, in rank order. Where sizes differ, which all-gather does not allow, an all-to-all of copies."""
    if len(set(sizes)) == 1:
        out = x.new_empty(sum(sizes), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out
    return _all_to_all(torch.cat([x] * len(sizes)), sizes, [x.shape[0]] * len(sizes), group)


def _reduce_scatter(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks, added in at least fp32."""
    mine = sizes[group.rank()]
    parts = _all_to_all(x, [mine] * len(sizes), sizes, group).unflatten(0, (len(sizes), mine))
    return parts.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


class AllToAllRows(torch.autograd.Function):
    """``apply(x, output_splits, input_splits, group)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.args = (input_splits, output_splits, group)
        return _all_to_all(x, output_splits, input_splits, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], *ctx.args), None, None, None


class GatherRows(torch.autograd.Function):
    """``apply(x, sizes, group)``: rows of every rank, of which rank r has ``sizes[r]``, in rank order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.args = (sizes, group)
        return _gather(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grads[0], *ctx.args), None, None


class ReduceScatterRows(torch.autograd.Function):
    """``apply(x, sizes, group)``: this rank's rows of the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.args = (sizes, group)
        return _reduce_scatter(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _gather(grads[0], *ctx.args), None, None
