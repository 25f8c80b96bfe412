"""How far pictures are apart: PSNR, SSIM, F1 of edges, and the Frechet distance between sets of features. Pure functions.

Pictures are uint8 [B, 3, H, W]; arithmetic is float64.

    PSNR      10 log10(255^2 / mean (x - y)^2), at most 100 dB (equal pictures)
    SSIM      mean over channels and places of (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2)) under
              a Gaussian window of 11 x 11, sigma 1.5, inside the picture; C1 = (0.01 255)^2, C2 = (0.03 255)^2 (Wang et al. 2004)
    luma      of both: Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255 (BT.601, what papers of deraining report)
    edge F1   2 hits / (edges of one + edges of the other); with a tolerance an edge is hit by one at most so many pixels away
    Frechet   |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), means and unbiased covariances of features (Heusel et al. 2017)

With features of Inception (inception.py) the last is FID; with those of any other network it is a Frechet distance and is called
after that network. It falls with the number of pictures: compare only values of the same number, size and crop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 255.0
LARGEST_DB = 100.0
"""PSNR of equal pictures, which would be infinite: one of them must not decide a mean."""
WINDOW, SIGMA = 11, 1.5
LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)


def psnr(drawn: Tensor, wanted: Tensor, *, where: Tensor | None = None, luma: bool = False) -> Tensor:
    """Decibels [B] of uint8 [B, 3, H, W]. ``where``: bool [H, W] or [B, H, W], the pixels that count (a hole, what an edit
    leaves alone). ValueError for other shapes, and where no pixel counts."""
    first, second = _values(drawn, wanted, luma)
    error = (first - second).square().mean(1)
    if where is None:
        mean = error.mean((1, 2))
    else:
        if where.shape not in (error.shape, error.shape[1:]) or where.dtype != torch.bool:
            raise ValueError(f"where is {where.dtype} {list(where.shape)}; it must be bool {list(error.shape)}")
        counts = where.expand_as(error)
        if not bool(counts.flatten(1).any(1).all()):
            raise ValueError("where has a picture without a pixel that counts")
        mean = (error * counts).sum((1, 2)) / counts.sum((1, 2))
    return (10 * torch.log10(PEAK**2 / mean)).clamp(max=LARGEST_DB)


def ssim(drawn: Tensor, wanted: Tensor, *, luma: bool = False) -> Tensor:
    """[B] of uint8 [B, 3, H, W], 1 for equal pictures. ValueError for other shapes and for sides below 11."""
    first, second = _values(drawn, wanted, luma)
    if min(first.shape[-2:]) < WINDOW:
        raise ValueError(f"pictures of {first.shape[-1]} x {first.shape[-2]}: SSIM needs sides of at least {WINDOW}")
    mean1, mean2 = _windowed(first), _windowed(second)
    spread1, spread2 = _windowed(first.square()) - mean1.square(), _windowed(second.square()) - mean2.square()
    both = _windowed(first * second) - mean1 * mean2
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    above = (2 * mean1 * mean2 + c1) * (2 * both + c2)
    below = (mean1.square() + mean2.square() + c1) * (spread1 + spread2 + c2)
    return (above / below).mean((1, 2, 3))


def edge_f1(drawn: Tensor, wanted: Tensor, *, tolerance: int = 0) -> Tensor:
    """F1 [B] of bool edge maps [B, H, W]; 1 where both have none. ``tolerance`` in pixels, diagonals included."""
    if drawn.shape != wanted.shape or drawn.dim() != 3 or drawn.dtype != torch.bool or wanted.dtype != torch.bool:
        raise ValueError(
            f"edges of {drawn.dtype} {list(drawn.shape)} and {wanted.dtype} {list(wanted.shape)}; give two of bool [B, H, W]"
        )
    hits = (drawn & _wider(wanted, tolerance)).sum((1, 2)).double()
    found = (wanted & _wider(drawn, tolerance)).sum((1, 2)).double()
    precision = hits / drawn.sum((1, 2)).clamp(min=1)
    recall = found / wanted.sum((1, 2)).clamp(min=1)
    none = ~drawn.flatten(1).any(1) & ~wanted.flatten(1).any(1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-300)
    return torch.where(none, torch.ones_like(f1), f1)


def frechet(first: Tensor, second: Tensor) -> float:
    """Of features [N, D] and [M, D]. ValueError for fewer than two rows on a side, other widths, values that are no numbers.

    With A, B the centred features over sqrt(N - 1), sqrt(M - 1): S_1 = A'A, S_2 = B'B, and the trace of the root is the sum
    of the singular values of A B'. No root of a matrix is taken, so it holds for fewer rows than columns too.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(
            f"features of {list(first.shape)} and {list(second.shape)}; give two matrices of one width, two rows or more"
        )
    if not bool(first.isfinite().all() and second.isfinite().all()):
        raise ValueError("features have values that are no numbers")
    mean1, factor1 = _moments(first.double())
    mean2, factor2 = _moments(second.double())
    root = torch.linalg.svdvals(factor1 @ factor2.T).sum()
    total = (mean1 - mean2).square().sum() + factor1.square().sum() + factor2.square().sum() - 2 * root
    return max(0.0, float(total))


def _values(drawn: Tensor, wanted: Tensor, luma: bool) -> tuple[Tensor, Tensor]:
    """[B, 3 or 1, H, W] in float64."""
    for picture in (drawn, wanted):
        if picture.dtype != torch.uint8 or picture.dim() != 4 or picture.shape[1] != 3 or not picture.numel():
            raise ValueError(f"pictures of {picture.dtype} {list(picture.shape)}; give uint8 [B, 3, height, width]")
    if drawn.shape != wanted.shape:
        raise ValueError(
            f"pictures of {list(drawn.shape)} and {list(wanted.shape)}: only pictures of one size are compared; "
            "draw at the size of the reference"
        )
    first, second = drawn.double(), wanted.double()
    if luma:
        weights = torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1)
        first, second = ((16 + (one * weights).sum(1, keepdim=True)) for one in (first, second))
    return first, second


def _windowed(values: Tensor) -> Tensor:
    """Gaussian means [B, C, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    flat = values.flatten(0, 1).unsqueeze(1)
    rows = F.conv2d(flat, weights.view(1, 1, WINDOW, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, WINDOW)).unflatten(0, values.shape[:2]).squeeze(2)


def _wider(edges: Tensor, tolerance: int) -> Tensor:
    if tolerance == 0:
        return edges
    side = 2 * tolerance + 1
    return F.max_pool2d(edges.float().unsqueeze(1), side, stride=1, padding=tolerance).squeeze(1) > 0


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D], and a factor [at most D, D] of the covariance: S = factor' factor."""
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred
