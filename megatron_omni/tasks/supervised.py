"""Supervised training: next-token prediction on assistant turns (stages 1 to 4 of the recipe chain).

The model's last stage returns per-token cross-entropy; ``losses/lm.py`` turns it into the loss and its breakdown.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.data import SourceConfig
from megatron_omni.losses.lm import lm_loss, loss_report, report_names
from megatron_omni.training.task import LossFunction, StepInfo, Task


class SupervisedTask(Task):
    """Language-model loss over the label tokens of the batch; ``sources`` in the order of the batch's source ids."""

    asked: ClassVar[Mapping[str, bool]] = {}
    """What the model is asked for beside the loss."""
    stochastic = True
    """Whether routing in training is as where the mixture learns: drawn, where its settings say so."""

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        self.num_sources = len(sources)
        self.report_names: Sequence[str] = report_names([source.name for source in sources])
        weights = [source.loss_weight for source in sources]
        self._loss_weights = torch.tensor(weights) if any(weight != 1.0 for weight in weights) else None

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`megatron_omni.training.task.Task`."""
        output = model(
            batch,
            step=info.step,
            stochastic=info.training and self.stochastic,
            aux_loss_scale=info.aux_loss_scale,
            stats=info.stats,
            **self.asked,
        )

        def loss_function(token_loss: Tensor) -> tuple[Tensor, Tensor]:
            weight = None
            if self._loss_weights is not None and info.training:
                self._loss_weights = self._loss_weights.to(token_loss.device)  # once: it waits for the device
                weight = self._loss_weights[batch.source_ids.clamp(min=0)]
            loss = lm_loss(token_loss, batch.labels, num_label_tokens=info.divisor, token_weight=weight)
            return loss, loss_report(token_loss, batch, num_sources=self.num_sources)

        return output, loss_function
