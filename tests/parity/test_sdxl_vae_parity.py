"""The released codec of pictures is diffusers' AutoencoderKL, bit for bit, on random weights under new and old names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.models.generators.vae import load_picture_codec, picture_codec_facts

diffusers = pytest.importorskip("diffusers", reason="the extra image is not installed")

SDXL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "scaling_factor": 0.13025, "force_upcast": True,
}  # fmt: skip
"""Of stabilityai/sdxl-vae (image.md 1.4)."""
SMALL = SDXL | {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**SMALL).eval()


@pytest.fixture
def folder(vae: Any, tmp_path: Path) -> Path:
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def with_old_names(folder: Path, *, convolutions: bool) -> None:
    """As releases before diffusers 0.17 named the attention; CompVis has 1 x 1 convolutions there."""
    weights = load_file(folder / WEIGHTS)
    old: dict[str, Tensor] = {}
    for name, value in weights.items():
        for new, before in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            if new in name:
                name, value = (
                    name.replace(new, before),
                    value[..., None, None] if value.ndim == 2 and convolutions else value,
                )
        old[name] = value.contiguous()
    assert sum(".query." in name for name in old) == 4  # weight and bias, encoder and decoder
    save_file(old, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def test_pixels_and_latents_are_those_of_diffusers(vae: Any, folder: Path) -> None:
    codec, given = load_picture_codec(folder), pixels(2, 3, 12, 8)
    assert (codec.latent_channels, codec.downsampling, codec.latent_scale) == (4, 2, 0.13025)
    assert picture_codec_facts(folder) == (4, 2, 0.13025, None)
    latents = codec.encode(given)
    for picture, latent in zip(given, latents):
        x = picture[None].float() / 127.5 - 1
        assert torch.equal(latent[None], vae.encode(x).latent_dist.mean * 0.13025)
        made = vae.decode(latent[None] / 0.13025).sample
        assert torch.equal(codec.decode(latent[None]), ((made + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    assert torch.equal(codec.encode(given), latents)
    codec.check(ImageGeneratorConfig(downsampling=2, vae_fingerprint=codec.fingerprint))
    with pytest.raises(ValueError, match=r"keep it in torch\.float32"):
        load_picture_codec(folder).half().encode(given)


@torch.no_grad()
def test_old_names_are_the_same_codec(vae: Any, folder: Path) -> None:
    new, given = load_picture_codec(folder), pixels(1, 3, 8, 8)
    for convolutions in (False, True):
        vae.save_pretrained(folder)
        with_old_names(folder, convolutions=convolutions)
        old = load_picture_codec(folder)
        assert old.fingerprint == new.fingerprint and torch.equal(old.encode(given), new.encode(given))
        if not convolutions:  # diffusers itself reads these
            theirs = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
            latents = theirs.encode(given.float() / 127.5 - 1).latent_dist.mean * 0.13025
            assert torch.equal(latents, old.encode(given))


@torch.no_grad()
def test_above_1024_pixels_it_decodes_in_tiles(vae: Any, folder: Path) -> None:
    codec = load_picture_codec(folder)
    for width, tiled in ((512, False), (520, True)):
        latents = torch.randn(1, 4, 4, width, generator=torch.Generator().manual_seed(1))
        whole = ((vae.decode(latents / 0.13025).sample + 1) * 127.5).round().clamp(0, 255)
        made = codec.decode(latents)
        assert torch.equal(made, whole.to(torch.uint8)) != tiled
        assert made.shape == whole.shape
    with_edges = codec.encode(pixels(1, 3, 2, 1040))  # a source is encoded whole
    assert torch.equal(with_edges, vae.encode(pixels(1, 3, 2, 1040).float() / 127.5 - 1).latent_dist.mean * 0.13025)


def test_the_released_sizes_have_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        released = diffusers.AutoencoderKL(**SDXL)
    count = lambda module: sum(value.numel() for value in module.parameters())  # noqa: E731
    assert count(released) == 83_653_863 and count(released.decoder) + count(released.post_quant_conv) == 49_490_199


def test_a_fingerprint_is_of_weights_and_sizes(folder: Path) -> None:
    found = {load_picture_codec(folder).fingerprint}
    weights = load_file(folder / WEIGHTS)
    weights["decoder.conv_out.bias"][0] += 1e-4
    save_file(weights, folder / WEIGHTS)
    found.add(load_picture_codec(folder).fingerprint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    found.add(load_picture_codec(folder).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "AutoencoderTiny"}, "found AutoencoderTiny"),
        ({"scaling_factor": None}, "scaling_factor=None"),
        ({"shift_factor": 0.1}, "shift_factor=0.1: only codecs with a scaling_factor alone"),
        ({"latent_channels": 8}, "expected"),
        (None, "no diffusion_pytorch_model.safetensors; pickled weights"),
    ],
)
def test_a_folder_that_is_no_such_codec_is_refused(folder: Path, change: dict[str, Any] | None, said: str) -> None:
    if change is None:
        (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=said) as caught:
        load_picture_codec(folder)
    assert str(folder) in str(caught.value)
