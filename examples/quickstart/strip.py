"""The strip of README: a held-out question of each kind, what the model was shown or played, and its answer.

    python -m examples.quickstart.strip runs/quickstart --out docs/images/quickstart_answers.png [--record N]

Drawn from answers.jsonl (score.py) and the records that were asked, in English, from the N-th on (default 0): nothing is
chosen by whether the answer is right. A wrong answer is red and says what was expected.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TASKS = ("image", "image_two", "word", "speech", "sound", "video", "text")
FRAMES = 4
WINDOW, HOP = 512, 128
"""Of the spectrogram, in samples."""


def main() -> None:
    """Draw the strip of a run that was scored."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture to write")
    parser.add_argument("--record", type=int, default=0, metavar="N", help="first record to look at (default 0)")
    options = parser.parse_args()
    panels = read_panels(options.run_dir, first=options.record)
    if not panels:
        parser.error(f"{options.run_dir}: no answers of {', '.join(TASKS)} there; score the run first")
    draw_answers(panels, options.out)
    print(f"wrote {options.out}")


def read_panels(run_dir: Path, *, first: int = 0) -> list[dict[str, Any]]:
    """A table for each task that was scored: task, question, expected, answer and the media files of its record."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for line in (run_dir / "answers.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers.setdefault(row["set"], []).append(row)
    panels = []
    for task in TASKS:
        file = run_dir / "data" / "eval" / f"{task}.held_out.jsonl"
        given = next((rows for name, rows in answers.items() if name in (task, f"{task}.held_out")), None)
        if given is None or not file.is_file():
            continue
        records = [json.loads(line) for line in islice(file.open(encoding="utf-8"), len(given))]
        for record, row in list(zip(records, given, strict=True))[first:]:
            assert record["messages"][-1]["content"] == row["expected"], f"{file}: not what was scored"
            if (row["question"] + row["expected"] + row["answer"]).isascii():
                media = [file.parent / path for kind in ("images", "audios", "videos") for path in record.get(kind, [])]
                panels.append({"task": task, **row, "media": media})
                break
    return panels


def draw_answers(panels: list[dict[str, Any]], path: Path) -> None:
    """One column a panel: what was seen or heard, the question below it, the answer in green or red."""
    figure, axes = plt.subplots(
        2, len(panels), figsize=(1.75 * len(panels), 2.7), height_ratios=[1.6, 1], layout="constrained", squeeze=False
    )
    for (above, below), panel in zip(axes.T, panels, strict=True):
        for axis in (above, below):
            axis.set_axis_off()
        above.set_title(panel["task"], fontsize=9)
        question = panel["question"]
        for marker in ("<image>", "<audio>", "<video>"):
            question = question.replace(marker, "")
        asked = _wrapped(question.strip())
        _draw_media(above, panel["media"], otherwise=asked)
        right = panel["answer"].strip() == panel["expected"].strip()
        said = panel["answer"].strip() or "(nothing)"
        if panel["media"]:
            below.text(0.5, 0.95, asked, ha="center", va="top", fontsize=7.5, color="0.35")
        below.text(
            0.5, 0.3, _wrapped(said) if right else _wrapped(f"{said} (expected: {panel['expected']})"),
            ha="center", va="center", fontsize=9, fontweight="bold", color="tab:green" if right else "tab:red",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_media(axis: Axes, media: list[Path], *, otherwise: str) -> None:
    if not media:
        axis.text(0.5, 0.5, otherwise, ha="center", va="center", fontsize=9, style="italic")
    elif media[0].suffix in (".wav", ".flac", ".ogg"):
        wave, _ = soundfile.read(media[0], dtype="float32", always_2d=True)
        axis.imshow(spectrogram(wave.mean(axis=1)), origin="lower", aspect="auto", cmap="magma")
    elif media[0].suffix in (".mp4", ".webm", ".mkv"):
        frames = frames_of(media[0])
        half = (len(frames) + 1) // 2  # two rows, in reading order
        upper, lower = np.concatenate(frames[:half], axis=1), np.concatenate(frames[-half:], axis=1)
        axis.imshow(np.concatenate([upper, lower], axis=0))
    else:
        axis.imshow(np.asarray(Image.open(media[0]).convert("RGB")))


def spectrogram(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """[WINDOW / 2 + 1, steps] decibels of a Hann-windowed short-time transform, at most 60 below the loudest."""
    steps = max(1, 1 + (len(wave) - WINDOW) // HOP)
    padded = np.pad(wave, (0, max(0, WINDOW - len(wave))))
    windows = np.stack([padded[i * HOP : i * HOP + WINDOW] for i in range(steps)]) * np.hanning(WINDOW)
    level = 20 * np.log10(np.abs(np.fft.rfft(windows, axis=1)).T + 1e-6)
    return np.maximum(level, level.max() - 60)


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    """``FRAMES`` frames [H, W, 3] spread over a clip, the first and the last among them."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    places = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
    return [frames[place] for place in places]


def _wrapped(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    main()
