"""Rotary angles from 3D positions (docs/model.md; the sections are those of Qwen2-VL).

A head of width D has D/2 frequencies base^(-2i/D). The first ``sections[0]`` of them turn with the time coordinate of
a token, the next ``sections[1]`` with its height, the last ``sections[2]`` with its width; text has the three equal
and so gets the ordinary rotary embedding. Angles are computed in fp32 from integer positions, whatever the model's
precision, and nothing is kept in a buffer, so that no precision conversion can touch them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, *, head_dim: int, base: float, sections: Sequence[int]) -> Tensor:
    """Angles [S, B, 1, D] fp32 of ``position_ids`` [3, B, S], in Megatron's layout: the D/2 angles twice (rotate-
    half).
    """
    assert position_ids.shape[0] == 3, f"position_ids must be [3, B, S], got {tuple(position_ids.shape)}"
    assert 2 * sum(sections) == head_dim, f"sections {list(sections)} must sum to half of head_dim {head_dim}"
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = base**-exponents
    coordinates = position_ids.permute(2, 1, 0).float()
    angles = torch.cat(
        [coordinates[..., axis : axis + 1] * part for axis, part in enumerate(frequencies.split(list(sections)))],
        dim=-1,
    )
    return torch.cat([angles, angles], dim=-1).unsqueeze(2)


def rotation(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What :func:`rotated` turns one row of tokens with: cosines and signed sines, as ``angles`` [S, 1, 1, D]."""
    cosines, sines = angles.cos(), angles.sin()
    half = sines.shape[-1] // 2
    return cosines.to(dtype), torch.cat([-sines[..., :half], sines[..., half:]], dim=-1).to(dtype)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """``x`` [S, groups, n, D] turned by a :func:`rotation`, as Megatron turns it."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)
