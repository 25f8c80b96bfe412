"""One MoE layer's worth of input for the benchmarks: a routing map, tensors, and what must come out.

T tokens, H hidden, F expert width, E experts, A assignments.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.moe_shapes import Shape
from megatron_omni.ops.permute import Permutation, build_permutation_reference
from megatron_omni.ops.topp_route import RoutingRule, topp_route_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NUM_NULL, TOP_P = 1, 0.7
"""Of the routing op, which is measured on logits of its own."""


def _counts(shape: Shape, generator: torch.Generator) -> Tensor:
    """[T] real experts of each token, A in all."""
    if shape.fixed_k:
        return torch.full((shape.tokens,), shape.assignments // shape.tokens)
    slots = (1 + torch.rand(shape.tokens, generator=generator) * (2 * shape.mean_k - 2)).round().clamp_min(0)
    k = torch.binomial(slots, torch.full_like(slots, 1 - shape.null_share), generator=generator).long()
    k = k.clamp(0, shape.experts)
    while (missing := shape.assignments - int(k.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = ((k < shape.experts) if step > 0 else (k > 0)).nonzero().flatten()
        chosen = free[torch.randperm(free.numel(), generator=generator)[: abs(missing)]]
        k[chosen] += step
    return k


def routing_map(shape: Shape, *, seed: int = 0) -> Tensor:
    """[T, E] bool with exactly ``shape.assignments`` entries."""
    generator = torch.Generator().manual_seed(seed)
    k = _counts(shape, generator)
    logits = -shape.skew * torch.arange(1, shape.experts + 1).log()
    uniform = torch.rand(shape.tokens, shape.experts, generator=generator).clamp_min_(1e-20)
    order = (logits - uniform.log().neg_().log_()).argsort(dim=1, descending=True)
    taken = torch.arange(shape.experts) < k.unsqueeze(1)
    return torch.zeros_like(taken).scatter_(1, order, taken)


@dataclass
class Problem:
    """Tensors of one shape, on one device, in one dtype."""

    shape: Shape
    x: Tensor
    """[T, H]."""
    w1: Tensor
    """[E, H, 2 F] = (gate | up)."""
    w2: Tensor
    """[E, F, H]."""
    mask: Tensor
    """[T, E] bool."""
    weights: Tensor
    """[T, E] fp32, 0 where not selected."""
    grad_y: Tensor
    """[T, H] gradient of a layer's output."""
    permutation: Permutation
    rows: Tensor
    """[A, H]: x in expert order."""
    grad_rows: Tensor
    """[A, H]."""
    grad_up: Tensor
    """[A, 2 F]: gradient of the first product."""
    row_weights: Tensor
    """[A] fp32."""
    logits: Tensor
    """[T, E + 3] fp32 of a gate over the experts, ``NUM_NULL`` null and two shared slots."""
    grad_weights: Tensor
    """[T, E + 1] fp32: gradient of the routing weights."""


