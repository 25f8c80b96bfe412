"""Token permutation for a variable number of experts per token.

``permute``             rows[a] = x[row_token[a]]: one copy of a token per selected expert, expert by expert.
``unpermute``           y[t] = sum over the rows a of token t of w[a] rows[a], in row order, accumulated in fp32 (float64
                        for float64 rows) and rounded once.
``assignment_values``   out[a] = values[row_token[a], row_expert[a]]: routing weights of the rows.

Gradients: permute's is an unpermute with unit weights; for unpermute, with g the gradient of y and f an optional
factor on the gradient of each weighted row (gradient_estimator.py): ``d rows[a] = f[a] w[a] g[t]``, ``d w[a] = f[a]
<rows[a], g[t]>``; for assignment_values a matrix that is zero elsewhere.

The metadata is built once per layer from the boolean routing map and serves both directions. A token without any expert
has no row and gets a zero; an expert without any token has an empty range. T tokens, E experts, A assignments, H width.

Order of this file: metadata, references in plain torch, the ops ``megatron_omni::*`` with their fake kernels, the public
functions. Their gradients are registered in csrc/bindings_autograd.cpp, their arguments checked in csrc/bindings.cpp:
ValueError with the argument's name. Limits: contiguous x and rows of float32, bfloat16, float16 or float64.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_omni.ops import extension


class Permutation(NamedTuple):
    """Where the assignments of a routing map lie, expert-major; tokens keep their order inside an expert."""

    offsets: Tensor
    """[E + 1] int64: the rows of expert e are offsets[e]..offsets[e + 1]."""
    row_token: Tensor
    """[A] int64: token of each row."""
    row_expert: Tensor
    """[A] int64: expert of each row."""
    token_offsets: Tensor
    """[T + 1] int64: the assignments of token t are token_offsets[t]..token_offsets[t + 1] of ``token_rows``."""
    token_rows: Tensor
    """[A] int64: row of each assignment, token-major: the inverse direction, for gather-sums without atomics."""


@torch.no_grad()
def build_permutation_reference(routing_map: Tensor, *, num_assignments: int | None = None) -> Permutation:
    """:func:`build_permutation` in plain torch."""

    def assigned(entries: Tensor) -> tuple[Tensor, ...]:
        found = entries.nonzero() if num_assignments is None else entries.nonzero_static(size=num_assignments)
        return found.unbind(1)

    row_expert, row_token = assigned(routing_map.t())
    zero = torch.zeros(1, dtype=torch.int64, device=routing_map.device)
    offsets = torch.cat([zero, routing_map.sum(0).cumsum(0)])
    token_offsets = torch.cat([zero, routing_map.sum(1).cumsum(0)])
    row_of = routing_map.cumsum(0) - 1 + offsets[:-1]
    return Permutation(offsets, row_token, row_expert, token_offsets, row_of[assigned(routing_map)])


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sum_rows(rows: Tensor, row_token: Tensor, num_tokens: int) -> Tensor:
    """[num_tokens, H] sums of the rows of each token, in at least fp32."""
    out = torch.zeros(num_tokens, rows.shape[1], dtype=_accumulation_dtype(rows), device=rows.device)
    return out.index_add_(0, row_token, rows.to(out.dtype))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_token: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(row_token)
        ctx.num_tokens = x.shape[0]
        if num_rows == row_token.shape[0]:
            return x.index_select(0, row_token)
        rows = x.new_zeros(num_rows, x.shape[1])
        torch.index_select(x, 0, row_token, out=rows[: row_token.shape[0]])
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (row_token,) = ctx.saved_tensors
        grad = grads[0][: row_token.shape[0]]
        return _sum_rows(grad, row_token, ctx.num_tokens).to(grad.dtype), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        row_token: Tensor,
        num_tokens: int,
        gradient_factor: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, row_token, gradient_factor)
        used = rows[: row_token.shape[0]].to(_accumulation_dtype(rows))
        return _sum_rows(used * weights.unsqueeze(1), row_token, num_tokens).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        rows, weights, row_token, gradient_factor = ctx.saved_tensors
        row_grad = grads[0].index_select(0, row_token).to(_accumulation_dtype(rows))
        if gradient_factor is not None:
            row_grad.mul_(gradient_factor.unsqueeze(1))
        used = rows[: row_token.shape[0]]
        grad_weights = grad_rows = None
        if ctx.needs_input_grad[1]:
            grad_weights = torch.linalg.vecdot(used.to(row_grad.dtype), row_grad).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            grad_rows = row_grad.mul_(weights.unsqueeze(1)).to(rows.dtype)
            if rows.shape[0] > used.shape[0]:
                grad_rows = torch.cat([grad_rows, grad_rows.new_zeros(rows.shape[0] - used.shape[0], rows.shape[1])])
        return grad_rows, grad_weights, None, None, None, None


def permute_reference(x: Tensor, permutation: Permutation, *, num_rows: int | None = None) -> Tensor:
    """:func:`permute` in plain torch."""
    num_assignments = permutation.row_token.shape[0]
    num_rows = num_assignments if num_rows is None else num_rows
    if num_rows < num_assignments:
        raise ValueError(f"num_rows: {num_rows} output rows cannot hold {num_assignments} assignments")
    result: Tensor = _Permute.apply(x, permutation.row_token, num_rows)
    return result


def unpermute_reference(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    num_tokens: int,
    gradient_factor: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`unpermute` in plain torch."""
    result: Tensor = _Unpermute.apply(
        rows, weights, permutation.row_token, num_tokens, gradient_factor, out_dtype or rows.dtype
    )
    return result


