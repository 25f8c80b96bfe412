"""What the judges hear in sounds of `make speak`: words out of the 64, words of the prompt, the voice, pitch, rate, loudness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from examples.quickstart.assets import SAMPLE_RATE, load_assets
from examples.speak.sounds import DECOYS, ENROLLED, LOUDNESS, PITCH, PROMPT_WORDS, RATE, STEPS, VOICES, Said, Style
from megatron_omni.evaluation.judges.remembered import Remembered
from megatron_omni.evaluation.judges.voices import VoiceJudge, in_a_row
from megatron_omni.evaluation.judges.words import WordJudge
from megatron_omni.scoring.voice import Measured, at_rate, measure, style_class

SECONDS = 6
"""Longest clip: three words in any style, and the words of a prompt before them."""
MOST_READ = 7
"""Words of a prompt that is read aloud and three more."""
Wave = np.ndarray


class Listener:
    """The judges, and what they said before."""

    def __init__(self, remembered: Path) -> None:
        assets = load_assets()
        self.vocabulary = assets.english
        self.words, self._remembered = WordJudge(SECONDS), Remembered(remembered)
        self.voices = VoiceJudge({name: in_a_row([assets.words[name][word] for word in ENROLLED]) for name in VOICES})

    def heard(self, waves: Sequence[Wave], rate: int, *, at_most: int = 3) -> list[list[str]]:
        """Words of the 64."""
        question = f"{self.words.version} 64 words {at_most}"
        return self._remembered.ask(
            lambda some: self.words.choose(some, self.vocabulary, at_most=at_most), self._clips(waves, rate), question
        )

    def freely(self, waves: Sequence[Wave], rate: int) -> list[str]:
        """Whisper's own text."""
        return self._remembered.ask(self.words.hear, self._clips(waves, rate), f"{self.words.version} free")

    def of_prompt(self, waves: Sequence[Wave], rate: int) -> list[list[str]]:
        """Words of a prompt that are heard, out of these, the 64 and the decoys."""
        words = [*self.vocabulary, *PROMPT_WORDS, *DECOYS]
        found = self._remembered.ask(
            lambda some: self.words.choose(some, words, at_most=MOST_READ),
            self._clips(waves, rate),
            f"{self.words.version} with prompts {MOST_READ}",
        )
        return [[word for word in one if word in PROMPT_WORDS] for one in found]

    def named(self, waves: Sequence[Wave], rate: int) -> list[str | None]:
        """One of the five voices."""
        return self._remembered.ask(
            lambda some: [self.voices.name(wave) for wave in some],
            [at_rate(wave, rate, SAMPLE_RATE) for wave in waves],
            f"{self.voices.version} {' '.join(VOICES)}",
        )

    @staticmethod
    def _clips(waves: Sequence[Wave], rate: int) -> list[Wave]:
        """As long as the judge hears: what comes later was said too much, and is no reason to stop."""
        return [at_rate(wave, rate, SAMPLE_RATE)[: SECONDS * SAMPLE_RATE] for wave in waves]


def errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words that are wrong, missing or too many."""
    found = jiwer.process_words(" ".join(said), " ".join(heard))
    return found.substitutions + found.deletions + found.insertions


def words_of(said: Said) -> list[str]:
    """What is said, word by word."""
    return [load_assets().english[word] for word in said.words]


def heard_style(wave: Wave, natural: Wave, rate: int) -> Style | None:
    """The style of a sound by rule: against the natural recording of the same words, of the voice that was asked for.

    None where it has no pitch.
    """
    found, normal = measure(wave, rate), measure(natural, rate)
    classes = (
        style_class(found.pitch_octaves, normal.pitch_octaves, STEPS["pitch"]),
        style_class(_octaves_faster(found, normal), 0.0, STEPS["rate"]),
        style_class(found.loudness_db, normal.loudness_db, STEPS["loudness"]),
    )
    if None in classes:
        return None
    places = [["low", "normal", "high"].index(str(one)) for one in classes]
    return Style(list(PITCH)[places[0]], list(RATE)[places[1]], list(LOUDNESS)[places[2]])


def _octaves_faster(found: Measured, normal: Measured) -> float:
    if found.sound_seconds <= 0:
        return float("nan")
    return float(np.log2(normal.sound_seconds / found.sound_seconds))


def right_of(found: Style | None, wanted: Style) -> float:
    """Share of pitch, rate and loudness that are as wanted."""
    if found is None:
        return 0.0
    pairs = ((found.pitch, wanted.pitch), (found.rate, wanted.rate), (found.loudness, wanted.loudness))
    return sum(one == other for one, other in pairs) / len(pairs)


def row(said: Said, heard: Sequence[str], named: str | None, **more: Any) -> dict[str, Any]:
    """What is kept of a clip."""
    words = words_of(said)
    return {
        "said": words, "voice": said.voice, "heard": list(heard), "named": named, "errors": errors(words, heard), **more,
    }  # fmt: skip
