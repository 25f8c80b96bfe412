"""Grouped matrix product: rows of one expert after the other against that expert's weight.

``y[a] = x[a] @ w[e]`` for offsets[e] <= a < offsets[e + 1]. Gradients: ``dx[a] = dy[a] @ w[e]^T`` and
``dw[e] = x[rows of e]^T @ dy[rows of e]``, exactly zero for an expert without rows. Rows past offsets[E] are zero.

x [A, K], w [E, K, N], offsets [E + 1] int64 ascending from 0; y [A, N]. The reference reads the offsets on the host
and runs one matrix product per non-empty expert, written straight into the result.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def _spans(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every expert that has rows."""
    bounds = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        spans = _spans(offsets)
        ctx.save_for_backward(x, w)
        ctx.spans = spans
        covered = spans[-1][2] if spans else 0
        y = x.new_empty(x.shape[0], w.shape[2])
        for e, a, b in spans:
            torch.mm(x[a:b], w[e], out=y[a:b])
        y[covered:].zero_()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        grad = grads[0].contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for e, a, b in ctx.spans:
                torch.mm(grad[a:b], w[e].t(), out=dx[a:b])
            dx[ctx.spans[-1][2] if ctx.spans else 0 :].zero_()
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(w, memory_format=torch.contiguous_format)
            used = {e for e, _, _ in ctx.spans}
            for e in range(w.shape[0]):
                if e not in used:
                    dw[e].zero_()
            for e, a, b in ctx.spans:
                torch.mm(x[a:b].t(), grad[a:b], out=dw[e])
        return dx, dw, None


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """[A, N] product of x [A, K] with w [E, K, N] by expert ranges ``offsets`` [E + 1]; empty ranges are legal."""
    assert offsets.shape[0] == w.shape[0] + 1, f"{offsets.shape[0]} offsets for {w.shape[0]} experts"
    result: Tensor = _GroupedGemm.apply(x, w, offsets)
    return result
