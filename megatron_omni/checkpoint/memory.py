"""Memory of saves and loads: copies in slices, and main memory that is kept from save to save.

Between a device and main memory, and between ranks, at most ``STAGING_BYTES`` are on their way: a copy to or from a view
that is not contiguous makes a contiguous one of its own first.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.estimate.memory import STAGING_BYTES


class SaveMemory:
    """Main memory for what a background save copies: this rank's share of the checkpoint."""

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}
        self.is_known = False
        """Whether the ranks have compared what each of them saves."""

    def copy(self, tensor: Tensor, *, key: tuple[Any, ...]) -> Tensor:
        """A contiguous copy of ``tensor`` in memory that the next copy of the same ``key`` uses again.

        Fresh memory costs more than the copy: the system has to map and clear every page of it.
        """
        key = (*key, tensor.shape, tensor.dtype)
        if key not in self._memory:
            # Flat in its own storage: Megatron's writer would copy a slice of a larger one again.
            self._memory[key] = torch.empty(tensor.numel(), dtype=tensor.dtype)
        return copy_in_slices(self._memory[key].view(tensor.shape), tensor)


def to_main_memory(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous and in main memory."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    return copy_in_slices(torch.empty(tensor.shape, dtype=tensor.dtype), tensor)


def copy_in_slices(target: Tensor, source: Tensor) -> Tensor:
    """``target.copy_(source)`` by slices of at most ``STAGING_BYTES``."""
    for part, values in zip(slices(target), slices(source), strict=True):
        part.copy_(values)
    return target


@torch.no_grad()
def broadcast_in_slices(tensor: Tensor, *, owner: int, group: dist.ProcessGroup) -> None:
    """Give ``tensor`` of the ``owner`` (its rank in ``group``) to all ranks of the group."""
    source = dist.get_global_rank(group, owner)
    for part in slices(tensor.detach()):
        sent = part if part.is_contiguous() else part.contiguous()
        dist.broadcast(sent.view(-1).view(torch.uint8), source, group=group)
        if sent is not part:
            part.copy_(sent)


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most ``STAGING_BYTES`` that make up ``tensor``, cut along its first axes."""
    if tensor.nbytes <= STAGING_BYTES or tensor.ndim == 0:
        yield tensor
        return
    entry = math.prod(tensor.shape[1:]) * tensor.itemsize
    if entry > STAGING_BYTES:
        for row in tensor:
            yield from slices(row)
    else:
        yield from tensor.split(STAGING_BYTES // entry)
