"""Token permutation for a variable number of experts per token.

``permute``    rows[a] = x[row_token[a]]: one copy of a token per selected expert, expert by expert.
``unpermute``  y[t] = sum over the rows a of token t of w[a] rows[a], accumulated in fp32 (float64 for float64 input).

Gradients: permute's is an unpermute with unit weights; for unpermute, with g the gradient of y and f an optional
factor on the gradient of each weighted row (gradient_estimator.py): ``d rows[a] = f[a] w[a] g[t]``, ``d w[a] = f[a]
<rows[a], g[t]>``.

The metadata is built once per layer from the boolean routing map and serves both directions. A token without any expert
has no row and gets a zero; an expert without any token has an empty range. T tokens, E experts, A assignments, H width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


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
def build_permutation(routing_map: Tensor) -> Permutation:
    """Metadata of a routing map [T, E] bool."""
    row_expert, row_token = routing_map.t().nonzero(as_tuple=True)
    zero = torch.zeros(1, dtype=torch.int64, device=routing_map.device)
    offsets = torch.cat([zero, routing_map.sum(0).cumsum(0)])
    token_offsets = torch.cat([zero, routing_map.sum(1).cumsum(0)])
    row_of = routing_map.cumsum(0) - 1 + offsets[:-1]
    return Permutation(offsets, row_token, row_expert, token_offsets, row_of[routing_map])


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


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


def permute(x: Tensor, permutation: Permutation, *, num_rows: int | None = None) -> Tensor:
    """[num_rows, H] rows of x [T, H] in expert order; ``num_rows`` (default A) beyond A leaves a tail of zeros."""
    num_assignments = permutation.row_token.shape[0]
    num_rows = num_assignments if num_rows is None else num_rows
    assert num_rows >= num_assignments, f"{num_rows} output rows cannot hold {num_assignments} assignments"
    result: Tensor = _Permute.apply(x, permutation.row_token, num_rows)
    return result


def unpermute(
    rows: Tensor,
    weights: Tensor,
    permutation: Permutation,
    *,
    num_tokens: int,
    gradient_factor: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[num_tokens, H] weighted sums of rows [>= A, H] with weights [A]; ``gradient_factor`` [A] as in the docstring."""
    result: Tensor = _Unpermute.apply(
        rows, weights, permutation.row_token, num_tokens, gradient_factor, out_dtype or rows.dtype
    )
    return result
