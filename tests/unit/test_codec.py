"""The codec: quantiser, transform, streaming, files, what it refuses. Small sizes; released ones in tests/parity."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.encoders.codec import mel_fft_size
from megatron_omni.models.generators.codebook import Codebook, draw_vectors
from megatron_omni.models.generators.codec import Codec, StreamingDecoder, load_codec, save_codec
from megatron_omni.models.generators.istft import istft, stft
from megatron_omni.platform.seeds import named_generator

HOP = 40
SMALL = {"sample_rate": 1600, "num_codes": 16, "code_size": 8, "strides": [2, 4, 5], "num_filters": 4}
SMALL |= {"num_mel_bins": 10, "encoder_hidden_size": 12, "hidden_size": 64, "ffn_hidden_size": 48, "num_layers": 2}


def generator(*name: str | int) -> torch.Generator:
    return named_generator(0, *name)


def build(encoder: str = "mel") -> Codec:
    codec = Codec(CodecConfig(encoder=encoder, **SMALL)).eval()
    codec.draw_weights(generator)
    codec.codebook.start(torch.randn(64, 8, generator=generator("vectors")), generator=generator("start"))
    return codec


@pytest.fixture(params=["seanet", "mel"])
def codec(request: pytest.FixtureRequest) -> Codec:
    return build(request.param)


def sound(*shape: int) -> Tensor:
    return 0.2 * torch.randn(shape, generator=generator("sound", *shape))


# ------------------------------------------------------------------------------------------------ codes and sound


@pytest.mark.parametrize("samples", [1, 39, 40, 41, 1600, 1601])
def test_as_many_codes_as_begun_hops_and_exactly_hop_samples_a_code(codec: Codec, samples: int) -> None:
    codes = codec.encode(sound(2, samples))
    assert codes.shape == (2, math.ceil(samples / HOP)) and codes.dtype == torch.int64
    assert codec.decode(codes).shape == (2, codes.shape[1] * HOP)


def test_nothing_in_is_nothing_out(codec: Codec) -> None:
    assert codec.encode(torch.zeros(3, 0)).shape == (3, 0)
    assert codec.decode(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0)


def test_a_clip_of_a_batch_has_the_codes_and_sound_of_the_clip_alone(codec: Codec) -> None:
    wave = sound(3, 900)
    codes = codec.encode(wave)
    for i in range(3):
        assert torch.equal(codes[i : i + 1], codec.encode(wave[i : i + 1]))
        torch.testing.assert_close(codec.decode(codes)[i], codec.decode(codes[i : i + 1])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wave", [torch.zeros(1, 800), torch.ones(1, 800), sound(1, 800).mul(50).clamp(-1, 1)])
def test_silence_and_clipped_sound_have_codes(codec: Codec, wave: Tensor) -> None:
    assert bool(codec.decode(codec.encode(wave)).isfinite().all())


def test_forward_is_encode_and_decode(codec: Codec) -> None:
    wave = sound(2, 800)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    out = codec(wave)
    assert out.quantised is not None and torch.equal(out.quantised.codes, codec.encode(wave))
    torch.testing.assert_close(out.wave, codec.decode(out.quantised.codes), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())
    assert codec(wave, quantise=False).quantised is None


def test_training_reaches_every_weight_through_the_codes(codec: Codec) -> None:
    out = codec.train()(sound(2, 800), row=1)
    assert out.quantised is not None
    (out.wave.square().mean() + out.quantised.commitment).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    rows = codec.decoder.norm.scale.weight.grad
    assert rows is not None and rows[1].abs().sum() > 0 and rows[[0, 2, 3]].abs().sum() == 0


def test_rows_of_the_adaptive_norms_differ_and_row_0_decodes(codec: Codec) -> None:
    entries = codec.codebook.lookup(torch.arange(9)[None])
    with torch.no_grad():
        codec.decoder.norm.shift.weight[1] += torch.randn(64, generator=generator("row"))
        assert torch.equal(codec.decoder(entries)[0], codec.decode(torch.arange(9)[None])[0])
        assert not torch.allclose(codec.decoder(entries, 1), codec.decoder(entries, 0))


def test_dropout_acts_in_training_alone() -> None:
    codec, codes = build(), torch.arange(9)[None]
    assert torch.equal(codec.decode(codes), codec.decode(codes))
    codec.train()
    assert not torch.equal(codec.decode(codes), codec.decode(codes))


@pytest.mark.parametrize("encoder", ["seanet", "mel"])
def test_initial_weights_keep_the_size_of_speech(encoder: str) -> None:
    """Convolutions on the waveform, as PyTorch starts them, shrink it until biases decide the code."""
    codec = build(encoder)
    with torch.no_grad():
        vectors = codec.encoder(sound(2, 4000) / 2)
    assert 0.3 < vectors.std() < 3
    across = vectors.reshape(-1, 8).std(0).mean() / vectors.std()
    assert across > 0.3, "vectors hardly differ from frame to frame"


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, second = build(), build()
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_log_mel_frames_by_their_definition() -> None:
    codec, wave = build("mel"), sound(1, 100)
    size = mel_fft_size(codec.config)
    assert size == 128
    padded = torch.cat([torch.zeros(54), wave[0], torch.zeros(20 + 54)]).double()
    for frame, start in enumerate(range(0, 6 * 20, 20)):
        window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(size).double() / size)
        spectrum = torch.fft.fft(padded[start : start + size] * window)[: size // 2 + 1].abs()
        expected = torch.log((spectrum @ codec.encoder.filters.double()).clamp(min=1e-3)) / 3
        torch.testing.assert_close(codec.encoder.log_mel(wave)[0, :, frame].double(), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ transform


def test_istft_inverts_its_stft() -> None:
    wave, window = torch.randn(2, 12 * 600, generator=generator("wave")), torch.hann_window(2400)
    spectrum = stft(wave, window, 600)
    assert spectrum.shape == (2, 12, 1201)
    torch.testing.assert_close(istft(spectrum, window, 600), wave, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ codebook


def test_nearest_entry_straight_through_gradient_and_commitment() -> None:
    book = Codebook(5, 3)
    book.embed.copy_(torch.randn(5, 3, generator=generator("book")))
    vectors = torch.randn(2, 4, 3, generator=generator("x"), requires_grad=True)
    out = book(vectors)
    distances = (vectors.detach()[:, :, None] - book.embed).square().sum(-1)
    assert torch.equal(out.codes, distances.argmin(-1))
    torch.testing.assert_close(out.vectors, book.embed[out.codes])
    torch.testing.assert_close(out.commitment, distances.min(-1).values.mean() / 3)
    weights = torch.randn(2, 4, 3, generator=generator("w"))
    (gradient,) = torch.autograd.grad((out.vectors * weights).sum(), vectors, retain_graph=True)
    assert torch.equal(gradient, weights)
    (gradient,) = torch.autograd.grad(out.commitment, vectors)
    torch.testing.assert_close(gradient, 2 * (vectors.detach() - book.embed[out.codes]) / 24)


def test_running_means_by_their_definition() -> None:
    book = build().codebook
    sizes, averages = book.cluster_size.double(), book.embed_avg.double()
    vectors = torch.randn(50, 8, generator=generator("x"))
    codes = book.nearest(vectors)
    counts, sums = book.statistics(vectors, codes)
    assert book.learn(counts, sums, torch.zeros(16, 8), decay=0.9, dead_below=0.0) == 0
    for i in range(16):
        chosen = vectors[codes == i].double()
        sizes[i] = 0.9 * sizes[i] + 0.1 * len(chosen)
        averages[i] = 0.9 * averages[i] + 0.1 * chosen.sum(0)
    smoothed = (sizes + 1e-5) / (sizes.sum() + 16 * 1e-5) * sizes.sum()
    torch.testing.assert_close(book.embed.double(), averages / smoothed[:, None], atol=1e-5, rtol=1e-5)


def test_statistics_of_parts_add_up() -> None:
    """Micro-batches and ranks: the same codebook however the vectors are dealt."""
    book, vectors = build().codebook, torch.randn(60, 8, generator=generator("x"))
    whole = book.statistics(vectors, book.nearest(vectors))
    parts = [book.statistics(part, book.nearest(part)) for part in vectors.split(17)]
    torch.testing.assert_close(whole[0], sum(part[0] for part in parts))
    torch.testing.assert_close(whole[1], sum(part[1] for part in parts))


def test_a_dead_code_starts_again_at_a_vector_and_stays_there() -> None:
    book = Codebook(4, 2)
    book.start(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), generator=generator("s"))
    far, near = torch.tensor([[50.0, 50.0]]), torch.tensor([[1.0, 1.0]]).repeat(40, 1)
    for _ in range(400):
        vectors = torch.cat([near, far.repeat(3, 1)])
        counts, sums = book.statistics(vectors, book.nearest(vectors))
        replaced = book.learn(counts, sums, far.repeat(4, 1))
    assert replaced > 0, "codes that nobody chooses die again and again"
    assert (book.lookup(book.nearest(far)) - far).norm() < 1.0
    assert (book.lookup(book.nearest(near[:1])) - near[:1]).norm() < 0.1


def test_kmeans_finds_clusters_and_counts_them() -> None:
    centres = torch.tensor([[0.0, 0], [20, 0], [0, 20], [20, 20]])
    vectors = centres.repeat_interleave(25, 0) + torch.randn(100, 2, generator=generator("x"))
    book = Codebook(8, 2)
    assert not book.is_started
    book.start(vectors, generator=generator("s"), num_iterations=20)
    assert book.is_started and book.cluster_size.sum() == 100
    assert (vectors - book.lookup(book.nearest(vectors))).square().sum(1).mean() < 2.0
    for i in range(8):
        chosen = vectors[book.nearest(vectors) == i]
        assert len(chosen) == book.cluster_size[i]
        torch.testing.assert_close(book.embed_avg[i], chosen.sum(0), atol=1e-3, rtol=1e-4)


def test_a_codebook_larger_than_its_first_vectors_starts_too() -> None:
    book = Codebook(8, 2)
    book.start(torch.tensor([[0.0, 1], [2, 3]]), generator=generator("s"))
    assert set(map(tuple, book.embed.tolist())) == {(0.0, 1.0), (2.0, 3.0)}


def test_drawn_vectors_are_of_the_step_and_different() -> None:
    vectors = torch.arange(40.0).reshape(20, 2)
    drawn = draw_vectors(vectors, 20, generator("d"))
    assert sorted(drawn[:, 0].tolist()) == vectors[:, 0].tolist()
    assert torch.equal(drawn, draw_vectors(vectors, 20, generator("d")))


# ------------------------------------------------------------------------------------------------ streaming


def stream(codec: Codec, codes: Tensor, pieces: int, **sizes: int) -> list[Tensor]:
    decoder = StreamingDecoder(codec, **sizes)
    return [*(decoder.push(part) for part in codes.split(pieces)), decoder.finish()]


@pytest.mark.parametrize("count", [0, 1, 9, 12, 13, 40, 41, 100])
@pytest.mark.parametrize("pieces", [1, 7, 100])
def test_streaming_gives_every_sample_once(count: int, pieces: int) -> None:
    codec, codes = build(), torch.randint(0, 16, (count,), generator=generator("codes", count))
    sizes = {"left": 6, "window": 9, "right": 3}
    parts = stream(codec, codes, pieces, **sizes)
    assert torch.cat(parts).shape == (count * HOP,)
    assert torch.equal(torch.cat(parts), torch.cat(stream(codec, codes, 5, **sizes))), "depends on how codes arrive"
    if 0 < count < 12:
        assert torch.equal(torch.cat(parts), codec.decode(codes[None])[0])


def test_sound_is_out_as_soon_as_a_window_and_its_right_context_are_there() -> None:
    decoder = StreamingDecoder(build(), left=6, window=9, right=3)
    assert [len(decoder.push([1])) for _ in range(21)] == [0] * 11 + [9 * HOP] + [0] * 8 + [9 * HOP]
    assert len(decoder.finish()) == 3 * HOP
    assert torch.equal(
        decoder.push([1] * 12), StreamingDecoder(decoder.codec, left=6, window=9, right=3).push([1] * 12)
    )


def test_windows_with_all_the_codes_as_context_are_the_whole() -> None:
    codec, codes = build(), torch.randint(0, 16, (30,), generator=generator("codes"))
    decoder = StreamingDecoder(codec, left=30, window=10, right=20)
    streamed = torch.cat([decoder.push(codes), decoder.finish()])
    torch.testing.assert_close(streamed, codec.decode(codes[None])[0], atol=1e-5, rtol=1e-4)


def test_more_context_is_nearer_to_the_whole_and_there_is_no_step_at_joins() -> None:
    codec, codes = build(), torch.randint(0, 16, (200,), generator=generator("codes"))
    whole = codec.decode(codes[None])[0]

    def noise(**sizes: int) -> float:
        streamed = torch.cat(stream(codec, codes, 200, **sizes))
        return float((streamed - whole).square().sum() / whole.square().sum())

    assert noise(left=40, window=40, right=10) < noise(left=4, window=40, right=1)
    streamed = torch.cat(stream(codec, codes, 200, left=10, window=20, right=5))
    joins = torch.arange(20, 200, 20) * HOP
    steps = streamed.diff().abs()
    for join in joins.tolist():
        assert steps[join - 1] <= 3 * steps[join - 4 * HOP : join - 2].max()
    # Without the fade a join would be where two different decodes meet.
    heads = torch.stack([codec.decode(codes[None, join - 30 : join + 5])[0, 30 * HOP] for join in range(40, 200, 20)])
    tails = torch.stack([codec.decode(codes[None, join - 50 : join + 5])[0, 50 * HOP] for join in range(60, 200, 20)])
    assert not torch.allclose(heads[1:], tails)


@pytest.mark.parametrize("sizes", [{"window": 0}, {"left": -1}, {"right": 0}])
def test_windows_that_make_no_sense_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 0, 1 and 1 codes"):
        StreamingDecoder(build(), **sizes)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "wave, said",
    [
        (torch.zeros(1, 2, 800), "one channel; mix stereo down"),
        (torch.zeros(800), r"takes \[clips, samples\]"),
        (torch.zeros(1, 800, dtype=torch.int16), "divide 16-bit by 32768"),
        (torch.tensor([[0.0, math.nan]]), "NaN or infinite"),
        (torch.tensor([[0.0, math.inf]]), "NaN or infinite"),
        (torch.zeros(1, 1).expand(1, (1 << 24) + 1), "cut it into pieces"),
    ],
)
def test_sound_that_cannot_be_encoded(wave: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build().encode(wave)


@pytest.mark.parametrize(
    "codes, said",
    [
        (torch.tensor([[0, 16]]), "from 0 to 16: this codec has 0 to 15"),
        (torch.tensor([[-1, 3]]), "from -1 to 3"),
        (torch.tensor([0, 1]), r"takes whole \[clips, n\]"),
        (torch.tensor([[0.0, 1.0]]), r"takes whole \[clips, n\]"),
    ],
)
def test_codes_that_cannot_be_decoded(codes: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build().decode(codes)


def test_a_stream_refuses_a_code_outside_the_codebook_and_goes_on() -> None:
    decoder = StreamingDecoder(build(), left=6, window=9, right=3)
    decoder.push([1, 2])
    with pytest.raises(ValueError, match="from 3 to 99"):
        decoder.push([3, 99])
    assert torch.equal(decoder.finish(), decoder.codec.decode(torch.tensor([[1, 2]]))[0])


@pytest.mark.parametrize(
    "sizes, said", [({"hidden_size": 80}, "multiple of 32"), ({"strides": [3, 5]}, "15, must be even")]
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Codec(CodecConfig(**SMALL | sizes))


# ------------------------------------------------------------------------------------------------ files


def test_a_folder_gives_the_same_codes_and_sound(codec: Codec, tmp_path: Path) -> None:
    fingerprint = save_codec(codec, tmp_path / "codec", about={"recipe": "x"})
    again, wave = load_codec(tmp_path / "codec"), sound(1, 900)
    assert not again.training and again.config == codec.config
    assert again.fingerprint == codec.fingerprint == fingerprint
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in codec.state_dict().items())
    assert torch.equal(codec.encode(wave), again.encode(wave))
    assert torch.equal(codec.decode(codec.encode(wave)), again.decode(again.encode(wave)))


def test_half_precision_on_disk_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    codec = build()
    fingerprint = save_codec(codec, tmp_path, dtype=torch.float16)
    again = load_codec(tmp_path)
    assert again.fingerprint == fingerprint != codec.fingerprint
    assert again.decoder.out.weight.dtype == torch.float32
    assert torch.equal(again.decoder.out.weight, codec.decoder.out.weight.half().float())
    assert save_codec(again, tmp_path / "again") == fingerprint


def test_the_fingerprint_is_of_what_decides_codes_and_sound() -> None:
    codec = build()
    before = codec.fingerprint
    codec.codebook.cluster_size += 1
    assert codec.fingerprint == before, "only training reads it"
    with torch.no_grad():
        codec.decoder.out.bias[3] += 1e-6
    assert codec.fingerprint != before
    other = build()
    other.config.sample_rate += 1
    assert other.fingerprint != build().fingerprint


def test_a_codec_without_codebook_or_with_nan_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no codebook yet"):
        save_codec(Codec(CodecConfig(**SMALL)), tmp_path / "codec")
    codec = build()
    with torch.no_grad():
        codec.decoder.out.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"decoder.out.weight has values that are not finite in torch.float16"):
        save_codec(codec, tmp_path / "codec", dtype=torch.float16)
    assert not (tmp_path / "codec").exists()


def edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "codec.json").read_text())
    document["config"] |= changes.pop("config", {})
    (folder / "codec.json").write_text(json.dumps(document | changes))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": 2}, "expected a table with format 1"),
        ({"fingerprint": "0" * 64}, "is not the 000000000000 that codec.json names"),
        ({"config": {"num_layers": 3}}, "convnext.2.* is missing"),
        ({"config": {"num_codes": 17}}, r"codebook.cluster_size: expected \[17\], found \[16\]"),
        ({"config": {"num_codes": -1}}, "config.num_codes=-1: must be at least 2"),
        ({"config": {"num_codes": "16"}}, "config.num_codes='16': expected"),
        ({"config": {"strides": [2, "4"]}}, "config.strides=.*: expected"),
        ({"config": {"encoder": "dac"}}, "expected seanet or mel"),
        ({"config": {"depth": 3}}, "config.depth: no such field"),
        ({"config": {"sample_rate": 1601}}, "fingerprint .* is not the"),
    ],
)
def test_a_folder_that_was_changed_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    save_codec(build(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=said):
        load_codec(tmp_path)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no codec here \(codec.json is missing\)"):
        load_codec(tmp_path)
    save_codec(build(), tmp_path)
    weights = tmp_path / "codec.safetensors"
    found = load_file(weights)
    for change, said in (
        ({"decoder.out.bias": found["decoder.out.bias"] + 1}, "is damaged or of another codec"),
        ({"decoder.out.bias": found["decoder.out.bias"] * math.nan}, "decoder.out.bias has values that are not finite"),
        ({"more": torch.zeros(1)}, "more has no place in this codec"),
    ):
        save_file(found | change, weights)
        with pytest.raises(ValueError, match=said):
            load_codec(tmp_path)
    weights.write_bytes(b"\x10")
    with pytest.raises(ValueError, match=r"codec.safetensors: cannot be read"):
        load_codec(tmp_path)
