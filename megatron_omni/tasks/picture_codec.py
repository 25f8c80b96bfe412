"""Training of a codec of pictures: crops through encoder and decoder and back (losses/picture_codec.py; docs/images_out.md).

The decoder learns from latents with noise of a fixed size, drawn by each sample's number: the same on every layout and in a run
that was resumed. Held-out crops have none: their PSNR is that of the codec as it is used.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.losses.picture_codec import picture_loss, psnr
from megatron_omni.models.generators.picture_codec_model import PictureCodecModel
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training.task import LossFunction, StepInfo, Task

NAMES = ("picture codec loss", "picture codec/psnr", "picture codec/power")
"""Of the report table. PSNR in training is with the noise; power is the mean squared latent."""


class PictureCodecTask(Task):
    """See the module."""

    report_names: Sequence[str] = NAMES
    held_out_names: Sequence[str] = NAMES[1:]

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.model.picture_codec is not None
        self.config, self.seed = recipe.picture_codec, recipe.seed

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`Task`."""
        assert batch.pixel_values is not None
        pictures = batch.pixel_values.float() / 127.5 - 1
        inner = cast(PictureCodecModel, unwrap_model(cast(Any, model)))
        noise = None
        if info.training and self.config.latent_noise:
            numbers = batch.sample_ids[:, 0].tolist()
            drawn = inner.latent_noise(self.seed, numbers, pictures.shape[-1])
            noise = self.config.latent_noise * drawn.to(pictures.device)
        made, latents = model(pictures, noise)

        def loss_function(made: Tensor) -> tuple[Tensor, Tensor]:
            learned = (batch.labels[:, 0] != IGNORE_LABEL).to(made.dtype)
            losses = picture_loss(made, pictures, latents, self.config)
            rows = [losses, psnr(made, pictures), latents.square().flatten(1).mean(dim=1)]
            sums = torch.stack([(row.detach() * learned).double().sum() for row in rows])
            counts = torch.full_like(sums, float(batch.num_label_tokens))
            return (losses * learned).sum() / max(info.divisor, 1), torch.stack([sums, counts], dim=1)

        return made, loss_function
