"""What projectors learn from teachers' embeddings before there are pictures (docs/images_out.md).

    caption   mean over rows that count of  |f / rms f - g / rms g|^2 / D  +  w |log rms f - log rms g|
    task      the same of the three vectors with their mean taken away (:func:`centred`)
    visual    mean (f - g)^2

f of the projector, g the teacher's. The first term is 2 (1 - cos(f, g)). In front of the generator's attention stand an RMSNorm
(caption) and a LayerNorm (task), which see directions alone; w (``align_norm``) keeps lengths near the teacher's. Vision rows
go in as they are, so their size counts. ``mse`` is the plain error of captions and tasks as well: there Gemma's first row,
three times as long as the others, decides. Cosines are reported in any case.

All terms are of each picture, [G] in fp32; their sum over pictures is divided by those of the global batch, as the flow loss.
Shapes: G pictures, R rows of width D.
"""

from typing import Literal

import torch
from torch import Tensor

Metric = Literal["directional", "mse"]
LEAST_SQUARE = 1e-12
"""Added under the roots: a row of zeros has a gradient."""


def align_caption(
    found: Tensor, teacher: Tensor, mask: Tensor, *, metric: Metric = "directional", norm_weight: float = 0.01
) -> Tensor:
    """[G] of caption rows or of centred task vectors [G, R, D]; ``mask`` [G, R]: rows that count, at least one of a picture's."""
    return _mean(_distance(found.float(), teacher.float(), metric, norm_weight), mask)


def align_visual(found: Tensor, teacher: Tensor) -> Tensor:
    """[G] of vision rows [G, N, D] in the same order."""
    return (found.float() - teacher.float()).square().flatten(1).mean(dim=1)


def cosines(found: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """[G]: mean over rows [G, R, D], those of ``mask`` [G, R], of the cosine; no gradient."""
    found, teacher = found.detach().float(), teacher.detach().float()
    cosine = (_unit(found) * _unit(teacher)).mean(dim=-1)
    return _mean(cosine, torch.ones_like(cosine, dtype=torch.bool) if mask is None else mask)


def centred(rows: Tensor) -> Tensor:
    """Rows [..., D] with the mean of their channels taken away, as a LayerNorm does."""
    return rows - rows.mean(dim=-1, keepdim=True)


def _distance(found: Tensor, teacher: Tensor, metric: Metric, norm_weight: float) -> Tensor:
    """[..., D] to [...]."""
    if metric == "mse":
        return (found - teacher).square().mean(dim=-1)
    lengths = (_rms(found).log() - _rms(teacher).log()).abs().squeeze(-1)
    return (_unit(found) - _unit(teacher)).square().mean(dim=-1) + norm_weight * lengths


def _rms(rows: Tensor) -> Tensor:
    return (rows.square().mean(dim=-1, keepdim=True) + LEAST_SQUARE).sqrt()


def _unit(rows: Tensor) -> Tensor:
    return rows / _rms(rows)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """[G] over the columns of ``values`` [G, R] that count."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
