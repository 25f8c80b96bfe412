"""Recordings for a codec, of the quickstart's voices:

    python -m examples.speak.codec_data --out runs/codec/data

    OUT/train.jsonl        10 voices; of each, recordings of 56 words and ten digits in random order with pauses
    OUT/new_voices.jsonl   the 3 voices that are not trained on, the same 56 words
    OUT/new_words.jsonl    the 10 voices, the 8 words that are not trained on
    OUT/media/             FLAC, 16 kHz

A record is an ordinary one with one sound. The same files for the same seed.
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
RECORDINGS = 6
"""Of a voice in training."""
PAUSE_SECONDS = (0.05, 0.3)


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
    for name, voices in sets.items():
        rng = np.random.default_rng([seed, len(name)])
        files = [
            (f"media/{name}_{voice}_{number}.flac", joined(rng, words))
            for voice, words in voices.items()
            for number in range(RECORDINGS if name == "train" else 1)
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


if __name__ == "__main__":
    main()
