"""The weights that a run started from, beside those it trains: the reference of a KL divergence.

A copy of the trained parameters in main memory; frozen ones are the same in both. For a pass the two change places, on
every rank for itself, and afterwards the trained ones are back bit for bit.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def put_back(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Behind the block ``parameters`` are what they are now, whatever was written into them; kept in main memory."""
    kept = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, now in kept:
                parameter.copy_(now)


class StartWeights:
    """Of ``model`` as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(p, p.detach().to("cpu", copy=True)) for p in model.parameters() if p.requires_grad]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has them inside the block."""
        with put_back(parameter for parameter, _ in self._kept):
            with torch.no_grad():
                for parameter, start in self._kept:
                    parameter.copy_(start)
            yield
