"""Learning from preferences: DPO (losses/dpo.py) on pairs of responses (data/pairs.py).

A row of a micro-batch is a pair. The reference is the weights that the run starts from, so it takes no second model: its
two log-probabilities of every pair that the run will read are computed by one pass without gradients before the first
step, in the micro-batches of the steps themselves, and kept beside the run (reference.py). Routing is deterministic and
nothing else is drawn: at step 1 both passes agree to the bit, and every pair's loss is ln 2.

Means over pairs since the last record, each also by modality and source: the loss, the share of pairs whose margin is
positive (``accuracy``), the margin, and the policy's log-probability of chosen and of rejected responses. Of the last
two look at both: a margin grows as well where both fall.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.data.responses import Responses, responses_of
from megatron_omni.losses.breakdown import membership, row_names, sums_and_counts
from megatron_omni.losses.dpo import dpo_loss, pair_sums
from megatron_omni.parallel.sharing import StepData
from megatron_omni.tasks.reference import Reference, complete_reference
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.setup import Run
from megatron_omni.training.task import Interrupted, LossFunction, StepInfo, Task

MEASURED = ("accuracy", "margin", "chosen", "rejected")


class PreferenceTask(Task):
    """DPO over the pairs of the batch."""

    def __init__(self, recipe: Recipe) -> None:
        names = [source.name for source in recipe.data.sources]
        self.config, self.num_sources = recipe.preference, len(names)
        self.reference: Reference | None = None
        self._begun_with: str | None = None
        rows = {"dpo loss": "loss"} | {f"preference/{name}": f"preference/{name}" for name in MEASURED}
        self.report_names = [name for first, rest in rows.items() for name in (first, *row_names(names, rest))]

    def prepare(self, run: Run, *, stop: Callable[[], bool], moved: Callable[[], None]) -> None:
        """Compute what the reference lacks."""
        self.reference = complete_reference(run, expected=self._begun_with, stop=stop, moved=moved)
        if self.reference is None:
            raise Interrupted("stopped while the reference was computed; the next start goes on there")

    def batches(
        self, run: Run, *, timer: PartTimer, stop: Callable[[], bool], written: Callable[[], bool]
    ) -> tuple[StepData | None, dict[str, int]]:
        """Pairs."""
        batches, totals = super().batches(run, timer=timer, stop=stop, written=written)
        return batches, totals | {"divisor": totals["samples"]}

    def state_dict(self, run: Run) -> dict[str, Any]:
        """Which reference the run began with."""
        return {"reference": self._begun_with if self.reference is None else self.reference.digest}

    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """The run must find the same again."""
        self._begun_with = state["reference"]

    def forward_step(self, batch: OmniBatch, model: torch.nn.Module, *, info: StepInfo) -> tuple[Tensor, LossFunction]:
        """See :class:`megatron_omni.training.task.Task`."""
        output = model(batch, step=info.step, stochastic=False, stats=info.stats)

        def loss_function(token_loss: Tensor) -> tuple[Tensor, Tensor]:
            assert self.reference is not None
            found = responses_of(batch)
            sums, lengths = pair_sums(found.of(-token_loss), found.valid), found.lengths.view(-1, 2)
            reference = self.reference.of(_pairs(found, batch.sample_ids), held_out=info.held_out)
            terms = dpo_loss(
                sums,
                reference,
                lengths,
                num_pairs=info.divisor,
                beta=self.config.beta,
                label_smoothing=self.config.label_smoothing,
                length_normalized=self.config.length_normalized,
                sft_weight=self.config.sft_weight,
            )
            members = membership(
                _pairs(found, batch.sample_modalities), _pairs(found, batch.source_ids), num_sources=self.num_sources
            ) * (lengths > 0).all(1, keepdim=True)
            chosen, rejected = sums.detach().unbind(1)
            values = [terms.losses, (terms.margins > 0).double(), terms.margins, chosen, rejected]
            return terms.loss, torch.cat([sums_and_counts(value, members) for value in values])

        return output, loss_function


def _pairs(found: Responses, grid: Tensor) -> Tensor:
    """[P] of ``grid`` [B, S], which is the same for all tokens of a pair."""
    return found.facts(grid)[::2]
