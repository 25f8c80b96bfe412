"""What a training objective provides to the loop.

The loop owns steps, schedules, the optimizer and logging; a task owns one thing, what a micro-batch's loss is. Tasks
live in ``tasks/`` and are handed to the loop by the command line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.models.moe.context import RoutingStats

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Model output of the last pipeline stage -> (scalar loss to differentiate, report table [rows, 2] of sums and
counts).
"""


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Facts of one step that every micro-batch of it shares."""

    step: int
    """1 for the first step of a run."""
    training: bool
    """False: evaluation, with deterministic routing and no auxiliary loss."""
    num_label_tokens: int
    """Label tokens of the global batch."""
    aux_loss_scale: float = 0.0
    """Coefficient of the MoE auxiliary loss / (MoE layers x micro-batches of the global step)."""
    stats: RoutingStats | None = None
    """Where routing statistics are added; None on steps that are not logged."""


class Task(Protocol):
    """One objective."""

    @property
    def report_names(self) -> Sequence[str]:
        """Metric name of every row of the report table; the first is the step's loss."""
        ...

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this rank's pipeline stage; the loss function is called on the last stage."""
        ...
