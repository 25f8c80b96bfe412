"""Our codec of pictures: its arithmetic against a definition written out in float64, its loss, its files, what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_omni.checkpoint.codec_folders import verify_codec
from megatron_omni.config.generators import PictureCodecConfig
from megatron_omni.config.objectives import PictureCodecTrainingConfig
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig
from megatron_omni.losses.picture_codec import picture_loss, psnr
from megatron_omni.models.generators.conv_vae import ConvCodec
from megatron_omni.models.generators.conv_vae_calibration import border_ratio, calibrate
from megatron_omni.models.generators.vae import load_picture_codec, picture_codec_facts
from megatron_omni.models.generators.vae_files import save_conv_codec
from megatron_omni.platform.seeds import named_generator

SMALL = {
    "latent_channels": 3,
    "channels": [6, 8],
    "encoder_blocks": [1, 0],
    "decoder_blocks": [0, 1],
    "pixel_channels": 5,
}


def build(**changes: object) -> ConvCodec:
    codec = ConvCodec(PictureCodecConfig(**{**SMALL, **changes})).eval()
    codec.draw_weights(lambda name: named_generator(0, name))
    for name, value in codec.named_parameters():  # no weight is without effect
        with torch.no_grad():
            value.add_(torch.randn(value.shape, generator=named_generator(1, name)) * 0.1)
    return codec


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ------------------------------------------------------------------------------------------------ the definition


def convolved(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """[C, h, w] by a convolution whose zeros lie around it, place by place."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    reach = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    out = np.empty((len(kernel), *x.shape[1:]))
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            window = padded[:, row : row + kernel.shape[2], column : column + kernel.shape[3]]
            out[:, row, column] = (kernel * window).sum(axis=(1, 2, 3)) + bias
    return out