def make_problem(shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Normal inputs scaled so that every intermediate has a spread of about 1."""
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device, dtype)

    mask = routing_map(shape, seed=seed).to(device)
    weights = (torch.rand(shape.tokens, shape.experts, generator=generator) * 0.9 + 0.1).to(device) * mask
    permutation = build_permutation_reference(mask)
    x = normal(shape.tokens, shape.hidden)
    grad_y = normal(shape.tokens, shape.hidden)
    return Problem(
        shape=shape,
        x=x,
        w1=normal(shape.experts, shape.hidden, 2 * shape.ffn, std=1 / math.sqrt(shape.hidden)),
        w2=normal(shape.experts, shape.ffn, shape.hidden, std=1 / math.sqrt(shape.ffn)),
        mask=mask,
        weights=weights,
        grad_y=grad_y,
        permutation=permutation,
        rows=x[permutation.row_token],
        grad_rows=grad_y[permutation.row_token],
        grad_up=normal(permutation.row_token.shape[0], 2 * shape.ffn),
        row_weights=torch.masked_select(weights.t(), mask.t()),
        logits=torch.randn(shape.tokens, shape.experts + NUM_NULL + 2, generator=generator).to(device),
        grad_weights=torch.randn(shape.tokens, shape.experts + NUM_NULL, generator=generator).to(device),
    )


Results = dict[str, Tensor]
"""``y`` and the gradient of each leaf, by name."""


def _wide(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.x.dtype == torch.float32 else torch.float32


def _gradients(y: Tensor, grad: Tensor, leaves: dict[str, Tensor]) -> Results:
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def reference_topp_route(problem: Problem) -> Results:
    """Weights of Top-P routing in float64."""
    z = problem.logits.double().requires_grad_()
    rule = RoutingRule(num_routed=problem.shape.experts, num_null=NUM_NULL, top_p=TOP_P)
    routing = topp_route_reference(z, rule)
    return _gradients(routing.weights, problem.grad_weights.double(), {"z": z})


def reference_permute(problem: Problem) -> Results:
    """rows[a] = x[token of a]."""
    x = problem.x.to(_wide(problem)).requires_grad_()
    return _gradients(x[problem.permutation.row_token], problem.grad_rows.to(x.dtype), {"x": x})


def reference_unpermute(problem: Problem) -> Results:
    """y[t] = sum of weighted rows of t."""
    rows = problem.rows.to(_wide(problem)).requires_grad_()
    weights = problem.row_weights.to(rows.dtype).requires_grad_()
    y = torch.zeros_like(problem.x, dtype=rows.dtype)
    y = y.index_add(0, problem.permutation.row_token, rows * weights.unsqueeze(1))
    return _gradients(y, problem.grad_y.to(rows.dtype), {"rows": rows, "weights": weights})


def reference_round_trip(problem: Problem) -> Results:
    """y[t] = x[t] times the sum of t's weights."""
    x = problem.x.to(_wide(problem)).requires_grad_()
    weights = problem.row_weights.to(x.dtype).requires_grad_()
    token = problem.permutation.row_token
    y = torch.zeros_like(x).index_add(0, token, x[token] * weights.unsqueeze(1))
    return _gradients(y, problem.grad_y.to(x.dtype), {"x": x, "weights": weights})


def reference_grouped_gemm(problem: Problem) -> Results:
    """rows of expert e times w1[e], with both gradients."""
    wide, offsets = _wide(problem), problem.permutation.offsets.tolist()
    y = torch.zeros_like(problem.grad_up, dtype=wide)
    rows, grad = problem.rows.to(wide), problem.grad_up.to(wide)
    dx, dw = torch.zeros_like(rows), torch.zeros_like(problem.w1, dtype=wide)
    for e in range(problem.shape.experts):
        part = slice(offsets[e], offsets[e + 1])
        w = problem.w1[e].to(wide)
        y[part], dx[part] = rows[part] @ w, grad[part] @ w.t()
        dw[e] = rows[part].t() @ grad[part]
    return {"y": y, "x": dx, "w": dw}


def _reference_mlp(problem: Problem, rows: Tensor, grad: Tensor, row_weight: Tensor | None) -> Results:
    """Forward and hand-written backward of the weighted expert MLP, one expert at a time to save memory."""
    wide, offsets = rows.dtype, problem.permutation.offsets.tolist()
    y, dx = torch.zeros_like(rows), torch.zeros_like(rows)
    dw1, dw2 = torch.zeros_like(problem.w1, dtype=wide), torch.zeros_like(problem.w2, dtype=wide)
    for e in range(problem.shape.experts):
        part = slice(offsets[e], offsets[e + 1])
        w1, w2, f = problem.w1[e].to(wide), problem.w2[e].to(wide), problem.shape.ffn
        gate, up = (rows[part] @ w1).split(f, dim=1)
        s = torch.sigmoid(gate)
        hidden = s * gate * up
        y[part] = hidden @ w2
        g = grad[part] if row_weight is None else grad[part] * row_weight[part].unsqueeze(1)
        dw2[e] = hidden.t() @ g
        dh = g @ w2.t()
        dgate_up = torch.cat([dh * up * s * (1 + gate * (1 - s)), dh * s * gate], dim=1)
        dw1[e] = rows[part].t() @ dgate_up
        dx[part] = dgate_up @ w1.t()
    return {"y": y, "x": dx, "w1": dw1, "w2": dw2}


def reference_expert_mlp(problem: Problem) -> Results:
    """(silu(x Wg) * (x Wu)) Wd by expert."""
    wide = _wide(problem)
    return _reference_mlp(problem, problem.rows.to(wide), problem.grad_rows.to(wide), None)


def reference_layer(problem: Problem) -> Results:
    """y[t] = sum_e weights[t, e] FFN_e(x[t]) over the selected experts."""
    wide, token = _wide(problem), problem.permutation.row_token
    rows, grad = problem.x.to(wide)[token], problem.grad_y.to(wide)[token]
    row_weight = problem.row_weights.to(wide)
    mlp = _reference_mlp(problem, rows, grad, row_weight)
    y, dx = (torch.zeros_like(problem.x, dtype=wide) for _ in range(2))
    y.index_add_(0, token, mlp["y"] * row_weight.unsqueeze(1))
    dx.index_add_(0, token, mlp["x"])
    dweights = torch.zeros_like(problem.weights, dtype=wide)
    dweights[token, problem.permutation.row_expert] = (mlp["y"] * grad).sum(1)
    return {"y": y, "x": dx, "w1": mlp["w1"], "w2": mlp["w2"], "weights": dweights}
