"""Questions that are answered aloud, for the loop of `make speak`; media and answers are the quickstart's.

    python -m examples.speak.asked --quickstart runs/quickstart --out DIR [--fast] [--seed 0]

    DIR/train/asked.jsonl, DIR/eval/asked.jsonl

A picture, a word or a note of an instrument is asked about: half of the questions are typed, half are spoken (sounds.QUESTIONS,
in ten voices); which voice is to answer is always typed:

    "<image> what is it?\\nanswer as flite_slt."      "<image> <audio>\\nanswer as flite_slt."
    -> {"content": "cat", "speech": {"speaker": "flite_slt"}}

Answers are of the 64 words, since the speech generator has learned no other. Held-out questions are about held-out media of the
quickstart. Media are named from the folder that both lie in (`runs`, the source's `root`).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from examples.quickstart.assets import load_assets
from examples.quickstart.media import flac_bytes
from examples.speak.sounds import QUESTIONS, VOICES, question

SIZES, FAST_SIZES = {"train": 4000, "eval": 200}, {"train": 200, "eval": 8}
REQUEST = "answer as {voice}."


def compose(quickstart: Path, out: Path, *, seed: int, sizes: dict[str, int]) -> None:
    """Write both sets."""
    assets = load_assets()
    media, root = out / "media", os.path.commonpath([quickstart, out])
    media.mkdir(parents=True, exist_ok=True)
    for source in QUESTIONS:
        for voice in assets.train_voices:
            (media / f"{source}_{voice}.flac").write_bytes(flac_bytes(question(voice, source)))
    for number, (split, suffix) in enumerate((("train", ""), ("eval", ".held_out"))):
        folder = quickstart / "data" / split
        known = {source: _usable(folder / f"{source}{suffix}.jsonl", assets.english) for source in QUESTIONS}
        (out / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(sizes[split]):
            rng = np.random.default_rng([31, seed, number, index])
            row = _row(rng, known, index, os.path.relpath(folder, root), os.path.relpath(media, root))
            lines.append(json.dumps(row) + "\n")
        (out / split / "asked.jsonl").write_text("".join(lines), encoding="utf-8")


def _usable(path: Path, words: list[str]) -> list[dict[str, Any]]:
    """Records that are answered with one of the words."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["messages"][-1]["content"] in words]


def _row(
    rng: np.random.Generator, known: dict[str, list[dict[str, Any]]], index: int, folder: str, media: str
) -> dict[str, Any]:
    """The index decides what it is about and whether it is spoken, so that all kinds are as many."""
    source, spoken = list(QUESTIONS)[index // 2 % len(QUESTIONS)], index % 2 == 1
    row = known[source][int(rng.integers(len(known[source])))]
    voice = VOICES[int(rng.integers(len(VOICES)))]
    typed, answer = (turn["content"] for turn in row["messages"])
    files = {kind: [f"{folder}/{file}" for file in row.get(kind, [])] for kind in ("images", "audios")}
    if spoken:
        voices = load_assets().train_voices
        asking = voices[int(rng.integers(len(voices)))]
        typed = f"{typed.split('>')[0]}> <audio>"
        files["audios"].append(f"{media}/{source}_{asking}.flac")
    turns = [
        {"role": "user", "content": f"{typed}\n{REQUEST.format(voice=voice)}"},
        {"role": "assistant", "content": answer, "speech": {"speaker": voice, "language": "English"}},
    ]
    name = f"{source}.{'spoken' if spoken else 'typed'}.{index:05d}"
    return {"messages": turns, "id": name} | {kind: found for kind, found in files.items() if found}


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quickstart", type=Path, required=True, help="folder of a quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--fast", action="store_true", help="few questions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    compose(options.quickstart, options.out, seed=options.seed, sizes=FAST_SIZES if options.fast else SIZES)


if __name__ == "__main__":
    main()
