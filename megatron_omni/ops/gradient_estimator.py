"""The straight-through pieces of the routing gradient (paper appendix A.4; docs/model.md 2.3).

A selected slot with weight w and expert output E contributes ``o = w E``. Each (token, slot) has a scale
``s = 1 if delta or B else 1/3``; delta: the slot was the argmax of what was left when it was drawn.

``paper``  ``o_est = 2 o + detach(s o - 2 o)``, B ~ Bernoulli(5/8): forward ``s w E``, gradients ``dw = 2 <E, g>`` and
           ``dE = 2 w g``. Written as weight ``s w`` by ordinary autograd and a factor ``2 / s`` on the gradient of the
           weighted row (``unpermute`` applies it): ``dw = s <E, (2/s) g>`` and ``dE = s w (2/s) g``.
``grin``   B ~ Bernoulli(1/4) and ``scale_forward`` on the weight alone: forward ``s w E``, gradients ``dw = <E, g>``
           and ``dE = s w g``.
``none``   s = 1.
"""

from typing import Any, Literal

import torch
from torch import Tensor

Estimator = Literal["paper", "grin", "none"]

KEEP_PROBABILITY: dict[str, float] = {"paper": 5 / 8, "grin": 1 / 4}
"""P(B = 1): the full step of the third-order method, against the third of a step."""


class _ScaleForward(torch.autograd.Function):
    """Multiplication by ``factor`` whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def scale_forward(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor``; the gradient passes as if the factor were 1."""
    result: Tensor = _ScaleForward.apply(x, factor)
    return result


def argmax_among_remaining(z: Tensor, draw_rank: Tensor) -> Tensor:
    """delta [T, E] bool: when slot e was drawn, no slot still left (drawn later or never) had a larger z.

    ``draw_rank`` [T, E] is each slot's place in the draw order. Ties go to the lowest index, as argmax does.
    """
    index = torch.arange(z.shape[1], device=z.device)
    lower_index = index[None, :] < index[:, None]  # [e, other]
    mine, other = z.unsqueeze(2), z.unsqueeze(1)
    beaten = (other > mine) | ((other == mine) & lower_index)
    still_left = draw_rank.unsqueeze(1) > draw_rank.unsqueeze(2)
    return ~(beaten & still_left).any(2)


def slot_scale(delta: Tensor, bernoulli: Tensor, *, estimator: Estimator) -> Tensor:
    """s [T, E] float32 in {1, 1/3} from delta and uniform draws ``bernoulli`` [T, E] (B = draw < P(B = 1))."""
    if estimator == "none":
        return torch.ones_like(bernoulli)
    full = delta | (bernoulli < KEEP_PROBABILITY[estimator])
    return torch.full_like(bernoulli, 1 / 3).masked_fill_(full, 1.0)


def row_gradient_factor(scale: Tensor, *, estimator: Estimator) -> Tensor | None:
    """Factor 2 / s on the gradient of a weighted expert row, or None where the estimator leaves rows alone."""
    return 2.0 / scale if estimator == "paper" else None
