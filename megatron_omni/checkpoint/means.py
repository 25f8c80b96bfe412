"""Running means of weights in a checkpoint (tasks/averages.py), read in the place of the weights.

They are ``optimizer.ema.NAME`` in fp32, because to a run that goes on they belong to the optimizer's state. Everyone else (drawing,
a later stage, export) reads the checkpoint by :class:`MeansReader`: where there is a mean, it is the weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.checkpoint.torch_dist import TorchDistReader

MEANS = "optimizer.ema."
"""Before a weight's name."""


class MeansReader(TorchDistReader):
    """As :class:`TorchDistReader`; weights that have a running mean are it, in their own type."""

    def fill(self, key: str, start: Sequence[int], target: Tensor) -> None:
        """See :meth:`TorchDistReader.fill`."""
        if f"{MEANS}{key}" not in self.tensors:
            return super().fill(key, start, target)
        mean = torch.empty(target.shape)
        super().fill(f"{MEANS}{key}", start, mean)
        target.copy_(mean)