def assignment_values_reference(values: Tensor, permutation: Permutation) -> Tensor:
    """:func:`assignment_values` in plain torch."""
    return values[permutation.row_token, permutation.row_expert]


_build_permutation = extension.op("build_permutation")
_permute = extension.op("permute")
_unpermute = extension.op("unpermute")
_gather_assignments = extension.op("gather_assignments")


@extension.register_fake("build_permutation")
def _(routing_map: Tensor, num_assignments: int | None = None) -> tuple[Tensor, ...]:
    num_tokens, num_experts = routing_map.shape
    rows = torch.library.get_ctx().new_dynamic_size() if num_assignments is None else num_assignments
    sizes = (num_experts + 1, rows, rows, num_tokens + 1, rows)
    return tuple(routing_map.new_empty(size, dtype=torch.int64) for size in sizes)


@extension.register_fake("permute")
def _(x: Tensor, row_token: Tensor, token_offsets: Tensor, token_rows: Tensor, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, x.shape[1])


@extension.register_fake("unpermute")
def _(
    rows: Tensor,
    weights: Tensor | None,
    row_token: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    num_tokens: int,
    gradient_factor: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return rows.new_empty(num_tokens, rows.shape[1], dtype=out_dtype)


@extension.register_fake("unpermute_backward")
def _(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    gradient_factor: Tensor | None,
    row_token: Tensor,
    token_offsets: Tensor,
    token_rows: Tensor,
    needs_rows: bool,
    needs_weights: bool,
) -> tuple[Tensor, Tensor]:
    grad_rows = rows.new_empty(rows.shape[0] if needs_rows else 0, rows.shape[1])
    num_weights = row_token.shape[0] if needs_weights else 0
    return grad_rows, rows.new_empty(num_weights, dtype=_accumulation_dtype(rows))


@extension.register_fake("gather_assignments")
def _(values: Tensor, row_token: Tensor, row_expert: Tensor) -> Tensor:
    return values.new_empty(row_token.shape[0])


@extension.register_fake("scatter_assignments")
def _(entries: Tensor, row_token: Tensor, row_expert: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    return entries.new_empty(num_tokens, num_experts)


def build_permutation(routing_map: Tensor, *, num_assignments: int | None = None) -> Permutation:
    """Metadata of a routing map [T, E] bool; ``num_assignments``: its number of true entries, where it is known.

    On a GPU a known number spares the wait for the device that counting them costs; a wrong one stops the device.
    """
    return Permutation(*_build_permutation(routing_map, num_assignments))


def permute(x: Tensor, permutation: Permutation, *, num_rows: int | None = None) -> Tensor:
    """[num_rows, H] rows of x [T, H] in expert order; ``num_rows`` (default A) beyond A leaves a tail of zeros."""
    row_token = permutation.row_token
    num_rows = row_token.shape[0] if num_rows is None else num_rows
    return _permute(x, row_token, permutation.token_offsets, permutation.token_rows, num_rows)


def unpermute(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    num_tokens: int,
    gradient_factor: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[num_tokens, H] weighted sums of rows [>= A, H] with weights [A]; ``gradient_factor`` [A] as in the docstring.

    Weights and factor are taken in fp32 (float64 for float64 rows); rows past A are not read.
    """
    dtype = _accumulation_dtype(rows)
    if gradient_factor is not None and gradient_factor.dtype != dtype:
        gradient_factor = gradient_factor.to(dtype)
    return _unpermute(
        rows,
        weights if weights.dtype == dtype else weights.to(dtype),
        permutation.row_token,
        permutation.token_offsets,
        permutation.token_rows,
        num_tokens,
        gradient_factor,
        out_dtype or rows.dtype,
    )


def assignment_values(values: Tensor, permutation: Permutation) -> Tensor:
    """[A] entries of values [T, E] (any strides) at the assignments, in row order."""
    return _gather_assignments(values, permutation.row_token, permutation.row_expert)
