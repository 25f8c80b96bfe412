"""Compose the corpus of `make speak`: records with codes, the same for the same seed and codec.

    python -m examples.speak.corpus --out DIR [--codec DIR] [--fast] [--seed 0]

    DIR/train/VOICE.jsonl          one to three words, the prompt names the voice
    DIR/train/styled.jsonl         the prompt describes a style of a voice (sounds.style_texts)
    DIR/train/long.jsonl           texts of three pieces, each a record; the codes before it are its prefix. Half of the
                                   prompts name the voice, half name `any`
    DIR/train/anneal.jsonl         a balanced mix of voices, of which the half is kept that the codec gives back best
    DIR/train/*.codes.safetensors  their codes, with the fingerprint of the codec
    DIR/eval/named.jsonl           what is measured: three words whose neighbours are never neighbours in training
    DIR/eval/styled.jsonl          styles of voices that training does not describe
    DIR/eval/long.jsonl            texts of three pieces
    DIR/manifest.json              counts

Every record is drawn from a generator seeded by (seed, set, index). Records of evaluation have words, voice and style as
numbers and names in ``said``, from which sounds.py makes the natural recording.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.quickstart.compose import in_processes
from examples.speak.sounds import (
    ANY,
    CODEC,
    NORMAL,
    SINGLE,
    STYLES,
    VOICES,
    Said,
    Style,
    draw_words,
    is_held_out_style,
    style_texts,
    trained_styles,
    wave_of,
)
from megatron_omni.data.codes import write_codes
from megatron_omni.models.generators.codec import Codec, load_codec
from megatron_omni.scoring.voice import log_mel_distance

SIZES = {
    **{voice: 8000 if voice == SINGLE else 4000 for voice in VOICES},
    "styled": 8000, "long": 2000, "anneal": 3000, "eval/named": 200, "eval/styled": 200, "eval/long": 100,
}  # fmt: skip
FAST_SIZES = {
    **{voice: 24 for voice in VOICES},
    "styled": 24, "long": 8, "anneal": 16, "eval/named": 8, "eval/styled": 4, "eval/long": 2,
}  # fmt: skip
"""Of long sets, texts."""
NUM_PIECES = 3
FIRST_ENTROPY = 30
"""Sets the draws apart from those of the quickstart and of `make reason`."""
CHUNK = 50
WORD_COUNTS = (1, 2, 3, 3)
"""Of training, each as likely as the others."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive draws: the unit of work of a process."""

    codec: str
    seed: int
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Recording:
    """Codes, and the records that are pieces of it."""

    codes: list[int]
    rows: list[dict[str, Any]]
    quality: float = 0.0
    """Log-mel distance between sound and what the codec makes of it; lower is better."""


def compose_chunk(chunk: Chunk) -> list[Recording]:
    """The recordings of a chunk; of evaluation without codes."""
    torch.set_num_threads(1)
    codec = load_codec(Path(chunk.codec))
    made = []
    for index in range(chunk.start, chunk.stop):
        rng = np.random.default_rng([FIRST_ENTROPY, chunk.seed, list(SIZES).index(chunk.name), index])
        made.append(_MAKERS.get(chunk.name, _named)(codec, rng, chunk.name, index))
    return made


def _named(codec: Codec, rng: np.random.Generator, name: str, index: int) -> Recording:
    said = Said(draw_words(rng, int(rng.choice(WORD_COUNTS)), held_out=False), name)
    return _recording(codec, rng, [said], {"speaker": name}, name, index)


def _anneal(codec: Codec, rng: np.random.Generator, name: str, index: int) -> Recording:
    voice = VOICES[index % len(VOICES)]
    said = Said(draw_words(rng, 3, held_out=False), voice)
    return _recording(codec, rng, [said], {"speaker": voice}, name, index, judged=True)


def _styled(codec: Codec, rng: np.random.Generator, name: str, index: int) -> Recording:
    voice = VOICES[index % len(VOICES)]
    styles = trained_styles(voice)
    style = styles[int(rng.integers(len(styles)))]
    said = Said(draw_words(rng, int(rng.choice(WORD_COUNTS)), held_out=False), voice, style)
    texts = style_texts(voice, style)
    return _recording(codec, rng, [said], {"style": texts[int(rng.integers(len(texts)))]}, name, index)


def _long(codec: Codec, rng: np.random.Generator, name: str, index: int) -> Recording:
    voice = VOICES[index % len(VOICES)]
    said = [Said(draw_words(rng, 3, held_out=False), voice) for _ in range(NUM_PIECES)]
    return _recording(codec, rng, said, {"speaker": voice if rng.random() < 0.5 else ANY}, name, index)


