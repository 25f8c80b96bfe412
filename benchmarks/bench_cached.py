"""What a step of task ``generative`` costs with the models in it, and on what they made beforehand.

    python -m benchmarks.bench_cached --tokenizer FILE --vae DIR --json FILE [--recipe R] [--steps 12] [--rows 96]

A corpus of scenes (examples/draw/scenes.py: a third are edits), a language model of the recipe's sizes with random weights,
``megatron-omni prepare --latents --hidden``, then the same steps three times: language model and VAE in the step; language
model in the step and latents from disk; hidden states and latents from disk. CPU seconds of a step (median, without the first
two) of one process and thread; calls of language model, vision encoder and VAE in a step,
and CPU seconds inside language model (with its encoder) and VAE. ``predicted_s`` is the first run's step without those.
The file holds [{machine, torch, steps, ..}, {conditions, latents, cpu_s, calls, language_s, vae_s, losses, predicted_s}, ..].
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

FROZEN = [
    "vision", "audio", "projectors", "attention", "norms", "experts", "shared_experts", "gate", "embeddings", "output",
    "new_token_rows",
]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, make, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="of the quickstart")
    parser.add_argument("--vae", required=True, help="folder of the codec of pictures that the recipe names")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--recipe", default="recipes/tiny/draw/2_tasks.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=96)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measured(Path(folder), options)
    head = {"machine": platform.processor(), "torch": torch.__version__, "steps": options.steps, "rows": options.rows}
    options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


def _measured(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_omni.cli import prepare
    from megatron_omni.platform.device import install

    install()
    _compose(folder, options.rows)
    words = [
        f"data.tokenizer={options.tokenizer}", f"model.image.vae={options.vae}", "data.num_workers=0", "data.cache_gib=0",
        "data.packing=false", "data.micro_batch_size=12", "data.global_batch_size=24", "optim.lr_warmup_iters=0",
        "optim.lr_decay_style=constant", "log.interval=1", "checkpoint.save_interval=0",
    ]  # fmt: skip
    language = [
        *words,
        "task=supervised",
        "model.image=null",
        "train_iters=1",
        f"run_dir={folder / 'language'}",
        "init_from=null",
    ]
    _train(options.recipe, [*language, *_source(folder / "draw.jsonl")])
    drawn = [*words, f"train_iters={options.steps}", f"init_from={folder / 'language'}", "init_allow_missing=[image.*]"]
    drawn += [f"freeze=[{','.join(FROZEN)}]", "generative.losses.lm=0.0", "model.image.weights=null"]
    made = [options.recipe, "--data", folder / "draw.jsonl", "--latents", options.vae, "--hidden", folder / "language"]
    assert prepare.main([*map(str, made), *words]) == 0
    cached = ["generative.conditions=cached", "init_allow_extra=[language.*,vision.*,audio.*]", "model.image.vae=null"]
    rows = []
    for conditions, latents, more in (("model", False, []), ("model", True, []), ("cached", True, cached)):
        data = _source(folder / ("draw.drawn-*.jsonl" if latents else "draw.jsonl"))
        run_dir = folder / f"{conditions}{latents}"
        costs, calls, seconds = _train(options.recipe, [*drawn, *more, *data, f"run_dir={run_dir}"])
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        row = {
            "conditions": conditions,
            "latents": latents,
            "cpu_s": round(statistics.median(costs[2:]), 4),
            "calls": {name: round(number / options.steps, 2) for name, number in calls.items()},
            "language_s": round(seconds["language"] / options.steps, 4),
            "vae_s": round(seconds["vae"] / options.steps, 4),
            "losses": [json.loads(line)["flow loss"] for line in lines if "flow loss" in line],
        }
        first = rows[0] if rows else row
        spared = (first["vae_s"] if latents else 0.0) + (first["language_s"] if conditions == "cached" else 0.0)
        row["predicted_s"] = round(first["cpu_s"] - spared, 4)
        rows.append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "losses"}), flush=True)
    return rows


def _source(path: Path) -> list[str]:
    return [f"data.sources=[{{name: draw, path: '{path}'}}]"]


def _compose(folder: Path, count: int) -> None:
    """Rows of scenes: captions, and edits that begin with another scene."""
    import numpy as np

    from examples.draw.scenes import draw_scene, paint, place

    rng, lines = np.random.default_rng(0), []
    for number in range(count):
        scene = draw_scene(rng, held_out=False)
        paint(place(rng, scene)).save(folder / f"{number}.png")
        edits = number % 3 == 2
        row: dict[str, Any] = {
            "messages": [
                {"role": "user", "content": "<image> make it another" if edits else f"draw number {number}"},
                {"role": "assistant", "content": "<generate>"},
            ],
            "targets": [f"{number}.png"],
        }
        lines.append(json.dumps(row | ({"images": [f"{number - 1}.png"]} if edits else {})))
    (folder / "draw.jsonl").write_text("\n".join(lines) + "\n")


def _train(recipe: str, words: list[str]) -> tuple[list[float], Counter[str], Counter[str]]:
    """A run; CPU seconds of each step, calls in all of them, and seconds inside language model and VAE."""
    from megatron_omni.config.load import load_recipe
    from megatron_omni.data.loader import StepLoader
    from megatron_omni.models.encoders.vision import VisionEncoder
    from megatron_omni.models.generators.vae import PictureCodec
    from megatron_omni.models.omni import OmniModel
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.tasks.choice import task_of
    from megatron_omni.training.loop import train
    from megatron_omni.training.setup import setup

    loaded = load_recipe(recipe, words)
    starts: list[float] = []
    calls: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        for owner, method, name in (
            (OmniModel, "forward", "language"), (VisionEncoder, "forward", "vision"), (PictureCodec, "encode", "vae"),
        ):  # fmt: skip
            stack.enter_context(_timed(owner, method, name, calls, seconds))
        stack.enter_context(_told(StepLoader, "next_step", lambda: starts.append(time.process_time())))
        try:
            assert train(setup(loaded, task_of(loaded))) == 0
            starts.append(time.process_time())
        finally:
            destroy()
    return [after - before for before, after in pairwise(starts)][: loaded.train_iters], calls, seconds


@contextlib.contextmanager
def _timed(owner: Any, method: str, name: str, calls: Counter[str], seconds: Counter[str]) -> Iterator[None]:
    whole = getattr(owner, method)

    def timed(*args: Any, **settings: Any) -> Any:
        calls[name] += 1
        start = time.process_time()
        try:
            return whole(*args, **settings)
        finally:
            seconds[name] += time.process_time() - start  # type: ignore[assignment]

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, whole)


@contextlib.contextmanager
def _told(owner: Any, method: str, tell: Callable[[], None]) -> Iterator[None]:
    whole = getattr(owner, method)

    def told(*args: Any, **settings: Any) -> Any:
        tell()
        return whole(*args, **settings)

    setattr(owner, method, told)
    try:
        yield
    finally:
        setattr(owner, method, whole)


if __name__ == "__main__":
    raise SystemExit(main())
