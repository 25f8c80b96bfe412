"""Will this recipe fit on so many GPUs, how long will it take, and what would fit better? Needs no GPU and no torch.

megatron-omni plan recipes/3_sft.yaml --gpus 64
megatron-omni plan recipes/layout/anneal_64x80gb.yaml --gpus 64 --tokens 50e9
megatron-omni plan RECIPE --gpus 32 parallel.pipeline_model_parallel_size=2 parallel.recompute=moe
megatron-omni plan recipes/chain.yaml --gpus 512

Memory of a rank by pipeline stage, for the heaviest micro-batch that the recipe is expected to meet (--tiles, --chunks,
--pictures, --label-share, --imbalance, --sample-length say what that is); then step time, tokens/s, MFU and days; where
pictures are drawn, their FLOPs; where there are pipeline stages, how long they wait for each other, and the cut of the blocks
whose slowest stage is fastest. Weights, gradients and optimizer state are exact and activations within a few per cent of what
autograd keeps (tests/distributed/test_plan.py, tests/unit/test_estimate_pictures.py). Times rest
on kernel efficiencies that are stated, not measured: see docs/parallelism.md.

Of a chain: for each stage the layouts that fit and what they cost, at the recipe's own batch and at larger ones (the same
table follows the error where a recipe's own layout cannot work on so many GPUs). Exit status: 0 fits, 1 does not (a stage
of a chain: at no batch), 2 bad input.
"""

import argparse
import sys
from math import inf
from pathlib import Path
from typing import Any

from megatron_omni.cli.plan_chain import batch_table, is_chain, plan_chain
from megatron_omni.config.load import load_recipe
from megatron_omni.config.outcome import EXIT_BAD_INPUT
from megatron_omni.config.parts import draws_alone
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import data_parallel_size, num_micro_batches, validate
from megatron_omni.estimate.activations import MicroBatch
from megatron_omni.estimate.hardware import GPUS, STATED, with_measured_experts
from megatron_omni.estimate.memory import offloaded_bytes
from megatron_omni.estimate.pictures import num_tokens, picture_flops, picture_forward
from megatron_omni.estimate.plan import (
    GIB,
    IMBALANCE,
    RESERVE_GIB,
    Plan,
    alternatives,
    heaviest_batch,
    make_plan,
    splits,
)

EXIT_DOES_NOT_FIT = 1
PACKED_FILL = 0.97
SHOWN = 4


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="megatron-omni plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("recipe", help="YAML recipe, or chain of recipes")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change (of a chain: in every stage)")
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
    p.add_argument("--pictures", type=float, help="pictures that a sequence draws in task generative (default 1)")
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


