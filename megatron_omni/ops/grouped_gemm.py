"""Grouped matrix product: rows of one expert after the other against that expert's weight.

``y[a] = x[a] @ w[e]`` for offsets[e] <= a < offsets[e + 1]. Gradients: ``dx[a] = dy[a] @ w[e]^T`` and
``dw[e] = x[rows of e]^T @ dy[rows of e]``, exactly zero for an expert without rows. Rows past offsets[E] are never read
(they may hold anything) and come back zero, in y and in dx.

x [A, K], w [E, K, N], offsets [E + 1] int64 ascending from 0; y [A, N]; any K and N. bf16 and fp16 accumulate in fp32 and
round once.

Order of this file: the reference in plain torch, the ops ``megatron_omni::grouped_gemm*`` with their fake kernels, the
public functions. Gradients are registered in csrc/bindings_autograd.cpp, arguments checked in csrc/bindings.cpp:
ValueError with the argument's name. On a CPU the offsets are checked too; on a GPU reading them would wait for it.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_omni.ops import extension


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


def grouped_gemm_reference(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """:func:`grouped_gemm` in plain torch: one matrix product per expert with rows, offsets read on the host."""
    if offsets.shape[0] != w.shape[0] + 1:
        raise ValueError(
            f"offsets: has {offsets.shape[0]} entries for {w.shape[0]} experts, must have one more than those"
        )
    result: Tensor = _GroupedGemm.apply(x, w, offsets)
    return result


_grouped_gemm = extension.op("grouped_gemm")
_grouped_gemm_wgrad_out = extension.op("grouped_gemm_wgrad_out")


@extension.register_fake("grouped_gemm")
def _(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@extension.register_fake("grouped_gemm_dgrad")
def _(dy: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], w.shape[1])


@extension.register_fake("grouped_gemm_wgrad")
def _(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dy.shape[1])


@extension.register_fake("grouped_gemm_wgrad_out")
def _(x: Tensor, dy: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    return None


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """[A, N] product of x [A, K] with w [E, K, N] by expert ranges ``offsets`` [E + 1]; empty ranges are legal.

    All contiguous, x and w of one dtype (float32, bfloat16, float16, float64), offsets int64.
    """
    return _grouped_gemm(x, w, offsets)


def grouped_gemm_wgrad(x: Tensor, dy: Tensor, offsets: Tensor, *, out: Tensor, accumulate: bool = True) -> None:
    """Weight gradient x^T dy by expert [E, K, N] written, or added, to ``out``: a ``main_grad`` buffer, say.

    ``out`` is float32 (float64 for float64 rows), or of x's dtype if not accumulating. Not differentiable.
    """
    _grouped_gemm_wgrad_out(x, dy, offsets, out, accumulate)
