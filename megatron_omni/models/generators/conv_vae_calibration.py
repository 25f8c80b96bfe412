"""What is measured on pictures when the codec has been trained: the measure of its latents and the smoothing of its grid.

    A            = C^(1/2),  C = cov(z)                     z: the encoder's means, channels of all places
    latent_scale = 1 / sqrt(mean (A z)^2)
    smoothing    : mean |p_b| = mean |p_i|                  of decoded pictures

Noise of one size on all latents (the training) makes the deviation of what a latent says grow with the square root of what
it means to a picture (conv_vae.coefficients). A generator that learns such latents spends most of its loss on details. With
A, folded into the convolutions at both ends of the latent, deviations are the picture's own; pictures stay what they were.

p_b are the steps between neighbouring pixels across the borders of places and p_i all others. Latents are decoded with the
noise of the training on them: a generator's are not free of error either, and what they add stands at the borders first.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_omni.models.generators.conv_vae import ConvCodec, smoothed
from megatron_omni.platform.seeds import named_generator

HALVINGS = 12
"""Of the interval in which ``smoothing`` is looked for."""
LEAST_VARIANCE = 1e-3
"""Of a principal axis, as a share of the largest: what never moves is not stretched without end by the way back."""


@torch.no_grad()
def calibrate(codec: ConvCodec, pictures: Iterable[Tensor], *, noise: float) -> None:
    """Set all three by ``pictures``, [1, 3, H, W] uint8 each. ValueError for pictures whose latents are all 0."""
    codec.decoder.smoothing, generator = 0.0, named_generator(0, "calibration")
    rows, made = [], []
    for number, pixels in enumerate(pictures):
        latents = codec.encode(pixels, names=[f"picture {number} of the calibration"]) / codec.latent_scale
        rows.append(latents.double().movedim(1, 3).flatten(0, 2))
        made.append(codec.picture(latents + noise * torch.randn(latents.shape, generator=generator)).clamp(-1, 1))
    z = torch.cat(rows) if rows else torch.zeros(0, 1)
    if not z.any():
        raise ValueError(
            f"the latents of {len(made)} pictures are all 0: no scale makes their mean square 1; name others"
        )
    measure = _root(torch.cov(z.T, correction=0).reshape(z.shape[1], -1))
    fold(codec, measure)
    power = float((z @ measure).square().mean())
    codec.latent_scale = codec.config.latent_scale = float(f"{power**-0.5:.3g}")
    low, high = 0.0, 0.5
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        ratios = [border_ratio(smoothed(each, codec.downsampling, middle), codec.downsampling) for each in made]
        low, high = (middle, high) if sum(ratios) > len(ratios) else (low, middle)
    codec.decoder.smoothing = codec.config.smoothing = float(f"{low:.2g}")


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, axes = torch.linalg.eigh(covariance)
    return (axes * values.clamp_min(LEAST_VARIANCE * values.max()).sqrt()) @ axes.T


@torch.no_grad()
def fold(codec: ConvCodec, measure: Tensor) -> None:
    """Make the codec's latents ``measure`` [C, C] times what they are, and its pictures the same."""
    measure = measure.double()
    for last in (codec.encoder.out, codec.encoder.short):
        last.weight.copy_(torch.einsum("ij,jcab->icab", measure, last.weight.double()))
        assert last.bias is not None
        last.bias.copy_(measure @ last.bias.double())
    back = torch.linalg.inv(measure)
    for first in (codec.decoder.enter, codec.decoder.short):
        first.weight.copy_(torch.einsum("ojab,ji->oiab", first.weight.double(), back))


@torch.no_grad()
def border_ratio(pictures: Tensor, side: int) -> float:
    """Mean step across the borders of squares of ``side`` pixels over the mean step inside them; 1 where there are none of the one
    or the other."""
    borders, inside = [], []
    for axis in (3, 2):
        steps = pictures.diff(dim=axis).abs().transpose(axis, 3)
        across = torch.arange(1, steps.shape[3] + 1) % side == 0
        borders.append(steps[..., across].flatten())
        inside.append(steps[..., ~across].flatten())
    means = [torch.cat(each).mean() if sum(map(len, each)) else torch.ones(()) for each in (borders, inside)]
    return float(means[0] / means[1]) if means[1] else 1.0
