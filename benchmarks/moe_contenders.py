"""Everyone who can compute an op of the MoE layer, behind one signature.

A contender takes a ``Problem`` and returns a ``Prepared``: a call without arguments and the leaves whose gradients it
yields, in whatever layout it likes (``canonical`` turns its gradients back into ours). One that cannot run here raises
``Unavailable`` with the reason. ``omni``, ``torch``, ``te`` and ``megatron`` are the choices of ``model.moe.kernels``,
run by the model's own functions and dispatcher; the others are what people use elsewhere:

``loop``                     one torch.mm after the other over unbound weights, eager
``... medium``               fp32 with ``set_float32_matmul_precision("medium")``
``megatron SequentialMLP``   megatron-core's modules, with its permute and unpermute
``hf qwen3_moe ...``         the experts of Hugging Face's Qwen3-MoE block; tokens with fewer experts than the most are
                             padded with its out-of-range index, which it skips
``sonic-moe``, ``scattermoe``, ``grouped_gemm``   the packages of these names, on a GPU; scattermoe takes a fixed number
                             of experts per token, so its padding is computed, with weight 0
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe_problem import NUM_NULL, TOP_P, Problem
from megatron_omni.models.moe.kernels import load_kernels, swiglu, te_grouped_gemm, torch_grouped_gemm
from megatron_omni.ops.grouped_gemm import grouped_gemm
from megatron_omni.ops.topp_route import RoutingRule


class Unavailable(Exception):
    """This contender cannot run here; the message says why."""


@dataclass
class Prepared:
    """A contender on one problem."""

    run: Callable[[], Tensor]
    leaves: dict[str, list[Tensor]]
    canonical: dict[str, Callable[[list[Tensor]], Tensor]] = field(default_factory=dict)
    """From gradients of a leaf's tensors to the gradient in our layout; the one tensor itself where missing."""
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around forward and backward."""
    rounds_to: torch.dtype | None = None
    """What its products may round their factors to, if not the problem's dtype."""


Contender = Callable[[Problem], Prepared]


class OneRank:
    """A process group of this process alone."""

    def size(self) -> int:
        """1."""
        return 1

    def rank(self) -> int:
        """0."""
        return 0


def prepare_leaves(run: Callable[..., Tensor], **inputs: Tensor) -> Prepared:
    """``run`` on leaves that share the memory of ``inputs``."""
    leaves = {name: value.detach() for name, value in inputs.items()}
    return Prepared(lambda: run(**leaves), {name: [leaf] for name, leaf in leaves.items()})


@contextmanager
def medium_precision() -> Iterator[None]:
    """fp32 products as ``set_float32_matmul_precision("medium")`` makes them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def medium(contender: Contender) -> Contender:
    """The same at medium precision, for fp32 only."""

    def prepare(problem: Problem) -> Prepared:
        if problem.x.dtype != torch.float32:
            raise Unavailable("differs in fp32 only")
        prepared = contender(problem)
        prepared.scope = medium_precision
        prepared.rounds_to = torch.bfloat16  # where the processor multiplies that faster (AMX), and nowhere else
        return prepared

    return prepare


def choice(name: str) -> Any:
    """The ``Kernels`` of ``model.moe.kernels=name``."""
    try:
        return load_kernels(name)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def package(name: str, problem: Problem) -> Any:
    """An optional package that works on a GPU only."""
    if problem.x.device.type != "cuda":
        raise Unavailable("runs on CUDA only")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"cannot be imported ({error})") from error


def _choice_route(name: str) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        route = choice(name).topp_route
        rule = RoutingRule(num_routed=problem.shape.experts, num_null=NUM_NULL, top_p=TOP_P)
        return prepare_leaves(lambda z: route(z, rule).weights, z=problem.logits)

    return prepare


# Moving rows. Building the metadata from the routing map is part of permute, since megatron-core's does it there.


def _choice_permute(name: str) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        kernels, mask = choice(name), problem.mask
        return prepare_leaves(lambda x: kernels.permute(x, kernels.build_permutation(mask)), x=problem.x)

    return prepare


def _choice_unpermute(name: str) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        kernels, permutation, tokens = choice(name), problem.permutation, problem.shape.tokens

        def run(rows: Tensor, weights: Tensor) -> Tensor:
            y: Tensor = kernels.unpermute(rows, weights, permutation, num_tokens=tokens, out_dtype=rows.dtype)
            return y

        return prepare_leaves(run, rows=problem.rows, weights=problem.row_weights)

    return prepare


def _choice_round_trip(name: str) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        kernels, mask, tokens = choice(name), problem.mask, problem.shape.tokens

        def run(x: Tensor, weights: Tensor) -> Tensor:
            permutation = kernels.build_permutation(mask)
            rows = kernels.permute(x, permutation)
            y: Tensor = kernels.unpermute(rows, weights, permutation, num_tokens=tokens, out_dtype=x.dtype)
            return y

        return prepare_leaves(run, x=problem.x, weights=problem.row_weights)

    return prepare


def _megatron_permute(problem: Problem) -> Prepared:
    from megatron.core.transformer.moe.moe_utils import permute

    mask, rows = problem.mask, problem.rows.shape[0]
    return prepare_leaves(lambda x: permute(x, mask, num_out_tokens=rows)[0], x=problem.x)


def _megatron_unpermute(problem: Problem) -> Prepared:
    from megatron.core.transformer.moe.moe_utils import unpermute

    mask, order, size = problem.mask, problem.permutation.row_token, problem.x.shape

    def run(rows: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = unpermute(rows, order, size, probs=weights, routing_map=mask)
        return y

    prepared = prepare_leaves(run, rows=problem.rows, weights=problem.weights)
    prepared.canonical = {"weights": lambda grads: torch.masked_select(grads[0].t(), mask.t())}
    return prepared


def _megatron_round_trip(problem: Problem) -> Prepared:
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    mask, num_rows = problem.mask, problem.rows.shape[0]

    def run(x: Tensor, weights: Tensor) -> Tensor:
        rows, _, order, _, _ = permute(x, mask, num_out_tokens=num_rows)
        y: Tensor = unpermute(rows, order, x.shape, probs=weights, routing_map=mask)
        return y

    prepared = prepare_leaves(run, x=problem.x, weights=problem.weights)
    prepared.canonical = {"weights": lambda grads: torch.masked_select(grads[0].t(), mask.t())}
    return prepared


# Products.


def loop_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """One product per expert, over rows split and weights unbound once: slicing each would cost a whole gradient."""
    parts = x.split(offsets.diff().tolist())
    return torch.cat([part @ one for part, one in zip(parts, w.unbind(), strict=True)])


def loop_expert_mlp(rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
    """Expert after expert, eager."""
    parts = rows.split(offsets.diff().tolist())
    experts = zip(parts, w1.unbind(), w2.unbind(), strict=True)
    return torch.cat([swiglu(part @ up) @ down for part, up, down in experts])


def library_product(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, w, offsets) -> product by the package grouped_gemm, which wants row counts on the host."""
    gmm = package("grouped_gemm", problem).ops.gmm
    return lambda x, w, offsets: gmm(x, w, offsets.diff().cpu())


