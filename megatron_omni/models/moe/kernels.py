"""Who routes tokens, moves their rows and multiplies them by the experts of a MoE layer: ``model.moe.kernels``.

A choice is six functions, each with the meaning of the op of its name (ops/), on the same stacked weights: parameters,
checkpoints and gradients do not depend on it.

``omni``      the ops of this project: csrc/ kernels on CUDA and on processors whose engine was measured (AVX-512,
              AVX2); on others the same functions as ``torch``, unless OMNI_CPU_KERNELS=neon or =portable asks for ours
``torch``     plain PyTorch: the ops' references, and ``F.grouped_mm`` (one product per expert where that function does
              not take the dtype or shape); needs nothing compiled
``te``        ours, but the experts run on Transformer Engine's ``GroupedLinear``. It wants weights [out, in], of which
              a copy is made in each forward
``megatron``  megatron-core's scatter-add and, one expert after the other, the linear and SwiGLU functions its
              ``SequentialMLP`` calls; the rest as ``torch``

x rows [A, H], w1 [E, H, 2 F] = (gate | up), w2 [E, F, H], offsets [E + 1]; A assignments, E experts, H hidden, F expert
width.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_omni.ops import extension
from megatron_omni.ops.expert_mlp import expert_mlp
from megatron_omni.ops.grouped_gemm import grouped_gemm_reference
from megatron_omni.ops.permute import (
    Permutation,
    assignment_values,
    assignment_values_reference,
    build_permutation,
    build_permutation_reference,
    permute,
    permute_reference,
    unpermute,
    unpermute_reference,
)
from megatron_omni.ops.topp_route import Routing, topp_route, topp_route_reference
from megatron_omni.platform.device import accelerator_present

logger = logging.getLogger(__name__)

GROUPED_MM_ALIGN_BYTES = 16
"""``F.grouped_mm`` refuses matrices whose rows are no multiple of this."""


class Kernels(NamedTuple):
    """One choice of ``model.moe.kernels``."""

    topp_route: Callable[..., Routing]
    build_permutation: Callable[..., Permutation]
    assignment_values: Callable[[Tensor, Permutation], Tensor]
    permute: Callable[..., Tensor]
    unpermute: Callable[..., Tensor]
    expert_mlp: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rows, w1, w2, offsets) -> [A, H]."""


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [.., 2 F] (gate | up)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@functools.cache
def load_kernels(name: str) -> Kernels:
    """The functions of a choice; ValueError where it is not there. Logged on first use."""
    if name not in _CHOICES:
        raise ValueError(f"model.moe.kernels={name!r}: no such choice; use one of {', '.join(_CHOICES)}")
    kernels = _CHOICES[name]()
    logger.info("backends: moe=%s", backend_of(name))
    return kernels


def backend_of(name: str) -> str:
    """A choice as logs say it: ours on a CPU with the engine that runs."""
    if name != "omni" or accelerator_present():
        return name
    return f"omni({'torch' if _takes_torch() else extension.cpu_engine()})"


def _takes_torch() -> bool:
    """Whether nobody asked for the engine of our CPU kernels, and it may be slower than torch's products."""
    return extension.cpu_engine() not in extension.MEASURED_ENGINES and not extension.cpu_engine_is_forced()


