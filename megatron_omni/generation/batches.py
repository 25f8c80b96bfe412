"""Many prompts: built a window at a time, batched by length and dealt to the data-parallel ranks.

Prompts go to the ranks in turn; within a window of some batches each rank sorts its own by length, so that the rows of
a batch need about the same padding. Every rank makes the same number of :func:`generate` calls, some perhaps with
nothing to answer, because with expert parallelism they need one another.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.data.sample import Sample
from megatron_omni.generation.engine import generate

BATCHES_PER_WINDOW = 8
"""Batches of prompts whose media are held in memory together."""


def generate_all(
    model: nn.Module, build_prompt: Callable[[int], Sample | None], num_prompts: int, **settings: Any
) -> dict[int, list[int]]:
    """Token ids of the answer to every prompt, by its number: all windows of :func:`generate_windows`."""
    windows = generate_windows(model, build_prompt, range(num_prompts), **settings)
    return {n: answer for _, answers in windows for n, answer in answers.items()}


def generate_windows(
    model: nn.Module,
    build_prompt: Callable[[int], Sample | None],
    prompts: range,
    *,
    batch_size: int,
    pg: ProcessGroupCollection,
    **settings: Any,
) -> Iterator[tuple[range, dict[int, list[int]]]]:
    """Token ids of the answers to some prompts at a time, the same on every rank; all ranks call this together.

    Yields the numbers of a window and the answers by number. ``build_prompt(n)`` is called once for each n of
    ``prompts``, on one data-parallel rank; None leaves the prompt out. ``settings`` are those of :func:`generate`; a
    prompt's number names it for the sampler, so that an answer depends on nothing else that is asked.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rank, ranks = pg.dp.rank(), pg.dp.size()
    window = batch_size * ranks * BATCHES_PER_WINDOW
    for start in range(0, len(prompts), window):
        numbers = prompts[start : start + window]
        answers: dict[int, list[int]] = {}
        mine = [(n, prompt) for n in numbers[rank::ranks] if (prompt := build_prompt(n)) is not None]
        mine.sort(key=lambda item: -item[1].length)  # longest first: what does not fit in memory fails at once
        for first in range(0, -(-len(numbers) // ranks), batch_size):
            names = [n for n, _ in mine[first : first + batch_size]]
            batch = [prompt for _, prompt in mine[first : first + batch_size]]
            answers |= zip(names, generate(model, batch, rows=names, pg=pg, **settings), strict=True)
        yield numbers, joined(answers, pg)


def joined(mine: dict[int, Any], pg: ProcessGroupCollection) -> dict[int, Any]:
    """What every data-parallel rank has, by prompt; all of them call this together."""
    if pg.dp.size() == 1:
        return mine
    parts: list[dict[int, Any]] = [{}] * pg.dp.size()
    dist.all_gather_object(parts, mine, group=pg.dp)
    return {n: value for part in parts for n, value in part.items()}