def normed(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.scale"][:, None, None] * x / np.sqrt((x**2).mean(axis=0) + 1e-6)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def block(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    inner = silu(convolved(weights, f"{name}.first", normed(weights, f"{name}.norm", x)))
    return x + convolved(weights, f"{name}.second", inner)


def gathered(x: np.ndarray, side: int = 2) -> np.ndarray:
    """side x side places beside each other become channels: channel, row, column."""
    return np.stack([x[c, i::side, j::side] for c in range(len(x)) for i in range(side) for j in range(side)])


def spread(x: np.ndarray, side: int = 2) -> np.ndarray:
    """And back."""
    out = np.empty((len(x) // side**2, side * x.shape[1], side * x.shape[2]))
    for number, plane in enumerate(x):
        out[number // side**2, number % side**2 // side :: side, number % side :: side] = plane
    return out


def test_encoder_and_decoder_are_what_the_page_says() -> None:
    codec = build(latent_scale=0.7, smoothing=0.2)
    weights = {name: value.double().numpy() for name, value in codec.state_dict().items()}
    picture = pixels(3, 8, 12)
    x = picture.numpy() / 127.5 - 1.0
    for level, blocks in enumerate(SMALL["encoder_blocks"]):  # type: ignore[arg-type]
        x = convolved(weights, f"encoder.down.{level}", gathered(x))
        for number in range(blocks):
            x = block(weights, f"encoder.levels.{level}.{number}", x)
    z = convolved(weights, "encoder.out", normed(weights, "encoder.norm", x))
    z = z + convolved(weights, "encoder.short", gathered(picture.numpy() / 127.5 - 1.0, 4))
    found = codec.encode(picture[None])[0]
    assert found.shape == (3, 2, 3)
    assert np.allclose(found.numpy(), 0.7 * z, atol=1e-5)

    y = convolved(weights, "decoder.enter", z)
    for level in (1, 0):
        for number in range(SMALL["decoder_blocks"][level]):  # type: ignore[index]
            y = block(weights, f"decoder.levels.{level}.{number}", y)
        y = spread(convolved(weights, f"decoder.up.{level}", y))
    y = convolved(weights, "decoder.out", silu(normed(weights, "decoder.norm", y)))
    y = y + spread(convolved(weights, "decoder.short", z), 4)
    for border in (4, 8):
        step = y[:, :, border] - y[:, :, border - 1]
        y[:, :, border - 1], y[:, :, border] = y[:, :, border - 1] + 0.2 * step, y[:, :, border] - 0.2 * step
    step = y[:, 4] - y[:, 3]
    y[:, 3], y[:, 4] = y[:, 3] + 0.2 * step, y[:, 4] - 0.2 * step
    made = codec.decode(found[None])[0].numpy().astype(np.float64)
    assert made.shape == (3, 8, 12)
    assert np.abs(made - (127.5 * (y + 1)).clip(0, 255)).max() <= 0.5 + 1e-3


def test_a_picture_has_the_same_bits_alone_and_in_a_batch_and_the_same_latent_at_another_place() -> None:
    codec, batch = build(), pixels(5, 3, 16, 8)
    latents = codec.encode(batch)
    assert all(torch.equal(codec.encode(one[None])[0], latent) for one, latent in zip(batch, latents))
    together = codec.decode(latents)
    assert all(torch.equal(codec.decode(one[None])[0], made) for one, made in zip(latents, together))
    assert torch.equal(codec.encode(batch), latents)  # nothing is drawn
    wide = pixels(1, 3, 64, 64)
    moved = codec.encode(wide.roll(4, dims=3))[..., 5:12]
    assert torch.allclose(moved, codec.encode(wide)[..., 4:11], atol=1e-5)


def test_the_loss_of_a_picture_and_its_gradient_follow_the_formula() -> None:
    rng = np.random.default_rng(2)
    y, x, z = rng.normal(size=(2, 3, 4, 6)), rng.uniform(-1, 1, (2, 3, 4, 6)), rng.normal(size=(2, 5, 2, 3))
    z[0] *= 2
    z[1] *= 0.5  # one above the bound, one below
    config = PictureCodecTrainingConfig(
        square_weight=0.7, absolute_weight=0.3, edge_weight=0.9, grid_weight=0.6, power_weight=0.2
    )
    expected = []
    for number in range(2):  # a place stands for 2 x 2 pixels
        e = y[number] - x[number]
        borders = [(e[:, :, k] - e[:, :, k - 1]) for k in (2, 4)], [e[:, 2] - e[:, 1]]
        grid = sum((np.stack(each) ** 2).mean() for each in borders) / 2
        across, along = e[:, :, 1:] - e[:, :, :-1], e[:, 1:] - e[:, :-1]
        loss = 0.7 * (e**2).mean() + 0.3 * abs(e).mean() + 0.9 * ((across**2).mean() + (along**2).mean()) / 2
        expected.append(loss + 0.6 * grid + 0.2 * max(0.0, (z[number] ** 2).mean() - 1))
    arguments = [torch.from_numpy(value) for value in (y, x, z)]
    assert np.allclose(picture_loss(*arguments, config).numpy(), expected, rtol=1e-12)
    made, latents = (arguments[place].clone().requires_grad_() for place in (0, 2))
    assert torch.autograd.gradcheck(lambda m, n: picture_loss(m, arguments[1], n, config), (made, latents))


def test_calibration_gives_latents_of_power_1_and_borders_like_the_rest() -> None:
    codec, given = build(latent_scale=3.0, smoothing=0.3), [pixels(1, 3, 16, 24, seed=seed) for seed in range(4)]
    with torch.no_grad():
        codec.decoder.short.bias[:16:4] += 0.5  # first columns of places are lighter
    codec.decoder.smoothing = 0.0
    before = [codec.encode(each) / codec.latent_scale for each in given]
    pictures = [codec.picture(each) for each in before]
    calibrate(codec, given, noise=0.0)
    latents = [codec.encode(each) for each in given]
    codec.decoder.smoothing = 0.0
    for old, new in zip(pictures, latents):
        assert torch.allclose(codec.picture(new / codec.latent_scale), old, atol=1e-4)
    old, new = (principal_variances(each) for each in (before, latents))  # what noise of one size made a root
    assert torch.allclose(new / new.sum(), old**2 / (old**2).sum(), rtol=1e-3, atol=1e-5)
    codec.decoder.smoothing = codec.config.smoothing
    power = torch.cat([each.flatten() for each in latents]).square().mean()
    assert float(power) == pytest.approx(1, abs=0.01)
    assert 0 < codec.config.smoothing == codec.decoder.smoothing < 0.5
    made = [codec.picture(each / codec.latent_scale).clamp(-1, 1) for each in latents]
    assert np.mean([border_ratio(each, 4) for each in made]) == pytest.approx(1, abs=0.05)
    flat = torch.zeros(1, 3, 4, 8)
    flat[..., 4:], flat[..., 5] = 0.6, 0.4  # across 0.6, then 0.2, 0.2 and four of 0
    assert border_ratio(flat[:, :, :1], 4) == pytest.approx(0.6 / (0.4 / 6))
    with pytest.raises(ValueError, match="are all 0"):
        calibrate(codec, [], noise=0.0)


def principal_variances(latents: list[torch.Tensor]) -> torch.Tensor:
    """Of the channels of all places, in rising order."""
    rows = torch.cat([each.double().movedim(1, 3).flatten(0, 2) for each in latents])
    return torch.linalg.eigvalsh(torch.cov(rows.T))


def test_psnr_of_a_known_error() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 3.0)])
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 1)]  # the second is cut to 1
    assert psnr(y, x).tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ files


