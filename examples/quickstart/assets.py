"""The committed pictures, words and notes under `assets/`, decoded once into memory.

`make_assets.py` says what the files hold. Waves are float32 in [-1, 1], 16 kHz mono.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

FOLDER = Path(__file__).parent / "assets"
SAMPLE_RATE = 16000
TILE_PX = 64
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Assets:
    """Everything the composer draws from. Concepts are known by their index, 0 to 63."""

    english: list[str]
    chinese: list[str]
    pictures: dict[str, list[Image.Image]]  # style -> 64 RGBA tiles
    words: dict[str, list[np.ndarray]]  # voice -> 64 waves
    train_voices: list[str]
    held_out_voices: list[str]
    notes: dict[str, np.ndarray]  # instrument -> [pitch, velocity, samples]
    train_pitches: list[int]  # indices into the pitch axis
    held_out_pitches: list[int]


@cache
def load_assets() -> Assets:
    """Decode all assets (about a second)."""
    concepts = read_json("concepts.json")
    voices = read_json("voices.json")
    notes = read_json("notes.json")
    pitches, held_out = notes["pitches"], set(notes["held_out_pitches"])
    shape = (len(pitches), len(notes["velocities"]), notes["note_samples"])
    return Assets(
        english=[row["name"] for row in concepts],
        chinese=[row["zh"] for row in concepts],
        pictures={style: read_sheet(style, len(concepts)) for style in ("noto", "twemoji")},
        words={name: read_words(f"voices/{name}.ogg", voice["words"]) for name, voice in voices.items()},
        train_voices=[name for name, voice in voices.items() if not voice["held_out"]],
        held_out_voices=[name for name, voice in voices.items() if voice["held_out"]],
        notes={name: read_wave(f"notes/{name}.ogg").reshape(shape) for name in notes["instruments"]},
        train_pitches=[index for index, pitch in enumerate(pitches) if pitch not in held_out],
        held_out_pitches=[index for index, pitch in enumerate(pitches) if pitch in held_out],
    )


def load_voices() -> list[str]:
    """Names of all voices."""
    return list(read_json("voices.json"))


def load_digits() -> dict[str, list[np.ndarray]]:
    """Zero to nine in every voice."""
    return {name: read_words(f"digits/{name}.ogg", spans) for name, spans in read_json("digits.json").items()}


def read_json(name: str) -> Any:
    """An index file."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def read_sheet(style: str, num_pictures: int) -> list[Image.Image]:
    """Cut a sheet into its tiles, row by row."""
    sheet = Image.open(FOLDER / f"{style}.png").convert("RGBA")
    columns = sheet.width // TILE_PX
    corners = [(index % columns * TILE_PX, index // columns * TILE_PX) for index in range(num_pictures)]
    return [sheet.crop((x, y, x + TILE_PX, y + TILE_PX)) for x, y in corners]


def read_words(path: str, spans: list[list[int]]) -> list[np.ndarray]:
    """Cut a voice's recording into its words."""
    wave = read_wave(path)
    return [wave[start : start + num_samples] for start, num_samples in spans]


def read_wave(name: str) -> np.ndarray:
    """A whole recording."""
    wave, rate = soundfile.read(FOLDER / name, dtype="float32")
    assert rate == SAMPLE_RATE, (name, rate)
    return wave
