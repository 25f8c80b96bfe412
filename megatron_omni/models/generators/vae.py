"""The codec of pictures: pixels to latents and back (docs/images_out.md).

    latents = latent_scale * mean of encoder(pixels / 127.5 - 1)      [B, 3, H, W] uint8 -> [B, C, H / d, W / d] fp32
    pixels  = round(127.5 (decoder(latents / latent_scale) + 1))      and back, cut to 0 .. 255

``mean``: an encoder that gives a distribution is asked for its mean, so that latents are a function of the picture alone. Pictures
go through one by one: what a picture becomes does not depend, to the last bit, on what stands beside it in a batch. Everything is
computed in fp32 outside any autocast: the released decoder overflows in fp16.

Two kinds of folder: ``vae.json`` with ``vae.safetensors`` is a codec that was trained here (conv_vae.py, vae_files.py); a
``config.json`` of diffusers' AutoencoderKL is the released one (sdxl_vae.py), for which the extra ``image`` must be installed.

Not a part of the model: Megatron would cast its weights. Who draws holds one beside it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_omni.config.pictures import ImageGeneratorConfig

CONFIG_FILE, WEIGHTS_FILE = "vae.json", "vae.safetensors"
DIFFUSERS_CONFIG = "config.json"


class PictureCodecFacts(NamedTuple):
    """What a folder says of itself, without its weights."""

    latent_channels: int
    downsampling: int
    latent_scale: float
    fingerprint: str | None
    """None: only the weights can tell (the released kind)."""


class PictureCodec(nn.Module):
    """Pixels to latents and back; a subclass brings :meth:`mean` and :meth:`picture`."""

    latent_channels: int
    """C."""
    downsampling: int
    """d: pixels a side of one place of a latent."""
    latent_scale: float
    """Factor of the encoder's means."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what decides latents and pixels; files of latents carry it."""

    @abstractmethod
    def mean(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] from -1 to 1 -> the encoder's means [B, C, H / d, W / d], not scaled."""

    @abstractmethod
    def picture(self, latents: Tensor) -> Tensor:
        """What :meth:`mean` gives -> [B, 3, H, W], about -1 to 1."""

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, names: Sequence[str] = ()) -> Tensor:
        """Latents [B, C, H / d, W / d], fp32, of ``pixels`` [B, 3, H, W] uint8.

        ValueError for another shape or type, sides that ``d`` does not divide, weights that are not fp32, and values that are not
        finite, with the picture's name in ``names`` (records) or its number.
        """
        self._check_weights()
        self._check_pixels(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            made = [self.mean(one[None].float() / 127.5 - 1)[0] * self.latent_scale for one in pixels]
        latents = torch.stack(made) if made else pixels.new_zeros(self._latent_shape(pixels), dtype=torch.float32)
        _check_finite(latents, names, "the codec's encoder gave latents")
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, *, names: Sequence[str] = ()) -> Tensor:
        """Pixels [B, 3, h d, w d], uint8, of ``latents`` [B, C, h, w]. ValueError as in :meth:`encode`."""
        self._check_weights()
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or not latents.is_floating_point():
            raise ValueError(
                f"latents of shape {list(latents.shape)}, type {latents.dtype}: this codec takes floats "
                f"[pictures, {self.latent_channels}, height, width]; they are of another codec"
            )
        _check_finite(latents, names, "latents")
        with torch.autocast(latents.device.type, enabled=False):
            made = [self.picture(one[None].float() / self.latent_scale)[0] for one in latents]
        side = self.downsampling
        empty = latents.new_zeros((0, 3, latents.shape[2] * side, latents.shape[3] * side))
        pictures = torch.stack(made) if made else empty.float()
        _check_finite(pictures, names, "the codec's decoder gave pixels")
        return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def check(self, image: ImageGeneratorConfig) -> None:
        """ValueError unless this is the codec of a model that draws, ``image`` of its configuration."""
        for name, wanted, found in (
            ("dit.latent_channels", image.dit.latent_channels, self.latent_channels),
            ("downsampling", image.downsampling, self.downsampling),
            ("latent_scale", image.latent_scale, self.latent_scale),
        ):
            if wanted != found:
                raise ValueError(f"model.image.{name}={wanted}: the codec of pictures (model.image.vae) has {found}")
        if image.vae_fingerprint is not None:
            self.check_fingerprint(image.vae_fingerprint, where="model.image.vae_fingerprint")

    def check_fingerprint(self, fingerprint: str, *, where: str) -> None:
        """ValueError, which begins with ``where``, unless ``fingerprint`` is this codec's."""
        if fingerprint != (found := self.fingerprint):
            raise ValueError(
                f"{where}: made with the codec of pictures {fingerprint[:12]}, and this one is {found[:12]}: latents of the one "
                "mean nothing to the other; name the folder of the first (model.image.vae), or make the latents again"
            )

    def _latent_shape(self, pixels: Tensor) -> tuple[int, int, int, int]:
        return (
            len(pixels),
            self.latent_channels,
            pixels.shape[2] // self.downsampling,
            pixels.shape[3] // self.downsampling,
        )

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixels of shape {list(pixels.shape)}, type {pixels.dtype}: the codec takes uint8 [pictures, 3, height, width]"
            )
        height, width = pixels.shape[2:]
        side = self.downsampling
        if height % side or width % side or not (height and width):
            raise ValueError(
                f"a picture of {width} x {height} pixels: the codec takes sides that {side} divides; cut or resize it"
            )

    def _check_weights(self) -> None:
        kind = next(self.parameters()).dtype
        if kind != torch.float32:
            raise ValueError(
                f"a codec of pictures with weights in {kind}: the released one overflows in fp16 and rounds visibly in bf16; "
                "keep it in torch.float32 and out of the model's modules"
            )


def load_picture_codec(folder: Path | str) -> PictureCodec:
    """The codec in ``folder``, in fp32 on the CPU, for inference. ValueError that names what is missing or damaged."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        from megatron_omni.models.generators.vae_files import load_conv_codec

        return load_conv_codec(folder)
    if (folder / DIFFUSERS_CONFIG).is_file():
        from megatron_omni.models.generators.sdxl_vae import load_sdxl_codec

        return load_sdxl_codec(folder)
    raise ValueError(_nothing_here(folder))


def picture_codec_facts(folder: Path | str) -> PictureCodecFacts:
    """What ``folder`` says of itself, without reading weights. ValueError as in :func:`load_picture_codec`."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        from megatron_omni.models.generators.vae_files import conv_facts

        return conv_facts(folder)
    if (folder / DIFFUSERS_CONFIG).is_file():
        from megatron_omni.models.generators.sdxl_vae import sdxl_facts

        return sdxl_facts(folder)
    raise ValueError(_nothing_here(folder))


def _nothing_here(folder: Path) -> str:
    return (
        f"{folder}: no codec of pictures here: neither {CONFIG_FILE}, which megatron-omni convert codec writes of a trained run, "
        f"nor {DIFFUSERS_CONFIG} of a released one (visual_gen/sdxl-vae)"
    )


def _check_finite(values: Tensor, names: Sequence[str], what: str) -> None:
    if values.numel() and not bool(values.isfinite().all()):
        bad = [number for number, one in enumerate(values) if not bool(one.isfinite().all())]
        which = ", ".join(names[number] if number < len(names) else f"picture {number}" for number in bad[:3])
        raise ValueError(f"{which}: {what} that are NaN or infinite; look at the picture, and at the codec's weights")
