"""The judges on natural recordings of the quickstart: they hear what was said, by whom, and planted errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.quickstart.assets import load_assets
from megatron_omni.evaluation.judges.packages import PackageFile
from megatron_omni.evaluation.judges.remembered import Remembered
from megatron_omni.evaluation.judges.voices import VoiceJudge, _mel_energies, in_a_row
from megatron_omni.evaluation.judges.whisper import read_ctranslate2
from megatron_omni.evaluation.judges.words import WordJudge

VOICES = ("espeak_us", "espeak_us_f3", "flite_slt", "flite_rms", "flite_awb")
SAID = (
    ("dog", "piano", "banana"),
    ("tiger", "cloud", "pizza"),
    ("violin", "elephant", "bus"),
    ("guitar", "sun", "lemon"),
)


def say(voice: str, *words: str) -> np.ndarray:
    """Words of a voice with pauses between."""
    assets = load_assets()
    waves = [assets.words[voice][assets.english.index(word)] for word in words]
    return np.concatenate([part for wave in waves for part in (np.zeros(1600, np.float32), wave)])


@pytest.fixture(scope="module")
def words() -> WordJudge:
    return WordJudge(5)


@pytest.fixture(scope="module")
def voices() -> VoiceJudge:
    assets = load_assets()
    return VoiceJudge({name: in_a_row(assets.words[name][:32]) for name in VOICES})


def test_words_are_heard(words: WordJudge) -> None:
    waves = [say(voice, *said) for said, voice in zip(SAID, VOICES)]
    found = words.choose(waves, load_assets().english)
    right = sum(a == b for heard, said in zip(found, SAID) for a, b in zip(heard, said))
    assert right >= 11, found  # of 12
    # what is read does not depend on the clips beside it
    assert words.choose(waves[2:3], load_assets().english) == found[2:3]
    assert "dog" in words.hear(waves[:1])[0].lower()


def test_a_planted_word_is_heard(words: WordJudge) -> None:
    first, second = say("espeak_us", "dog", "piano", "banana"), say("espeak_us", "dog", "trumpet", "banana")
    found = words.choose([first, second], load_assets().english)
    assert found[0] != found[1] and "trumpet" in found[1] and "trumpet" not in found[0]
    # at most so many, and nothing but words of the list
    assert len(words.choose([first], load_assets().english, at_most=2)[0]) == 2
    assert set(words.choose([first], ["violin", "rocket"], at_most=3)[0]) <= {"violin", "rocket"}


def test_silence_has_no_words_and_no_voice(words: WordJudge, voices: VoiceJudge) -> None:
    still = np.zeros(16_000, np.float32)
    assert words.hear([still]) == [""] and words.choose([still, still], ["cat"]) == [(), ()]
    assert voices.name(still) is None


def test_bad_sounds_are_refused(words: WordJudge, voices: VoiceJudge) -> None:
    with pytest.raises(ValueError, match=r"a wave of 6\.0 s; the judge hears 5 s"):
        words.hear([np.zeros(6 * 16_000, np.float32)])
    with pytest.raises(ValueError, match="no numbers"):
        words.hear([np.full(100, np.nan, np.float32)])
    with pytest.raises(ValueError, match="no numbers"):
        voices.name(np.full(16_000, np.nan, np.float32))
    with pytest.raises(ValueError, match="closed vocabulary of 0 words"):
        words.choose([], [])


def test_voices_are_named(voices: VoiceJudge) -> None:
    # words that were not enrolled: the last half of the list
    held_out = [("rose", "clock", "camera"), ("violin", "guitar", "balloon"), ("hammer", "crown", "pizza")]
    named = [voices.name(say(voice, *said)) for voice in VOICES for said in held_out]
    assert sum(found == voice for found, voice in zip(named, np.repeat(VOICES, 3))) >= 14, named  # of 15
    cosines = voices.cosines(say("flite_slt", *held_out[0]))
    assert cosines.shape == (5,) and voices.names[int(cosines.argmax())] == "flite_slt" and cosines.max() <= 1 + 1e-6


def test_quiet_sounds_have_the_same_voice(voices: VoiceJudge) -> None:
    wave = say("flite_awb", "rose", "clock", "camera")
    assert np.allclose(voices.cosines(0.01 * wave), voices.cosines(0.001 * wave), atol=1e-3)


def test_mel_energies_against_the_formula() -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 1600)
    found = _mel_energies(torch.from_numpy(wave).float()).numpy()
    padded, window = np.pad(wave, 200), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.array([np.abs(np.fft.rfft(padded[160 * t : 160 * t + 400] * window)) ** 2 for t in range(len(found))])

    # Slaney: linear to 1 kHz (66.7 Hz a band of the scale), then logarithmic; triangles of equal area
    def to_hz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + np.log(8000 / 1000) * 27 / np.log(6.4)
    edges, hz = to_hz(np.linspace(0, top, 42)), np.linspace(0, 8000, 201)[:, None]
    rising, falling = (hz - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - hz) / np.diff(edges)[1:]
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])
    assert np.allclose(found, power @ filters, rtol=1e-3, atol=1e-7)


def test_files_are_those_of_the_hash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not installed, whose file"):
        PackageFile(package="no-such-package", version="1", path="a", sha256="", install="pip install it").find()
    with pytest.raises(ValueError, match=r"its SHA-256 is .*, not 000"):
        PackageFile(package="numpy", version="1", path="numpy/__init__.py", sha256="0" * 64, install="pip").find()
    other = tmp_path / "model.bin"
    other.write_bytes(b"\x05\0\0\0\x04\0Bert")
    with pytest.raises(ValueError, match="must be version 6 of WhisperSpec"):
        read_ctranslate2(other)
    other.write_bytes(b"\x05")
    with pytest.raises(ValueError, match="ends in the middle"):
        read_ctranslate2(other)


def test_verdicts_are_remembered(tmp_path: Path) -> None:
    asked: list[int] = []

    def judge(waves: Sequence[np.ndarray]) -> list[Any]:
        asked.append(len(waves))
        return [(float(wave.sum()), None) for wave in waves]

    waves = [np.full(4, n, np.float32) for n in (1, 2, 1)]
    path = tmp_path / "folder" / "judged.jsonl"
    known = Remembered(path)
    assert known.ask(judge, waves, "sum") == [[4.0, None], [8.0, None], [4.0, None]] and asked == [2]
    with path.open("a") as file:
        file.write('{"key": "cut o')
    again = Remembered(path)
    assert again.ask(judge, waves[:2], "sum") == [[4.0, None], [8.0, None]] and asked == [2]
    assert again.ask(judge, [waves[0]], "another question") == [[4.0, None]] and asked == [2, 1]
    assert again.ask(judge, [np.full(4, 3, np.float32)], "sum") == [[12.0, None]] and asked == [2, 1, 1]