def test_a_folder_holds_all_of_it_and_its_fingerprint_every_weight_and_size(tmp_path: Path) -> None:
    codec = build()
    fingerprint = save_conv_codec(codec, tmp_path / "whole")
    read = load_picture_codec(tmp_path / "whole")
    assert read.fingerprint == fingerprint == codec.fingerprint and not read.training
    assert torch.equal(read.encode(pixels(1, 3, 8, 8)), codec.encode(pixels(1, 3, 8, 8)))
    assert picture_codec_facts(tmp_path / "whole") == (3, 4, 1.0, fingerprint)
    halves = save_conv_codec(codec, tmp_path / "half", dtype=torch.float16)
    assert halves != fingerprint and load_picture_codec(tmp_path / "half").fingerprint == halves
    assert halves in verify_codec(tmp_path / "half")
    others = {build(latent_scale=2.0).fingerprint, build(smoothing=0.1).fingerprint}
    for name, value in codec.named_parameters():
        with torch.no_grad():
            value.view(-1)[-1] += 1e-3
        others.add(codec.fingerprint)
        assert name and len(others) == len({*others})
    assert len(others | {fingerprint}) == 3 + len([*codec.parameters()])


def spoil_json(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / "vae.json").read_text())
        change(document)
        (folder / "vae.json").write_text(json.dumps(document))

    return spoil


