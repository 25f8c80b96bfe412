"""Compose the quickstart's corpus: real media files and JSONL records, the same for the same seed.

    python -m examples.quickstart.compose --out DIR [--fast] [--choice] [--seed N]

    DIR/train/<source>.jsonl            records; their media under DIR/train/media/<source>/
    DIR/eval/<task>.held_out.jsonl      the split that is gated: unseen combinations of seen things
    DIR/eval/<task>.choice.jsonl        with --choice: other samples by the same rules, to choose a recipe by
    DIR/eval/<task>.harder.jsonl        reported only: unseen art style, voices, noise, length
    DIR/manifest.json                   counts, chance level of each task, the split rule
    DIR/tokenizer_corpus.txt            words and phrases to train a small tokenizer on

Sources, each also a task:

    image      one emoji on a gradient, 64 x 64 px         -> "cat"
    image_two  two emoji                                   -> "cat left of dog", "猫在狗上边"
    word       one spoken word                             -> "cat"
    speech     two spoken words                            -> "cat dog"
    sound      one note                                    -> "violin"
    video      4 frames of a moving emoji, a spoken word   -> "cat left said: dog"
    text       a caption to translate or turn round        -> "狗在猫右边", "right of cat"

Every sample is drawn from a generator seeded by (seed, split, source, index), so neither the number of processes
nor the size of the corpus changes a sample.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.quickstart import media
from examples.quickstart.assets import DIGITS, Assets, load_assets

SIZES = {
    "image": 10000, "image_two": 14000, "word": 5000, "speech": 16000, "sound": 11000, "video": 6000, "text": 8000,
}  # fmt: skip
FAST_SHARE = 0.15
EVAL_SIZE = 240
SPLITS = ("train", "held_out", "harder", "choice")
"""The order is part of a sample's seed."""
CHUNK_SAMPLES = 250  # per call to a worker

SPLIT_RULE = (
    "Concepts have indices 0..63. An ordered pair (a, b) is held out when (7919 a + 104729 b) % 5 == 0: "
    "pairs are (left or upper, right or lower) in image_two, (first, second) in speech and text, "
    "(picture, spoken word) in video. sound holds out every 6th pitch; image and word, only new positions, "
    "backgrounds, pauses and loudness. "
    "harder: Twemoji art, 3 unseen voices, noise 6 dB under the note, captions of three objects."
)
CHANCE = {
    "image": 1 / 64, "image_two": 1 / (64 * 63 * 2), "word": 1 / 64, "speech": 1 / (64 * 63), "sound": 1 / 18,
    "video": 1 / (64 * 63 * 4), "text": 1 / (64 * 63),
}  # fmt: skip

ENGLISH_RELATIONS = {"left": "left of", "above": "above", "right": "right of", "below": "below"}
CHINESE_RELATIONS = {"left": "左边", "above": "上边", "right": "右边", "below": "下边"}
OPPOSITE = {"left": "right", "above": "below", "right": "left", "below": "above"}
PROMPTS = {
    "image": ("<image> what is it?", "<image> 这是什么？"),
    "image_two": ("<image> what is in the picture?", "<image> 图里有什么？"),
    "word": ("<audio> which word is it?",),
    "speech": ("<audio> write down the words.",),
    "sound": ("<audio> which instrument is it?",),
    "video": ("<video><audio> what moves where, and what is said?",),
    "to_chinese": "say it in Chinese: {}",
    "to_english": "用英语说：{}",
    "turn_round": "{}. where is {}?",
}


@dataclass(frozen=True)
class Sample:
    """One question with its answer, and the encoded media file it is about."""

    prompt: str
    answer: str
    suffix: str = ""  # of the media file, with the dot; empty for text
    data: bytes = b""


def is_held_out(first: int, second: int) -> bool:
    """The split rule for ordered pairs of concepts: one in five."""
    return (7919 * first + 104729 * second) % 5 == 0


def draw_pair(rng: np.random.Generator, split: str) -> tuple[int, int]:
    """Two different concepts on the split's side of the rule."""
    while True:
        first, second = (int(index) for index in rng.integers(64, size=2))
        if first != second and is_held_out(first, second) == (split != "train"):
            return first, second


