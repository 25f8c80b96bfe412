"""How fast the generator draws: seconds of a batch of pictures, with and without guidance, and what a step costs.

    python -m benchmarks.bench_draw RECIPE --json FILE [--batch 8] [--steps 16] [--repeats 5] [--threads 1]

The generator of ``RECIPE``'s sizes (recipes/tiny/draw/0_pictures.yaml) with random weights: what it draws is noise of the same
cost. Pictures of base_size squared, with a source and a caption each; projectors, language model and codec are not in it.
Guidance: none (one branch), of words (two), of words and source (three). ``wall_s`` is the quickest of the repeats, ``cpu_s`` the
CPU time of that one; on a busy machine compare the latter. The file holds

    [{machine, torch, threads, parameters, tflop_a_forward}, {branches, wall_s, cpu_s, gflops}, ...]
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Parse, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML recipe with model.image")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    import torch

    from megatron_omni.config.load import load_recipe
    from megatron_omni.estimate.pictures import picture_forward
    from megatron_omni.models.generators.flow import Guidance

    torch.set_num_threads(options.threads)
    model = load_recipe(options.recipe, []).model
    if model.image is None:
        raise SystemExit(f"{options.recipe}: model.image is null")
    dit, x0, branches = _made(model, options.batch)
    forward = picture_forward(model).generator
    rows: list[dict[str, Any]] = [
        {
            "machine": platform.processor(),
            "torch": torch.__version__,
            "threads": options.threads,
            "parameters": sum(weight.numel() for weight in dit.parameters()),
            "gflop_a_forward": round(forward / 1e9, 4),
        }
    ]
    for guidance in (Guidance(text=1.0), Guidance(text=2.0), Guidance(text=2.0, image=1.5)):
        rows.append(_timed(dit, x0, branches, guidance, options))
        evaluations = rows[-1]["branches"] * options.batch * options.steps
        rows[-1]["gflops"] = round(evaluations * forward / rows[-1]["cpu_s"] / 1e9, 1)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _made(model: Any, batch: int) -> tuple[Any, Any, dict[Any, Any]]:
    """Generator, noise, conditions of the branches."""
    import torch

    from megatron_omni.estimate.pictures import num_vision_rows
    from megatron_omni.models.generators.dit import DiT
    from megatron_omni.models.generators.sampling import BranchConditions

    image, generator = model.image, torch.Generator().manual_seed(0)
    dit = DiT(image.dit).eval()
    with torch.no_grad():
        for weight in dit.parameters():
            weight.normal_(std=0.02 if weight.ndim == 1 else weight.shape[1] ** -0.5, generator=generator)
    side, rows = image.base_size // image.downsampling, image.projectors.num_caption_rows
    noise, source = (torch.randn(batch, image.dit.latent_channels, side, side, generator=generator) for _ in range(2))

    def branch() -> BranchConditions:
        return BranchConditions(
            source=source,
            caption=torch.randn(batch, rows, image.dit.caption_size, generator=generator),
            caption_mask=torch.ones(batch, rows, dtype=torch.bool),
            task=torch.randn(batch, image.dit.task_size, generator=generator),
            vision=torch.randn(batch, max(1, num_vision_rows(model)), image.dit.vision_size, generator=generator),
        )

    return dit, noise, {"c": branch(), "i": branch(), "u": branch()}


def _timed(dit: Any, x0: Any, branches: dict[Any, Any], guidance: Any, options: argparse.Namespace) -> dict[str, Any]:
    from megatron_omni.models.generators.sampling import sample

    best: tuple[float, float] | None = None
    for _ in range(options.repeats + 1):  # the first warms up
        wall, cpu = time.perf_counter(), time.process_time()
        sample(dit, x0, branches, steps=options.steps, guidance=guidance)
        taken = time.perf_counter() - wall, time.process_time() - cpu
        best = taken if best is None else min(best, taken)
    assert best is not None
    return {"branches": len(guidance.branches), "wall_s": round(best[0], 4), "cpu_s": round(best[1], 4)}


if __name__ == "__main__":
    sys.exit(main())