def _asked(codec: Codec, rng: np.random.Generator, name: str, index: int) -> Recording:
    """What is asked in evaluation: no codes."""
    voice = VOICES[index % len(VOICES)]
    styles = [style for style in STYLES if is_held_out_style(voice, style)]
    style = styles[int(rng.integers(len(styles)))] if name == "eval/styled" else NORMAL
    pieces = NUM_PIECES if name == "eval/long" else 1
    said = [Said(draw_words(rng, 3, held_out=True), voice, style) for _ in range(pieces)]
    speech = {"style": style_texts(voice, style)[index % 3]} if style != NORMAL else {"speaker": voice}
    text = " ".join(one.text for one in said)
    return Recording([], [row_of(text, speech, f"{name}.{index:05d}") | {"said": [asdict(one) for one in said]}])


_MAKERS = {
    "styled": _styled, "long": _long, "anneal": _anneal, "eval/named": _asked, "eval/styled": _asked, "eval/long": _asked,
}  # fmt: skip


def _recording(
    codec: Codec,
    rng: np.random.Generator,
    said: Sequence[Said],
    speech: dict[str, str],
    name: str,
    index: int,
    *,
    judged: bool = False,
) -> Recording:
    """Pieces one behind the other, as one sound."""
    waves = [wave_of(one, rng, rate=codec.sample_rate, hop=codec.hop_size) for one in said]
    wave = torch.from_numpy(np.concatenate(waves)).unsqueeze(0)
    codes = codec.encode(wave)
    ends = np.cumsum([len(one) // codec.hop_size for one in waves]).tolist()
    rows = []
    for number, (one, start, stop) in enumerate(zip(said, [0, *ends], ends)):
        span = {"start": start, "stop": stop} if len(said) > 1 else {}
        rows.append(row_of(one.text, speech | span, f"{name}.{index:05d}.{number}"))
    quality = 0.0
    if judged:
        quality = log_mel_distance(wave[0].numpy(), codec.decode(codes)[0].numpy(), codec.sample_rate)
    return Recording(codes[0].tolist(), rows, quality)


def row_of(text: str, speech: dict[str, Any], name: str) -> dict[str, Any]:
    """A record that is read aloud."""
    answer = {"role": "assistant", "content": text, "speech": {"language": "English"} | speech}
    return {"messages": [{"role": "user", "content": text}, answer], "id": name}


def said_of(row: dict[str, Any]) -> list[Said]:
    """What a record of evaluation says, piece by piece."""
    return [Said(tuple(one["words"]), one["voice"], Style(**one["style"])) for one in row["said"]]


def compose(out: Path, *, codec: Path, seed: int, sizes: dict[str, int], processes: int) -> dict[str, int]:
    """Write all sets under ``out``; how many records each has."""
    chunks = [
        Chunk(str(codec), seed, name, start, stop)
        for name, size in sizes.items()
        for start, stop in pairwise([*range(0, size, CHUNK), size])
    ]
    recordings: dict[str, list[Recording]] = {name: [] for name in sizes}
    for chunk, made in zip(chunks, in_processes(compose_chunk, chunks, processes)):
        recordings[chunk.name] += made
    loaded = load_codec(codec)
    facts = {
        "fingerprint": loaded.fingerprint,
        "num_codes": loaded.config.num_codes,
        "codes_per_second": loaded.codes_per_second,
    }
    if "anneal" in recordings:
        best = sorted(recordings["anneal"], key=lambda one: one.quality)
        recordings["anneal"] = best[: len(best) // 2]
    counts = {}
    for name, made in recordings.items():
        folder, _, stem = name.rpartition("/")
        path = out / (folder or "train") / f"{stem}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            row for number, one in enumerate(made) for row in _with_codes(one, f"{stem}.codes.safetensors#{number}")
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if not folder:
            write_codes(path.with_suffix(".codes.safetensors"), [one.codes for one in made], **facts)
        counts[name] = len(rows)
    (out / "manifest.json").write_text(json.dumps({"seed": seed, **facts, "records": counts}, indent=1) + "\n")
    return counts


def _with_codes(recording: Recording, codes: str) -> list[dict[str, Any]]:
    if recording.codes:
        for row in recording.rows:
            row["messages"][-1]["speech"]["codes"] = codes
    return recording.rows


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--codec", type=Path, default=CODEC, help="folder of the codec")
    parser.add_argument("--fast", action="store_true", help="few records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    sizes = FAST_SIZES if options.fast else SIZES
    counts = compose(options.out, codec=options.codec, seed=options.seed, sizes=sizes, processes=options.processes)
    print(f"{options.out}: {sum(counts.values())} records")


if __name__ == "__main__":
    main()
