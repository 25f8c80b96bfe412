"""Tiles and log-mel chunks: grids against exact fractions, tile contents pixel by pixel, sound against transformers."""

import io
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import WhisperFeatureExtractor

from megatron_omni.config.model import AudioConfig, VisionConfig
from megatron_omni.data.processors import choose_grid, fit_on_canvas, frame_tiles, image_tiles, log_mel, to_rgb
from megatron_omni.models.encoders.vision import normalised


def vision(p: int = 8, n: int = 3) -> VisionConfig:
    return VisionConfig(image_size=p, patch_size=2, max_tiles_per_side=n)


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((384, 384), (1, 1)),
        ((100, 100), (1, 1)),  # every grid keeps all of it; one tile wastes least
        ((385, 384), (2, 1)),  # one pixel more than a tile: two tiles lose nothing, one tile loses a column
        ((768, 768), (2, 2)),
        ((1920, 1080), (5, 3)),
        ((640, 480), (2, 2)),
        ((480, 2000), (2, 6)),
        ((10_000, 10_000), (6, 6)),
        ((10_000, 10), (6, 1)),
        ((1, 100_000), (1, 1)),  # scaled down to nothing everywhere: least waste decides
    ],
)
def test_grid_of_well_known_sizes(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert choose_grid(*size, tile_size=384, max_tiles_per_side=6) == grid


@given(w=st.integers(1, 5000), h=st.integers(1, 5000), p=st.sampled_from([14, 32, 384]), n=st.integers(1, 6))
def test_grid_maximises_effective_resolution_then_wastes_least(w: int, h: int, p: int, n: int) -> None:
    def measure(cols: int, rows: int) -> tuple[int, int]:
        scale = min(Fraction(cols * p, w), Fraction(rows * p, h))
        effective = min(floor(w * scale) * floor(h * scale), w * h)
        return effective, cols * rows * p * p - effective

    chosen = measure(*choose_grid(w, h, tile_size=p, max_tiles_per_side=n))
    everything = [measure(c, r) for c in range(1, n + 1) for r in range(1, n + 1)]
    best = max(effective for effective, _ in everything)
    assert chosen == (best, min(waste for effective, waste in everything if effective == best))


# ------------------------------------------------------------------------------------------------ tiles


def test_tiles_are_cut_row_by_row_without_touching_a_pixel() -> None:
    """A picture of exactly 3 x 2 tiles is not resized: each tile holds its own pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tiles, grid = image_tiles(Image.fromarray(pixels), vision())
    assert grid == (2, 3) and tiles.shape == (6, 3, 8, 8) and tiles.dtype == torch.uint8
    exact = (torch.from_numpy(pixels).double() / 255 - 0.5) / 0.5
    for row in range(2):
        for col in range(3):
            cell = exact[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8].permute(2, 0, 1)
            torch.testing.assert_close(normalised(tiles[row * 3 + col]).double(), cell, atol=1e-6, rtol=0)


def test_padding_is_black_and_centred() -> None:
    tiles, grid = image_tiles(Image.new("RGB", (100, 50), "white"), vision(n=1))
    assert grid == (1, 1)
    white = [-1, -1, 1, 1, 1, 1, -1, -1]
    assert normalised(tiles[0]).mean(dim=(0, 2)).tolist() == white
    tiles, grid = image_tiles(Image.new("RGB", (50, 100), "white"), vision(n=1))
    assert grid == (1, 1) and normalised(tiles[0]).mean(dim=(0, 1)).tolist() == white


def test_aspect_is_kept_and_the_other_side_rounded_up() -> None:
    canvas = fit_on_canvas(Image.new("RGB", (30, 10), "white"), width=8, height=8)
    white_rows = [y for y in range(8) if canvas.getpixel((4, y)) == (255, 255, 255)]
    assert white_rows == [2, 3, 4]  # ceil(10 * 8 / 30) = 3, from (8 - 3) // 2
    tall = fit_on_canvas(Image.new("RGB", (10, 30), "white"), width=8, height=8)
    assert [x for x in range(8) if tall.getpixel((x, 4)) == (255, 255, 255)] == [2, 3, 4]


def test_resizing_is_bicubic() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((8, 8), Image.Resampling.BICUBIC))
    tiles, _ = image_tiles(picture, vision(n=1))
    assert np.array_equal(tiles[0].permute(1, 2, 0).numpy(), expected)


def test_extreme_shapes_still_give_a_tile() -> None:
    tiles, grid = image_tiles(Image.new("RGB", (1, 1000), "white"), vision(n=2))
    assert grid[1] == 1 and tiles.max() == 255


def test_exif_orientation_is_applied() -> None:
    picture = Image.new("RGB", (8, 16), "black")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated: turn by 90 degrees clockwise to show
    stored = io.BytesIO()
    picture.save(stored, "PNG", exif=exif)
    shown = to_rgb(Image.open(stored))
    assert shown.size == (16, 8) and shown.getpixel((15, 0)) == (255, 0, 0)


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (200, 0, 0, 255))
    assert [to_rgb(half).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]
    palette = Image.new("P", (1, 1), 3)
    palette.info["transparency"] = 3
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    stored = io.BytesIO()
    Image.fromarray(values).save(stored, "PNG")
    shown = to_rgb(Image.open(stored))
    assert [shown.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "HSV"])
def test_every_common_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (5, 4))).mode == "RGB"


def test_float_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="32-bit floats"):
        to_rgb(Image.new("F", (2, 2)))


def test_frames_are_stretched_to_one_tile_each() -> None:
    left_white = np.zeros((10, 40, 3), dtype=np.uint8)
    left_white[:, :20] = 255
    tiles = frame_tiles([left_white, Image.new("RGB", (3, 50), "white")], vision())
    assert tiles.shape == (2, 3, 8, 8)
    assert (tiles[0, :, :, :3] > 242).all() and (tiles[0, :, :, 5:] < 13).all()
    assert (tiles[1] == 255).all()


# ------------------------------------------------------------------------------------------------ sound


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    time = np.arange(round(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(seed).normal(size=time.size)
    return (0.3 * np.sin(2 * np.pi * 440 * time) * np.exp(-time) + 0.01 * noise).astype(np.float32)


@pytest.mark.parametrize(("mel", "chunk"), [(128, 30), (80, 30), (80, 3), (64, 1)])
def test_log_mel_equals_transformers(mel: int, chunk: int) -> None:
    """Two and a half chunks: every chunk is an input of its own, the last one zero-padded."""
    samples = sound(2.5 * chunk)
    ours = log_mel(samples, AudioConfig(num_mel_bins=mel, chunk_seconds=float(chunk)))
    extractor = WhisperFeatureExtractor(feature_size=mel, chunk_length=chunk)
    pieces = [samples[i : i + chunk * 16_000] for i in range(0, samples.size, chunk * 16_000)]
    theirs = extractor(pieces, sampling_rate=16_000, return_tensors="pt").input_features
    assert ours.shape == (3, mel, chunk * 100) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_log_mel_equals_the_numpy_definition() -> None:
    """The definition in float64, without torch's STFT."""
    samples = sound(1.0)
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    expected = extractor._np_extract_fbank_features(samples[None].astype(np.float64), "cpu")
    ours = log_mel(samples, AudioConfig(num_mel_bins=80, chunk_seconds=1.0))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)


