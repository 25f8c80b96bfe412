"""Latents drawn by the generator: conditions of each branch, remembered once, and Euler steps (flow.py has the formulas).

All branches of a step are one batch, pictures of the first branch before those of the second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_omni.models.generators.dit import DiT
from megatron_omni.models.generators.flow import Branch, Guidance, euler, guided


@dataclass(frozen=True, kw_only=True)
class BranchConditions:
    """What a branch of guidance knows of B pictures; shapes as :meth:`DiT.forward`."""

    source: Tensor
    caption: Tensor
    caption_mask: Tensor
    task: Tensor
    vision: Tensor


@torch.no_grad()
def sample(
    dit: DiT,
    x0: Tensor,
    branches: Mapping[Branch, BranchConditions],
    *,
    steps: int,
    guidance: Guidance,
    shift: float = 1.0,
    noise: Tensor | None = None,
    base_tokens: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] in fp32 from noise ``x0``; of ``branches`` those that count are read.

    ``noise`` [B, layers, N]: one choice of vision rows for all steps and branches; ``base_tokens`` as :meth:`DiT.forward`.
    ValueError as :func:`flow.grid`.
    """
    names = guidance.branches

    def joined(field: str) -> Tensor:
        return torch.cat([getattr(branches[name], field) for name in names])

    source = joined("source").float()
    memory = dit.remember(
        caption=joined("caption"),
        caption_mask=joined("caption_mask"),
        task=joined("task"),
        vision=joined("vision"),
        noise=None if noise is None else noise.repeat(len(names), 1, 1),
    )

    def velocity(_: Sequence[Branch], x: Tensor, t: Tensor) -> Sequence[Tensor]:
        many = len(names)
        v = dit.velocity(x.repeat(many, 1, 1, 1), t.repeat(many), source=source, memory=memory, base_tokens=base_tokens)
        return v.chunk(many)

    return euler(guided(velocity, guidance), x0, steps, shift, on_step=on_step)
