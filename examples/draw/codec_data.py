"""Pictures for the codec, of the quickstart's art:

    python -m examples.draw.codec_data --out runs/picture_codec/data

    OUT/train.jsonl      scenes (scenes.py), 64 x 64
    OUT/damaged.jsonl    others, as a generator is given them: blurred, noisy, dark, with a hole, with rain, or their edges
    OUT/held_out.jsonl   scenes on the other side of the rule of what is held out
    OUT/other_art.jsonl  the same with pictures of another style, which no codec is trained on
    OUT/media/           PNG

A record is an ordinary one with one picture. The same files for the same seed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from examples.draw.scenes import SIZE_PX, draw_scene, paint, place

Pixels = NDArray[np.uint8]
SIZES = {"train": 4000, "damaged": 800, "held_out": 300, "other_art": 100}


def main(arguments: list[str] | None = None) -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description="Pictures for the codec, of the quickstart's art.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    write(options.out, seed=options.seed, sizes=SIZES)
    print(f"wrote {options.out}")


def write(out: Path, *, seed: int, sizes: dict[str, int]) -> None:
    """See the module; ``sizes``: pictures of each set."""
    (out / "media").mkdir(parents=True, exist_ok=True)
    for kind, (name, size) in enumerate(sizes.items()):
        rows = []
        for number in range(size):
            rng = np.random.default_rng([seed, kind, number])
            style = "twemoji" if name == "other_art" else "noto"
            pixels = scene(rng, style=style, held_out=name not in ("train", "damaged"))
            pixels = damaged(rng, pixels) if name == "damaged" else pixels
            file = f"media/{name}_{number:05d}.png"
            Image.fromarray(pixels).save(out / file, compress_level=1)
            rows.append({"messages": [{"role": "user", "content": "<image>"}], "images": [file]})
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scene(rng: np.random.Generator, *, style: str = "noto", held_out: bool = False) -> Pixels:
    """A scene's picture, [64, 64, 3]."""
    return np.asarray(paint(place(rng, draw_scene(rng, held_out=held_out)), style))


def damaged(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    """``pixels`` as a picture that a generator is given: damaged, or its edges alone."""
    kind = ("noise", "blur", "dark", "hole", "rain", "edges")[int(rng.integers(6))]
    values = pixels.astype(np.float32)
    if kind == "noise":
        values += rng.normal(0, 255 * rng.uniform(0.05, 0.25), values.shape)
    elif kind == "blur":
        blur = ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.5)))
        values = np.asarray(Image.fromarray(pixels).filter(blur), dtype=np.float32)
    elif kind == "dark":
        values = values * rng.uniform(0.15, 0.6) + rng.normal(0, 4, values.shape)
    elif kind == "hole":
        top, left = rng.integers(0, SIZE_PX - 24 + 1, size=2)
        values[top : top + 24, left : left + 24] = rng.choice([0, 128, 255])
    elif kind == "rain":
        values += 255 * streaks(rng)[:, :, None]
    else:
        values = np.repeat(edges(values)[:, :, None], 3, axis=2)
    return values.clip(0, 255).astype(np.uint8)


def streaks(rng: np.random.Generator) -> NDArray[np.float32]:
    """Bright slanted lines, [64, 64], 0 to 1."""
    drops = (rng.random((SIZE_PX, SIZE_PX)) < rng.uniform(0.005, 0.02)).astype(np.float32)
    slant, length = int(rng.integers(-1, 2)), int(rng.integers(6, 14))
    lines = sum(np.roll(drops, (step, slant * step // 3), axis=(0, 1)) for step in range(length))
    return np.asarray(np.minimum(lines, 1) * rng.uniform(0.3, 0.8), dtype=np.float32)


def edges(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """White where the picture's grey changes quickly, black elsewhere, [64, 64]."""
    grey = np.pad(values.mean(axis=2), 1, mode="edge")
    steps = np.hypot(grey[1:-1, 2:] - grey[1:-1, :-2], grey[2:, 1:-1] - grey[:-2, 1:-1])
    return np.where(steps > 60, 255.0, 0.0).astype(np.float32)


if __name__ == "__main__":
    main()
