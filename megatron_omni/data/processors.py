"""From decoded media to encoder inputs: pictures to tiles, sound to log-mel chunks (paper section 2.2).

Any-resolution pictures: among grids of (1 x 1) .. (n x n) tiles of p pixels, take the one that keeps most of the
picture (largest effective resolution, then least waste), resize to fit inside with the aspect kept, centre on black,
and cut the canvas row by row into tiles [rows * cols, 3, p, p]. No thumbnail, no separator. A video frame is one tile,
stretched to p x p. Tiles are 8-bit pixels; the vision encoder normalises them (models/encoders/vision.py).

Sound: mono 16 kHz is cut into chunks of ``chunk_seconds``, the last one zero-padded; each chunk becomes Whisper's
log-mel [mel bins, 100 frames a second]: STFT (Hann 400, hop 160), power, mel filters, log10 clipped to 8 below the
chunk's maximum, (x + 4) / 4. Equal to ``transformers.WhisperFeatureExtractor``.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isfinite

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from megatron_omni.config.model import AudioConfig, VisionConfig
from megatron_omni.data.decode.cpu import to_rgb
from megatron_omni.positions import SAMPLE_RATE, audio_chunks

N_FFT = 400
HOP_SAMPLES = 160
MAX_AMPLITUDE = 16.0
"""Largest sample of sound: far above what is mixed too loud, far below integers that were stored as floats."""

# ------------------------------------------------------------------------------------------------ pictures


def choose_grid(width: int, height: int, *, tile_size: int, max_tiles_per_side: int) -> tuple[int, int]:
    """(cols, rows) of tiles for a picture of ``width`` x ``height`` pixels.

    Effective resolution of a candidate = min(pixels of the picture scaled down or up to fit, pixels of the picture);
    waste = pixels of the candidate - effective resolution. Integer arithmetic, so no float can tip a tie; candidates
    equal in both go to fewer columns.
    """
    if width < 1 or height < 1:
        raise ValueError(f"picture of {width}x{height} pixels: needs at least one pixel each way")
    sides = range(1, max_tiles_per_side + 1)
    return max(
        ((cols, rows) for cols in sides for rows in sides), key=lambda grid: _score(width, height, grid, tile_size)
    )


def _score(width: int, height: int, grid: tuple[int, int], tile_size: int) -> tuple[int, int]:
    target_w, target_h = grid[0] * tile_size, grid[1] * tile_size
    if target_w * height <= target_h * width:  # the width is what limits the scale
        scaled = target_w * (height * target_w // width)
    else:
        scaled = target_h * (width * target_h // height)
    effective = min(scaled, width * height)
    return effective, -(target_w * target_h - effective)


def fit_on_canvas(image: Image.Image, *, width: int, height: int) -> Image.Image:
    """Resize (bicubic) to the largest size inside the canvas with the aspect kept, centred on black."""
    if width * image.height <= height * image.width:
        size = width, min(-(-image.height * width // image.width), height)
    else:
        size = min(-(-image.width * height // image.height), width), height
    resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    if size == (width, height):
        return resized
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def image_tiles(image: Image.Image, config: VisionConfig) -> tuple[Tensor, tuple[int, int]]:
    """Tiles [rows * cols, 3, p, p] uint8 in row-major order, and (rows, cols)."""
    image, p = to_rgb(image), config.image_size
    cols, rows = choose_grid(image.width, image.height, tile_size=p, max_tiles_per_side=config.max_tiles_per_side)
    fitted = fit_on_canvas(image, width=cols * p, height=rows * p)
    canvas = torch.from_numpy(np.array(fitted))  # [rows p, cols p, 3]
    tiles = canvas.view(rows, p, cols, p, 3).permute(0, 2, 4, 1, 3).reshape(rows * cols, 3, p, p)
    return tiles, (rows, cols)


def frame_tiles(frames: Sequence[Image.Image | np.ndarray], config: VisionConfig) -> Tensor:
    """Video frames (pictures or uint8 [height, width, 3]) to one tile each, [F, 3, p, p] uint8; aspect not kept."""
    stretched = np.stack([square(frame, config.image_size) for frame in frames])
    return torch.from_numpy(stretched).permute(0, 3, 1, 2).contiguous()


def square(frame: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """A frame stretched to one tile, [side, side, 3] uint8; one that is a tile already comes back as it is."""
    if isinstance(frame, np.ndarray) and frame.shape == (side, side, 3):
        return frame
    picture = frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(frame)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


# ------------------------------------------------------------------------------------------------ sound


def log_mel(samples: np.ndarray | Tensor, config: AudioConfig) -> Tensor:
    """Mono 16 kHz float samples in [-1, 1] to log-mel chunks [C, mel bins, frames] float32.

    ValueError for an empty clip, one longer than ``max_chunks``, more than one channel, or samples beyond MAX_AMPLITUDE.
    """
    wave = torch.as_tensor(samples)
    if wave.ndim != 1 or not wave.is_floating_point():
        raise ValueError(f"samples of shape {tuple(wave.shape)} and type {wave.dtype}: need one channel of floats")
    if wave.numel() == 0:
        raise ValueError("audio clip without samples")
    num_chunks = audio_chunks(wave.numel(), chunk_seconds=config.chunk_seconds)
    if num_chunks > config.max_chunks:
        raise ValueError(
            f"audio of {wave.numel() / SAMPLE_RATE:.1f} s: longer than model.audio.max_chunks={config.max_chunks} "
            f"chunks of {config.chunk_seconds:g} s; cut the clip or raise max_chunks"
        )
    chunk_samples = round(config.chunk_seconds * SAMPLE_RATE)
    padded = wave.new_zeros(num_chunks * chunk_samples, dtype=torch.float32)
    padded[: wave.numel()] = wave
    peak = float(padded.abs().max())
    if not peak <= MAX_AMPLITUDE:
        what = f"up to {peak:.3g}: sound lies in [-1, 1]" if isfinite(peak) else "that are not finite"
        raise ValueError(f"audio clip with samples {what}; scale it, or make it anew")
    frames = chunk_samples // HOP_SAMPLES
    # Half a window behind the last sample and half a window of mirrored silence.
    heard = frames if num_chunks > 1 else min(frames, -(-(wave.numel() + N_FFT) // HOP_SAMPLES))
    return _log_mel_chunks(padded.view(num_chunks, chunk_samples), config.num_mel_bins, heard)


def _log_mel_chunks(chunks: Tensor, num_mel_bins: int, heard: int) -> Tensor:
    """[C, samples] -> [C, mel bins, frames]; from frame ``heard`` on all chunks are silent."""
    spectrum = torch.stft(chunks[:, : heard * HOP_SAMPLES], N_FFT, HOP_SAMPLES, window=_window(), return_complex=True)
    spectrum = spectrum[..., :-1]
    power = spectrum.real.square().add_(spectrum.imag.square())  # [C, 201, heard]; a sum over the pairs is 4 x slower
    log_power = (_mel_filters(num_mel_bins) @ power).clamp_(min=1e-10).log10_()
    log_power = F.pad(log_power, (0, chunks.shape[1] // HOP_SAMPLES - heard), value=-10.0)
    floor = log_power.amax(dim=(1, 2), keepdim=True) - 8.0
    return torch.maximum(log_power, floor).add_(4.0).div_(4.0)


@lru_cache(maxsize=1)
def _window() -> Tensor:
    return torch.hann_window(N_FFT)


@lru_cache(maxsize=4)
def _mel_filters(num_mel_bins: int) -> Tensor:
    """[mel bins, 201]: Slaney's scale and norm, 0 to 8 kHz."""
    filters = mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float().T.contiguous()
