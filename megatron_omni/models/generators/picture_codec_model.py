"""The codec of pictures as the training loop's model; its parameters are ``picture_codec.encoder.*`` and ``.decoder.*``."""

import torch
from torch import Tensor

from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.codec_model import TrunklessModel
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.platform.seeds import named_generator


class PictureCodecModel(TrunklessModel):
    """A codec of pictures in training."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.model.picture_codec is not None
        super().__init__(recipe, width=recipe.model.picture_codec.channels[-1])
        self.picture_codec = ConvCodec(recipe.model.picture_codec)
        self.picture_codec.draw_weights(
            lambda name: named_generator(recipe.seed, name), prefix="picture_codec.", grey=recipe.picture_codec.grey
        )

    def forward(self, pictures: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """``pictures`` [B, 3, H, W] from -1 to 1 -> what the decoder makes of their latents, to which ``noise`` is added, and the
        latents [B, C, h, w] without it."""
        latents = self.picture_codec.mean(pictures)
        made = self.picture_codec.picture(latents if noise is None else latents + noise)
        return made, latents

    def latent_noise(self, seed: int, sample_ids: list[int], side: int) -> Tensor:
        """N(0, 1) [B, C, h, w] for crops of ``side`` pixels, each drawn by its sample's number."""
        places = side // self.picture_codec.downsampling
        shape = (self.picture_codec.latent_channels, places, places)
        drawn = [torch.randn(shape, generator=named_generator(seed, "latent noise", number)) for number in sample_ids]
        return torch.stack(drawn)
