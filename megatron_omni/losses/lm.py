"""Next-token loss: from per-token cross-entropy to the training loss and its breakdown.

    loss = sum over label tokens of the GLOBAL batch of w(source) ce(token) / number of label tokens of the global batch

with w the source's ``loss_weight``, 1 unless the recipe says otherwise.

The divisor is known before the first forward of a step (``training/loop.py`` sums it over the data-parallel ranks),
so every micro-batch contributes ``sum / divisor`` and gradients are summed, not averaged: the loss does not depend on
how samples are dealt to ranks or packed into micro-batches.

The breakdown is a table of (sum of ce, count) over label tokens, by modality and source (breakdown.py), that is added
over micro-batches, ranks and steps: ``lm loss``, ``loss/modality/{text,image,video,audio}``, ``loss/source/<name>``.

Shapes: B rows, S tokens a row.
"""

from collections.abc import Sequence

from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, OmniBatch
from megatron_omni.losses.breakdown import membership, row_names, sums_and_counts


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
    sources = labelled(batch.source_ids)
    return sums_and_counts(losses, membership(labelled(batch.sample_modalities), sources, num_sources=num_sources))


def report_names(source_names: Sequence[str]) -> list[str]:
    """Metric name of every row of :func:`loss_report`."""
    return ["lm loss", *row_names(source_names, "loss")]
