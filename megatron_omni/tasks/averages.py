"""Running means of trained weights, beside them: what a picture generator draws with (exponential moving average, EMA).

    mean <- d mean + (1 - d) weight        after every update,  d = min(decay, (1 + n) / (10 + n)),  n the updates so far

in fp32, of every trained parameter ``image.*`` as it is computed with (rounded under bf16); a skipped step changes nothing.
Each is kept by one rank of those that have the same weights, so that all of them cost 4 bytes a parameter once. Checkpoints have
them as ``optimizer.ema.NAME``, on any layout: a run that goes on continues with weights and means; whoever else reads the
checkpoint takes the means (checkpoint/means.py).
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_omni.checkpoint.means import MEANS
from megatron_omni.checkpoint.shards import deal
from megatron_omni.parallel.wrap import gather_weights, unwrap_model
from megatron_omni.training.setup import Run

PREFIX = "image."
"""Of the parameters that have a mean."""
WARM_UP = 10


class Averages:
    """This rank's share. ``updates``: those of the run that are in it."""

    def __init__(self, run: Run, *, decay: float) -> None:
        self.decay, self.updates = decay, run.state.updates
        named = [
            (n, p) for n, p in unwrap_model(run.model).named_parameters() if n.startswith(PREFIX) and p.requires_grad
        ]
        owners = deal([parameter.numel() for _, parameter in named], run.pg.dp_cp.size())
        self._own = {name: parameter for (name, parameter), owner in zip(named, owners) if owner == run.pg.dp_cp.rank()}
        self.means = {name: p.detach().float().clone() for name, p in self._own.items()}
        self._replica = (0, run.pg.tp.rank(), 0)

    @torch.no_grad()
    def follow(self, run: Run) -> None:
        """Take in the run's last update, if there was one since; all ranks together."""
        if run.state.updates == self.updates:
            return
        assert run.state.updates == self.updates + 1, "an update was not taken in"
        gather_weights(run.model)
        decay = min(self.decay, (1 + self.updates) / (WARM_UP + self.updates))
        if self.means:
            weights = [self._own[name].detach().float() for name in self.means]
            torch._foreach_lerp_([*self.means.values()], weights, 1 - decay)
        self.updates = run.state.updates

    def sharded(self) -> list[Any]:
        """As a checkpoint has them."""
        return [
            ShardedTensor.from_rank_offsets(f"{MEANS}{name}", mean, replica_id=self._replica)
            for name, mean in self.means.items()
        ]