def spoil_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "vae.safetensors")
        change(weights)
        save_file(weights, folder / "vae.safetensors")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "vae.json").unlink(), "no codec of pictures here"),
        (lambda folder: (folder / "vae.json").write_text("{"), "vae.json"),
        (lambda folder: (folder / "vae.safetensors").unlink(), "vae.safetensors: cannot be read"),
        (lambda folder: (folder / "vae.safetensors").write_bytes(b"12"), "vae.safetensors: cannot be read"),
        (spoil_json(lambda d: d.update(format=2)), "format 1"),
        (spoil_json(lambda d: d.pop("fingerprint")), "expected fingerprint and config"),
        (spoil_json(lambda d: d.update(fingerprint="0" * 64)), "one of the two files is damaged"),
        (spoil_json(lambda d: d["config"].update(latent_scale=2.0)), "one of the two files is damaged"),
        (spoil_json(lambda d: d["config"].update(depth=2)), "config.depth: no such field"),
        (spoil_json(lambda d: d["config"].update(latent_channels="3")), "config.latent_channels='3'"),
        (spoil_json(lambda d: d["config"].update(channels=[6, 0])), "must be at least 1"),
        (spoil_json(lambda d: d["config"].update(channels=[6])), "give one number for each"),
        (spoil_json(lambda d: d["config"].update(pixel_channels=4)), "expected"),
        (spoil_weights(lambda w: w.pop("encoder.out.bias")), "encoder.out.bias is missing"),
        (spoil_weights(lambda w: w.update(more=torch.zeros(1))), "more has no place"),
        (spoil_weights(lambda w: w["decoder.out.bias"].fill_(math.nan)), "decoder.out.bias has values that are not finite"),
        (spoil_weights(lambda w: w["decoder.out.bias"].add_(1e-3)), "one of the two files is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    save_conv_codec(build(), tmp_path / "codec")
    spoil(tmp_path / "codec")
    with pytest.raises(ValueError, match=said) as caught:
        load_picture_codec(tmp_path / "codec")
    assert str(tmp_path / "codec") in str(caught.value)


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: pixels(3, 8, 8), "uint8 .pictures, 3, height, width."),
        (lambda: pixels(1, 4, 8, 8), "uint8"),
        (lambda: pixels(1, 3, 8, 8).float(), "torch.float32: the codec takes uint8"),
        (lambda: pixels(1, 3, 8, 10), "10 x 8 pixels: the codec takes sides that 4 divides"),
        (lambda: pixels(1, 3, 0, 8), "8 x 0 pixels"),
    ],
)
def test_pixels_that_it_cannot_take(given: Callable[[], Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build().encode(given())


def test_latents_of_another_codec_and_values_that_are_not_finite_are_named() -> None:
    codec = build()
    for latents in (torch.zeros(1, 4, 2, 2), torch.zeros(3, 2, 2), torch.zeros(1, 3, 2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="they are of another codec"):
            codec.decode(latents)
    latents = torch.zeros(3, 3, 2, 2)
    latents[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"picture 1: latents that are NaN"):
        codec.decode(latents)
    with pytest.raises(ValueError, match=r"b\.jsonl:2: latents that are NaN"):
        codec.decode(latents, names=["b.jsonl:1", "b.jsonl:2", "b.jsonl:3"])
    with torch.no_grad():
        codec.encoder.out.bias[0] = math.inf
    with pytest.raises(ValueError, match=r"a\.png: the codec's encoder gave latents that are NaN or infinite"):
        codec.encode(pixels(1, 3, 8, 8), names=["a.png"])
    assert codec.decode(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 8, 8)
    assert codec.encode(pixels(0, 3, 8, 8)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_and_autocast_has_no_effect(kind: torch.dtype) -> None:
    codec, picture = build(), pixels(1, 3, 8, 8)
    latents = codec.encode(picture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(picture), latents)
        assert torch.equal(codec.decode(latents), codec.decode(latents))
        made = codec.decode(latents)
    assert torch.equal(made, codec.decode(latents))
    half = build().to(kind)
    for call in (lambda: half.encode(picture), lambda: half.decode(latents)):
        with pytest.raises(ValueError, match="keep it in torch"):
            call()


def test_a_model_is_told_when_the_codec_is_not_its_own() -> None:
    codec = build()
    right = {"dit": DiTConfig(latent_channels=3), "downsampling": 4, "latent_scale": 1.0}
    codec.check(ImageGeneratorConfig(**right))
    codec.check(ImageGeneratorConfig(**right, vae_fingerprint=codec.fingerprint))
    for changes, said in (
        ({"dit": DiTConfig(latent_channels=4)}, "model.image.dit.latent_channels=4: .* has 3"),
        ({"downsampling": 8}, "model.image.downsampling=8: .* has 4"),
        ({"latent_scale": 0.13025}, "model.image.latent_scale=0.13025: .* has 1.0"),
        ({"vae_fingerprint": "f" * 64}, f"vae_fingerprint: made with .* ffffffffffff, .* {codec.fingerprint[:12]}"),
    ):
        with pytest.raises(ValueError, match=said):
            codec.check(ImageGeneratorConfig(**{**right, **changes}))
