"""``megatron-omni convert codec``: WavTokenizer's files in and out, and those that are not what they say. Small sizes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_omni.checkpoint.codec_folders import convert_codec
from megatron_omni.checkpoint.untrusted import read_torch_file
from megatron_omni.cli.main import main as megatron_omni
from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.generators.codec import Codec, load_codec, save_codec
from tests.unit.test_codec import SMALL, build
from tests.unit.test_untrusted import Payload

EMBED = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with small released files."""
    save_codec(build("seanet"), tmp_path / "ours")
    list(convert_codec(tmp_path / "ours", tmp_path / "release"))
    return tmp_path / "release"


def edit(release: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = unmapped(release)
    change(state)
    torch.save({"state_dict": state}, release / "wavtokenizer.ckpt")


def unmapped(release: Path) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in read_torch_file(release / "wavtokenizer.ckpt").items()}


def test_there_and_back_by_the_command(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert megatron_omni(["convert", "codec", str(release), "--out", str(tmp_path / "codec")]) == 0
    said = capsys.readouterr().out
    assert "used, dropped: 62 of feature_extractor.encodec.decoder.*" in said
    codec, ours = load_codec(tmp_path / "codec"), load_codec(tmp_path / "ours")
    assert codec.fingerprint == ours.fingerprint and codec.fingerprint in said
    assert codec.config == CodecConfig(**SMALL | {"num_mel_bins": 80, "encoder_hidden_size": 256})
    assert megatron_omni(["convert", "verify", str(tmp_path / "codec")]) == 0
    assert codec.fingerprint in capsys.readouterr().out
    assert megatron_omni(["convert", "codec", str(tmp_path / "codec"), "--out", str(tmp_path / "back")]) == 0
    first, second = (read_torch_file(place / "wavtokenizer.ckpt") for place in (release, tmp_path / "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (release / "config.yaml").read_text() == (tmp_path / "back" / "config.yaml").read_text()
    assert megatron_omni(["convert", "codec", str(release), "--out", str(tmp_path / "back")]) == 2
    assert "exists already; choose another --out" in capsys.readouterr().err


def test_safetensors_and_half_precision_are_read(release: Path, tmp_path: Path) -> None:
    state = read_torch_file(release / "wavtokenizer.ckpt")
    save_file({key: value.half().contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    list(convert_codec(tmp_path / "x.safetensors", tmp_path / "codec", yaml=release / "config.yaml"))
    codec = load_codec(tmp_path / "codec")
    assert torch.equal(codec.codebook.embed, state[EMBED].half().float())


def test_a_checkpoint_among_other_weights_is_found(release: Path, tmp_path: Path) -> None:
    (release / "speech_gen_ep2.bin").write_bytes(b"the generator's")
    list(convert_codec(release, tmp_path / "codec"))
    (release / "other.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected one checkpoint; name the file itself \(found other.ckpt, wav"):
        list(convert_codec(release, tmp_path / "again"))


def test_an_interrupted_conversion_leaves_nothing(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_omni.models.generators.codec_folder.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(convert_codec(release, tmp_path / "codec"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "release"]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop(EMBED), f"{EMBED!r} is missing"),
        (lambda s: s.pop("feature_extractor.encodec.encoder.model.0.conv.conv.weight_v"), "it may be no WavTokenizer"),
        (lambda s: s.update({"backbone.extra.weight": torch.ones(1)}), "'backbone.extra.weight': no such weight"),
        (lambda s: s.update({EMBED: torch.ones(16, 9)}), r"expected \[16, 8\], found \[16, 9\]"),
        (lambda s: s.update({EMBED: s[EMBED].double()}), "expected floats of 32 or 16 bits, found torch.float64"),
        (lambda s: s[EMBED].fill_(torch.nan), "has values that are not finite"),
        (lambda s: s.update({EMBED.replace("embed", "inited"): torch.zeros(1)}), "codebook was never started"),
        (lambda s: s.update({"head.istft.window": torch.ones(160)}), "expected a periodic Hann window"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    release: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    edit(release, change)
    with pytest.raises(ValueError, match=said):
        list(convert_codec(release, tmp_path / "codec"))
    assert not (tmp_path / "codec").exists()


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("decoder.heads.ISTFTHead", "os.system", r"head.class_path: expected a path that ends with ISTFTHead"),
        ("ISTFTHead", "IMDCTCosHead", "no other class is read, and none is imported"),
        ("num_quantizers: 1", "num_quantizers: 4", "num_quantizers: expected 1, found 4"),
        ("padding: same", "padding: center", "padding: expected 'same', found 'center'"),
        ("n_fft: 160", "n_fft: 128", "n_fft: expected 160, found 128"),
        ("hop_length: 40", "hop_length: 20", "hop_length: expected 40, found 20"),
        ("vq_bins: 16", "vq_bins: sixteen", "vq_bins: expected a positive whole number, found 'sixteen'"),
        ("[5, 4, 2]", "[5, 4, 0]", "dowmsamples: expected a list of whole numbers"),
        ("sample_rate: 1600", "sample_rate: !!python/object/apply:os.getcwd []", "not readable as YAML"),
        ("model:", "models:", "class_path"),
        ("num_layers: 2", "num_layers: 3", "convnext.2.* is missing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    release: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = (release / "config.yaml").read_text()
    assert old in text
    (release / "config.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=said):
        list(convert_codec(release, tmp_path / "codec"))


def test_a_foreign_class_path_imports_nothing(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' loader imports and calls what the yaml names. Here its module would leave a file behind."""
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nISTFTHead = VocosBackbone = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = (release / "config.yaml").read_text()
    (release / "config.yaml").write_text(
        text.replace("decoder.heads.", "payload.").replace("decoder.models.", "payload.")
    )
    list(convert_codec(release, tmp_path / "codec"))
    assert "payload" not in sys.modules and not (tmp_path / "ran").exists()
    __import__("payload")
    assert (tmp_path / "ran").exists(), "the payload is a dud"


def test_a_checkpoint_that_runs_code_is_refused(release: Path, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": unmapped(release), "hyper_parameters": Payload(tmp_path / "ran")}, release / "wavtokenizer.ckpt"
    )
    with pytest.raises(ValueError, match="refused: not a file of plain tensors"):
        list(convert_codec(release, tmp_path / "codec"))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_source_is_named(release: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (release / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"expected one yaml; name it with --yaml \(found none\)"):
        list(convert_codec(release, tmp_path / "codec"))
    with pytest.raises(ValueError, match="no such file or folder"):
        list(convert_codec(tmp_path / "nowhere", tmp_path / "codec"))
    with pytest.raises(ValueError, match="has its configuration in it"):
        list(convert_codec(tmp_path / "ours", tmp_path / "codec", yaml=tmp_path / "x.yaml"))
    warned = [record.getMessage() for record in caplog.get_records("setup")]
    assert "num_filters is 4 here and 32 in their source, which cannot read this" in warned
    save_codec(build("mel"), tmp_path / "mel")
    with pytest.raises(ValueError, match="encoder 'mel'; WavTokenizer has only seanet"):
        list(convert_codec(tmp_path / "mel", tmp_path / "back"))
    assert isinstance(load_codec(tmp_path / "mel"), Codec) and not (tmp_path / "back").exists()
