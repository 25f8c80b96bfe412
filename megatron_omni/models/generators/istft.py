"""Inverse short-time Fourier transform with "same" padding: n frames, n * hop samples.

    x = (sum_t  w irfft(S_t) shifted by t hop) / (sum_t  w^2 shifted by t hop),  without (N - hop) / 2 samples at each end

N the window and FFT size, w periodic Hann. :func:`stft` is the transform that it inverts: (N - hop) / 2 zeros at both ends, no
centring. ``torch.istft`` refuses this: its check of the window's sum counts the samples that are cut off here.
"""

import torch
from torch import Tensor
from torch.nn.functional import fold, pad


def stft(wave: Tensor, window: Tensor, hop_size: int) -> Tensor:
    """[B, n hop] to complex [B, n, N / 2 + 1]."""
    size = window.shape[0]
    beside = (size - hop_size) // 2
    frames = pad(wave, (beside, beside)).unfold(1, size, hop_size)
    return torch.fft.rfft(frames * window)


def istft(spectrum: Tensor, window: Tensor, hop_size: int) -> Tensor:
    """Complex [B, n, N / 2 + 1] to [B, n hop]."""
    size, count = window.shape[0], spectrum.shape[1]
    frames = torch.fft.irfft(spectrum, n=size) * window
    envelope = _overlap_add(window.square().expand(1, count, size), hop_size)
    wave = _overlap_add(frames, hop_size)
    beside = (size - hop_size) // 2
    inside = slice(beside, beside + count * hop_size)
    return wave[:, inside] / envelope[:, inside]


def _overlap_add(frames: Tensor, hop_size: int) -> Tensor:
    """[B, n, N] to [B, (n - 1) hop + N]."""
    count, size = frames.shape[1], frames.shape[2]
    length = (count - 1) * hop_size + size
    added = fold(frames.transpose(1, 2), output_size=(1, length), kernel_size=(1, size), stride=(1, hop_size))
    return added[:, 0, 0]
