"""Will this recipe fit on so many GPUs, how long will it take, and what would fit better? Needs no GPU and no torch.

megatron-omni plan recipes/3_sft.yaml --gpus 64
megatron-omni plan recipes/layout/anneal_64x80gb.yaml --gpus 64 --tokens 50e9
megatron-omni plan RECIPE --gpus 32 parallel.pipeline_model_parallel_size=2 parallel.recompute=moe

Memory of a rank by pipeline stage, for the heaviest micro-batch that the recipe is expected to meet (--tiles, --chunks,
--label-share, --imbalance, --sample-length say what that is); then step time, tokens/s, MFU and days. Weights, gradients
and optimizer state are exact and activations within a few per cent of what autograd keeps
(tests/distributed/test_plan.py). Times rest on kernel efficiencies that are stated, not measured: see
docs/parallelism.md. Exit status: 0 fits, 1 does not, 2 bad input.
"""

import argparse
import sys
from math import inf
from pathlib import Path
from typing import Any

from megatron_omni.config.load import load_recipe
from megatron_omni.config.outcome import EXIT_BAD_INPUT
from megatron_omni.config.validate import validate
from megatron_omni.estimate.hardware import GPUS, STATED, with_measured_experts
from megatron_omni.estimate.plan import (
    GIB,
    IMBALANCE,
    RESERVE_GIB,
    Plan,
    alternatives,
    heaviest_batch,
    make_plan,
)

EXIT_DOES_NOT_FIT = 1
PACKED_FILL = 0.97
SHOWN = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="megatron-omni plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("recipe", help="YAML recipe")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    p.add_argument("--gpus", type=int, required=True, help="ranks of the run")
    p.add_argument("--gpu", default="H100-80GB", choices=tuple(GPUS), help="default H100-80GB")
    p.add_argument("--tokens", type=float, help="token budget for the days (default: train_iters full steps)")
    p.add_argument("--mean-k", type=float, help="real experts per token (a log's moe/mean_k; default: untrained gate)")
    p.add_argument(
        "--imbalance", type=float, default=IMBALANCE, help="tokens of the fullest rank's experts over the mean"
    )
    p.add_argument("--label-share", type=float, default=0.5, help="share of tokens that carry a label (default 0.5)")
    p.add_argument("--tiles", type=float, help="picture tiles of the heaviest sequence (default: data.max_frames)")
    p.add_argument("--chunks", type=float, help="audio chunks of the heaviest sequence (default 8)")
    p.add_argument(
        "--sample-length",
        type=int,
        metavar="N",
        help="tokens of a sample in packed sequences (default: one fills each)",
    )
    p.add_argument("--fill", type=float, help="share of a sequence that is filled (default 0.97 packed, else 1)")
    p.add_argument("--reserve", type=float, default=RESERVE_GIB, metavar="GIB", help="memory left free (default 6)")
    p.add_argument("--measured", type=Path, metavar="FILE", help="JSON of tools/bench_moe.py on the GPU in question")
    return p


