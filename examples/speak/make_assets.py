"""Make the recordings in `assets/` that the quickstart does not have: words of the prompts, spoken questions. For maintainers.

Users never run this: its output is committed. It needs `espeak-ng` and `flite`, as the quickstart's make_assets.py, which has
the voices. Run from the repository root:

    python -m examples.speak.make_assets

    prompts/<voice>.ogg     the words of a prompt that names a voice, 16 kHz mono, in the five voices that are taught
    questions/<voice>.ogg   the questions of sounds.QUESTIONS, in the ten voices that the quickstart trains on
    prompts.json, questions.json   per voice: [first sample, samples] of each
"""

import tempfile
from pathlib import Path

import numpy as np

from examples.quickstart.make_assets import SAMPLE_RATE, synthesise, write_json, write_ogg
from examples.quickstart.make_assets import VOICES as SYNTHESISED
from examples.speak.sounds import ASSETS, PROMPT_WORDS, QUESTIONS, VOICES

GAP_SECONDS = 0.05


def write(folder: str, voices: list[str], texts: list[str], scratch: Path) -> None:
    """All texts in every voice, and their index."""
    (ASSETS / folder).mkdir(parents=True, exist_ok=True)
    gap = np.zeros(int(GAP_SECONDS * SAMPLE_RATE), dtype=np.float32)
    spans: dict[str, list[list[int]]] = {}
    for voice in voices:
        tool, name, _ = SYNTHESISED[voice]
        pieces: list[np.ndarray] = []
        spans[voice], start = [], 0
        for text in texts:
            wave = synthesise(tool, name, text, scratch / "text.wav")
            spans[voice].append([start, len(wave)])
            pieces += [wave, gap]
            start += len(wave) + len(gap)
        write_ogg(ASSETS / f"{folder}/{voice}.ogg", np.concatenate(pieces))
    write_json(ASSETS / f"{folder}.json", spans)


def main() -> None:
    """Make everything anew."""
    trained = [name for name, (_, _, held_out) in SYNTHESISED.items() if not held_out]
    with tempfile.TemporaryDirectory() as name:
        write("prompts", list(VOICES), list(PROMPT_WORDS), Path(name))
        write("questions", trained, list(QUESTIONS.values()), Path(name))


if __name__ == "__main__":
    main()
