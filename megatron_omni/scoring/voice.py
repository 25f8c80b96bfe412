"""What rules say of a sound: pitch, loudness, rate, their classes, and how far two sounds are apart. numpy and scipy alone.

Waves are float [samples] in [-1, 1].

    F0          per frame of 40 ms, every 10 ms: the lag of the largest normalised autocorrelation
                r(l) = sum x_i x_{i+l} / sqrt(sum x_i^2 sum x_{i+l}^2), i over the samples that have a partner, l for 60 to
                400 Hz; a frame is voiced where r > 0.6 and it is at most 30 dB below the loudest. The shortest lag within 0.9
                of the maximum counts, since multiples of the period fit as well.
    pitch       median of log2 F0 of the voiced frames, in octaves
    loudness    20 log10 of the root mean square of the frames with sound (at most 40 dB below the loudest), dB of full scale
    seconds     of the frames with sound, and pauses up to 0.2 s between them
    log-mel     mean |log m_1 - log m_2| over frames and 80 bands, m clipped at 1e-3

A style is one of low, normal, high of each: how far a sound is from a reference (the voice's natural recordings) against a
step, :func:`style_class`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[Any]
FRAME_SECONDS, STEP_SECONDS = 0.04, 0.01
LOWEST_HZ, HIGHEST_HZ = 60.0, 400.0
LEAST_CORRELATION, VOICED_DB, SOUND_DB = 0.6, 30.0, 40.0
LONGEST_PAUSE_SECONDS = 0.2
CLASSES = ("low", "normal", "high")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a sound."""

    pitch_octaves: float
    """Median log2 of F0 in Hz; nan where nothing is voiced."""
    loudness_db: float
    """Of full scale; -inf for silence."""
    sound_seconds: float
    """Without the silence at its ends and without long pauses."""


def measure(wave: Wave, rate: int) -> Measured:
    """All of it. ValueError for samples that are no numbers."""
    if not np.isfinite(wave).all():
        raise ValueError("a sound has samples that are no numbers")
    pitches = f0_hz(wave, rate)
    voiced = pitches[pitches > 0]
    frames = _frames(wave, rate)
    power = (frames**2).mean(1)
    sounding = _sounding(power)
    return Measured(
        pitch_octaves=float(np.median(np.log2(voiced))) if len(voiced) else float("nan"),
        loudness_db=float(10 * np.log10(power[sounding].mean())) if sounding.any() else float("-inf"),
        sound_seconds=_seconds_of(sounding),
    )


def f0_hz(wave: Wave, rate: int) -> NDArray[np.float64]:
    """Per frame; 0 where it is not voiced."""
    frames = _frames(wave, rate)
    power = (frames**2).mean(1)
    shortest, longest = int(rate / HIGHEST_HZ), int(np.ceil(rate / LOWEST_HZ))
    correlations = _correlations(frames - frames.mean(1, keepdims=True), longest)[:, shortest : longest + 1]
    best = correlations.max(1)
    loud = power > max(power.max(initial=0.0) * 10 ** (-VOICED_DB / 10), 1e-10)
    # the first lag that is a peak nearly as high as the highest
    rising = np.diff(correlations, axis=1, prepend=-2.0) >= 0
    falling = np.diff(correlations, axis=1, append=-2.0) <= 0
    peaks = rising & falling & (correlations >= 0.9 * best[:, None])
    lags = peaks.argmax(1)
    exact = shortest + lags + _between(correlations, lags)
    return np.where(loud & (best > LEAST_CORRELATION), rate / exact, 0.0)


def log_mel_distance(first: Wave, second: Wave, rate: int) -> float:
    """Mean absolute difference of log-mel energies; the longer sound is cut to the shorter."""
    size = min(len(first), len(second))
    if not size:
        raise ValueError("a sound without samples has no distance to another")
    filters = mel_filters(rate)
    spectra = [np.log(np.maximum(_magnitudes(wave[:size], rate) @ filters, 1e-3)) for wave in (first, second)]
    return float(np.abs(spectra[0] - spectra[1]).mean())


def style_class(value: float, reference: float, step: float) -> str | None:
    """``low``, ``normal`` or ``high``: beyond half a ``step`` from the reference. None where the value is no number."""
    if not np.isfinite(value):
        return None
    return "low" if value < reference - step / 2 else "high" if value > reference + step / 2 else "normal"