def check_options(options: argparse.Namespace) -> None:
    """ValueError for a number that cannot be."""
    for name in ("gpus", "tokens", "mean_k", "imbalance", "fill", "sample_length"):
        value = getattr(options, name)
        if value is not None and not 0 < value < inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be positive")
    for name in ("tiles", "chunks", "pictures", "reserve"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < inf:
            raise ValueError(f"--{name} {value}: must not be negative")
    if not 0 <= options.label_share <= 1:
        raise ValueError(f"--label-share {options.label_share}: must lie in [0, 1]")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`make_plan` is told of the GPU."""
    gpu = GPUS[options.gpu]
    efficiency = STATED if options.measured is None else with_measured_experts(STATED, options.measured, gpu)
    return {"gpu": gpu, "efficiency": efficiency, "reserve_gib": options.reserve}


def batch_of(recipe: Recipe, options: argparse.Namespace) -> MicroBatch:
    """The heaviest micro-batch that ``recipe`` is to be planned for."""
    return heaviest_batch(
        recipe,
        mean_k=options.mean_k,
        imbalance=options.imbalance,
        label_share=options.label_share,
        tiles=options.tiles,
        chunks=options.chunks,
        pictures=options.pictures,
        sample_length=options.sample_length,
    )


def filled(recipe: Recipe, options: argparse.Namespace) -> float:
    """Share of a sequence that is filled."""
    return float(options.fill or (PACKED_FILL if recipe.data.packing else 1.0))


def plan_of(options: argparse.Namespace) -> tuple[Plan, list[Plan], dict[str, Plan]]:
    """The plan, the layouts that would fit, and cuts of the blocks into stages; ValueError for bad input."""
    check_options(options)
    recipe = load_recipe(options.recipe, options.overrides)
    settings = settings_of(options)
    try:
        validate(recipe, world_size=options.gpus, check_files=False)
    except ValueError as error:
        table, fits = table_of(recipe, options)
        raise ValueError("\n".join([str(error), *table] if fits else [str(error)])) from error
    batch, fill = batch_of(recipe, options), filled(recipe, options)
    plan = make_plan(recipe, world_size=options.gpus, batch=batch, fill=fill, **settings)
    del settings["gpu"]
    return plan, alternatives(plan, **settings), splits(plan, **settings)


def table_of(recipe: Recipe, options: argparse.Namespace) -> tuple[list[str], bool]:
    """Layouts of ``recipe`` at its batch and at larger ones, as lines; whether any fits."""
    return batch_table(
        recipe,
        world_size=options.gpus,
        batch_of=lambda laid_out: batch_of(laid_out, options),
        tokens=options.tokens,
        describe=layout,
        fill=filled(recipe, options),
        **settings_of(options),
    )


def report(plan: Plan, others: list[Plan], cuts: dict[str, Plan], *, tokens: float | None) -> str:
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
        "activations: pictures": [s.drawing for s in plan.stages],
        "while a layer runs": [s.working for s in plan.stages],
        "peak": [s.total for s in plan.stages],
    }
    if not batch.pictures:
        del rows["activations: pictures"]
    lines += [name.ljust(24) + "".join(f"{v / GIB:10.1f}" for v in values) for name, values in rows.items()]
    room = (plan.usable_bytes - plan.peak_bytes) / GIB
    verdict = f"fits, {room:.1f} GiB to spare" if plan.fits else f"DOES NOT FIT: {-room:.1f} GiB too much"
    lines += [f"usable {plan.usable_bytes / GIB:.1f} GiB of {plan.gpu.memory_gib:g}: {verdict}"]
    if offloaded := offloaded_bytes(recipe, plan.world_size):
        lines += [
            f"main memory {offloaded / GIB:.1f} GiB a rank for the optimizer, whose updates there no seconds below count"
        ]
    lines += [""]
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in vars(plan.step).items() if seconds >= 0.005)
    lines += [f"step {plan.step.total:.2f} s ({parts})", *starved(plan)]
    if not draws_alone(recipe):
        lines += [f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} (language model)"]
    lines += drawing(plan)
    budget = tokens or recipe.train_iters * plan.tokens_per_step
    lines += [
        f"{budget / 1e9:,.1f}B tokens: {plan.days(budget):,.1f} days; kernel efficiencies are stated, not measured"
    ]
    return "\n".join([*lines, *pipeline(cuts), *advice(plan, others)])


def drawing(plan: Plan) -> list[str]:
    """What a picture and a step of them cost, where any are drawn."""
    recipe = plan.recipe
    if not plan.batch.pictures or recipe.model.image is None:
        return []
    forward, flops, count = picture_forward(recipe.model), picture_flops(recipe), plan.pictures_per_step
    return [
        f"{count / plan.step.total:,.1f} pictures/s, of {num_tokens(recipe.model.image)} patches: "
        f"{forward.generator / 1e12:.3g} TFLOP a forward of the generator, {forward.projectors / 1e12:.3g} of the projectors",
        f"{flops / 1e12:.3g} TFLOP a picture in training, {count * flops / 1e15:.3g} PFLOP a step of {count:,.0f}",
    ]


def pipeline(cuts: dict[str, Plan]) -> list[str]:
    """Stages of different lengths beside each other, and the setting that gives the proposed ones."""
    if not cuts:
        return []
    lines = ["blocks of the stages".ljust(34) + "slowest, s   waiting    step, s  fullest, GiB"]
    for name, plan in cuts.items():
        blocks = f"  {name}: {', '.join(map(str, plan.blocks))}"
        lines.append(
            f"{blocks:34}{max(plan.stage_seconds):10.3f}{plan.bubble:10.1%}{plan.step.total:11.2f}{plan.peak_bytes / GIB:14.1f}"
        )
    given, best = next(iter(cuts.values())), min(cuts.values(), key=lambda plan: max(plan.stage_seconds))
    if best is given:
        return [*lines, "  the slowest stage is as fast as any cut makes it"]
    return [*lines, f"  'parallel.pipeline_layout={best.blocks}'{'' if best.fits else '  # does not fit'}"]


def starved(plan: Plan) -> list[str]:
    """What too few micro-batches cost, where there are too few."""
    stages, rounds = plan.recipe.parallel.pipeline_model_parallel_size, num_micro_batches(plan.recipe, plan.world_size)
    if rounds >= stages:
        return []
    return [
        f"{rounds} micro-batch(es) for {stages} stages: {plan.step.bubble / plan.step.total:.0%} of the step is spent waiting; "
        "raise data.global_batch_size, or take fewer stages or GPUs"
    ]


def layout(plan: Plan) -> str:
    """The layout in one line."""
    p = plan.recipe.parallel
    dp = data_parallel_size(p, plan.world_size)
    cp = f" CP{p.context_parallel_size}" if p.context_parallel_size > 1 else ""
    text = f"TP{p.tensor_model_parallel_size}{cp} PP{p.pipeline_model_parallel_size} DP{dp} EP{p.expert_model_parallel_size}"
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
            p, own = other.recipe.parallel, plan.recipe.parallel
            cut = "" if p.pipeline_layout == own.pipeline_layout else " parallel.pipeline_layout=[]"
            cp = f"parallel.context_parallel_size={p.context_parallel_size} " if p.context_parallel_size > 1 else ""
            lines.append(
                f"  {cp}parallel.tensor_model_parallel_size={p.tensor_model_parallel_size} "
                f"parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size} "
                f"parallel.expert_model_parallel_size={p.expert_model_parallel_size} parallel.recompute={p.recompute}"
                f"{cut}"
                f"  # {other.peak_bytes / GIB:.1f} GiB, {other.tokens_per_second:,.0f} tokens/s"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan, print."""
    options = parser().parse_intermixed_args(arguments)
    try:
        if is_chain(options.recipe):
            check_options(options)
            text, status = plan_chain(options, lambda recipe: table_of(recipe, options))
            print(text)
            return status
        plan, others, cuts = plan_of(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(report(plan, others, cuts, tokens=options.tokens))
    return 0 if plan.fits else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
