"""A codec of pictures of our own on disk: a folder with ``vae.json`` and ``vae.safetensors`` (codec_folder.py)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_omni.config.generators import PictureCodecConfig
from megatron_omni.models.generators.codec_folder import (
    check_fingerprint,
    fingerprint_of,
    load_weights,
    read_config,
    read_document,
    read_weights,
    rounded,
    write_folder,
)
from megatron_omni.models.generators.vae import CONFIG_FILE, WEIGHTS_FILE, PictureCodecFacts
from megatron_omni.models.nothing_drawn import NothingDrawn

if TYPE_CHECKING:
    from megatron_omni.models.generators.conv_vae import ConvCodec


def conv_fingerprint(config: PictureCodecConfig, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the sizes, then of every weight in fp32 by name."""
    return fingerprint_of(dataclasses.asdict(config), weights)


def save_conv_codec(
    codec: "ConvCodec", folder: Path, *, dtype: torch.dtype = torch.float32, about: Mapping[str, Any] | None = None
) -> str:
    """Write ``folder``, made where it is not there; the fingerprint of what it holds.

    In ``torch.float16`` weights are rounded, and the fingerprint is of the rounded ones. ValueError for weights that are
    not finite in ``dtype``.
    """
    kept = rounded(codec, dtype)
    fingerprint = conv_fingerprint(codec.config, kept)
    write_folder(
        folder / WEIGHTS_FILE, folder / CONFIG_FILE, kept, fingerprint=fingerprint, config=codec.config, about=about
    )
    return fingerprint


def load_conv_codec(folder: Path) -> "ConvCodec":
    """The codec in ``folder``, in fp32 on the CPU, for inference. ValueError that names what is missing or damaged."""
    from megatron_omni.models.generators.conv_vae import ConvCodec

    document, config = _document(folder)
    with NothingDrawn():
        codec = ConvCodec(config)
    load_weights(codec, read_weights(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    check_fingerprint(codec.fingerprint, document, folder / CONFIG_FILE)
    return codec.eval()


def conv_facts(folder: Path) -> PictureCodecFacts:
    """What ``vae.json`` says. ValueError for what is no such file."""
    document, config = _document(folder)
    fingerprint = document["fingerprint"]
    return PictureCodecFacts(config.latent_channels, config.downsampling, config.latent_scale, fingerprint)


def _document(folder: Path) -> tuple[dict[str, Any], PictureCodecConfig]:
    from megatron_omni.models.generators.conv_vae import check_levels

    path = folder / CONFIG_FILE
    document = read_document(path)
    config = read_config(PictureCodecConfig, document["config"], path)
    try:
        check_levels(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return document, config
