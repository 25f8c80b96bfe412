"""The sums of a step's gradients over ranks, once every backward is done.

    data parallel     each rank's gradients are of its own micro-batches: Megatron's buckets, all-reduced or, with the
                      distributed optimizer, reduce-scattered, so that a rank has the sum of what it will update
    tensor parallel   parameters that are whole on every rank of the group but met only a part of the tokens or inputs there
                      (norms, gate, shared experts, encoders, rows of new tokens); marked ``sequence_parallel``
    pipeline          a tied vocabulary, which the first and the last stage hold

Megatron's ``finalize_model_grads`` joins the second kind in a flat copy, 8 GiB at full size, and adds up all of it. Here the
buffers are added up where they lie, and only a rank's own share of them.
"""

from collections.abc import Iterator
from itertools import groupby

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.parallel.wrap import unwrap_model


def sum_gradients(model: DistributedDataParallel, pg: ProcessGroupCollection) -> None:
    """Make the gradients of ``model``, of one rank's micro-batches, those of the step; all ranks call it together."""
    model.finish_grad_sync()
    if pg.tp.size() > 1:
        sums = [dist.all_reduce(part, group=pg.tp, async_op=True) for part in partial_gradients(model, pg)]
        for work in sums:
            work.wait()
    omni = unwrap_model(model)
    if pg.pp.size() > 1 and omni.share_embeddings_and_output_weights:
        tied = omni.shared_embedding_or_output_weight()
        if tied is not None and tied.requires_grad:
            dist.all_reduce(tied.main_grad, group=pg.embd)


def partial_gradients(model: DistributedDataParallel, pg: ProcessGroupCollection) -> Iterator[Tensor]:
    """What this rank updates of the gradients that are summed over tensor-parallel ranks: views of the buffers, in the same
    order and of the same sizes on all of them."""
    ranks, rank = (pg.dp_cp.size(), pg.dp_cp.rank()) if model.ddp_config.use_distributed_optimizer else (1, 0)
    for bucket in (bucket for buffer in model.buffers for bucket in buffer.buckets):
        share = bucket.grad_data.numel() // ranks
        spans = sorted((*span, getattr(p, "sequence_parallel", False)) for p, span in bucket.param_to_index.items())
        for partial, run in groupby(spans, key=lambda span: span[2]):
            starts, ends, _ = zip(*run)
            # Neighbours go together, with the zeros that pad them.
            start, end = max(starts[0], rank * share), min(ends[-1], (rank + 1) * share)
            if partial and start < end:
                yield bucket.grad_data[start:end]
