"""Sampler against training, once an iteration: what each said of the same tokens by the same weights, and whether routers
chose the same experts.

A response whose log-probabilities differ too much (losses/mismatch.py) is left out of the loss; its record is named in the
log. Where too many do, or logits of training are no numbers, the run ends. Routes of a response flip where a router of the
old-log-probability pass would choose other experts for a token than it did when the token was sampled; that pass replays
what ``reinforce.routes`` says, so with ``rollout`` a flip is not followed by others in the layers behind it.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_omni.losses.mismatch import DROPPED_LIMIT, LIMIT, mismatch
from megatron_omni.tasks.figures import Figures
from megatron_omni.tasks.iteration import Iteration, MicroBatch
from megatron_omni.training.setup import Run

logger = logging.getLogger(__name__)

FLIPPED_LIMIT = 1e-3
"""Share of (token, layer) that flip above which replaying the routes of the rollout is worth while."""
_NAMED = 3
"""Responses that are named in the log, of those that are left out."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A response that is left out."""

    number: int
    g: int
    where: str
    """The prompt's record."""
    mismatch: float
    flips: int | None
    """Routes of its tokens that flipped; None where there are none."""


def compare(run: Run, iteration: Iteration) -> Figures:
    """Leave out the responses whose log-probabilities differ too much; figures of all ranks, on all of them, which call this
    together. RuntimeError where too many do."""
    own, dropped = Figures(), list[Dropped]()
    if run.place.is_last_stage and run.place.is_first:
        for micro in (micro for mini in iteration.micro_batches for micro in mini):
            dropped += _compared(run, iteration, micro, own)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own.plain(), dropped))
    figures = Figures()
    figures.merge(part for part, _ in everyone)
    gone = [response for _, responses in everyone for response in responses]
    for response in gone:
        if response.number in iteration.responses:
            iteration.responses[response.number][response.g].kept = False
    total = run.recipe.reinforce.group_size * sum(len(micro) for mini in iteration.steps for micro in mini)
    figures.add("rollout/dropped", len(gone), total)
    if gone:
        said = _said(iteration.number, gone, total)
        if len(gone) > DROPPED_LIMIT * total:
            raise RuntimeError(f"{said}: more than {DROPPED_LIMIT:.0%}; the ratio would compare two models")
        if dist.get_rank() == 0:
            logger.warning("%s: left out of the loss", said)
    return figures


def advise(figures: Figures, *, routes: str) -> str | None:
    """What to do about an iteration's flips, where they are many and not replayed."""
    flipped = figures.metrics().get("rollout/route_flips", 0.0)
    if routes == "rollout" or flipped <= FLIPPED_LIMIT:
        return None
    return (
        f"rollout/route_flips is {flipped:.2%}: training chooses other experts than the sampler did for that share of "
        "(token, layer); set reinforce.routes=rollout to train the experts that answered"
    )


def _compared(run: Run, iteration: Iteration, micro: MicroBatch, figures: Figures) -> list[Dropped]:
    """Those of a micro-batch that differ too much; figures of all."""
    assert micro.old is not None
    lengths = micro.where.lengths
    figures.add("entropy", micro.entropy, int(lengths.sum()))
    if micro.flips is not None:
        layers = run.recipe.model.num_layers
        figures.add("rollout/route_flips", int(micro.flips.sum()), layers * int(lengths.sum()))
    if run.recipe.reinforce.temperature != 1.0:  # the sampler's are at 1
        return []
    sampled = torch.zeros_like(micro.old, dtype=torch.float64)
    for row, (number, g) in enumerate(micro.order):
        told = iteration.responses[number][g].log_probs
        sampled[row, : len(told)] = torch.tensor(told, dtype=torch.float64)
    found = mismatch(micro.old, sampled, micro.where.valid)
    figures.add("rollout/mismatch", float((found.token * lengths).sum()), int(lengths.sum()))
    if len(lengths):
        figures.raise_to("rollout/mismatch_max", float(found.sequence.max()))
    flips = None if micro.flips is None else micro.flips.tolist()
    return [
        Dropped(
            number=number,
            g=g,
            where=iteration.places[number],
            mismatch=float(found.sequence[row]),
            flips=None if flips is None else flips[row],
        )
        for row, (number, g) in enumerate(micro.order)
        if found.dropped[row]
    ]


def _said(iteration: int, gone: list[Dropped], total: int) -> str:
    worst = sorted(gone, key=lambda response: -response.mismatch)[:_NAMED]
    named = "; ".join(
        f"{response.where}, response {response.g}: {response.mismatch:.3g}"
        + (f", {response.flips} routes flipped" if response.flips is not None else "")
        for response in worst
    )
    return (
        f"iteration {iteration}: {len(gone)} of {total} responses have other log-probabilities in training than when "
        f"they were sampled, by more than {LIMIT} a token on average ({named})"
    )
