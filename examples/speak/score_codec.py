"""How well a codec's sound is understood, beside the natural recordings it was made of:

    python -m examples.speak.score_codec --codec DIR --out scores.json [--clips 67]

Clips are three different words of one voice with pauses; columns are the five voices of `make speak` saying words that the codec
was trained on (``seen``), the three voices that it was not trained on saying these words (``new_voices``), and the ten voices
that it was saying the eight words that it was not (``new_words``). 67 clips a column are 201 words. WER is over a closed
vocabulary, the quickstart's 64 words, at most three; ``voice`` is the share of clips of ``seen`` in which the judge of voices names
the voice that spoke (chance 0.2). The file holds the hashes of judges, codec and clips; natural
scores of the same judges and clips that it has already are kept.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from numpy.typing import NDArray

from examples.quickstart.assets import SAMPLE_RATE, Assets, load_assets
from examples.speak.codec_data import NEW_WORDS, PAUSE_SECONDS
from megatron_omni.evaluation.judges.voices import VoiceJudge, in_a_row
from megatron_omni.evaluation.judges.words import WordJudge
from megatron_omni.models.generators.codec import load_codec
from megatron_omni.scoring.voice import log_mel_distance

Wave = NDArray[np.float32]
VOICES = ("espeak_us", "espeak_us_f3", "flite_slt", "flite_rms", "flite_awb")
COLUMNS = ("seen", "new_voices", "new_words")
ENROLLED_WORDS = 32


@dataclass(frozen=True)
class Clip:
    """Three words of one voice."""

    voice: str
    words: tuple[str, ...]
    wave: Wave


def draw_clips(assets: Assets, column: str, count: int, *, seed: int = 0) -> list[Clip]:
    """``count`` clips of a column, the same for the same seed."""
    rng = np.random.default_rng([seed, COLUMNS.index(column)])
    voices = {"seen": VOICES, "new_voices": assets.held_out_voices, "new_words": assets.train_voices}[column]
    words = [word for word in range(len(assets.english)) if (word in NEW_WORDS) == (column == "new_words")]
    clips = []
    for _ in range(count):
        voice = voices[int(rng.integers(len(voices)))]
        chosen = [words[int(i)] for i in rng.choice(len(words), 3, replace=False)]
        pauses = [np.zeros(int(rng.uniform(*PAUSE_SECONDS) * SAMPLE_RATE), np.float32) for _ in range(4)]
        parts = [part for pause, word in zip(pauses, chosen) for part in (pause, assets.words[voice][word])]
        clips.append(Clip(voice, tuple(assets.english[word] for word in chosen), np.concatenate([*parts, pauses[3]])))
    return clips


def score(
    make: Callable[[Wave], Wave],
    clips: dict[str, list[Clip]],
    words: WordJudge,
    voices: VoiceJudge,
    vocabulary: Sequence[str],
) -> dict[str, Any]:
    """WER of each column, the share of voices named right, and the log-mel distance to the recordings."""
    scores: dict[str, Any] = {}
    for column, members in clips.items():
        made = [make(clip.wave) for clip in members]
        heard = words.choose(made, vocabulary, at_most=3)
        scores[column] = {
            "wer": jiwer.wer([" ".join(clip.words) for clip in members], [" ".join(said) for said in heard]),
            "words": 3 * len(members),
            "log_mel": float(np.mean([log_mel_distance(c.wave, w, SAMPLE_RATE) for c, w in zip(members, made)])),
        }
        if column == "seen":
            scores["voice"] = float(np.mean([voices.name(wave) == clip.voice for clip, wave in zip(members, made)]))
    return scores


def codec_round(folder: Path) -> tuple[Callable[[Wave], Wave], str]:
    """What a codec makes of a wave, and its fingerprint."""
    codec = load_codec(folder)

    def make(wave: Wave) -> Wave:
        return codec.decode(codec.encode(torch.from_numpy(wave)[None]))[0, : len(wave)].numpy()

    return make, codec.fingerprint


def main() -> None:
    """Score both and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=67, help="of each column")
    options = parser.parse_args()
    assets = load_assets()
    clips = {column: draw_clips(assets, column, options.clips) for column in COLUMNS}
    words = WordJudge()
    voices = VoiceJudge({voice: in_a_row(assets.words[voice][:ENROLLED_WORDS]) for voice in VOICES})
    make, fingerprint = codec_round(options.codec)
    digest = hashlib.sha256(b"".join(clip.wave.tobytes() for members in clips.values() for clip in members))
    facts = {
        "judges": {"words": words.version, "voices": voices.version},
        "clips_sha256": digest.hexdigest(),
    }
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    if all(known.get(name) == value for name, value in facts.items()):
        natural = known["natural"]
    else:
        natural = score(lambda wave: wave, clips, words, voices, assets.english)
    made = score(make, clips, words, voices, assets.english)
    result = {**facts, "codec_fingerprint": fingerprint, "natural": natural, "codec": made}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
