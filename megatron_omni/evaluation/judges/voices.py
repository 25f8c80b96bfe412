"""Whose voice it is: the GE2E speaker encoder of Resemblyzer 0.1.4 (Wan et al. 2018), enrolled on recordings of known voices.

    windows of 1.6 s, one every 0.77 s -> 40 mel energies every 10 ms -> LSTM(256) x 3, its last state h
    e = relu(W h + b) / |relu(W h + b)|;   a wave's embedding is the mean of its windows', scaled to length 1

A voice is the mean of the embeddings of its recordings; a wave is given to the voice whose cosine is largest. Quiet waves are
raised to -30 dB first, silence at both ends is cut, as where the weights were trained (webrtcvad, which also shortens pauses
inside, is not used).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from megatron_omni.evaluation.judges.packages import PackageFile

WEIGHTS = PackageFile(
    package="Resemblyzer",
    version="0.1.4",
    path="resemblyzer/pretrained.pt",
    sha256="39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
    install="pip install --no-deps Resemblyzer==0.1.4",
)
SAMPLE_RATE, FFT, HOP, MEL_BINS, WIDTH = 16_000, 400, 160, 40, 256
WINDOW_FRAMES, STEP_FRAMES, LEAST_COVERAGE = 160, 77, 0.75
LOUDNESS_DB, SILENCE_DB = -30.0, -40.0
Wave = NDArray[np.float32]
_FILTERS = torch.from_numpy(
    mel_filter_bank(FFT // 2 + 1, MEL_BINS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
).float()


class SpeakerEncoder(nn.Module):
    """Embeddings of voices."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MEL_BINS, WIDTH, 3, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)
        # weights_only: nothing in a pickle is run
        state = torch.load(WEIGHTS.find(), map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({key: value for key, value in state.items() if not key.startswith("similarity")})
        self.eval().requires_grad_(False)

    def forward(self, mels: Tensor) -> Tensor:
        """[windows, frames, 40] -> [windows, 256] of length 1."""
        last = self.lstm(mels)[1][0][-1]
        return nn.functional.normalize(self.linear(last).relu(), dim=-1)

    def embed(self, wave: Wave) -> NDArray[np.float32]:
        """[256] of a wave at 16 kHz. ValueError for silence."""
        mels = _mel_energies(torch.from_numpy(_prepared(wave)))
        frames = len(mels)
        steps = range(0, max(1, frames - WINDOW_FRAMES + STEP_FRAMES + 1), STEP_FRAMES)
        starts = [s for s in steps if s == 0 or frames - s >= LEAST_COVERAGE * WINDOW_FRAMES]
        padded = nn.functional.pad(mels, (0, 0, 0, WINDOW_FRAMES))
        embedded = self(torch.stack([padded[s : s + WINDOW_FRAMES] for s in starts])).mean(0)
        return nn.functional.normalize(embedded, dim=0).numpy()


class VoiceJudge:
    """Names one of the voices that it has been shown."""

    version = f"ge2e/1 weights={WEIGHTS.sha256[:12]}"

    def __init__(self, recordings: Mapping[str, Sequence[Wave]]) -> None:
        """Natural recordings of each voice, of a second or more; short ones are put in a row by :func:`in_a_row`."""
        if len(recordings) < 2 or not all(recordings.values()):
            raise ValueError("the judge of voices names one of several: give recordings of two voices or more")
        self._encoder, self.names = SpeakerEncoder(), list(recordings)
        self._known = np.stack([self._mean(waves) for waves in recordings.values()])

    def _mean(self, waves: Sequence[Wave]) -> NDArray[np.float32]:
        total = np.sum([self._encoder.embed(wave) for wave in waves], axis=0)
        return total / np.linalg.norm(total)

    def cosines(self, wave: Wave) -> NDArray[np.float32]:
        """To each voice of :attr:`names`."""
        return self._known @ self._encoder.embed(wave)

    def name(self, wave: Wave) -> str | None:
        """The nearest voice; None for silence."""
        try:
            return self.names[int(self.cosines(wave).argmax())]
        except Silence:
            return None


class Silence(ValueError):
    """There is no voice in a wave."""


def in_a_row(words: Sequence[Wave], at_once: int = 4) -> list[Wave]:
    """Recordings of ``at_once`` words each: a voice is told from two seconds better than from half of one."""
    return [np.concatenate(words[first : first + at_once]) for first in range(0, len(words), at_once)]


def _prepared(wave: Wave) -> Wave:
    """Without silence at the ends, at -30 dB or louder."""
    wave = np.asarray(wave, np.float32)
    if not np.isfinite(wave).all():
        raise ValueError("a wave has samples that are no numbers")
    blocks = wave[: len(wave) // HOP * HOP].reshape(-1, HOP)
    power = (blocks.astype(np.float64) ** 2).mean(1)
    if not len(power) or power.max() < 1e-8:
        raise Silence("a wave is silent: no voice can be named")
    loud = np.flatnonzero(power > power.max() * 10 ** (SILENCE_DB / 10))
    wave = wave[loud[0] * HOP : (loud[-1] + 1) * HOP]
    level_db = 10 * np.log10(np.mean(wave.astype(np.float64) ** 2))
    return (wave * 10 ** (max(0.0, LOUDNESS_DB - level_db) / 20)).astype(np.float32)


def _mel_energies(wave: Tensor) -> Tensor:
    """[frames, 40]: power, not its logarithm."""
    spectrum = torch.stft(
        wave, FFT, HOP, window=torch.hann_window(FFT), center=True, pad_mode="constant", return_complex=True
    )
    return (spectrum.abs() ** 2).T @ _FILTERS
