"""Flow-matching loss and its breakdown (formulas: models/generators/flow.py).

    loss = sum over pictures of the GLOBAL batch of mean over (c, h, w) of (v(x_t, t) - (x1 - x0))^2 / number of pictures

so that it depends neither on the layout nor on how pictures are dealt to micro-batches, and a large picture counts as a small
one. The report has the mean of all, of each task and of each quarter of t: where a model only copies its source, the late
quarters look good and the tasks that edit do not.

Shapes: B pictures of [C, h, w].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.losses.breakdown import sums_and_counts

NUM_QUARTERS = 4


def picture_losses(velocity: Tensor, wanted: Tensor) -> Tensor:
    """[B] fp32: mean squared error of each picture's ``velocity`` [B, C, h, w]."""
    return (velocity.float() - wanted.float()).square().flatten(1).mean(dim=1)


def flow_loss(losses: Tensor, *, num_images: int) -> Tensor:
    """This micro-batch's share of the training loss, from ``losses`` [B]; ``num_images``: of the global batch."""
    return losses.sum() / max(num_images, 1)


def flow_report(losses: Tensor, times: Tensor, tasks: Sequence[str], names: Sequence[str]) -> Tensor:
    """[1 + len(names) + 4, 2] float64 table of (sum of losses, pictures), rows as :func:`flow_report_names`.

    ``times`` [B] in [0, 1]; ``tasks``: the task of each picture, of ``names`` or another, which counts in no row of its own.
    """
    places = {name: place for place, name in enumerate(names)}
    task = torch.tensor([places.get(name, -1) for name in tasks], dtype=torch.int64, device=losses.device)
    quarter = (times.to(losses.device) * NUM_QUARTERS).long().clamp(0, NUM_QUARTERS - 1)
    members = torch.cat(
        [torch.ones(len(tasks), 1, device=losses.device), _one_hot(task, len(names)), _one_hot(quarter, NUM_QUARTERS)],
        dim=1,
    )
    return sums_and_counts(losses.detach().double(), members.double())


def flow_report_names(names: Sequence[str]) -> list[str]:
    """Metric name of every row of :func:`flow_report`."""
    return [
        "flow loss",
        *(f"flow loss/task/{name}" for name in names),
        *(f"flow loss/t{i}" for i in range(NUM_QUARTERS)),
    ]


def _one_hot(places: Tensor, count: int) -> Tensor:
    return (places[:, None] == torch.arange(count, device=places.device)).float()
