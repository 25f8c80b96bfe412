"""Make the small finished assets in `assets/`: pictures, spoken words and instrument notes. For maintainers.

Users of the quickstart never run this: its output is committed. It needs `npm` (art and names) and the tools
`espeak-ng`, `flite` and `fluidsynth` with the TimGM6mb sound font (Debian packages `espeak-ng flite fluidsynth
timgm6mb-soundfont`). Run from the repository root:

    python -m examples.quickstart.make_assets [--only digits|notes]

It writes few container files, so that a checkout stays tidy:

    concepts.json          64 concepts in a fixed order: English name, Chinese name, code point
    noto.png twemoji.png   one 8 x 8 sheet of 64-px RGBA pictures a style, in that order
    voices/<voice>.ogg     the 64 English names spoken one after another, 16 kHz mono
    voices.json            per voice: tool, whether it is held out, [first sample, samples] of each word
    digits/<voice>.ogg     zero to nine in the same voices, likewise
    digits.json            per voice: [first sample, samples] of each digit
    notes/<instrument>.ogg every pitch at both velocities, each note exactly `note_samples` long
    notes.json             instruments, pitches, held-out pitches, velocities, `note_samples`

Licences of the sources are in `assets/NOTICE`.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from examples.quickstart.assets import DIGITS

ASSETS = Path(__file__).parent / "assets"
SAMPLE_RATE = 16000
TILE_PX, SHEET_COLUMNS = 64, 8
SOUND_FONT = "/usr/share/sounds/sf2/TimGM6mb.sf2"
STYLES = {"noto": "google", "twemoji": "twitter"}

# English name -> code point. The pictures of these exist in both styles; the order is part of the split rule.
CONCEPTS = {
    "cat": "1F408", "dog": "1F415", "horse": "1F40E", "cow": "1F404", "pig": "1F416", "monkey": "1F412",
    "lion": "1F981", "tiger": "1F405", "rabbit": "1F407", "elephant": "1F418", "bear": "1F43B",
    "panda": "1F43C", "frog": "1F438", "duck": "1F986", "chicken": "1F414", "penguin": "1F427",
    "fish": "1F41F", "whale": "1F40B", "snail": "1F40C", "snake": "1F40D", "bus": "1F68C", "taxi": "1F695",
    "train": "1F686", "rocket": "1F680", "bicycle": "1F6B2", "ship": "1F6A2", "airplane": "2708",
    "tractor": "1F69C", "house": "1F3E0", "church": "26EA", "mountain": "26F0", "sun": "2600",
    "cloud": "2601", "rainbow": "1F308", "umbrella": "2602", "star": "2B50", "banana": "1F34C",
    "lemon": "1F34B", "pineapple": "1F34D", "cherries": "1F352", "tomato": "1F345", "carrot": "1F955",
    "pizza": "1F355", "hamburger": "1F354", "cookie": "1F36A", "bread": "1F35E", "egg": "1F95A",
    "cheese": "1F9C0", "guitar": "1F3B8", "violin": "1F3BB", "trumpet": "1F3BA", "drum": "1F941",
    "piano": "1F3B9", "key": "1F511", "bell": "1F514", "candle": "1F56F", "hammer": "1F528",
    "book": "1F4D6", "scissors": "2702", "crown": "1F451", "camera": "1F4F7", "clock": "1F570",
    "balloon": "1F388", "rose": "1F339",
}  # fmt: skip
# Where emojibase describes the picture, the common noun instead.
CHINESE = {"cow": "牛", "book": "书", "clock": "钟", "piano": "钢琴"}

# voice -> (tool, its voice name, held out). Held-out voices speak only in the harder evaluation sets.
VOICES = {
    "espeak_us": ("espeak-ng", "en-us", False), "espeak_gb": ("espeak-ng", "en-gb", False),
    "espeak_scotland": ("espeak-ng", "en-gb-scotland", False), "espeak_us_f3": ("espeak-ng", "en-us+f3", False),
    "espeak_midlands_f2": ("espeak-ng", "en-gb-x-gbcwmd+f2", False), "espeak_us_m3": ("espeak-ng", "en-us+m3", False),
    "flite_slt": ("flite", "slt", False), "flite_rms": ("flite", "rms", False),
    "flite_awb": ("flite", "awb", False), "flite_kal": ("flite", "kal", False),
    "espeak_us_f5": ("espeak-ng", "en-us+f5", True), "espeak_rp_m1": ("espeak-ng", "en-gb-x-rp+m1", True),
    "flite_kal16": ("flite", "kal16", True),
}  # fmt: skip

# instrument -> General MIDI program, counted from 0.
INSTRUMENTS = {
    "piano": 0, "xylophone": 13, "organ": 19, "accordion": 21, "harmonica": 22, "guitar": 24, "violin": 40,
    "harp": 46, "timpani": 47, "choir": 52, "trumpet": 56, "tuba": 58, "saxophone": 65, "clarinet": 71,
    "flute": 73, "sitar": 104, "banjo": 105, "bagpipe": 109,
}  # fmt: skip
PITCHES = list(
    range(48, 85)
)  # one more than the last that is held out: those lie between trained ones, none beyond them
VELOCITIES = [70, 110]
NOTE_SECONDS = 0.75
NOTE_SPACING_SECONDS = 2  # in the MIDI file: long enough for the previous note's release to die away


def npm_package(name: str, version: str, into: Path) -> Path:
    """Fetch and unpack one npm package; returns its folder. Nothing of it is run."""
    folder = into / name
    folder.mkdir()
    subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def write_concepts(emojibase: Path) -> None:
    """`concepts.json` with the Chinese names of emojibase."""
    rows = json.loads((emojibase / "zh/data.json").read_text(encoding="utf-8"))
    chinese = {row["hexcode"].replace("-FE0F", ""): row["label"] for row in rows}
    concepts = [
        {"name": name, "zh": CHINESE.get(name) or chinese[code], "hexcode": code} for name, code in CONCEPTS.items()
    ]
    names = [row["zh"] for row in concepts]
    assert len(set(names)) == len(names) == SHEET_COLUMNS**2, "two concepts share a Chinese name"
    write_json(ASSETS / "concepts.json", concepts)


def write_sheet(style: str, package: Path) -> None:
    """One sprite sheet, concepts row by row."""
    folder = package / "img" / STYLES[style] / str(TILE_PX)
    files = {path.stem.lower().replace("-fe0f", ""): path for path in sorted(folder.glob("*.png"))}
    sheet = Image.new("RGBA", (SHEET_COLUMNS * TILE_PX, len(CONCEPTS) // SHEET_COLUMNS * TILE_PX))
    for index, code in enumerate(CONCEPTS.values()):
        row, column = divmod(index, SHEET_COLUMNS)
        picture = Image.open(files[code.lower()]).convert("RGBA")
        assert picture.size == (TILE_PX, TILE_PX), (style, code, picture.size)
        sheet.paste(picture, (column * TILE_PX, row * TILE_PX))
    sheet.save(ASSETS / f"{style}.png", optimize=True)


def synthesise(tool: str, voice: str, text: str, out: Path) -> np.ndarray:
    """One spoken word as float32 16 kHz mono, silence trimmed, peak 0.7."""
    if tool == "espeak-ng":
        command = [tool, "-v", voice, "-s", "150", "-w", str(out), text]
    else:
        command = [tool, "-voice", voice, "-t", text, "-o", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wave, rate = soundfile.read(out, dtype="float32")
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = resample(wave[loud[0] : loud[-1] + 1], rate)
    fade = np.linspace(0, 1, 80, dtype=np.float32)  # 5 ms, so that the cuts do not click
    wave[:80] *= fade
    wave[-80:] *= fade[::-1]
    return wave * (0.7 / np.abs(wave).max())


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """Band-limited resampling to 16 kHz by cutting or padding the spectrum."""
    num_out = round(len(wave) * SAMPLE_RATE / rate)
    spectrum = np.fft.rfft(wave)
    kept = np.zeros(num_out // 2 + 1, dtype=spectrum.dtype)
    num_bins = min(len(kept), len(spectrum))
    kept[:num_bins] = spectrum[:num_bins]
    return (np.fft.irfft(kept, num_out) * (num_out / len(wave))).astype(np.float32)


def write_words(folder: str, words: Iterable[str], scratch: Path) -> dict[str, list[list[int]]]:
    """One OGG a voice under `folder`, its words one after another; voice -> [first sample, samples] of each."""
    (ASSETS / folder).mkdir(exist_ok=True)
    spans_of: dict[str, list[list[int]]] = {}
    gap = np.zeros(SAMPLE_RATE // 20, dtype=np.float32)  # keeps one word's coding from bleeding into the next
    for name, (tool, voice, _) in VOICES.items():
        pieces: list[np.ndarray] = []
        spans = spans_of[name] = []
        start = 0
        for word in words:
            wave = synthesise(tool, voice, word, scratch / "word.wav")
            spans.append([start, len(wave)])
            pieces += [wave, gap]
            start += len(wave) + len(gap)
        write_ogg(ASSETS / f"{folder}/{name}.ogg", np.concatenate(pieces))
    return spans_of


def write_voices(scratch: Path) -> None:
    """The concepts' names in every voice and their index."""
    spans_of = write_words("voices", CONCEPTS, scratch)
    index = {
        name: {"tool": tool, "voice": voice, "held_out": held_out, "words": spans_of[name]}
        for name, (tool, voice, held_out) in VOICES.items()
    }
    write_json(ASSETS / "voices.json", index)


