"""The released codec of pictures: SDXL's VAE, by diffusers' AutoencoderKL, from a folder on disk (visual_gen/sdxl-vae).

The only module that names diffusers, and only where such a folder is opened: its import takes ten seconds. Factor 8, 4 channels,
``latent_scale`` is the configuration's ``scaling_factor`` (0.13025). Weights of older releases are named after CompVis' attention
(``query``, ``key``, ``value``, ``proj_attn``, as 1 x 1 convolutions); they are renamed. Above 1024 pixels a side pictures are
decoded in overlapping tiles.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_omni.foreign import read_json
from megatron_omni.models.generators.codec_folder import fingerprint_of, load_weights, read_weights
from megatron_omni.models.generators.vae import DIFFUSERS_CONFIG, PictureCodec, PictureCodecFacts
from megatron_omni.models.nothing_drawn import NothingDrawn

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
TILED_ABOVE = 1024
"""Pixels a side."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor", "act_fn")
"""Of the configuration: what the fingerprint holds beside the weights."""


class SdxlCodec(PictureCodec):
    """Around diffusers' module."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.latent_channels = vae.config.latent_channels
        self.downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_scale = float(vae.config.scaling_factor)
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILED_ABOVE, TILED_ABOVE // self.downsampling
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of sizes and weights under the new names; computed once, since it takes seconds."""
        if self._fingerprint is None:
            sizes = {name: self.vae.config[name] for name in SIZES}
            self._fingerprint = fingerprint_of(sizes, self.vae.state_dict())
        return self._fingerprint

    def mean(self, pictures: Tensor) -> Tensor:
        """See :class:`PictureCodec`."""
        self.vae.disable_tiling()
        return self.vae.encode(pictures).latent_dist.mean

    def picture(self, latents: Tensor) -> Tensor:
        """See :class:`PictureCodec`."""
        self.vae.enable_tiling()
        return self.vae.decode(latents).sample


def load_sdxl_codec(folder: Path) -> SdxlCodec:
    """The codec in ``folder``. ValueError where diffusers, a file or a weight is missing or does not fit."""
    config = _config(folder)
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f"{folder}: a released codec of pictures needs diffusers ({error}); run pip install 'megatron-omni[image]'"
        ) from error
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(
            f"{folder}: no {WEIGHTS[0]}; pickled weights (.bin) are not read: let diffusers' save_pretrained write the folder"
        )
    with NothingDrawn():
        vae = AutoencoderKL.from_config({name: value for name, value in config.items() if not name.startswith("_")})
    load_weights(vae, renamed(read_weights(path)), path)
    return SdxlCodec(vae.eval().requires_grad_(False))


def sdxl_facts(folder: Path) -> PictureCodecFacts:
    """What ``config.json`` says; its fingerprint is in the weights alone."""
    config = _config(folder)
    levels = len(config["block_out_channels"])
    return PictureCodecFacts(config["latent_channels"], 2 ** (levels - 1), float(config["scaling_factor"]), None)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` under diffusers' names of today; the 1 x 1 convolutions of old attention become matrices."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if "attentions" in parts:
            parts[-2:-1] = OLD_NAMES.get(parts[-2], parts[-2]).split(".")
            value = value[..., 0, 0] if value.ndim == 4 else value
        found[".".join(parts)] = value
    return found


def _config(folder: Path) -> dict[str, Any]:
    path = folder / DIFFUSERS_CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: expected the configuration of diffusers' AutoencoderKL, found {kind}")
    for name, kinds in (("block_out_channels", list), ("latent_channels", int), ("scaling_factor", (int, float))):
        if not isinstance(config.get(name), kinds) or not config[name]:
            raise ValueError(f"{path}: {name}={config.get(name)!r}: not that of an SDXL VAE")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ValueError(f"{path}: {name}={config[name]!r}: only codecs with a scaling_factor alone are supported")
    return config
