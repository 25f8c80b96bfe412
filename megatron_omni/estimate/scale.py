"""Layouts of a recipe on any number of GPUs, at its own batch and at larger ones.

The sequences of a step bound data parallelism: ``dp <= global_batch_size / micro_batch_size``. More GPUs than that need more
tensor, context or pipeline parallelism (of which the model allows so much), or a larger batch. So the batch is doubled, until
that makes the run no faster: how fast each is says what the recipe's own batch costs on so many GPUs. A larger batch is another
training: fewer steps over the same tokens, for which nobody has chosen a learning rate.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_omni.config.run import Recipe
from megatron_omni.estimate.activations import MicroBatch
from megatron_omni.estimate.plan import RECOMPUTE, Plan, laid_out, make_plan, model_parallel_sizes

GAIN = 1.1
"""A batch twice as large is worth a line where it makes the run faster by so much."""
LARGEST_FACTOR = 1024
MOST_BATCHES = 4
MOST_SPLITS = 3
CONTEXTS = (1, 2, 4)
"""Context-parallel sizes to look at."""


@dataclass(frozen=True, kw_only=True)
class AtBatch:
    """What can be done with so many sequences a step."""

    sequences: int
    factor: int
    """Times the recipe's own."""
    plans: list[Plan]
    """Layouts that fit, the fastest first."""
    tightest: Plan | None
    """Where none fits: the layout that needs least memory; None where no layout divides so few sequences."""


def at_batches(
    recipe: Recipe, *, world_size: int, batch_of: Callable[[Recipe], MicroBatch], **settings: Any
) -> Iterator[AtBatch]:
    """Layouts of ``recipe`` at its own batch and at 2, 4, 8, ... times it, while that is faster by ``GAIN``.

    Nothing where no batch helps: the recipe or the number of GPUs allows no layout. ``settings``: those of :func:`make_plan`.
    """
    best, factor, shown = 0.0, 1, 0
    while factor <= LARGEST_FACTOR and shown < MOST_BATCHES:
        found = at_batch(recipe, factor=factor, world_size=world_size, batch_of=batch_of, **settings)
        fastest = found.plans[0].tokens_per_second if found.plans else 0.0
        if best and fastest < GAIN * best:
            return
        if found.plans or found.tightest is not None or factor == 1:
            yield found
        if found.tightest is not None:
            return  # more micro-batches need no less memory
        best, factor, shown = fastest, 2 * factor, shown + bool(found.plans)


def at_batch(
    recipe: Recipe, *, factor: int, world_size: int, batch_of: Callable[[Recipe], MicroBatch], **settings: Any
) -> AtBatch:
    """The layouts of ``recipe`` with ``factor`` times its sequences a step: each with the least recomputation that fits, and of
    the ``MOST_SPLITS`` smallest replicas (TP x CP x PP ranks) that fit. Larger ones only add messages and waiting.
    """
    sequences = factor * recipe.data.global_batch_size
    larger = replace(recipe, data=replace(recipe.data, global_batch_size=sequences))
    fit: list[Plan] = []
    others: list[Plan] = []
    batches: dict[tuple[int, int, int], MicroBatch] = {}
    replicas: set[int] = set()
    crowded: set[tuple[int, int, int]] = set()
    """Replicas that do not fit without recomputation: fewer ranks for the experts are not looked at."""
    found = model_parallel_sizes(larger, world_size, contexts=CONTEXTS)
    for sizes in sorted(found, key=lambda sizes: (sizes.ranks, *sizes[:3], -sizes.ep)):
        if len(replicas) == MOST_SPLITS and sizes.ranks not in replicas:
            break
        if sizes[:3] in crowded:
            continue
        for recompute in RECOMPUTE:
            recipe = replace(larger, parallel=laid_out(larger, sizes, recompute=recompute))
            like = sizes.tp, sizes.cp, sizes.ep
            batches[like] = batches[like] if like in batches else batch_of(recipe)
            plan = make_plan(recipe, world_size=world_size, batch=batches[like], **settings)
            (fit if plan.fits else others).append(plan)
            if plan.fits:
                replicas.add(sizes.ranks)
                break
            crowded.add(sizes[:3])
    fit.sort(key=lambda plan: -plan.tokens_per_second)
    tightest = min(others, key=lambda plan: plan.peak_bytes, default=None) if not fit else None
    return AtBatch(sequences=sequences, factor=factor, plans=fit, tightest=tightest)


def fewest_sequences(recipe: Recipe, world_size: int) -> int | None:
    """Sequences of a step without which no layout leaves every one of ``world_size`` ranks something to do; None where there is
    no layout for another reason.
    """
    whole = replace(recipe, data=replace(recipe.data, global_batch_size=recipe.data.micro_batch_size * world_size))
    ranks = [sizes.ranks for sizes in model_parallel_sizes(whole, world_size, contexts=CONTEXTS)]
    return recipe.data.micro_batch_size * (world_size // max(ranks)) if ranks else None
