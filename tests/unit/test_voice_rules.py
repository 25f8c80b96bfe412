"""Rules of scoring/voice.py on sounds whose pitch, loudness and length are known."""

import numpy as np
import pytest

from megatron_omni.scoring.voice import (
    at_rate,
    f0_hz,
    log_mel_distance,
    mean_interval,
    measure,
    mel_filters,
    real_time_factor,
    style_class,
)

RATE = 16_000


def tone(hz: float, seconds: float = 0.5, level: float = 0.3, harmonics: int = 8) -> np.ndarray:
    """A sound like a voice: harmonics that fall off."""
    at = np.arange(int(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * hz * n * at + n) / n for n in range(1, harmonics + 1))
    return (level * wave / np.abs(wave).max()).astype(np.float32)


@pytest.mark.parametrize("hz", [70.3, 100.0, 141.7, 199.0, 283.1, 390.0])
@pytest.mark.parametrize("harmonics", [1, 8])
def test_pitch_of_a_tone(hz: float, harmonics: int) -> None:
    assert measure(tone(hz, harmonics=harmonics), RATE).pitch_octaves == pytest.approx(np.log2(hz), abs=0.01)


def test_pitch_does_not_depend_on_the_rate() -> None:
    wave = tone(120)
    assert measure(at_rate(wave, RATE, 24_000), 24_000).pitch_octaves == pytest.approx(np.log2(120), abs=0.01)


def test_noise_and_silence_have_no_pitch() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    assert (f0_hz(noise, RATE) > 0).mean() < 0.05
    still = measure(np.zeros(RATE), RATE)
    assert np.isnan(still.pitch_octaves) and still.loudness_db == -np.inf and still.sound_seconds == 0
    assert measure(np.zeros(0), RATE).sound_seconds == 0


def test_loudness_is_that_of_the_sound_and_not_of_the_silence_around() -> None:
    wave = tone(100)
    around = np.concatenate([np.zeros(RATE), wave, np.zeros(RATE)])
    exact = 10 * np.log10(np.mean(wave.astype(float) ** 2))
    assert measure(wave, RATE).loudness_db == pytest.approx(exact, abs=0.05)
    assert measure(around, RATE).loudness_db == pytest.approx(exact, abs=0.6)  # its two ends
    assert measure(0.5 * around, RATE).loudness_db == pytest.approx(measure(around, RATE).loudness_db - 6.02, abs=0.01)


def test_seconds_leave_out_long_pauses_and_keep_short_ones() -> None:
    wave, short, long = tone(100, 0.4), np.zeros(int(0.1 * RATE)), np.zeros(int(0.6 * RATE))
    assert measure(np.concatenate([wave, short, wave]), RATE).sound_seconds == pytest.approx(0.9, abs=0.05)
    assert measure(np.concatenate([long, wave, long, wave]), RATE).sound_seconds == pytest.approx(0.8, abs=0.12)


def test_distance_of_spectra() -> None:
    wave = tone(100)
    assert log_mel_distance(wave, wave, RATE) == 0
    # bands above the floor move by log 2, those at the floor not at all
    assert 0 < log_mel_distance(wave, 2 * wave, RATE) <= np.log(2) + 1e-6
    noise = np.random.default_rng(0).normal(0, 0.1, len(wave))
    assert log_mel_distance(noise, 2 * noise, RATE) == pytest.approx(np.log(2), rel=1e-3)
    assert log_mel_distance(wave, tone(200), RATE) > log_mel_distance(wave, tone(101), RATE) > 0
    with pytest.raises(ValueError, match="without samples"):
        log_mel_distance(wave, wave[:0], RATE)


def test_filters_are_means_of_bins() -> None:
    sums = mel_filters(RATE).sum(0)
    assert np.all(np.isclose(sums, 1) | (sums == 0)) and (sums == 0).sum() <= 12
    filters = mel_filters(RATE)
    peaks = filters.argmax(0)
    assert np.all(np.diff(peaks[sums > 0]) >= 0)


@pytest.mark.parametrize(
    ("value", "found"), [(-0.26, "low"), (-0.24, "normal"), (0.0, "normal"), (0.24, "normal"), (0.26, "high")]
)
def test_style_is_beyond_half_a_step(value: float, found: str) -> None:
    assert style_class(7 + value, 7.0, 0.5) == found
    assert style_class(float("nan"), 7.0, 0.5) is None


def test_numbers_beside_scores() -> None:
    assert real_time_factor(3.0, 12.0) == 0.25
    with pytest.raises(ValueError, match="no real-time factor"):
        real_time_factor(1.0, 0.0)
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(1.96 * np.std([1, 2, 3, 4], ddof=1) / 2)
    with pytest.raises(ValueError, match="no numbers"):
        measure(np.array([0.0, np.nan]), RATE)


def test_resampling_keeps_a_tone() -> None:
    up = at_rate(tone(100, harmonics=3), RATE, 24_000)
    at = np.arange(len(up)) / 24_000
    wave = sum(np.sin(2 * np.pi * 100 * n * at + n) / n for n in range(1, 4))
    exact = 0.3 * wave / np.abs(wave).max()
    middle = slice(2000, -2000)
    assert np.abs(up[middle] - exact[middle]).max() < 2e-3
