"""Training of a speech generator (``model.speech``): the supervised task, and how many codes it would get right.

accuracy/codes    share of the codes that are the most probable token where they stand, all before them given
accuracy/end      the same of ``codes_end``: where it is low, speech does not end by itself
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.generators import SpeechIds
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.training.task import LossFunction, StepInfo

ACCURACIES = ("accuracy/codes", "accuracy/end")


class SpeechTask(SupervisedTask):
    """Cross entropy of codes and their end; ``ids`` of the generator."""

    asked: ClassVar = {"with_top": True}
    held_out_names = ACCURACIES

    def __init__(self, sources: Sequence[SourceConfig], ids: SpeechIds) -> None:
        super().__init__(sources)
        self.ids = ids
        self.report_names = [*self.report_names, *ACCURACIES]

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`megatron_omni.training.task.Task`."""
        output, loss_of = super().forward_step(batch, model, info=info)

        def loss_function(found: Tensor) -> tuple[Tensor, Tensor]:
            token_loss, is_top = found
            loss, report = loss_of(token_loss)
            return loss, torch.cat([report, accuracy_report(is_top, batch, end=self.ids.codes_end)])

        return output, loss_function


def accuracy_report(is_top: Tensor, batch: OmniBatch, *, end: int) -> Tensor:
    """[2, 2] float64: (most probable, all) codes and ends, from ``is_top`` [B, S], 1 where a label is the most probable."""
    right, labels = (grid.t().flatten().index_select(0, batch.label_places) for grid in (is_top.detach(), batch.labels))
    ends = (labels == end).double()
    members = torch.stack([1 - ends, ends], dim=1)
    return torch.stack([right.double() @ members, members.sum(dim=0)], dim=1)
