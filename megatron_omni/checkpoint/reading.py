"""Reading tensors of a checkpoint into the memory that they belong to, each byte from the disk by one rank.

A rank reads its own slice of the distributed optimizer's state, and its share of what all data-parallel ranks hold alike
(weights), straight into parameters and optimizer state; then the shares are broadcast. Beside what the run keeps anyway
this takes some buffers of ``STAGING_BYTES``, on no rank a second copy of anything.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.memory import broadcast_in_slices
from megatron_omni.checkpoint.shards import dealt
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.parallel.long_work import Work, long_work


def read_into_place(
    directory: Path,
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
    with long_work(f"reading {directory}") as work:
        failures = work.exchange(_read(directory, [*own, *(entry.tensor for entry in shared if entry.is_ours)], work))
    if failed := [failure for failure in failures if failure is not None]:
        raise CheckpointError(failed[0])
    for tensor, group, owner in shared:
        if group.size() > 1:
            broadcast_in_slices(tensor.data, owner=owner, group=group)


@torch.no_grad()
def _read(directory: Path, tensors: Sequence[ShardedTensor], work: Work) -> str | None:
    """What went wrong on this rank."""
    try:
        reader = TorchDistReader(directory, moved=work.advance)
        for tensor in tensors:
            reader.fill(tensor.key, tensor.global_offset, tensor.data.detach()[(None,) * tensor.prepend_axis_num])
    except Exception as error:  # one rank that ends here would leave the others waiting
        text = str(error) if isinstance(error, (CheckpointError, ValueError)) else f"{type(error).__name__}: {error}"
        return f"[rank {dist.get_rank()}] {text}"
    return None
