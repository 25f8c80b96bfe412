"""A codec whose decoder hears only what is near: the same sound where nothing is far, and streamed as whole."""

from pathlib import Path

import pytest
import soundfile
import torch

from megatron_omni.checkpoint.wavtokenizer import write_released
from megatron_omni.cli.main import main as megatron_omni
from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.generators.codec import Codec, StreamingDecoder, load_codec, save_codec
from megatron_omni.models.generators.local_decoder import fix_statistics, localise
from tests.unit.test_codec import SMALL, build, generator, sound, stream


def test_with_the_statistics_of_a_recording_and_all_of_it_near_it_sounds_as_before() -> None:
    codec, wave = build(), sound(1, 1200)[0]
    local = localise(codec, [wave], [30, 30])
    codes = codec.encode(wave[None])
    assert torch.equal(local.encode(wave[None]), codes)
    torch.testing.assert_close(local.decode(codes), codec.decode(codes), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(localise(codec, [wave], [3, 1]).decode(codes), codec.decode(codes), atol=1e-3)


def test_statistics_of_several_recordings_are_of_all_their_values() -> None:
    codec, waves = build(), [sound(1, 400)[0], 3 * sound(1, 2000)[0]]
    seen: list[torch.Tensor] = []
    norm = codec.decoder.pos_net[0].norm1
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].reshape(32, -1)))
    local = localise(codec, waves, [4, 2])
    handle.remove()
    values = torch.cat(seen, dim=1)
    torch.testing.assert_close(local.decoder.pos_net[0].norm1.mean, values.mean(1))
    torch.testing.assert_close(local.decoder.pos_net[0].norm1.variance, values.var(1, unbiased=False))
    assert not codec.decoder.pos_net[0].norm1._forward_pre_hooks, "its hooks are gone"


def test_a_decoder_with_a_span_takes_the_statistics_that_it_has_by_its_input() -> None:
    codec = Codec(CodecConfig(encoder="mel", **SMALL | {"decoder_span": [40, 40]})).eval()
    codec.load_state_dict(build().state_dict(), strict=False)
    wave = sound(1, 800)
    free = codec(wave, quantise=False).wave
    torch.testing.assert_close(free, build()(wave, quantise=False).wave)  # before its codebook starts it has no numbers
    fix_statistics(codec.decoder, codec.encoder(wave))
    codec.decoder.by_input(False)
    torch.testing.assert_close(codec.decoder(codec.encoder(wave)), free, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(codec.decoder(codec.encoder(3 * wave)), build().decoder(codec.encoder(3 * wave)))


def test_attention_in_blocks_is_attention_under_a_mask() -> None:
    local = localise(build(), [sound(1, 800)[0]], [20, 7])
    block = local.decoder.pos_net[2]
    hidden = torch.randn(2, 64, 600, generator=generator("hidden"))
    with torch.no_grad():
        found = block(hidden)
        normed = block.norm(hidden)
        query, key, value = (part(normed).transpose(1, 2) for part in (block.q, block.k, block.v))
        distance = torch.arange(600) - torch.arange(600)[:, None]
        scores = (query @ key.transpose(1, 2) / 64**0.5).masked_fill((distance < -20) | (distance > 7), -torch.inf)
        expected = hidden + block.proj_out((scores.softmax(-1) @ value).transpose(1, 2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_streamed_sound_is_the_whole_where_the_whole_decoder_differs() -> None:
    codec, codes = build(), torch.randint(0, 16, (300,), generator=generator("codes"))

    def decibel(some: Codec) -> float:
        whole = some.decode(codes[None])[0]
        streamed = torch.cat(stream(some, codes, 300, left=60, window=40, right=30))
        return float(10 * torch.log10(whole.square().sum() / (streamed - whole).square().sum()))

    local = localise(codec, [sound(1, 4000)[0]], [30, 8])
    assert decibel(local) > 60
    assert decibel(codec) < 40, "the case is too easy to say anything"


def test_it_is_kept_in_its_folder_and_has_no_released_form(tmp_path: Path) -> None:
    local = localise(build(), [sound(1, 800)[0]], [20, 7])
    save_codec(local, tmp_path)
    again, codes = load_codec(tmp_path), torch.arange(16)[None]
    assert again.config.decoder_span == [20, 7] and torch.equal(again.decode(codes), local.decode(codes))
    assert again.fingerprint != build().fingerprint
    with pytest.raises(ValueError, match=r"decoder_span \[20, 7\]; WavTokenizer's decoder has none"):
        write_released(again, tmp_path / "released")


def test_the_command_makes_a_folder_local(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec, wave = build(), sound(1, 1200)[0].clamp(-1, 1)
    save_codec(codec, tmp_path / "codec")
    soundfile.write(tmp_path / "a.wav", wave.numpy(), codec.sample_rate, subtype="FLOAT")
    words = ["convert", "codec", str(tmp_path / "codec"), "--out", str(tmp_path / "local"), "--local", "9", "4"]
    assert megatron_omni(words) == 2
    assert "--local and --recordings: each needs the other" in capsys.readouterr().err
    assert megatron_omni([*words, "--recordings", str(tmp_path / "a.wav")]) == 0
    found, expected = load_codec(tmp_path / "local"), localise(codec, [wave], [9, 4])
    assert found.fingerprint == expected.fingerprint and found.fingerprint in capsys.readouterr().out


def test_it_can_be_trained_on() -> None:
    local = localise(build(), [sound(1, 800)[0]], [20, 7]).train()
    before = local.decoder.pos_net[0].norm1.mean.clone()
    local(sound(2, 800)).wave.square().mean().backward()
    assert all(parameter.grad is not None for parameter in local.decoder.pos_net.parameters())
    assert torch.equal(before, local.decoder.pos_net[0].norm1.mean)


def test_what_cannot_be_made_local_is_refused() -> None:
    local = localise(build(), [sound(1, 800)[0]], [20, 7])
    with pytest.raises(ValueError, match="a codec is made local once"):
        localise(local, [sound(1, 800)[0]], [20, 7])
    with pytest.raises(ValueError, match="no recording"):
        localise(build(), [], [20, 7])
    with pytest.raises(ValueError, match="two numbers"):
        Codec(CodecConfig(**SMALL | {"decoder_span": [4]}))
    assert len(StreamingDecoder(local).push([1])) == 0
