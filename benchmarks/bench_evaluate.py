"""The share of an evaluation that the engine computes: time inside ``step()`` by the time from first request to last result.

    python -m benchmarks.bench_evaluate --json FILE [--samples 10000] [--threads 1 2]

Short samples on one rank, a third of them with media (pictures of 64 x 64 pixels and sound of half a second in turn), the
model of recipes/tiny/quickstart.yaml with random weights, answers of 16 tokens: what is least for the engine to do, so
preparing prompts costs the most beside it. The file holds

    [{samples, threads, batch_size, wall_seconds, step_seconds, share, samples_per_s, skipped}]
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from megatron_omni.config.load import load_recipe
from megatron_omni.data.tokenizer import train_sentencepiece
from megatron_omni.platform.device import install

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "what",
    "is",
    "in",
    "the",
    "picture",
    "and",
    "which",
    "word",
    "do",
    "you",
    "hear",
    "a",
    "cat",
    "dog",
    "left",
    "of",
)
NUM_MEDIA = 200
"""Files of each kind; samples share them."""


def main(arguments: list[str] | None = None) -> int:
    """Compose, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args(arguments)
    install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compose(folder, options.samples)
        rows = measure(folder, options.threads, options.batch_size)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row)
    return 0


def compose(folder: Path, count: int) -> None:
    """Records, media and a tokenizer."""
    rng = np.random.default_rng(0)
    for number in range(NUM_MEDIA):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", rng.normal(0, 0.1, 8000).astype(np.float32), 16_000)
    lines = []
    for number in range(count):
        question, media = " ".join(rng.choice(WORDS, 8)), {}
        if number % 3 == 0:
            kind, ending = (("image", "png"), ("audio", "wav"))[number % 2]
            question, media = f"<{kind}> {question}", {f"{kind}s": [f"{number % NUM_MEDIA}.{ending}"]}
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]
        lines.append(json.dumps({"messages": turns, **media}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    train_sentencepiece([" ".join(WORDS)] * 20, folder / "t.model", vocab_size=290)


def measure(folder: Path, threads: list[int], batch_size: int) -> list[dict[str, Any]]:
    """One run for each number of threads."""
    import torch

    from megatron_omni.data.sample import SampleBuilder
    from megatron_omni.evaluation.results import SkippedSample
    from megatron_omni.evaluation.running import ask_all, limits_for
    from megatron_omni.evaluation.task import load_tasks
    from megatron_omni.models.build import build_model
    from megatron_omni.parallel.groups import destroy, initialize

    torch.set_num_threads(1)
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "quickstart.yaml", [f"data.tokenizer={folder / 't.model'}"])
    pg = initialize(recipe.parallel)
    model, builder = build_model(recipe, pg), SampleBuilder(recipe)
    tasks = load_tasks([str(folder / "rows.jsonl")], changes={"metric": "exact_match", "max_new_tokens": 16})
    rows = []
    for number in threads:
        lines: list[Any] = []
        times = ask_all(
            model, builder, tasks, pg=pg, limits=limits_for(batch_size), threads=number,
            finished=lambda _, line, lines=lines: lines.append(line),
        )  # fmt: skip
        rows.append(
            {
                "samples": len(lines),
                "threads": number,
                "batch_size": batch_size,
                "cores": len(os.sched_getaffinity(0)),
                "load": round(os.getloadavg()[0], 1),
                "wall_seconds": round(times.wall, 2),
                "step_seconds": round(times.step, 2),
                "share": round(times.step / times.wall, 3),
                "samples_per_s": round(len(lines) / times.wall, 1),
                "skipped": sum(isinstance(line, SkippedSample) for line in lines),
            }
        )
    destroy()
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
