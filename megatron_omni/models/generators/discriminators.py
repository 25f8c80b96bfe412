"""Judges of a codec's sound in adversarial training: is this a recording, or was it decoded?

One network a size N of the transform, on the real and imaginary part of the short-time spectrum (hop N / 4), with the magnitude
compressed as |S|^0.3, so that quiet sounds count:

    [B, 2, frames, N / 2 + 1] -> 4 x (conv, leaky ReLU 0.1), each halving the frequencies -> conv -> logits [B, 1, frames, ..]

WavTokenizer has such judges and others on the waveform. They are parameters of the run, not of the codec, and are left
behind when it is exported (checkpoint/codec_folders.py).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal

CHANNELS = 16
KERNEL = (3, 5)
SLOPE = 0.1
COMPRESSION = 0.3
SMALLEST = 1e-5


class SpectrumJudge(nn.Module):
    """One size."""

    window: Tensor

    def __init__(self, fft_size: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        padding = (KERNEL[0] // 2, KERNEL[1] // 2)
        widths = (2, CHANNELS, CHANNELS, CHANNELS, CHANNELS)
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, KERNEL, stride=(1, 2), padding=padding) for before, after in pairwise(widths)
        )
        self.last = nn.Conv2d(CHANNELS, 1, KERNEL, padding=padding)

    def forward(self, wave: Tensor) -> list[Tensor]:
        """What each layer makes of ``wave`` [B, T]; the logits last."""
        spectrum = torch.stft(
            wave, self.fft_size, self.fft_size // 4, window=self.window, pad_mode="reflect", return_complex=True
        )
        parts = torch.stack([spectrum.real, spectrum.imag], dim=1).transpose(2, 3)
        magnitude = (parts.square().sum(1, keepdim=True) + SMALLEST).sqrt()
        found = [parts * magnitude ** (COMPRESSION - 1)]
        for layer in self.layers:
            found.append(nn.functional.leaky_relu(layer(found[-1]), SLOPE))
        return [*found[1:], self.last(found[-1])]


class Discriminators(nn.Module):
    """A judge of each size."""

    def __init__(self, fft_sizes: Sequence[int]) -> None:
        super().__init__()
        self.judges = nn.ModuleList(SpectrumJudge(size) for size in fft_sizes)

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        """Of each judge, what its layers make of ``wave`` [B, T]."""
        return [judge(wave) for judge in self.judges]

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Convolutions N(0, 1 / fan-in), biases 0."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.zero_()
                else:
                    draw_normal(parameter, parameter[0].numel() ** -0.5, generator_for(prefix + name))
