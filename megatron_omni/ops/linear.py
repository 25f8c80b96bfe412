"""A dense product without gradients: y = x W^T + b, by whoever is faster on this machine.

x [.., K], W [N, K], b [N]; y [.., N]. PyTorch's product on an accelerator, and on a CPU where nothing else was measured.
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

_product = extension.op("grouped_gemm_dgrad")


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """[.., N] from ``x`` [.., K], ``w`` [N, K] and ``bias`` [N], all of one dtype; not differentiable on a CPU."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows < LEAST_ROWS.get(x.dtype, rows + 1) or not _is_fast():
        return torch_linear(x, w, bias)
    y: Tensor = _product(x.reshape(rows, -1).contiguous(), w.unsqueeze(0), _one_group(rows))
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


def _is_fast() -> bool:
    return extension.CPU_ERROR is None and extension.cpu_engine() == ENGINE


@functools.lru_cache(maxsize=256)
def _one_group(rows: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives the step that made it
        return torch.tensor([0, rows])
