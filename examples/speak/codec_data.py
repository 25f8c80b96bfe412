"""Recordings for a codec, of the quickstart's voices:

    python -m examples.speak.codec_data --out runs/codec/data

    OUT/train.jsonl        10 voices; of each, recordings of 56 words and ten digits in random order with pauses
    OUT/spliced.jsonl      the same recordings cut into pieces shorter than a word, which are joined at random and filtered
    OUT/new_voices.jsonl   the 3 voices that are not trained on, the same 56 words
    OUT/new_words.jsonl    the 10 voices, the 8 words that are not trained on
    OUT/media/             FLAC, 16 kHz

A record is an ordinary one with one sound. The same files for the same seed. Without spliced sounds a codec learns its 56 words
by heart: it gives them back, and other words as the nearest of them (docs/log.md).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.quickstart.assets import SAMPLE_RATE, Assets, load_assets, load_digits
from examples.quickstart.media import flac_bytes

NEW_WORDS = range(5, 64, 8)
"""Numbers of the words that no codec is trained on; monkey is the first."""
RECORDINGS, SPLICED = 6, 20
"""Of a voice in training."""
PAUSE_SECONDS = (0.05, 0.3)
PIECE_SECONDS = (0.08, 0.3)
FADE_SAMPLES = 128
PIECES = 200
"""Of a spliced recording."""
PAUSE_EVERY = 6
"""Pieces between two pauses of a spliced recording, on average."""
FILTERED_PIECES = 12
"""Pieces in a row that share a filter."""
FILTER_DB = 5.0
"""Standard deviation of a filter's gain at each of its corners."""


def main(arguments: list[str] | None = None) -> None:
    """Write the three sets."""
    parser = argparse.ArgumentParser(description="Recordings for a codec, of the quickstart's voices.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    write(options.out, seed=options.seed)
    print(f"wrote {options.out}")


def write(out: Path, *, seed: int) -> None:
    """See the module."""
    assets, digits = load_assets(), load_digits()
    old = [word for word in range(len(assets.english)) if word not in NEW_WORDS]
    known = {voice: words_of(assets, voice, old) for voice in assets.words}
    sets = {
        "train": {voice: known[voice] + digits[voice] for voice in assets.train_voices},
        "new_voices": {voice: known[voice] for voice in assets.held_out_voices},
        "new_words": {voice: words_of(assets, voice, NEW_WORDS) for voice in assets.train_voices},
    }
    (out / "media").mkdir(parents=True, exist_ok=True)
    sets["spliced"] = sets["train"]
    numbers = {"train": RECORDINGS, "spliced": SPLICED}
    for name, voices in sets.items():
        make = spliced if name == "spliced" else joined
        rng = np.random.default_rng([seed, len(name)])
        files = [
            (f"media/{name}_{voice}_{number}.flac", make(rng, words))
            for voice, words in voices.items()
            for number in range(numbers.get(name, 1))
        ]
        for file, wave in files:
            (out / file).write_bytes(flac_bytes(wave))
        rows = ({"messages": [{"role": "user", "content": "<audio>"}], "audios": [file]} for file, _ in files)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words_of(assets: Assets, voice: str, words: Sequence[int]) -> list[NDArray[np.float32]]:
    """Recordings of ``words`` by ``voice``."""
    return [assets.words[voice][word] for word in words]


def joined(rng: np.random.Generator, words: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """All ``words`` in random order, a pause before each."""
    parts: list[NDArray[np.float32]] = []
    for word in rng.permutation(len(words)):
        parts.append(np.zeros(int(rng.uniform(*PAUSE_SECONDS) * SAMPLE_RATE), dtype=np.float32))
        parts.append(words[word])
    return np.concatenate(parts)


def spliced(rng: np.random.Generator, words: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Pieces of ``words`` from random places, faded into each other: sounds of the voice in an order that no word has."""
    fade = np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)
    out = np.zeros(FADE_SAMPLES, dtype=np.float32)
    for first in range(0, PIECES, FILTERED_PIECES):
        row = np.zeros(FADE_SAMPLES, dtype=np.float32)
        for _ in range(min(FILTERED_PIECES, PIECES - first)):
            word = words[int(rng.integers(len(words)))]
            length = min(int(rng.uniform(*PIECE_SECONDS) * SAMPLE_RATE), len(word))
            start = int(rng.integers(len(word) - length + 1))
            row = faded(row, word[start : start + length], fade)
            if rng.random() < 1 / PAUSE_EVERY:
                row = faded(row, np.zeros(int(rng.uniform(*PAUSE_SECONDS) * SAMPLE_RATE), dtype=np.float32), fade)
        out = faded(out, filtered(rng, row), fade)
    return out


def faded(before: NDArray[np.float32], after: NDArray[np.float32], fade: NDArray[np.float32]) -> NDArray[np.float32]:
    """One sound behind the other; they overlap by the length of ``fade``."""
    both = before[-len(fade) :] * fade[::-1] + after[: len(fade)] * fade
    return np.concatenate([before[: -len(fade)], both, after[len(fade) :]])


def filtered(rng: np.random.Generator, wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """``wave`` by a random smooth filter, as another throat would; its loudness stays."""
    corners = np.linspace(0, len(wave) // 2, 8)
    gain_db = np.interp(np.arange(len(wave) // 2 + 1), corners, rng.normal(0, FILTER_DB, len(corners)))
    made = np.fft.irfft(np.fft.rfft(wave) * 10 ** (gain_db / 20), n=len(wave)).astype(np.float32)
    loudness = float(np.sqrt(np.mean(np.square(wave)) / max(float(np.mean(np.square(made))), 1e-12)))
    return made * np.float32(min(loudness, 0.98 / max(float(np.abs(made).max()), 1e-6)))


if __name__ == "__main__":
    main()
