"""Our codec of pictures: a small convolutional encoder and decoder, trained from nothing in half an hour of a core.

    encoder    x [3, H, W], for each level: 2 x 2 pixels into channels, 3 x 3 convolution, blocks; then norm and 1 x 1 to C;
               plus a 3 x 3 convolution of all d x d pixels of a place beside each other
    decoder    z [C, h, w], 3 x 3 convolution, for each level from the coarsest: blocks, 3 x 3 convolution to 4 times the width of
               the next, whose fours of channels become 2 x 2 places; then a 3 x 3 convolution at full size to 3 channels;
               plus a 3 x 3 convolution of z to the d x d pixels of each place; ``smoothing`` last
    block      u + W2 silu(W1 norm(u)),  W 3 x 3,  norm(u) = g u / sqrt(mean over channels of u^2 + 1e-6)

The two short ways are linear. They begin as the transform of JPEG, the C coefficients of a d x d square that say most of a usual
picture, and its inverse, so that training has a picture from its first step on and the levels learn what such a transform lacks.
Every convolution overlaps its neighbours. What is left of a grid where places of the latent meet is smoothed: a step p across a
border becomes (1 - 2 smoothing) p, half of the difference on either side. Nothing looks at statistics of a picture or a batch: a
latent follows from the pixels around it alone, whatever the picture's size. Its power is held at 1 at most in training
(losses/picture_codec.py); conv_vae_calibration.py measures the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_omni.config.generators import PictureCodecConfig
from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal, draw_weights
from megatron_omni.models.generators.vae import PictureCodec

_EPSILON = 1e-6


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each place of [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x * (x.square().mean(dim=1, keepdim=True) + _EPSILON).rsqrt() * self.scale[:, None, None]


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x + self.second(F.silu(self.first(self.norm(x))))


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] to means [B, C, H / d, W / d]."""

    def __init__(self, config: PictureCodecConfig) -> None:
        super().__init__()
        before = [3, *config.channels[:-1]]
        self.down = nn.ModuleList(nn.Conv2d(4 * a, b, 3, padding=1) for a, b in zip(before, config.channels))
        self.levels = nn.ModuleList(_blocks(*level) for level in zip(config.channels, config.encoder_blocks))
        self.norm = ChannelNorm(config.channels[-1])
        self.out = nn.Conv2d(config.channels[-1], config.latent_channels, 1)
        self.side = config.downsampling
        self.short = nn.Conv2d(3 * self.side**2, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        short = self.short(F.pixel_unshuffle(x, self.side))
        for down, level in zip(self.down, self.levels):
            x = level(down(F.pixel_unshuffle(x, 2)))
        return short + self.out(self.norm(x))


class Decoder(nn.Module):
    """Means [B, C, h, w] to pictures [B, 3, h d, w d]."""

    def __init__(self, config: PictureCodecConfig) -> None:
        super().__init__()
        after = [config.pixel_channels, *config.channels[:-1]]
        self.enter = nn.Conv2d(config.latent_channels, config.channels[-1], 3, padding=1)
        self.levels = nn.ModuleList(_blocks(*level) for level in zip(config.channels, config.decoder_blocks))
        self.up = nn.ModuleList(nn.Conv2d(a, 4 * b, 3, padding=1) for a, b in zip(config.channels, after))
        self.norm = ChannelNorm(config.pixel_channels)
        self.out = nn.Conv2d(config.pixel_channels, 3, 3, padding=1)
        self.side = config.downsampling
        self.short = nn.Conv2d(config.latent_channels, 3 * self.side**2, 3, padding=1)
        self.smoothing = config.smoothing

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.enter(z)
        for level, up in reversed([*zip(self.levels, self.up)]):
            x = F.pixel_shuffle(up(level(x)), 2)
        made = F.pixel_shuffle(self.short(z), self.side) + self.out(F.silu(self.norm(x)))
        return smoothed(made, self.side, self.smoothing) if self.smoothing else made


class ConvCodec(PictureCodec):
    """Encoder and decoder."""

    def __init__(self, config: PictureCodecConfig) -> None:
        super().__init__()
        check_levels(config)
        self.config = config
        self.latent_channels, self.downsampling = config.latent_channels, config.downsampling
        self.latent_scale = config.latent_scale
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides latents and pixels, computed at each call."""
        from megatron_omni.models.generators.vae_files import conv_fingerprint

        return conv_fingerprint(self.config, self.state_dict())

    def mean(self, pictures: Tensor) -> Tensor:
        """See :class:`PictureCodec`."""
        return self.encoder(pictures)

    def picture(self, latents: Tensor) -> Tensor:
        """See :class:`PictureCodec`."""
        return self.decoder(latents)

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "", grey: float = 0.0) -> None:
        """Weights for training from scratch: the short ways are :func:`coefficients`, blocks begin close to the identity, the
        levels close to nothing. A picture that is ``grey`` (-1 to 1) all over has latents of about 0."""
        draw_weights(self, generator_for, prefix=prefix)
        for name, module in self.named_modules():
            if isinstance(module, ChannelNorm):
                nn.init.ones_(module.scale)
            if isinstance(module, Block):
                weight, name = module.second.weight, f"{prefix}{name}.second.weight"
                draw_normal(weight, 0.1 * weight[0].numel() ** -0.5, generator_for(name))
        for name, out in (("encoder.out", self.encoder.out), ("decoder.out", self.decoder.out)):
            draw_normal(out.weight, 0.02 * out.weight[0].numel() ** -0.5, generator_for(f"{prefix}{name}.weight"))
        basis, gains = coefficients(self.latent_channels, self.downsampling)
        into, back = self.encoder.short, self.decoder.short
        assert into.bias is not None and back.bias is not None
        with torch.no_grad():
            into.weight.zero_()
            back.weight.zero_()
            into.weight[:, :, 1, 1] = gains[:, None] * basis
            back.weight[:, :, 1, 1] = (basis / gains[:, None]).T
            into.bias.copy_(-grey * gains * basis.sum(dim=1))
            back.bias.fill_(grey)


def smoothed(pictures: Tensor, side: int, share: float) -> Tensor:
    """``pictures`` [B, 3, H, W] with ``share`` of every step across a border of squares of ``side`` pixels taken off both its
    pixels, first in rows, then in columns."""
    for axis in (3, 2):
        turned = pictures.transpose(axis, 3)
        step = share * (turned[..., side::side] - turned[..., side - 1 : -1 : side])
        change = torch.zeros_like(turned)
        change[..., side - 1 : -1 : side] = step
        change[..., side::side] = -step
        pictures = (turned + change).transpose(axis, 3)
    return pictures


def coefficients(count: int, side: int) -> tuple[Tensor, Tensor]:
    """The cosine transform of squares of ``side`` pixels: (basis [count, 3 side side], orthonormal rows, order channel, row,
    column; gains [count]).

    A coefficient (colour o, frequencies u, v) has a variance of about s = 7 (side / 8)^2 w_o / (1 + u^2 + v^2)^2 in pictures from
    -1 to 1, w of brightness 1, of red against blue 0.6, of green against both 0.3; the ``count`` largest are taken. With gains
    a s^(-1/4), a such that their mean power is 1, noise of one size on all costs least. ValueError for more than there are.
    """
    if count > 3 * side**2:
        raise ValueError(
            f"model.picture_codec.latent_channels={count}: {side} x {side} pixels have only {3 * side**2} numbers; lower it"
        )
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    number = torch.arange(side)
    waves = torch.cos(torch.pi * (2 * number + 1) * number[:, None] / (2 * side)) * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    squares = number.square()
    falls = 7 * (side / 8) ** 2 / (1 + squares[:, None] + squares).square()
    spread = (torch.tensor([1.0, 0.6, 0.3])[:, None, None] * falls).flatten()
    chosen = spread.argsort(descending=True, stable=True)[:count]
    basis = torch.einsum("oc,ui,vj->ouvcij", colours, waves, waves).reshape(3 * side**2, -1)
    power = spread[chosen].sqrt().mean()
    return basis[chosen], (power.sqrt() * spread[chosen] ** 0.25).reciprocal()


def check_levels(config: PictureCodecConfig) -> None:
    """ValueError unless every level has its blocks."""
    if not config.channels:
        raise ValueError("model.picture_codec.channels is empty: give the width of at least one level")
    for name in ("encoder_blocks", "decoder_blocks"):
        if len(blocks := getattr(config, name)) != len(config.channels):
            raise ValueError(
                f"model.picture_codec.{name}={blocks}: give one number for each of the {len(config.channels)} levels of channels"
            )


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels) for _ in range(count)))
