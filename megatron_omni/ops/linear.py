"""Dense products without gradients, by whoever is faster on this machine.

    linear     y = x W^T + b        W [N, K], as linear layers have it
    product    y = x W              W [K, N], as experts have it

x [.., K], b [N]; y [.., N]. PyTorch's product on an accelerator, and on a CPU where nothing else was measured.
Where our CPU kernels run on AVX-512 (extension.py), W is the one group of a grouped product, which reads W as it lies and
takes a third to two thirds of the time of PyTorch's for a few rows: docs/generation.md has the figures. fp32 and bf16
accumulate in fp32 and round once. There, the bits of a row do not depend on how many rows there are.

Training has products of its own (Megatron's linear modules).
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from megatron_omni.ops import extension

ENGINE = "avx512"
"""The one engine that was faster for every shape. ``avx2`` was faster for fp32 only, and by a tenth."""
LEAST_ROWS = {torch.float32: 4, torch.bfloat16: 1}
"""Rows from which ours is taken: fewer are one pass over W, which PyTorch does as fast in fp32."""

_by_transposed = extension.op("grouped_gemm_dgrad")
_by = extension.op("grouped_gemm")


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """[.., N] from ``x`` [.., K], ``w`` [N, K] and ``bias`` [N], all of one dtype; not differentiable on a CPU."""
    if not _is_ours(x):
        return torch_linear(x, w, bias)
    y: Tensor = _by_transposed(*_one_group(x, w))
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


def product(x: Tensor, w: Tensor) -> Tensor:
    """[.., N] from ``x`` [.., K] and ``w`` [K, N] of one dtype; not differentiable on a CPU."""
    if not _is_ours(x):
        return x @ w
    y: Tensor = _by(*_one_group(x, w))
    return y.view(*x.shape[:-1], -1)


def _is_ours(x: Tensor) -> bool:
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows < LEAST_ROWS.get(x.dtype, rows + 1) or extension.CPU_ERROR is not None:
        return False
    return extension.cpu_engine() == ENGINE


def _one_group(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and offsets of a grouped product."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows, w.unsqueeze(0), _offsets(len(rows))


@functools.lru_cache(maxsize=256)
def _offsets(rows: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives the step that made it
        return torch.tensor([0, rows])