def _gemm(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        offsets = problem.permutation.offsets
        return prepare_leaves(lambda x, w: product(x, w, offsets), x=problem.rows, w=problem.w1)

    return prepare


def _te_gemm(problem: Problem) -> Prepared:
    choice("te")
    return _gemm(te_grouped_gemm)(problem)


def _library_gemm(problem: Problem) -> Prepared:
    return _gemm(library_product(problem))(problem)


# The expert MLP on rows that are already grouped.


def _mlp(compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Contender:
    def prepare(problem: Problem) -> Prepared:
        offsets = problem.permutation.offsets
        return prepare_leaves(
            lambda x, w1, w2: compute(x, w1, w2, offsets), x=problem.rows, w1=problem.w1, w2=problem.w2
        )

    return prepare


def _choice_mlp(name: str) -> Contender:
    return lambda problem: _mlp(choice(name).expert_mlp)(problem)


def _library_mlp(problem: Problem) -> Prepared:
    product = library_product(problem)
    return _mlp(lambda x, w1, w2, offsets: product(swiglu(product(x, w1, offsets)), w2, offsets))(problem)


def megatron_module(problem: Problem) -> tuple[Any, dict[str, list[Tensor]], dict[str, Any]]:
    """megatron-core's module with our weights, its leaves, and what makes its gradients ours."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape, dtype = problem.shape, problem.x.dtype
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=problem.x.device.type != "cpu",
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=problem.x.device.type == "cpu",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    groups = SimpleNamespace(ep=OneRank(), expt_tp=OneRank(), expt_dp=OneRank())
    module = SequentialMLP(shape.experts, config, MLPSubmodules(ColumnParallelLinear, RowParallelLinear), groups)
    leaves: dict[str, list[Tensor]] = {"w1": [], "w2": []}
    for e, expert in enumerate(module.local_experts):
        for name, linear, weight in (("w1", expert.linear_fc1, problem.w1), ("w2", expert.linear_fc2, problem.w2)):
            linear.explicit_expert_comm = True  # as under expert parallelism: no collective of its own
            linear.weight = torch.nn.Parameter(weight[e].t().contiguous())
            leaves[name].append(linear.weight)

    def stack(grads: list[Tensor]) -> Tensor:
        return torch.stack(grads).transpose(1, 2)

    return module, leaves, {"w1": stack, "w2": stack}


def _sequential_mlp(problem: Problem) -> Prepared:
    module, leaves, canonical = megatron_module(problem)
    counts = problem.permutation.offsets.diff()
    x = problem.rows.detach()
    unit = torch.ones_like(problem.row_weights, dtype=x.dtype)
    return Prepared(lambda: module(x, counts, unit)[0], {"x": [x], **leaves}, canonical)


TOPP_ROUTE: dict[str, Contender] = {"omni": _choice_route("omni"), "torch": _choice_route("torch")}
PERMUTE: dict[str, Contender] = {
    "omni": _choice_permute("omni"),
    "torch": _choice_permute("torch"),
    "megatron": _megatron_permute,
}
UNPERMUTE: dict[str, Contender] = {
    "omni": _choice_unpermute("omni"),
    "torch": _choice_unpermute("torch"),
    "megatron": _megatron_unpermute,
}
ROUND_TRIP: dict[str, Contender] = {
    "omni": _choice_round_trip("omni"),
    "torch": _choice_round_trip("torch"),
    "megatron": _megatron_round_trip,
}
GROUPED_GEMM: dict[str, Contender] = {
    "omni": _gemm(grouped_gemm),
    "torch": _gemm(torch_grouped_gemm),
    "torch medium": medium(_gemm(torch_grouped_gemm)),
    "loop": _gemm(loop_grouped_gemm),
    "te": _te_gemm,
    "grouped_gemm": _library_gemm,
}
EXPERT_MLP: dict[str, Contender] = {
    "omni": _choice_mlp("omni"),
    "torch": _choice_mlp("torch"),
    "torch medium": medium(_choice_mlp("torch")),
    "te": _choice_mlp("te"),
    "megatron": _choice_mlp("megatron"),
    "loop": _mlp(loop_expert_mlp),
    "megatron SequentialMLP": _sequential_mlp,
    "grouped_gemm": _library_mlp,
}
