"""``megatron-omni plan CHAIN --gpus N``: each stage of a chain on so many GPUs, at its batch and at larger ones.

A line is a layout that fits: the two fastest of each batch, micro-batches of a replica, the share of a step that the
slowest stage waits (bubble), the fullest rank's memory, seconds a step, tokens/s, MFU and hours for the stage's tokens. Tokens of a
stage are those of its recipe, whatever the batch.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_omni.chain import load_chain
from megatron_omni.config.load import read_mapping
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import num_micro_batches
from megatron_omni.estimate.plan import GIB, Plan
from megatron_omni.estimate.scale import AtBatch, at_batches, fewest_sequences

SHOWN = 2
"""Layouts of a batch."""
COLUMNS = ("sequences a step", "layout", "micro-batches", "bubble", "GiB", "s a step", "tokens/s", "MFU", "hours")
FOOT = (
    "bubble: share of a step that the slowest stage waits for the others. A larger batch means fewer steps over the same "
    "tokens: another training, whose learning rate nobody has chosen. Kernel efficiencies are stated, not measured"
)


def is_chain(path: str) -> bool:
    """Whether the file is a chain and no recipe; a file that cannot be read is left to who reads recipes."""
    try:
        return "stages" in read_mapping(Path(path), "recipe")
    except (OSError, ValueError):
        return False


def plan_chain(options: argparse.Namespace, table_of: Callable[[Recipe], tuple[list[str], bool]]) -> tuple[str, int]:
    """What is printed of the chain, and the exit status; ``table_of``: lines of a recipe, and whether a layout fits."""
    if options.tokens is not None:
        raise ValueError(f"--tokens {options.tokens:g}: a chain's stages have each their own; plan one of its recipes")
    chain = load_chain(Path(options.recipe), options.overrides)
    lines, fits = [f"chain {chain.name} on {options.gpus} x {options.gpu}"], True
    for stage in chain.stages:
        if stage.recipe is None:
            lines += ["", f"{stage.name}: trains nothing; one process, not planned"]
            continue
        found, fit = table_of(stage.recipe)
        lines += ["", f"{stage.name} ({stage.recipe_file}): {_size(stage.recipe)}", *found]
        fits = fits and fit
    return "\n".join([*lines, "", FOOT]), 0 if fits else 1


def _size(recipe: Recipe) -> str:
    data = recipe.data
    said = f"{_tokens(recipe) / 1e9:,.3g}B tokens in sequences of {data.seq_length:,}, {data.micro_batch_size} a micro-batch"
    return said + ("; the learning alone, not the sampling of answers" if recipe.task == "reinforce" else "")


def _tokens(recipe: Recipe) -> float:
    return float(recipe.train_iters) * recipe.data.global_batch_size * recipe.data.seq_length


def batch_table(
    recipe: Recipe,
    *,
    world_size: int,
    batch_of: Callable[[Recipe], Any],
    tokens: float | None,
    describe: Callable[[Plan], str],
    fill: float,
    **settings: Any,
) -> tuple[list[str], bool]:
    """Layouts by batch as lines, and whether any fits. ``tokens``: for the hours (default: the recipe's)."""
    budget = tokens or _tokens(recipe) * fill
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    fits = False
    for found in at_batches(recipe, world_size=world_size, batch_of=batch_of, fill=fill, **settings):
        rows += [_row(found, plan, describe(plan), budget) for plan in found.plans[:SHOWN]]
        fits = fits or bool(found.plans)
        if not found.plans:
            notes.append(_why_not(recipe, found, world_size, describe))
    return [*notes, *(_aligned(COLUMNS, rows) if rows else [])], fits


def _row(found: AtBatch, plan: Plan, described: str, budget: float) -> tuple[str, ...]:
    times = "" if found.factor == 1 else f" (x {found.factor})"
    return (
        f"{found.sequences:,}{times}",
        described,
        f"{num_micro_batches(plan.recipe, plan.world_size)}",
        f"{plan.step.bubble / plan.step.total:.0%}",
        f"{plan.peak_bytes / GIB:.1f}",
        f"{plan.step.total:.2f}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.mfu:.0%}",
        f"{24 * plan.days(budget):,.1f}",
    )


def _why_not(recipe: Recipe, found: AtBatch, world_size: int, describe: Callable[[Plan], str]) -> str:
    if found.tightest is not None:
        over = (found.tightest.peak_bytes - found.tightest.usable_bytes) / GIB
        return (
            f"{found.sequences:,} sequences a step: no layout fits; {describe(found.tightest)} comes nearest, {over:.1f} GiB "
            "too much. What lowers the peak: data.seq_length, data.max_frames, more parts in freeze, model.lora"
        )
    least = fewest_sequences(recipe, world_size)
    if least is None:
        return f"{world_size} GPUs: no layout of this recipe divides them, whatever its batch; try a multiple of 8"
    return (
        f"{found.sequences:,} sequences a step: too few for {world_size:,} GPUs, which no layout of this model shares among "
        f"fewer than {least:,}; raise data.global_batch_size, or take fewer GPUs"
    )


def _aligned(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns; the second, which is words, to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 1 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (head, *rows)
    ]
