"""The contenders for the whole routed layer: from tokens, routing map and weights to weighted sums of expert outputs.

See moe_contenders.py for what a contender is and who they are.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe_contenders import (
    Contender,
    OneRank,
    Prepared,
    choice,
    library_product,
    loop_expert_mlp,
    medium,
    megatron_module,
    package,
    prepare_leaves,
)
from benchmarks.moe_problem import Problem
from megatron_omni.models.moe.dispatcher import AllToAllDispatcher
from megatron_omni.models.moe.kernels import load_kernels, swiglu


def _layer(compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], kernels: Any, problem: Problem) -> Prepared:
    group: Any = OneRank()
    dispatch = AllToAllDispatcher(
        num_experts=problem.shape.experts, ep_group=group, expt_tp_group=group, kernels=kernels
    )
    mask = problem.mask

    def run(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor) -> Tensor:
        y = dispatch.begin(mask)(x, weights, lambda rows, offsets: compute(rows, w1, w2, offsets))
        return y.to(x.dtype)

    return prepare_leaves(run, x=problem.x, w1=problem.w1, w2=problem.w2, weights=problem.weights)


def _choice_layer(name: str) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        kernels = choice(name)
        return _layer(kernels.expert_mlp, kernels, problem)

    return prepare


def _loop_layer(problem: Problem) -> Prepared:
    return _layer(loop_expert_mlp, load_kernels("torch"), problem)


def _library_layer(problem: Problem) -> Prepared:
    product = library_product(problem)

    def compute(rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
        return product(swiglu(product(rows, w1, offsets)), w2, offsets)

    return _layer(compute, load_kernels("torch"), problem)


def _sequential_mlp_layer(problem: Problem) -> Prepared:
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    module, leaves, canonical = megatron_module(problem)
    mask, num_rows, dtype = problem.mask, problem.rows.shape[0], problem.x.dtype
    x, weights = problem.x.detach(), problem.weights.detach()

    def run() -> Tensor:
        rows, probs, order, _, _ = permute(x, mask, probs=weights, num_out_tokens=num_rows)
        rows, _ = module(rows, mask.sum(0), probs)
        y: Tensor = unpermute(rows.to(dtype), order, x.shape)
        return y

    return Prepared(run, {"x": [x], "weights": [weights], **leaves}, canonical)


def _padded_top_k(problem: Problem) -> tuple[Tensor, Tensor]:
    """Experts [T, k_max] and weights of each token; the index E and weight 0 where a token has fewer."""
    k = problem.mask.sum(1)
    order = problem.mask.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, : int(k.max())]
    used = torch.arange(order.shape[1], device=k.device) < k.unsqueeze(1)
    index = order.masked_fill(~used, problem.shape.experts)
    return index, problem.weights.gather(1, order) * used


def _dense_weights(problem: Problem, index: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """[T, E] from gradients at ``index`` [T, k_max]."""

    def scatter(grads: list[Tensor]) -> Tensor:
        wide = grads[0].new_zeros(problem.shape.tokens, problem.shape.experts + 1)
        return wide.scatter_(1, index, grads[0])[:, :-1]

    return scatter


def _hf_layer(implementation: str) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        shape = problem.shape
        index, top = _padded_top_k(problem)
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.ffn,
            num_experts=shape.experts,
            num_experts_per_tok=index.shape[1],
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeSparseMoeBlock(config).experts
        experts._is_expert_parallel = bool((index == shape.experts).any())  # there are indices to skip
        experts.gate_up_proj = torch.nn.Parameter(problem.w1.transpose(1, 2).contiguous())
        experts.down_proj = torch.nn.Parameter(problem.w2.transpose(1, 2).contiguous())
        x, weights = problem.x.detach(), top.detach()

        def run() -> Tensor:
            y: Tensor = experts(x, index, weights.to(x.dtype))
            return y

        leaves = {"x": [x], "w1": [experts.gate_up_proj], "w2": [experts.down_proj], "weights": [weights]}
        back = {name: lambda grads: grads[0].transpose(1, 2) for name in ("w1", "w2")}
        return Prepared(run, leaves, {**back, "weights": _dense_weights(problem, index)})

    return prepare


def _sonic_layer(problem: Problem) -> Prepared:
    sonic = package("sonicmoe", problem)
    activation = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    token, expert = (part.int() for part in problem.mask.nonzero(as_tuple=True))
    mask, experts = problem.mask, problem.shape.experts

    def run(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor) -> Tensor:
        scores = weights[mask].to(x.dtype)
        up, down = w1.permute(2, 1, 0), w2.permute(2, 1, 0)  # [2 F, H, E], [H, F, E]
        y: Tensor = sonic.moe_general_routing_inputs(
            x, scores, token, expert, up, None, down, None,
            E=experts, activation_type=activation, is_inference_mode_enabled=False, concat_layout=True, stream_id=None,
        )[0]  # fmt: skip
        return y

    return prepare_leaves(run, x=problem.x, w1=problem.w1, w2=problem.w2, weights=problem.weights)


def _scattermoe_layer(problem: Problem) -> Prepared:
    scatter = package("scattermoe", problem).parallel_experts
    index, top = _padded_top_k(problem)
    experts, k = problem.shape.experts, index.shape[1]
    weights = top.detach()
    plan = scatter.flatten_sort_count(index.clamp(max=experts - 1), num_experts=experts)
    x, w1, w2 = problem.x.detach(), problem.w1.detach(), problem.w2.detach()

    def run() -> Tensor:
        up = scatter.parallel_linear(x, w1, k, *plan, grouped_out=True)
        y: Tensor = scatter.parallel_linear(swiglu(up), w2, 1, *plan, grouped_in=True, gates=weights.to(x.dtype))
        return y

    leaves = {"x": [x], "w1": [w1], "w2": [w2], "weights": [weights]}
    return Prepared(run, leaves, {"weights": _dense_weights(problem, index)})


LAYER: dict[str, Contender] = {
    "omni": _choice_layer("omni"),
    "torch": _choice_layer("torch"),
    "torch medium": medium(_choice_layer("torch")),
    "te": _choice_layer("te"),
    "megatron": _choice_layer("megatron"),
    "loop": _loop_layer,
    "megatron SequentialMLP": _sequential_mlp_layer,
    "hf qwen3_moe eager": _hf_layer("eager"),
    "hf qwen3_moe grouped_mm": _hf_layer("grouped_mm"),
    "sonic-moe": _sonic_layer,
    "scattermoe": _scattermoe_layer,
    "grouped_gemm": _library_layer,
}
