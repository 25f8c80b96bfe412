"""What recording and replaying routes costs: forward and backward of a recipe's model, with and without, in one run.

    python -m benchmarks.bench_replay [RECIPE] [key=value ...] [--rows N] [--length N] [--steps N]

One rank, rows of random text, no optimizer step. Each step is computed in turn with live routing, recorded, and replayed
from its own record, so all three multiply the same rows by the same experts, and a machine that slows down slows all of
them. Thread CPU time, medians; a ratio is the median of the steps' ratios. One line of JSON at the end.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import Any

WARM_UP_STEPS = 2
RECIPE = "recipes/tiny/4_anneal.yaml"


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_intermixed_args(arguments)
    from megatron_omni.config.load import load_recipe
    from megatron_omni.platform.device import install

    recipe = load_recipe(options.recipe, options.overrides)
    recipe.model.vision = recipe.model.audio = None
    install()
    found = measure(recipe, rows=options.rows, length=options.length, steps=options.steps)
    for name in ("recorded", "replayed"):
        print(
            f"{name}: {found[name]:.1f} ms, {100 * (found[f'{name} / live'] - 1):+.1f} % of {found['live']:.1f} ms live"
        )
    print(f"routes: {found['bytes a token']} bytes a token in {recipe.model.num_layers} layers")
    print(json.dumps(found))
    return 0


def measure(recipe: Any, *, rows: int, length: int, steps: int) -> dict[str, float]:
    """Milliseconds of each kind, ratios to live routing, and bytes of routes a token."""
    import torch

    from benchmarks.measure import seconds
    from megatron_omni.models.build import build_model
    from megatron_omni.models.moe.routes import RouteRecord
    from megatron_omni.parallel import groups
    from megatron_omni.parallel.schedule import run_step
    from megatron_omni.parallel.wrap import wrap_model
    from megatron_omni.platform.device import device

    torch.set_num_threads(1)
    pg = groups.initialize(recipe.parallel)
    model = wrap_model(build_model(recipe, pg), recipe, pg)
    batch = text_batch(rows, length, recipe.model.vocab_size).to(device())

    def step(batch: Any, record: RouteRecord | None) -> None:
        def forward(batch: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            loss = model(batch, step=1, stochastic=False, record=record)
            return loss, lambda loss: (loss.mean(), None)

        model.zero_grad_buffer()
        run_step(forward, [batch], model, pg=pg, recipe=recipe)

    first = RouteRecord()
    step(batch, first)
    routes = first.grid(batch, recipe.model, pg)

    def recorded() -> None:
        record = RouteRecord()
        step(batch, record)
        record.grid(batch, recipe.model, pg)

    kinds = {
        "live": partial(step, batch, None),
        "recorded": recorded,
        "replayed": partial(step, replace(batch, routes=routes), None),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(WARM_UP_STEPS + steps):
        for kind, run in kinds.items():
            times[kind].append(1e3 * seconds(run, device=device(), threads=1)[0])
    groups.destroy()
    kept = {kind: values[WARM_UP_STEPS:] for kind, values in times.items()}
    found = {kind: statistics.median(values) for kind, values in kept.items()}
    for kind in ("recorded", "replayed"):
        found[f"{kind} / live"] = statistics.median(a / b for a, b in zip(kept[kind], kept["live"], strict=True))
    return found | {"bytes a token": routes.nbytes / routes[..., 0].numel()}


def text_batch(rows: int, length: int, vocab_size: int) -> Any:
    """An OmniBatch of random tokens, all of them learned."""
    import torch

    from megatron_omni.batch import OmniBatch
    from megatron_omni.segments import packed

    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    positions, zeros = torch.arange(length).expand(rows, length), torch.zeros(rows, length, dtype=torch.int64)
    return OmniBatch.of(
        input_ids=ids[:, :-1], labels=ids[:, 1:].contiguous(), position_ids=positions.expand(3, rows, length),
        segment_ids=zeros, sample_ids=zeros + torch.arange(rows)[:, None], sample_positions=positions, modality=zeros,
        source_ids=zeros, attention=packed([[length]] * rows, length),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
