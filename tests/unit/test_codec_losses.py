"""Losses of the codec against float64 NumPy straight from their formulas."""

import math

import numpy
import torch
from numpy.typing import NDArray
from transformers.audio_utils import mel_filter_bank

from megatron_omni.losses.codec import (
    MelDistance,
    feature_loss,
    judges_loss,
    magnitude_loss,
    mel_filters,
    verdict_loss,
)
from megatron_omni.models.generators.istft import stft

RATE = 16_000


def sounds() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs of sounds [2, T]: a tone and noise, and nearly the same."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(4800) / RATE
    clean = torch.stack([0.3 * torch.sin(2 * math.pi * 440 * time), 0.1 * torch.randn(4800, generator=generator)])
    return clean, clean + 0.02 * torch.randn(clean.shape, generator=generator)


def log_mel(wave: NDArray[numpy.float64], size: int, bins: int) -> NDArray[numpy.float64]:
    window = 0.5 - 0.5 * numpy.cos(2 * numpy.pi * numpy.arange(size) / size)
    padded = numpy.pad(wave, size // 2, mode="reflect")
    frames = [padded[start : start + size] * window for start in range(0, len(padded) - size + 1, size // 4)]
    spectrum = numpy.fft.rfft(numpy.stack(frames))
    magnitude = numpy.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9) * 4 / size
    filters = mel_filter_bank(size // 2 + 1, bins, 0.0, RATE / 2, RATE, norm=None, mel_scale="htk")
    return numpy.log(numpy.maximum(magnitude @ filters, 1e-3))


def test_filters_are_those_of_the_mel_scale() -> None:
    theirs = mel_filter_bank(513, 40, 0.0, RATE / 2, RATE, norm=None, mel_scale="htk")
    assert numpy.abs(mel_filters(RATE, 1024, 40).numpy() - theirs).max() < 1e-5


def test_mel_distance_is_its_formula() -> None:
    clean, noisy = sounds()
    found = MelDistance(RATE, [256, 1024], [24, 40])(noisy, clean)
    wanted = numpy.mean(
        [
            numpy.mean(
                [
                    numpy.abs(log_mel(noisy[row].double().numpy(), size, bins) - log_mel(clean[row].double().numpy(), size, bins))
                    for row in range(2)
                ]
            )
            for size, bins in ((256, 24), (1024, 40))
        ]
    )  # fmt: skip
    assert abs(float(found) - wanted) < 1e-4 * wanted


def test_mel_distance_hears_nothing_below_minus_60_db_and_learns_of_one_side() -> None:
    clean, _ = sounds()
    clean.requires_grad_()
    silence = torch.zeros(1, 4800, requires_grad=True)
    distance = MelDistance(RATE, [256], [24])
    assert float(distance(silence.detach(), 1e-7 * torch.ones(1, 4800))) == 0.0
    distance(silence.expand(2, -1), clean).backward()
    assert clean.grad is None
    assert silence.grad is not None and bool(silence.grad.isfinite().all())


def test_magnitude_loss_is_its_formula_and_zero_at_the_recording() -> None:
    clean, _ = sounds()
    window = torch.hann_window(1600)
    recorded = stft(clean[:, :4800], window, 400)
    guess = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(1))
    least = math.log(1e-3 * 1600 / 4)
    wanted = (guess.double().clamp(min=least) - recorded.to(torch.complex128).abs().log().clamp(min=least)).abs().mean()
    assert abs(float(magnitude_loss(guess, recorded, fft_size=1600)) - float(wanted)) < 1e-4
    assert float(magnitude_loss(recorded.abs().log(), recorded, fft_size=1600)) < 1e-6


def test_losses_of_the_judges_are_their_formulas() -> None:
    real = [[torch.tensor([2.0, -2.0]), torch.tensor([0.5, 2.0])], [torch.tensor([1.0]), torch.tensor([-1.0])]]
    made = [[torch.tensor([1.0, -2.0]), torch.tensor([0.0, -3.0])], [torch.tensor([3.0]), torch.tensor([0.5])]]
    assert float(judges_loss(real, made)) == ((0.25 + 0.5) + (2.0 + 1.5)) / 2
    assert float(verdict_loss(made)) == ((1.0 + 4.0) / 2 + 0.5) / 2
    assert float(feature_loss(real, made)) == (0.5 / 2.0 + 2.0 / 1.0) / 2