def real_time_factor(seconds: float, sound_seconds: float) -> float:
    """Time that making a sound took by how long it sounds: below 1 it can be played while it is made."""
    if sound_seconds <= 0:
        raise ValueError(f"a sound of {sound_seconds} s has no real-time factor")
    return seconds / sound_seconds


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval, 1.96 standard errors; nan for fewer than two values."""
    found = np.asarray(values, np.float64)
    half = 1.96 * found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else float("nan")
    return float(found.mean()) if len(found) else float("nan"), float(half)


def at_rate(wave: Wave, rate: int, wanted: int) -> NDArray[np.float32]:
    """Resampled (polyphase, Kaiser window)."""
    if rate == wanted:
        return np.asarray(wave, np.float32)
    from scipy.signal import resample_poly  # half a second that those who need no resampling need not wait for

    common = int(np.gcd(rate, wanted))
    return resample_poly(np.asarray(wave, np.float64), wanted // common, rate // common).astype(np.float32)


def mel_filters(rate: int, bands: int = 80, fft: int = 1024) -> NDArray[np.float64]:
    """[fft / 2 + 1, bands]: triangles that are even on the scale 2595 log10(1 + f / 700), each with the sum 1."""
    edges_mel = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), bands + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    hz = np.linspace(0, rate / 2, fft // 2 + 1)[:, None]
    rising = (hz - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - hz) / np.diff(edges)[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    # a band narrower than the distance of two bins may have none
    return triangles / np.maximum(triangles.sum(0), 1e-12)


def _frames(wave: Wave, rate: int) -> NDArray[np.float64]:
    """[frames, samples of a frame], one frame at least."""
    size, step = round(FRAME_SECONDS * rate), round(STEP_SECONDS * rate)
    padded = np.pad(np.asarray(wave, np.float64), (0, max(0, size - len(wave))))
    return np.lib.stride_tricks.sliding_window_view(padded, size)[::step]


def _correlations(frames: NDArray[np.float64], longest: int) -> NDArray[np.float64]:
    """[frames, longest + 1]: normalised autocorrelation by lag."""
    size = frames.shape[1]
    spectrum = np.fft.rfft(frames, 2 * size)
    products = np.fft.irfft(np.abs(spectrum) ** 2)[:, : longest + 1]
    sums = np.cumsum(np.pad(frames**2, ((0, 0), (1, 0))), axis=1)
    lags = np.arange(longest + 1)
    head, tail = sums[:, size - lags], sums[:, -1:] - sums[:, lags]
    return products / np.sqrt(np.maximum(head * tail, 1e-20))


def _between(correlations: NDArray[np.float64], lags: NDArray[np.intp]) -> NDArray[np.float64]:
    """Where between samples the peak lies: the top of the parabola through it and its neighbours."""
    at = np.arange(len(lags))
    inside = np.clip(lags, 1, correlations.shape[1] - 2)
    left, middle, right = (correlations[at, inside + offset] for offset in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(np.abs(bend) > 1e-12, 0.5 * (left - right) / np.where(bend == 0, 1, bend), 0.0)
    return np.where(inside == lags, np.clip(shift, -0.5, 0.5), 0.0)


def _sounding(power: NDArray[np.float64]) -> NDArray[np.bool_]:
    return power > max(float(power.max(initial=0.0)) * 10 ** (-SOUND_DB / 10), 1e-10)


def _seconds_of(sounding: NDArray[np.bool_]) -> float:
    """Of frames with sound and the short pauses between."""
    places = np.flatnonzero(sounding)
    if not len(places):
        return 0.0
    gaps = np.diff(places)
    longest = round(LONGEST_PAUSE_SECONDS / STEP_SECONDS)
    return float((1 + np.where(gaps <= longest, gaps, 1).sum()) * STEP_SECONDS)


def _magnitudes(wave: Wave, rate: int, fft: int = 1024) -> NDArray[np.float64]:
    """[frames, fft / 2 + 1] every quarter of a frame, Hann window, sound padded by half a frame at both ends."""
    padded = np.pad(np.asarray(wave, np.float64), fft // 2)
    padded = np.pad(padded, (0, max(0, fft - len(padded))))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(fft) / fft)
    frames = np.lib.stride_tricks.sliding_window_view(padded, fft)[:: fft // 4]
    return np.abs(np.fft.rfft(frames * window))
