"""Dense products without gradients, by whoever is faster on this machine.

    linear     y = x W^T + b        W [N, K], as linear layers have it
    product    y = x W              W [K, N], as experts have it

x [.., K], b [N]; y [.., N]. PyTorch's product on an accelerator, and on a CPU where nothing else was measured.
For the numbers of rows at which our CPU kernels are faster (``OURS``; docs/generation.md has the figures) W is the one group
of a grouped product, which reads W as it lies. fp32 and bf16 accumulate in fp32 and round once. There, the bits of a row do
not depend on how many rows there are.

Training has products of its own (Megatron's linear modules).
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from megatron_omni.ops import extension

_ANY = 1 << 62
OURS = {
    "avx512": {torch.float32: range(4, _ANY), torch.bfloat16: range(1, _ANY)},
    "avx2": {torch.float32: range(4, 129), torch.bfloat16: range(2, _ANY)},
}
"""Rows of which ours is faster, by engine: one row is a pass over W, which PyTorch does as fast; past 128 MKL is as fast as
``avx2``, which oneDNN is in bf16 only on processors that multiply bf16 (and those have AVX-512)."""

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
    if x.device.type != "cpu" or extension.CPU_ERROR is not None:
        return False
    rows = x.numel() // x.shape[-1]
    return rows in OURS.get(extension.cpu_engine(), {}).get(x.dtype, ())


def _one_group(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weights and offsets of a grouped product."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return rows, w.unsqueeze(0), _offsets(len(rows))


@functools.lru_cache(maxsize=256)
def _offsets(rows: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives the step that made it
        return torch.tensor([0, rows])