def plan_of(options: argparse.Namespace) -> tuple[Plan, list[Plan]]:
    """The plan and the layouts that would fit; ValueError for bad input."""
    for name in ("gpus", "tokens", "mean_k", "imbalance", "fill", "sample_length"):
        value = getattr(options, name)
        if value is not None and not 0 < value < inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name in ("tiles", "chunks", "reserve"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < inf:
            raise ValueError(f"--{name} {value}: must not be negative")
    if not 0 <= options.label_share <= 1:
        raise ValueError(f"--label-share {options.label_share}: must lie in [0, 1]")
    recipe = load_recipe(options.recipe, options.overrides)
    validate(recipe, world_size=options.gpus, check_files=False)
    gpu = GPUS[options.gpu]
    efficiency = STATED if options.measured is None else with_measured_experts(STATED, options.measured, gpu)
    settings: dict[str, Any] = {"efficiency": efficiency, "reserve_gib": options.reserve}
    plan = make_plan(
        recipe,
        world_size=options.gpus,
        gpu=gpu,
        batch=heaviest_batch(
            recipe,
            mean_k=options.mean_k,
            imbalance=options.imbalance,
            label_share=options.label_share,
            tiles=options.tiles,
            chunks=options.chunks,
            sample_length=options.sample_length,
        ),
        fill=options.fill or (PACKED_FILL if recipe.data.packing else 1.0),
        **settings,
    )
    return plan, alternatives(plan, **settings)


def report(plan: Plan, others: list[Plan], *, tokens: float | None) -> str:
    """What is printed."""
    recipe, batch = plan.recipe, plan.batch
    lines = [
        f"{layout(plan)} on {plan.world_size} x {plan.gpu.name}; {recipe.data.global_batch_size} sequences of "
        f"{recipe.data.seq_length} tokens a step",
        f"heaviest micro-batch: {batch.tokens} tokens, {batch.label_tokens:.0f} with labels, {batch.tiles:.0f} tiles, "
        f"{batch.chunks:.0f} audio chunks; samples of {batch.mean_length:.0f} tokens",
        f"{batch.mean_k:.2f} experts a token, fullest rank {batch.imbalance:.2f} x the mean",
        "",
        "GiB a rank".ljust(24) + "".join(f"stage {i}".rjust(10) for i in range(len(plan.stages))),
    ]
    rows: dict[str, list[float]] = {
        "weights": [s.held.weights for s in plan.stages],
        "gradients": [s.held.gradients for s in plan.stages],
        "optimizer": [s.held.optimizer for s in plan.stages],
        "activations: blocks": [s.language for s in plan.stages],
        "activations: encoders": [s.encoders for s in plan.stages],
        "activations: loss": [s.loss for s in plan.stages],
        "while a layer runs": [s.working for s in plan.stages],
        "peak": [s.total for s in plan.stages],
    }
    lines += [name.ljust(24) + "".join(f"{v / GIB:10.1f}" for v in values) for name, values in rows.items()]
    room = (plan.usable_bytes - plan.peak_bytes) / GIB
    verdict = f"fits, {room:.1f} GiB to spare" if plan.fits else f"DOES NOT FIT: {-room:.1f} GiB too much"
    lines += [f"usable {plan.usable_bytes / GIB:.1f} GiB of {plan.gpu.memory_gib:g}: {verdict}", ""]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in vars(plan.step).items() if seconds >= 0.005)
    lines += [
        f"step {plan.step.total:.2f} s ({parts})",
        f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} (language model)",
    ]
    budget = tokens or recipe.train_iters * plan.tokens_per_step
    lines += [
        f"{budget / 1e9:,.1f}B tokens: {plan.days(budget):,.1f} days; kernel efficiencies are stated, not measured"
    ]
    return "\n".join([*lines, *advice(plan, others)])


def layout(plan: Plan) -> str:
    """The layout in one line."""
    p = plan.recipe.parallel
    dp = plan.world_size // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
    text = (
        f"TP{p.tensor_model_parallel_size} PP{p.pipeline_model_parallel_size} DP{dp} EP{p.expert_model_parallel_size}"
    )
    if p.expert_tensor_parallel_size > 1:
        text += f" ETP{p.expert_tensor_parallel_size}"
    return f"{text}, recompute {p.recompute}"


def advice(plan: Plan, others: list[Plan]) -> list[str]:
    """Layouts that fit, where this one does not or is slower; what else lowers the peak where none does."""
    if not others:
        return [
            "no layout of this recipe fits on so many GPUs. What lowers the peak: data.seq_length and data.max_frames, "
            "more parts in freeze, model.lora, more GPUs"
        ]
    if plan.fits and others[0].tokens_per_second < 1.05 * plan.tokens_per_second:
        return []
    lines = ["layouts that fit, fastest first:" if not plan.fits else "faster layouts that fit:"]
    for other in others[:SHOWN]:
        if not plan.fits or other.tokens_per_second > plan.tokens_per_second:
            p = other.recipe.parallel
            lines.append(
                f"  parallel.tensor_model_parallel_size={p.tensor_model_parallel_size} "
                f"parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size} "
                f"parallel.expert_model_parallel_size={p.expert_model_parallel_size} parallel.recompute={p.recompute}"
                f"  # {other.peak_bytes / GIB:.1f} GiB, {other.tokens_per_second:,.0f} tokens/s"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan, print."""
    options = parser().parse_intermixed_args(arguments)
    try:
        plan, others = plan_of(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(report(plan, others, tokens=options.tokens))
    return 0 if plan.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
