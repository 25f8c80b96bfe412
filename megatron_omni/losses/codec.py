"""Losses of a codec: how far the decoded sound and its spectrum are from the recording (docs/speech.md).

    mel         mean over sizes N of  mean |log max(F |STFT_N y|, e) - log max(F |STFT_N x|, e)|      hop N / 4
    magnitude   mean |max(a, log e') - log max(|S x|, e')|        a: the decoder's log magnitude, S: its own STFT
    commitment  mean squared distance of the encoder's vectors to their entries (codebook.py)
    verdict     mean over judges of  mean max(0, 1 - D(y));  the judges themselves learn  mean max(0, 1 - D(x)) + max(0, 1 + D(y))
    features    mean over the judges' layers of  mean |f(y) - f(x)| / mean |f(x)|

|STFT_N| is scaled by 4 / N, so that a sine of amplitude 1 has about 1 at its frequency, and F adds frequencies up to bands on
the mel scale; e is -60 dB, e' the same for an unscaled spectrum. What is quieter in both does not count. The mel loss hears
the sound and so teaches phases as far as they are heard; the magnitude loss reaches the decoder past the phases, without
which a decoder that starts from nothing spends hundreds of steps on loudness.

Shapes: B crops, T samples, n codes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

LEAST_AMPLITUDE = 1e-3
"""Of full scale."""


class MelDistance(nn.Module):
    """The mel loss at several sizes of the transform."""

    def __init__(self, sample_rate: int, fft_sizes: Sequence[int], num_bins: Sequence[int]) -> None:
        super().__init__()
        assert len(fft_sizes) == len(num_bins)
        self.fft_sizes = tuple(fft_sizes)
        for size, bins in zip(fft_sizes, num_bins):
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
            self.register_buffer(f"filters_{size}", mel_filters(sample_rate, size, bins), persistent=False)

    def forward(self, wave: Tensor, recording: Tensor) -> Tensor:
        """Mean distance of two sounds [B, T]; nothing is learned of the second."""
        with torch.no_grad():
            wanted = [self.log_mel(recording, size) for size in self.fft_sizes]
        found = (self.log_mel(wave, size) for size in self.fft_sizes)
        return torch.stack([(f - w).abs().mean() for f, w in zip(found, wanted)]).mean()

    def log_mel(self, wave: Tensor, size: int) -> Tensor:
        """[B, frames, bins], natural logarithm; frames centred, the sound reflected at its ends."""
        spectrum = torch.stft(
            wave, size, size // 4, window=self.get_buffer(f"window_{size}"), pad_mode="reflect", return_complex=True
        )
        # The root of a sum that is never 0: |S| has no gradient there.
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt() * (4 / size)
        bands = magnitude.transpose(1, 2) @ self.get_buffer(f"filters_{size}")
        return bands.clamp(min=LEAST_AMPLITUDE).log()


def magnitude_loss(log_magnitude: Tensor, recorded: Tensor, *, fft_size: int) -> Tensor:
    """``log_magnitude`` [B, n, N / 2 + 1] of the decoder against the recording's spectrum of the same shape."""
    least = LEAST_AMPLITUDE * fft_size / 4
    wanted = recorded.abs().clamp(min=least).log()
    return (log_magnitude.clamp(min=math.log(least)) - wanted).abs().mean()


def mel_filters(sample_rate: int, fft_size: int, num_bins: int) -> Tensor:
    """[N / 2 + 1, bins]: triangles of height 1 whose corners are evenly spaced in mel = 2595 log10(1 + f / 700)."""
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, highest, num_bins + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, fft_size // 2 + 1, dtype=torch.float64)[:, None]
    rising = (frequencies - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


Heard = Sequence[Sequence[Tensor]]
"""Of each judge, what its layers make of a sound; the logits last."""


def judges_loss(recording: Heard, decoded: Heard) -> Tensor:
    """What the judges learn: hinge loss, mean over judges."""
    parts = [relu(1 - real[-1]).mean() + relu(1 + made[-1]).mean() for real, made in zip(recording, decoded)]
    return torch.stack(parts).mean()


def verdict_loss(decoded: Heard) -> Tensor:
    """What the decoder learns from the judges' logits."""
    return torch.stack([relu(1 - made[-1]).mean() for made in decoded]).mean()


def feature_loss(recording: Heard, decoded: Heard) -> Tensor:
    """Relative distance of the layers; nothing is learned of the recording's."""
    pairs = [(r.detach(), d) for real, made in zip(recording, decoded) for r, d in zip(real[:-1], made[:-1])]
    return torch.stack([(d - r).abs().mean() / r.abs().mean().clamp(min=1e-6) for r, d in pairs]).mean()
