"""What is spoken in `make speak`: five of the quickstart's voices, their words in a row, styles made by rule.

An utterance is one to three words of the quickstart, each filled up with silence to whole codes and followed by 2 to 4
codes of pause, so that a word mostly has the same codes wherever it stands. A style changes a recording by rule (PyAV's
filters): pitch by playing it faster and stretching it back, rate by stretching (WSOLA), loudness by a factor. Waves are
float32 in [-1, 1], mono; they are 16 kHz here and are resampled for the codec.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from examples.quickstart.assets import SAMPLE_RATE, load_assets, read_json, read_wave
from examples.quickstart.compose import is_held_out
from megatron_omni.scoring.voice import at_rate

ASSETS = Path(__file__).parent / "assets"
CODEC = ASSETS / "codec"
VOICES = ("espeak_us", "espeak_us_f3", "flite_slt", "flite_rms", "flite_awb")
"""Names are one token each in the quickstart's tokenizer."""
SINGLE = "flite_slt"
"""The voice of the first stage."""
CONTINUED = ("flite_slt", "flite_rms", "espeak_us_f3")
"""Voices of the three continuations."""
ANY = "any"
"""A name that stands for any voice: the sound before decides."""
ENROLLED = range(32)
"""Words of a voice that the judge of voices is shown."""
PROMPT_WORDS = ("language", "English", "speaker", "flite", "espeak")
"""What a model would say that reads its prompt aloud."""
QUESTIONS = {"image": "what is it", "word": "which word is it", "sound": "which instrument is it"}
DECOYS = (
    "table", "window", "river", "garden", "pencil", "bottle", "mirror", "button", "pocket", "ladder", "bridge",
    "market", "doctor", "winter", "summer", "coffee", "sugar", "butter", "dinner", "kitchen", "carpet", "blanket",
    "pillow", "jacket", "trouser", "finger", "shoulder", "hospital", "village", "station", "captain", "soldier",
    "teacher", "sister", "brother", "uncle", "engine", "wagon", "anchor", "harbor", "island", "desert", "valley",
    "forest", "meadow", "thunder", "lightning", "shadow", "copper", "silver", "marble", "granite", "needle", "thread",
    "basket", "barrel", "ticket", "letter", "number", "paper", "circle", "square", "yellow", "purple",
)  # fmt: skip
"""Words that nobody says: what the judge could hear wrongly beside the words of the prompt."""

NATURAL_GAIN = 0.67
PITCH = {"low": 0.84, "normal": 1.0, "high": 1.19}
RATE = {"slow": 0.77, "normal": 1.0, "fast": 1.3}
LOUDNESS = {"quiet": 0.45, "normal": NATURAL_GAIN, "loud": 1.0}
STEPS = {"pitch": np.log2(1.19), "rate": np.log2(1.3), "loudness": 20 * np.log10(1 / NATURAL_GAIN)}
"""From one class to the next: octaves, octaves of the words a second, dB."""
PAUSES = (2, 4)
"""Codes behind a word, from and to."""


@dataclass(frozen=True)
class Style:
    """How something is said."""

    pitch: str = "normal"
    rate: str = "normal"
    loudness: str = "normal"


NORMAL = Style()
STYLES = tuple(Style(p, r, v) for p in PITCH for r in RATE for v in LOUDNESS)


@dataclass(frozen=True)
class Said:
    """An utterance: words by their number, a voice and a style."""

    words: tuple[int, ...]
    voice: str
    style: Style = NORMAL

    @property
    def text(self) -> str:
        """As it is written: the end of a sentence is a full stop."""
        return " ".join(load_assets().english[word] for word in self.words) + "."


def draw_words(rng: np.random.Generator, count: int, *, held_out: bool) -> tuple[int, ...]:
    """Different words; their neighbours are pairs that the quickstart holds out, or none of them is."""
    while True:
        words = tuple(int(word) for word in rng.choice(64, size=count, replace=False))
        if all(is_held_out(a, b) == held_out for a, b in pairwise(words)):
            return words


def wave_of(said: Said, rng: np.random.Generator, *, rate: int, hop: int) -> np.ndarray:
    """The sound at ``rate``: whole codes of ``hop`` samples, the first one silent."""
    parts = [np.zeros(hop, np.float32)]
    gain = np.float32(LOUDNESS[said.style.loudness])
    for word in said.words:
        wave = recorded(said.voice, word, said.style.pitch, said.style.rate, rate)
        filled = -(-len(wave) // hop) + int(rng.integers(PAUSES[0], PAUSES[1] + 1))
        parts.append(np.pad(wave * gain, (0, filled * hop - len(wave))))
    return np.concatenate(parts)


@cache
def recorded(voice: str, word: int, pitch: str, rate_class: str, rate: int) -> np.ndarray:
    """A word of a voice in a style, at ``rate``."""
    wave = load_assets().words[voice][word]
    return at_rate(stretched(wave, PITCH[pitch], RATE[rate_class]), SAMPLE_RATE, rate)


def stretched(wave: np.ndarray, pitch: float, speed: float) -> np.ndarray:
    """The wave at another pitch and speed, both factors."""
    if pitch == 1 and speed == 1:
        return wave
    tempo = speed / pitch
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=SAMPLE_RATE, format="flt", layout="mono")
    chain = [
        source,
        graph.add("asetrate", str(round(SAMPLE_RATE * pitch))),
        graph.add("aresample", str(SAMPLE_RATE)),
        graph.add("atempo", f"{tempo:.6f}"),
        graph.add("aformat", "sample_fmts=flt"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*chain).configure()
    # half a window of silence behind, which the stretching swallows
    frame = av.AudioFrame.from_ndarray(np.pad(wave, (0, 1600))[None].astype(np.float32), format="flt", layout="mono")
    frame.sample_rate = SAMPLE_RATE
    graph.push(frame)
    graph.push(None)
    parts = []
    while True:
        try:
            parts.append(graph.pull().to_ndarray()[0])
        except (av.BlockingIOError, av.EOFError):
            break
    return np.concatenate(parts)[: round(len(wave) / speed)].astype(np.float32)


@cache
def prompt_word(voice: str, number: int) -> np.ndarray:
    """A word of the prompt, 16 kHz."""
    return _cut("prompts", voice, number)


@cache
def question(voice: str, source: str) -> np.ndarray:
    """A spoken question, 16 kHz."""
    return _cut("questions", voice, list(QUESTIONS).index(source))


def _cut(folder: str, voice: str, number: int) -> np.ndarray:
    start, samples = read_json(str(ASSETS / f"{folder}.json"))[voice][number]
    return read_wave(str(ASSETS / f"{folder}/{voice}.ogg"))[start : start + samples]


def style_texts(voice: str, style: Style) -> list[str]:
    """Descriptions of a style of a voice."""
    names = {"pitch": style.pitch, "rate": style.rate, "loudness": style.loudness}
    return [
        "{voice}: {pitch} pitch, {rate} pace, {loudness} volume.".format(voice=voice, **names),
        "{voice} speaks at {rate} pace with {pitch} pitch and {loudness} volume.".format(voice=voice, **names),
        "{loudness} volume, {pitch} pitch, {rate} pace: {voice}.".format(voice=voice, **names),
    ]


def is_held_out_style(voice: str, style: Style) -> bool:
    """The split rule of styles: one in five combinations of voice and style is never described in training."""
    return style != NORMAL and (7 * STYLES.index(style) + 3 * VOICES.index(voice)) % 5 == 0


def trained_styles(voice: str) -> Sequence[Style]:
    """Styles of a voice that are taught."""
    return [style for style in STYLES if not is_held_out_style(voice, style)]