def write_digits(scratch: Path) -> None:
    """Ten digits in every voice and their index. No source of the quickstart uses them yet; its tokenizer has them."""
    write_json(ASSETS / "digits.json", write_words("digits", DIGITS, scratch))


def midi_file(program: int) -> bytes:
    """A format-0 MIDI file that plays every pitch at every velocity, one note each `NOTE_SPACING_SECONDS`."""
    ticks_a_second = 960  # 480 ticks a quarter note at MIDI's default of 120 quarter notes a minute
    hold = int(NOTE_SECONDS * 0.85 * ticks_a_second)
    rest = NOTE_SPACING_SECONDS * ticks_a_second - hold
    events = bytes([0, 0xC0, program])
    for first, (pitch, velocity) in enumerate((p, v) for p in PITCHES for v in VELOCITIES):
        events += variable_length(rest if first else 0) + bytes([0x90, pitch, velocity])
        events += variable_length(hold) + bytes([0x80, pitch, 0])
    events += variable_length(rest) + b"\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480) + b"MTrk" + struct.pack(">I", len(events)) + events


def variable_length(value: int) -> bytes:
    """MIDI's variable-length quantity: 7 bits a byte, high bit set on all but the last."""
    out = [value & 0x7F]
    while value := value >> 7:
        out.append((value & 0x7F) | 0x80)
    return bytes(reversed(out))