def test_chunks_do_not_see_each_other() -> None:
    config = AudioConfig(num_mel_bins=80, chunk_seconds=1.0)
    loud_then_quiet = np.concatenate([sound(1.0), 1e-3 * sound(1.0, seed=1)])
    together = log_mel(loud_then_quiet, config)
    alone = log_mel(loud_then_quiet[16_000:], config)
    torch.testing.assert_close(together[1:], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 200, 15_000, 15_600, 15_601, 15_840, 15_999, 16_000])
def test_a_clip_shorter_than_its_chunk_equals_transformers(num_samples: int) -> None:
    """Frames behind the sound are silence, wherever it ends."""
    samples = sound(1.0)[-num_samples:]
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    theirs = extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(
        log_mel(samples, AudioConfig(num_mel_bins=80, chunk_seconds=1.0)), theirs, atol=1e-5, rtol=0
    )


def test_silence_is_finite() -> None:
    features = log_mel(np.zeros(100, dtype=np.float32), AudioConfig(num_mel_bins=80, chunk_seconds=1.0))
    assert (features == -1.5).all()  # log10(1e-10) = -10 everywhere: (-10 + 4) / 4


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(0, dtype=np.float32), "without samples"),
        (np.zeros((2, 100), dtype=np.float32), "one channel"),
        (np.zeros(100, dtype=np.int16), "one channel of floats"),
        (np.full(100, np.nan, dtype=np.float32), "not finite"),
        (np.zeros(48_001, dtype=np.float32), "max_chunks=3"),
    ],
)
def test_bad_sound_says_what_is_wrong(samples: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        log_mel(samples, AudioConfig(num_mel_bins=80, chunk_seconds=1.0, max_chunks=3))
