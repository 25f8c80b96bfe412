"""Loss of a codec of pictures: how far what the decoder made is from the picture, and the power of the latents.

    loss   = w_sq mean (y - x)^2 + w_abs mean |y - x| + w_edge (mean (Dx e)^2 + mean (Dy e)^2) / 2
             + w_grid (mean (Bx e)^2 + mean (By e)^2) / 2 + w_power max(0, mean z^2 - 1)
    e      = y - x, Dx and Dy: differences of neighbours in a row and in a column, Bx and By: those across the borders of the
             d x d squares that the places of a latent stand for, 0 where there are none
    PSNR   = 10 log10(4 / mean (y - x)^2)

Means are over one picture, so that the loss does not depend on how pictures are dealt to batches. Pixels are from -1 to 1. With
noise of a fixed size on latents of a bounded power, what an element of the latent can carry is bounded as well: the encoder spends
its power where it saves most error, up to the bound, and an offset that carries nothing costs. The bound is on one side alone:
asked for more power, an encoder would find it in offsets first.

Shapes: pictures [B, 3, H, W], latents [B, C, h, w], results [B].
"""

import torch
from torch import Tensor

from megatron_omni.config.objectives import PictureCodecTrainingConfig


def picture_loss(made: Tensor, pictures: Tensor, latents: Tensor, config: PictureCodecTrainingConfig) -> Tensor:
    """The loss of each picture, [B]."""
    error = made - pictures
    across, along = error.diff(dim=3), error.diff(dim=2)
    loss = config.power_weight * (_mean(latents.square()) - 1).relu()
    if config.square_weight:
        loss = loss + config.square_weight * _mean(error.square())
    if config.absolute_weight:
        loss = loss + config.absolute_weight * _mean(error.abs())
    if config.edge_weight:
        loss = loss + config.edge_weight * (_mean(across.square()) + _mean(along.square())) / 2
    side = pictures.shape[-1] // latents.shape[-1]
    if config.grid_weight and min(latents.shape[2:]) > 1:
        borders = across[..., side - 1 :: side], along[:, :, side - 1 :: side]
        loss = loss + config.grid_weight * (_mean(borders[0].square()) + _mean(borders[1].square())) / 2
    return loss


def psnr(made: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture in decibels, [B]; what the decoder made is cut to its range first."""
    error = _mean((made.clamp(-1, 1) - pictures).square())
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)
