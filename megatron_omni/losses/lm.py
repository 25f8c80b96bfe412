"""Next-token loss: from per-token cross-entropy to the training loss and its breakdown.

    loss = sum over label tokens of the GLOBAL batch of w(source) ce(token) / number of label tokens of the global batch

with w the source's ``loss_weight``, 1 unless the recipe says otherwise.

The divisor is known before the first forward of a step (``training/loop.py`` sums it over the data-parallel ranks),
so every micro-batch contributes ``sum / divisor`` and gradients are summed, not averaged: the loss does not depend on
how samples are dealt to ranks or packed into micro-batches.

The breakdown is a table of (sum of ce, count) rows over label tokens, float64, that is added over micro-batches, ranks and
steps and divided only where it is printed:

    row 0                 every label token                                   ``lm loss``
    rows 1..4             tokens of samples that contain the modality         ``loss/modality/{text,image,video,audio}``
    rows 5..5+sources     tokens of samples from one source of the mixture    ``loss/source/<name>``

A sample with a picture and a sound counts in ``image`` and in ``audio``; ``text`` is the samples without any media.

Shapes: B rows, S tokens a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch

NUM_MODALITIES = len(Modality)


def lm_loss(token_loss: Tensor, labels: Tensor, *, num_label_tokens: int, token_weight: Tensor | None = None) -> Tensor:
    """This micro-batch's share of the training loss: sum over its label tokens, divided by those of the global batch.

    ``token_weight`` [B, S]: factor on each token's loss.
    """
    learned = token_loss.masked_fill(labels == IGNORE_LABEL, 0.0)
    if token_weight is not None:
        learned = learned * token_weight
    return learned.sum() / max(num_label_tokens, 1)


def loss_report(token_loss: Tensor, batch: OmniBatch, *, num_sources: int) -> Tensor:
    """[1 + 4 + num_sources, 2] float64 table of (sum of losses, number of label tokens)."""

    def labelled(grid: Tensor) -> Tensor:
        return grid.t().flatten().index_select(0, batch.label_places)

    losses = labelled(token_loss.detach()).double()
    bit = torch.arange(NUM_MODALITIES, device=losses.device)
    by_modality = labelled(batch.sample_modalities).unsqueeze(1).bitwise_right_shift(bit).bitwise_and(1).double()
    source = torch.arange(num_sources, device=losses.device)
    by_source = (labelled(batch.source_ids).unsqueeze(1) == source).double()
    membership = torch.cat([torch.ones_like(losses).unsqueeze(1), by_modality, by_source], dim=1)
    return torch.stack([losses @ membership, membership.sum(dim=0)], dim=1)


def report_names(source_names: Sequence[str]) -> list[str]:
    """Metric name of every row of :func:`loss_report`."""
    modalities = [f"loss/modality/{modality.name.lower()}" for modality in Modality]
    return ["lm loss", *modalities, *(f"loss/source/{name}" for name in source_names)]
