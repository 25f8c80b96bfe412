"""The experts' MLP over ragged groups of rows, one op: ``y = (s * silu(x Wg) * (x Wu)) Wd`` with w1 = (Wg | Wu), w2 = Wd.

s is the routing weight of a row (1 where none is given). Saved for the backward pass: x and the pre-activations
h = (g | u) = x w1, nothing else. With a = silu(g) * u, d = dy Wd^T and r = sigmoid(g):

    ds = <d, a>         dWd = (s a)^T dy         dg = s d u r (1 + g (1 - r))         du = s d silu(g)
    dx = (dg | du) w1^T         dw1 = x^T (dg | du)

so y is needed for no gradient, and the activations of a layer are x [A, H] and h [A, 2 F]. Weight gradients of experts
without rows are exactly zero; rows past offsets[E] are never read and come back zero (y, h, dx, ds).

x [A, H], w1 [E, H, 2 F], w2 [E, F, H], offsets [E + 1] int64 ascending from 0, row_weight [A] float32 (float64 for
float64 rows); y [A, H]. bf16 and fp16 accumulate in fp32; h, s a and (dg | du) are rounded to them.

With ``main_grads`` the gradients of w1 and w2 are added to these buffers by the backward pass: no weight-sized tensor is
written and read again. This is megatron-core's ``gradient_accumulation_fusion`` (models/moe/kernels.py keeps its side).

Order of this file: the reference in plain torch, the op ``megatron_omni::expert_mlp`` with its fake kernels, the public
function. Its gradient is registered in csrc/bindings_autograd.cpp, its arguments are checked in csrc/bindings.cpp:
ValueError with the argument's name.
"""

import torch
from torch import Tensor

from megatron_omni.ops import extension
from megatron_omni.ops.grouped_gemm import grouped_gemm_reference


def expert_mlp_reference(
    x: Tensor, w1: Tensor, w2: Tensor, offsets: Tensor, *, row_weight: Tensor | None = None
) -> Tensor:
    """:func:`expert_mlp` in plain torch: two grouped products around an eager SwiGLU."""
    gate, up = grouped_gemm_reference(x, w1, offsets).chunk(2, dim=-1)
    a = torch.nn.functional.silu(gate) * up
    if row_weight is not None:
        a = (a * row_weight.unsqueeze(1)).to(x.dtype)
    return grouped_gemm_reference(a, w2, offsets)


_expert_mlp = extension.op("expert_mlp")


@extension.register_fake("expert_mlp")
def _(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    row_weight: Tensor | None,
    main_grad1: Tensor | None = None,
    main_grad2: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], w1.shape[2])


@extension.register_fake("expert_mlp_backward")
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    row_weight: Tensor | None,
    needs_x: bool,
    needs_w1: bool,
    needs_w2: bool,
    needs_row_weight: bool,
    main_grad1: Tensor | None = None,
    main_grad2: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, hidden, width = w1.shape
    weight_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape[0] if needs_x else 0, hidden),
        x.new_empty(experts if needs_w1 and main_grad1 is None else 0, hidden, width),
        x.new_empty(experts if needs_w2 and main_grad2 is None else 0, w2.shape[1], hidden),
        x.new_empty(x.shape[0] if needs_row_weight else 0, dtype=weight_dtype),
    )


def expert_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    offsets: Tensor,
    *,
    row_weight: Tensor | None = None,
    main_grads: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[A, H] outputs of the experts for rows x [A, H] grouped by ``offsets`` [E + 1]; see the module docstring.

    All contiguous; x, w1 and w2 of one dtype (float32, bfloat16, float16, float64). ``main_grads``: float32 (float64 for
    float64 rows) buffers of w1's and w2's shapes; what autograd then holds as the gradients of w1 and w2 is
    uninitialised memory and must not be used.
    """
    return _expert_mlp(x, w1, w2, offsets, row_weight, *(main_grads or (None, None)))[0]