def _main_grads(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradient buffers of two parameters where the experts' gradients can be added to them directly.

    The convention is that of megatron-core's DistributedDataParallel: a parameter's ``main_grad``, and
    ``grad_added_to_main_grad`` for its hook, which then leaves ``.grad`` alone.
    """
    if not (torch.is_grad_enabled() and w1.requires_grad and w2.requires_grad):
        return None
    wide = torch.promote_types(w1.dtype, torch.float32)
    first, second = (getattr(w, "main_grad", None) for w in (w1, w2))
    if first is None or first.dtype != wide or second is None or second.dtype != wide:
        return None
    return first, second


def omni_expert_mlp(rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
    """``expert_mlp``; parameters with a ``main_grad`` get their gradients there."""
    main_grads = _main_grads(w1, w2)
    if main_grads is not None:
        w1.grad_added_to_main_grad = w2.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return expert_mlp(rows, w1, w2, offsets, main_grads=main_grads)


def _omni() -> Kernels:
    missing = extension.CUDA_ERROR if accelerator_present() else extension.CPU_ERROR
    if missing is not None:
        raise ValueError(f"model.moe.kernels='omni': {missing}; or set model.moe.kernels=torch")
    if not accelerator_present() and _takes_torch():
        return _torch()
    return Kernels(topp_route, build_permutation, assignment_values, permute, unpermute, omni_expert_mlp)


def takes_grouped_mm(x: Tensor, w: Tensor) -> bool:
    """Whether ``F.grouped_mm`` accepts x [A, K] with w [E, K, N], in both directions."""
    aligned = all(size * w.element_size() % GROUPED_MM_ALIGN_BYTES == 0 for size in w.shape[1:])
    return aligned and x.dtype in (torch.float32, torch.bfloat16)


class _Contiguous(torch.autograd.Function):
    """Identity whose gradient is contiguous: ``F.grouped_mm``'s backward refuses expanded ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return grads[0].contiguous()


def torch_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """[A, N] product of x [A, K] with w [E, K, N] by PyTorch alone."""
    if not takes_grouped_mm(x, w):
        return grouped_gemm_reference(x, w, offsets)
    y: Tensor = _Contiguous.apply(torch.nn.functional.grouped_mm(x, w, offs=offsets[1:].to(torch.int32)))
    return y


def torch_expert_mlp(rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
    """``expert_mlp`` as two grouped products around an eager SwiGLU."""
    return torch_grouped_gemm(swiglu(torch_grouped_gemm(rows, w1, offsets)), w2, offsets)


def _torch() -> Kernels:
    return Kernels(
        topp_route_reference,
        build_permutation_reference,
        assignment_values_reference,
        permute_reference,
        unpermute_reference,
        torch_expert_mlp,
    )


def _te() -> Kernels:
    why = None if accelerator_present() else "needs a CUDA device, none is usable here"
    if why is None:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except ImportError as error:
            why = f"Transformer Engine cannot be imported ({error})"
    if why is not None:
        raise ValueError(
            f"model.moe.kernels='te': {why}; install it with pip install 'megatron-omni[gpu]', or set "
            "model.moe.kernels=omni"
        )
    return _omni()._replace(expert_mlp=te_expert_mlp)


@functools.cache
def _te_linear(experts: int, size_in: int, size_out: int, dtype: torch.dtype) -> Any:
    te = importlib.import_module("transformer_engine.pytorch")
    return te.GroupedLinear(experts, size_in, size_out, bias=False, params_dtype=dtype, device="meta")


def te_grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """[A, N] product of x [A, K] with w [E, K, N] by Transformer Engine; waits for the row counts on the host."""
    linear = _te_linear(*w.shape, w.dtype)
    weights = {f"weight{e}": part for e, part in enumerate(w.transpose(1, 2).contiguous().unbind())}
    y: Tensor = torch.func.functional_call(linear, weights, (x, offsets.diff().tolist()))
    return y


def te_expert_mlp(rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
    """``expert_mlp`` on Transformer Engine's grouped linear."""
    return te_grouped_gemm(swiglu(te_grouped_gemm(rows, w1, offsets)), w2, offsets)


def _megatron() -> Kernels:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
    from megatron.core.transformer.moe.moe_utils import unpermute as megatron_unpermute

    linear = functools.partial(
        linear_with_grad_accumulation_and_async_allreduce,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )

    def sequential_mlp(rows: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor) -> Tensor:
        parts = rows.split(offsets.diff().tolist())
        weights = zip(parts, w1.transpose(1, 2).unbind(), w2.transpose(1, 2).unbind(), strict=True)
        return torch.cat([linear(bias_swiglu_impl(linear(part, up), None), down) for part, up, down in weights])

    def weighted_unpermute(
        rows: Tensor,
        weights: Tensor,
        permutation: Permutation,
        *,
        num_tokens: int,
        gradient_factor: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weighted = rows * weights.unsqueeze(1)
        if gradient_factor is not None and weighted.requires_grad:
            factor = gradient_factor.unsqueeze(1)
            weighted.register_hook(lambda grad: grad * factor)
        y = megatron_unpermute(weighted, permutation.row_token, torch.Size((num_tokens, rows.shape[1])))
        return y.to(out_dtype or rows.dtype)

    return _torch()._replace(unpermute=weighted_unpermute, expert_mlp=sequential_mlp)


_CHOICES: dict[str, Callable[[], Kernels]] = {"omni": _omni, "torch": _torch, "te": _te, "megatron": _megatron}
