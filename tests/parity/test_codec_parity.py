"""The codec on random weights of the released shapes: keys, encoder, decoder, files, against float64 and transformers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import EncodecConfig
from transformers.models.encodec.modeling_encodec import EncodecEncoder

from megatron_omni.checkpoint.untrusted import read_torch_file
from megatron_omni.checkpoint.wavtokenizer import read_released, released_yaml, write_released
from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.generators.codec import Codec, StreamingDecoder
from tests.parity import wavtokenizer as reference

UNUSED = "feature_extractor.encodec.decoder."


@dataclass
class Files:
    """A checkpoint with the released keys and what was read from it."""

    state: dict[str, Tensor]
    folder: Path
    codec: Codec
    dropped: dict[str, int]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("released")
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, shape in reference.released_shapes().items():
        value = torch.randn(shape, generator=generator)
        if key.endswith(".weight") and len(shape) > 1 and ".scale." not in key:
            value *= value[0].numel() ** -0.5
        elif key.endswith(("weight_g", "scale.weight", "gamma")) or (key.endswith(".weight") and len(shape) == 1):
            value = 1 + 0.1 * value
        elif "bias" in key or ".lstm." in key:
            value *= 0.05
        state[key] = value
    state["feature_extractor.encodec.quantizer.vq.layers.0._codebook.inited"] = torch.ones(1)
    state["head.istft.window"] = torch.hann_window(2400)
    more = {"multiperioddisc.x.weight": torch.ones(2), "dacdiscriminator.x": torch.ones(1)}
    torch.save({"state_dict": state | more, "global_step": 7}, folder / "release.ckpt")
    (folder / "release.yaml").write_text(released_yaml(CodecConfig()))
    found = read_released(folder / "release.ckpt", folder / "release.yaml")
    return Files(state, folder, found.codec, found.dropped)


def test_every_key_of_the_release_is_accounted_for(released: Files) -> None:
    assert len(released.state) == 289
    assert sum(value.numel() for value in released.state.values()) == pytest.approx(80.9e6 + 4.2e6, rel=2e-3)
    assert released.dropped == {f"{UNUSED}*": 62, "multiperioddisc.*": 1, "dacdiscriminator.*": 1}
    assert released.codec.config == CodecConfig()


def test_round_trip_of_the_release_is_bitwise(released: Files, tmp_path: Path) -> None:
    checkpoint, yaml = write_released(released.codec, tmp_path)
    written = read_torch_file(checkpoint)
    assert {key: list(value.shape) for key, value in written.items()} == reference.released_shapes()
    for key, value in released.state.items():
        if key.startswith(UNUSED):
            assert bool((written[key] == (1.0 if key.endswith("weight_v") else 0.0)).all()), key
        else:
            assert torch.equal(written[key], value), key
    assert yaml.read_text() == released_yaml(CodecConfig())


@pytest.mark.parametrize("length", [24000, 24001, 23999, 7777, 1200, 600])
def test_encoder_is_transformers_encodec(released: Files, length: int) -> None:
    config = EncodecConfig(
        use_causal_conv=False, norm_type="weight_norm", pad_mode="reflect", num_lstm_layers=2, hidden_size=512,
        num_filters=32, upsampling_ratios=[6, 5, 5, 4], kernel_size=7, last_kernel_size=7, residual_kernel_size=3,
        dilation_growth_rate=2, use_conv_shortcut=True, compress=2, num_residual_layers=1,
    )  # fmt: skip
    with torch.no_grad():
        theirs = EncodecEncoder(config)
        start = "feature_extractor.encodec.encoder.model."
        names = {"conv.conv.weight_g": "conv.parametrizations.weight.original0"}
        names |= {"conv.conv.weight_v": "conv.parametrizations.weight.original1", "conv.conv.bias": "conv.bias"}
        loaded = {}
        for key, value in released.state.items():
            if key.startswith(start):
                name = f"layers.{key.removeprefix(start)}"
                for old, new in names.items():
                    name = name.replace(old, new)
                loaded[name] = value
        theirs.load_state_dict(loaded)
        wave = 0.3 * torch.randn(2, length, generator=torch.Generator().manual_seed(length))
        expected, found = theirs(wave[:, None]).transpose(1, 2), released.codec.encoder(wave)
    assert (found - expected).abs().max() == 0.0
    assert found.shape[1] == -(-length // 600)


@pytest.mark.parametrize("length", [1801, 601, 5])
def test_encoder_and_codes_by_the_formulas(released: Files, length: int) -> None:
    wave = 0.3 * torch.randn(length, generator=torch.Generator().manual_seed(1))
    expected = reference.encode(released.state, wave)
    with torch.no_grad():
        found = released.codec.encoder(wave[None])[0]
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(released.codec.encode(wave[None])[0], reference.codes(released.state, expected))


@pytest.mark.parametrize("row", [0, 2])
def test_decoder_by_the_formulas(released: Files, row: int) -> None:
    codes = torch.randint(0, 4096, (7,), generator=torch.Generator().manual_seed(2))
    entries = released.state["feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"][codes]
    expected = reference.decode(released.state, entries, row)
    assert expected.shape == (7 * 600,) and expected.std() > 0.01
    with torch.no_grad():
        found = released.codec.decoder(entries[None], row)[0]
    assert (found.double() - expected).norm() / expected.norm() < 1e-5
    if row == 0:
        assert torch.equal(released.codec.decode(codes[None])[0], found)


def test_streamed_sound_has_every_sample_and_ends_as_the_whole(released: Files) -> None:
    codes = torch.randint(0, 4096, (120,), generator=torch.Generator().manual_seed(4))
    whole, stream = released.codec.decode(codes[None])[0], StreamingDecoder(released.codec)
    streamed = torch.cat([*(stream.push(codes[i : i + 17]) for i in range(0, 120, 17)), stream.finish()])
    assert streamed.shape == whole.shape == (72_000,)
    last = slice(-2400, None)  # 100 ms: users of the release heard distortion there (its issues 44, 49, 56)
    error = (streamed[last] - whole[last]).square().sum()
    assert whole[last].square().sum() / error > 10
    assert 0.5 < streamed[last].std() / streamed.std() < 2
