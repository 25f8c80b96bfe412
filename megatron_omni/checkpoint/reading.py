"""Reading tensors of a checkpoint into the memory that they belong to, each byte from the disk by one rank.

A rank reads its own slice of the distributed optimizer's state, and its share of what all data-parallel ranks hold alike
(weights), straight into parameters and optimizer state; then the shares are broadcast. Beside what the run keeps anyway
this takes some buffers of ``STAGING_BYTES``, on no rank a second copy of anything.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint import CheckpointException

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.memory import broadcast_in_slices
from megatron_omni.checkpoint.shards import dealt
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.parallel.long_work import Work, long_work


def read_into_place(
    reader: TorchDistReader,
    *,
    own: Sequence[ShardedTensor],
    equal: Sequence[ShardedTensor],
    experts: set[str],
    pg: ProcessGroupCollection,
) -> None:
    """Fill the memory of ``own``, which only this rank reads, and of ``equal``, which the ranks of a data-parallel group
    hold alike (``experts``: which names are routed experts'); all ranks call this together.

    CheckpointError on every rank when any of them cannot read its part, naming the rank and the file.
    """
    shared = dealt(equal, experts, pg)
    ours = [*own, *(entry.tensor for entry in shared if entry.is_ours)]
    together(reader.directory, lambda work: _read(reader, ours, work))
    for tensor, group, owner in shared:
        if group.size() > 1:
            broadcast_in_slices(tensor.data, owner=owner, group=group)


@torch.no_grad()
def _read(reader: TorchDistReader, tensors: Sequence[ShardedTensor], work: Work) -> None:
    reader.moved = work.advance
    for tensor in tensors:
        reader.fill(tensor.key, tensor.global_offset, tensor.data.detach()[(None,) * tensor.prepend_axis_num])


def together[T](directory: Path, action: Callable[[Work], T]) -> T:
    """``action`` on every rank, without collectives; where it fails on any, CheckpointError on all, naming the first."""
    result, failure = None, None
    with long_work(f"reading {directory}") as work:
        try:
            result = action(work)
        except (Exception, CheckpointException) as error:  # one rank that ends here would leave the others waiting
            failure = f"[rank {dist.get_rank()}] {reason_of(error)}"
        first = work.exchange(
            failure, answer=lambda failures: next((text for text in failures if text is not None), None)
        )
    if first is not None:
        raise CheckpointError(first)
    return cast(T, result)


def reason_of(error: BaseException) -> str:
    """The error that started it: torch wraps the failures of all ranks, each with its traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"on rank {rank}: {inner}"
    if isinstance(error, (CheckpointError, ConversionError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
