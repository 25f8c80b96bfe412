"""Many prompts: built a window at a time, batched by length and dealt to the data-parallel ranks.

Prompts go to the ranks in turn; within a window of some batches each rank sorts its own by length, so that the rows of
a batch need about the same padding. Every rank makes the same number of :func:`generate` calls, some perhaps with
nothing to answer, because with expert parallelism they need one another.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.data.sample import Sample
from megatron_omni.generation.engine import generate

BATCHES_PER_WINDOW = 8
"""Batches of prompts whose media are held in memory together."""


def generate_all(
    model: nn.Module,
    build_prompt: Callable[[int], Sample | None],
    num_prompts: int,
    *,
    batch_size: int,
    pg: ProcessGroupCollection,
    **settings: Any,
) -> dict[int, list[int]]:
    """Token ids of the answer to every prompt, by its number, the same on every rank; all ranks call this together.

    ``build_prompt(n)`` is called once for each n in [0, num_prompts), on one data-parallel rank; None leaves the prompt
    out. ``settings`` are those of :func:`generate`; a prompt's number names its row for the sampler.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    rank, ranks = pg.dp.rank(), pg.dp.size()
    answers: dict[int, list[int]] = {}
    window = batch_size * ranks * BATCHES_PER_WINDOW
    for start in range(0, num_prompts, window):
        numbers = range(start, min(start + window, num_prompts))
        mine = [(n, prompt) for n in numbers[rank::ranks] if (prompt := build_prompt(n)) is not None]
        mine.sort(key=lambda item: -item[1].length)  # longest first: what does not fit in memory fails at once
        for first in range(0, -(-len(numbers) // ranks), batch_size):
            rows = [n for n, _ in mine[first : first + batch_size]]
            prompts = [prompt for _, prompt in mine[first : first + batch_size]]
            answers |= zip(rows, generate(model, prompts, rows=rows, pg=pg, **settings), strict=True)
    if ranks > 1:
        parts: list[dict[int, list[int]]] = [{}] * ranks
        dist.all_gather_object(parts, answers, group=pg.dp)
        answers = {n: answer for part in parts for n, answer in part.items()}
    return answers