def style_of(split: str) -> str:
    """The art style of a split's pictures."""
    return "twemoji" if split == "harder" else "noto"


def draw_voice(assets: Assets, rng: np.random.Generator, split: str) -> str:
    """One of the split's voices."""
    voices = assets.held_out_voices if split == "harder" else assets.train_voices
    return voices[int(rng.integers(len(voices)))]


def english_caption(assets: Assets, first: int, relation: str, second: int) -> str:
    """`cat left of dog`."""
    return f"{assets.english[first]} {ENGLISH_RELATIONS[relation]} {assets.english[second]}"


def chinese_caption(assets: Assets, first: int, relation: str, second: int) -> str:
    """`猫在狗左边`."""
    return f"{assets.chinese[first]}在{assets.chinese[second]}{CHINESE_RELATIONS[relation]}"


def png_bytes(picture: Image.Image) -> bytes:
    """Lossless, and quick rather than small."""
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def compose_image(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """One object, 28 to 56 px wide, anywhere."""
    concept, language = int(rng.integers(64)), int(rng.random() < 0.25)
    canvas = media.gradient(rng)
    size_px = int(rng.integers(28, 57))
    x, y = (int(v) for v in rng.integers(0, media.TILE_PX - size_px + 1, size=2))
    media.paste(canvas, assets.pictures[style_of(split)][concept], size_px, x, y)
    answer = (assets.english, assets.chinese)[language][concept]
    return Sample(PROMPTS["image"][language], answer, ".png", png_bytes(canvas))


def compose_image_two(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """Two objects side by side or one over the other; the left or upper one is named first."""
    first, second = draw_pair(rng, split)
    relation = ("left", "above")[int(rng.integers(2))]
    picture = picture_of_two(assets, rng, split, first, relation, second)
    language = int(rng.random() < 0.3)
    caption = (english_caption, chinese_caption)[language](assets, first, relation, second)
    return Sample(PROMPTS["image_two"][language], caption, ".png", picture)


def picture_of_two(
    assets: Assets, rng: np.random.Generator, split: str, first: int, relation: str, second: int
) -> bytes:
    """A PNG of two objects: the first to the left of the second, or above it."""
    canvas = media.gradient(rng)
    level = int(rng.integers(4, 29))  # of both objects across the relation, to 4 px: never diagonal
    for order, concept in enumerate((first, second)):
        size_px = int(rng.integers(29, 33))
        along = order * 32 + int(rng.integers(0, 33 - size_px))
        across = level + int(rng.integers(-4, 5))
        x, y = (along, across) if relation == "left" else (across, along)
        media.paste(canvas, assets.pictures[style_of(split)][concept], size_px, x, y)
    return png_bytes(canvas)


def compose_word(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """One word: the step that makes two learnable soon. Held out are only new pauses and loudness."""
    concept = int(rng.integers(64))
    return Sample(PROMPTS["word"][0], assets.english[concept], ".flac", spoken_words(assets, rng, split, concept))


def compose_speech(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """Two words of one voice with a short pause between."""
    first, second = draw_pair(rng, split)
    answer = f"{assets.english[first]} {assets.english[second]}"
    return Sample(PROMPTS["speech"][0], answer, ".flac", spoken_words(assets, rng, split, first, second))


def spoken_words(assets: Assets, rng: np.random.Generator, split: str, *concepts: int) -> bytes:
    """A FLAC of words in one voice, a short pause before each."""
    words = assets.words[draw_voice(assets, rng, split)]
    return media.flac_bytes(media.join_words(rng, [words[concept] for concept in concepts]))


def compose_sound(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """One note at some loudness and start, a little out of tune; harder ones have noise under them."""
    instrument = list(assets.notes)[int(rng.integers(len(assets.notes)))]
    pitches = assets.train_pitches if split == "train" else assets.held_out_pitches
    notes = assets.notes[instrument][pitches[int(rng.integers(len(pitches)))]]
    wave = media.join_words(rng, [media.detune(rng, notes[int(rng.integers(len(notes)))])])
    if split == "harder":
        rms = float(np.sqrt(np.mean(wave**2)))
        wave = wave + rng.normal(0, 0.5 * rms, len(wave)).astype(np.float32)
    return Sample(PROMPTS["sound"][0], instrument, ".flac", media.flac_bytes(wave))


def compose_video(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """An emoji moving in one of four directions while a voice says another concept's name."""
    shown, spoken = draw_pair(rng, split)
    direction = list(media.DIRECTIONS)[int(rng.integers(len(media.DIRECTIONS)))]
    caption = clip_caption(assets, shown, direction, spoken)
    return Sample(PROMPTS["video"][0], caption, ".mp4", clip(assets, rng, split, shown, direction, spoken))


def clip_caption(assets: Assets, shown: int, direction: str, spoken: int) -> str:
    """`cat left said: dog`."""
    return f"{assets.english[shown]} {direction} said: {assets.english[spoken]}"


def clip(assets: Assets, rng: np.random.Generator, split: str, shown: int, direction: str, spoken: int) -> bytes:
    """An MP4 of an object that moves in a direction while a voice says a word."""
    frames = media.moving_frames(rng, assets.pictures[style_of(split)][shown], direction)
    wave = media.join_words(rng, [assets.words[draw_voice(assets, rng, split)][spoken]])
    return media.mp4_bytes(frames, wave)


def compose_text(assets: Assets, rng: np.random.Generator, split: str) -> Sample:
    """Translate a caption, or say it from the other object's side; harder ones chain two captions."""
    first, second = draw_pair(rng, split)
    relations = list(OPPOSITE)
    relation = relations[int(rng.integers(4))]
    kind = ("to_chinese", "to_english", "turn_round")[int(rng.integers(3))]
    english, chinese = (caption(assets, first, relation, second) for caption in (english_caption, chinese_caption))
    if split == "harder":
        third, other = (second + 1 + int(rng.integers(63))) % 64, relations[int(rng.integers(4))]
        english += ", " + english_caption(assets, second, other, third)
        chinese += "，" + chinese_caption(assets, second, other, third)
    if kind == "to_chinese":
        return Sample(str(PROMPTS[kind]).format(english), chinese)
    if kind == "to_english":
        return Sample(str(PROMPTS[kind]).format(chinese), english)
    question = str(PROMPTS[kind]).format(english, assets.english[second])
    return Sample(question, f"{ENGLISH_RELATIONS[OPPOSITE[relation]]} {assets.english[first]}")


COMPOSERS: dict[str, Callable[[Assets, np.random.Generator, str], Sample]] = {
    "image": compose_image, "image_two": compose_image_two, "word": compose_word, "speech": compose_speech,
    "sound": compose_sound, "video": compose_video, "text": compose_text,
}  # fmt: skip
MEDIA_FIELDS = {".png": ("images",), ".flac": ("audios",), ".mp4": ("videos", "audios"), "": ()}


@dataclass(frozen=True)
class Chunk:
    """Some consecutive samples of one source and split: the unit of work of a process."""

    folder: Path  # of the JSONL
    seed: int
    split: str
    source: str
    start: int
    stop: int


def compose_chunk(chunk: Chunk) -> list[str]:
    """Write the media of a chunk; returns its JSONL lines."""
    assets = load_assets()
    lines = []
    for index in range(chunk.start, chunk.stop):
        entropy = [chunk.seed, SPLITS.index(chunk.split), list(COMPOSERS).index(chunk.source), index]
        sample = COMPOSERS[chunk.source](assets, np.random.default_rng(entropy), chunk.split)
        name = f"media/{chunk.source}.{chunk.split}/{index:06d}{sample.suffix}"
        if sample.suffix:
            (chunk.folder / name).write_bytes(sample.data)
        row = row_of(sample, name, source=chunk.source, id=f"{chunk.source}.{chunk.split}.{index:06d}")
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def row_of(sample: Sample, name: str, *, source: str, id: str) -> dict[str, Any]:
    """The record of a sample whose medium is the file ``name``."""
    return {
        "messages": [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.answer}],
        **{field: [name] * (field in MEDIA_FIELDS[sample.suffix]) for field in ("images", "audios", "videos")},
        "source": source,
        "id": id,
    }


def in_processes[In, Out](work: Callable[[In], Out], items: Sequence[In], processes: int) -> list[Out]:
    """``work`` of every item, in order."""
    if processes <= 1:
        return [work(item) for item in items]
    # Spawned, not forked: a fork of a process that has torch's threads running can hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(work, items, chunksize=1)


def plan(
    out: Path, seed: int, sizes: dict[str, int], eval_size: int, splits: Sequence[str] = SPLITS[:3]
) -> dict[Path, list[Chunk]]:
    """The chunks of every JSONL file of the corpus."""
    files: dict[Path, list[Chunk]] = {}
    for source, train_size in sizes.items():
        for split in splits:
            folder = out / ("train" if split == "train" else "eval")
            size = train_size if split == "train" else eval_size
            path = folder / (f"{source}.jsonl" if split == "train" else f"{source}.{split}.jsonl")
            (folder / "media" / f"{source}.{split}").mkdir(parents=True, exist_ok=True)
            bounds = [*range(0, size, CHUNK_SAMPLES), size]
            files[path] = [Chunk(folder, seed, split, source, a, b) for a, b in pairwise(bounds)]
    return files


def compose(
    out: Path,
    *,
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    eval_size: int = EVAL_SIZE,
    choice: bool = False,
    processes: int = 1,
) -> None:
    """Write the whole corpus under `out`; `sizes` gives the number of training samples of each source.

    `choice` adds the sets that a recipe is chosen by, so that it is not tuned on what it reports.
    """
    sizes = sizes or SIZES
    files = plan(out, seed, sizes, eval_size, SPLITS if choice else SPLITS[:3])
    chunks = [chunk for parts in files.values() for chunk in parts]
    lines = iter(in_processes(compose_chunk, chunks, processes))
    for path, parts in files.items():
        text = "".join(line + "\n" for _ in parts for line in next(lines))
        path.write_text(text, encoding="utf-8")
    (out / "tokenizer_corpus.txt").write_text(tokenizer_corpus(load_assets()), encoding="utf-8")
    manifest = {
        "seed": seed,
        "train_samples": sizes,
        "eval_samples": {source: {"held_out": eval_size, "harder": eval_size} for source in sizes},
        "chance": {source: round(CHANCE[source], 6) for source in sizes},
        "split_rule": SPLIT_RULE,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def tokenizer_corpus(assets: Assets) -> str:
    """Words and phrases on lines of their own, so that no learned piece spans two of them; the chat template's roles,
    which stand in every sample, are words too.
    """
    words = [*assets.english, *assets.notes, *ENGLISH_RELATIONS.values(), *media.DIRECTIONS, "said:"]
    chinese = [*assets.chinese, *CHINESE_RELATIONS.values(), "在", "，"]
    prompts = [part for value in PROMPTS.values() for part in ([value] if isinstance(value, str) else value)]
    questions = [text.replace("{}", "").replace("<image>", "").replace("<audio>", "").replace("<video>", "")
                 for text in prompts]  # fmt: skip
    roles = ["system", "user", "assistant"]
    lines = [f"x {word}" for word in (*words, *DIGITS)] + words + list(DIGITS) + chinese + roles
    return "\n".join((lines * 20) + questions * 20) + "\n"


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--fast", action="store_true", help="a small corpus, for a smoke test")
    parser.add_argument("--choice", action="store_true", help="also the sets to choose a recipe by")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = {source: round(size * (FAST_SHARE if args.fast else 1)) for source, size in SIZES.items()}
    eval_size = EVAL_SIZE // 4 if args.fast else EVAL_SIZE
    processes = min(8, os.cpu_count() or 1)
    compose(args.out, seed=args.seed, sizes=sizes, eval_size=eval_size, choice=args.choice, processes=processes)
    num_sets = (3 if args.choice else 2) * len(sizes)
    print(f"composed {sum(sizes.values())} training and {num_sets * eval_size} evaluation samples in {args.out}")


if __name__ == "__main__":
    main()