def write_notes(scratch: Path) -> None:
    """One OGG an instrument, notes of equal length back to back in the order pitch, velocity."""
    (ASSETS / "notes").mkdir(exist_ok=True)
    note_samples = int(NOTE_SECONDS * SAMPLE_RATE)
    for name, program in INSTRUMENTS.items():
        midi, wav = scratch / "notes.mid", scratch / "notes.wav"
        midi.write_bytes(midi_file(program))
        command = ["fluidsynth", "-ni", "-q", "-R", "0", "-C", "0", "-r", str(SAMPLE_RATE), "-F", str(wav)]
        subprocess.run([*command, SOUND_FONT, str(midi)], check=True, stdout=subprocess.DEVNULL)
        wave = soundfile.read(wav, dtype="float32")[0].mean(axis=1)
        fade = np.ones(note_samples, dtype=np.float32)
        fade[-800:] = np.linspace(1, 0, 800)
        notes = []
        for index in range(len(PITCHES) * len(VELOCITIES)):
            start = index * NOTE_SPACING_SECONDS * SAMPLE_RATE
            note = wave[start : start + note_samples] * fade
            notes.append(note * (0.7 / max(float(np.abs(note).max()), 1e-3)))
        write_ogg(ASSETS / f"notes/{name}.ogg", np.concatenate(notes))
    index_of = {"instruments": INSTRUMENTS, "pitches": PITCHES, "held_out_pitches": PITCHES[5::6]}
    write_json(ASSETS / "notes.json", {**index_of, "velocities": VELOCITIES, "note_samples": note_samples})


def write_ogg(path: Path, wave: np.ndarray) -> None:
    """Ogg Vorbis, about 30 kbit/s; written in pieces since one large write overflows the encoder's stack."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, format="OGG", subtype="VORBIS", compression_level=0.6) as file:
        for start in range(0, len(wave), SAMPLE_RATE):
            file.write(wave[start : start + SAMPLE_RATE])


def write_json(path: Path, value: dict[str, Any] | list[Any]) -> None:
    """One line an entry: short and diffable."""
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        text = "{\n " + ",\n ".join(entries) + "\n}\n"
    else:
        text = "[\n " + ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n]\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Make everything under `assets/` anew, or one part alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("digits", "notes"), help="this part alone")
    only = parser.parse_args().only
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if only != "notes":
            write_digits(scratch)
        if only != "digits":
            write_notes(scratch)
        if only:
            return
        write_concepts(npm_package("emojibase-data", "17.0.0", scratch))
        for style, vendor in STYLES.items():
            write_sheet(style, npm_package(f"emoji-datasource-{vendor}", "16.0.0", scratch))
        write_voices(scratch)


if __name__ == "__main__":
    main()
