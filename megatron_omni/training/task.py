"""What a training objective provides to the loop.

The loop owns steps, schedules, the optimizer, logging and checkpoints; a task owns what a step is made of and what the loss
of a micro-batch is. Tasks live in ``tasks/`` and are handed to the loop by the command line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.parallel.sharing import StepData
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.step_data import next_batches

if TYPE_CHECKING:
    from megatron_omni.training.setup import Run

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Model output of the last pipeline stage -> (scalar loss to differentiate, report table [rows, 2] of sums and
counts).
"""


class Interrupted(Exception):
    """The next step cannot be had now, on any rank: the run is saved as it stands and leaves with 75. The text says why."""


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """Facts of one step that every micro-batch of it shares."""

    step: int
    """1 for the first step of a run."""
    training: bool
    """False: evaluation, with deterministic routing and no auxiliary loss."""
    divisor: int
    """What the loss is a mean over, of the global batch: label tokens (supervised), responses, pairs."""
    num_images: int = 0
    """Pictures that the answers of the global batch draw."""
    aux_loss_scale: float = 0.0
    """Coefficient of the MoE auxiliary loss / (MoE layers x micro-batches of the global step)."""
    stats: RoutingStats | None = None
    """Where routing statistics are added; None on steps that are not logged."""
    held_out: str = ""
    """Name of the held-out set that is evaluated."""


class Task(Protocol):
    """One objective. What a supervised one need not know has a body here; tasks inherit from this class."""

    report_names: Sequence[str]
    """Metric name of every row of the report table; the first is the step's loss."""
    held_out_names: Sequence[str] = ()
    """Those of its rows that are also reported of held-out sets, as ``eval/ROW/SET``."""
    watches_loss: bool = True
    """Whether a step whose loss is far above the others' is worth a report (training/incidents.py)."""

    def begin(self, run: "Run") -> None:
        """The run is set up and not resumed yet: what would end it later is looked for here. All ranks together."""
        return

    def prepare(self, run: "Run", *, stop: Callable[[], bool], moved: Callable[[], None]) -> None:
        """What a start does before its first step, however long it takes: ``moved`` is called now and then. Interrupted, on
        all ranks, where one was asked to ``stop``."""
        return

    def batches(
        self, run: "Run", *, timer: PartTimer, stop: Callable[[], bool], written: Callable[[], bool]
    ) -> tuple[StepData | None, dict[str, int]]:
        """This rank's micro-batches of the next step, and the counts of :func:`next_batches` over all ranks, among them
        ``divisor``. None instead of micro-batches where the step has nothing to learn, on all ranks: it is skipped.

        ``run.state.step`` is that of the step before. Errors as in :func:`next_batches`, and Interrupted.
        """
        return next_batches(run, run.step_loader, timer=timer, stop=stop, written=written)

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch through this rank's pipeline stage; the loss function is called on the last stage. With
        ``info.training`` off it is one of a held-out set."""
        ...

    def metrics(self, run: "Run") -> dict[str, float]:
        """What a record holds beside the report table, of the steps since the last one; all ranks together."""
        return {}

    def state_dict(self, run: "Run") -> dict[str, Any]:
        """What a checkpoint holds of the task, the same on every rank; all ranks together."""
        return {}

    def own_tensors(self, run: "Run") -> list[Any]:
        """Sharded tensors of the task, which checkpoints hold beside weights and optimizer: each whole, of this rank alone or
        equal on tensor-parallel ranks. All ranks together, before a save and before a load, which fills them."""
        return []

    def load_state_dict(self, run: "Run", state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same task, perhaps of another layout; before the loader does."""
        return

    def close(self) -> None:
        """The run is over, whatever happened."""
        return
