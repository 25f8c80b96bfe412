"""Wrap a built model for training: bf16 parameters when asked, then Megatron's DistributedDataParallel.

Gradients are summed, not averaged, over data parallel ranks: the loss is already divided by the number of label tokens
of the whole global batch, so the sum of the ranks' gradients is the gradient of the mean loss. Megatron does this when
``config.calculate_per_token_loss`` is set (scaling factor 1).
"""

from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_omni.config.parallel import bucket_size
from megatron_omni.config.run import Recipe


def wrap_model(model: MegatronModule, recipe: Recipe, pg: ProcessGroupCollection) -> DistributedDataParallel:
    """``model`` (frozen parts already marked) under bf16 conversion and gradient buffers.

    Its parameters move into the buffers.
    """
    assert model.config.calculate_per_token_loss, "gradients must be summed over data parallel ranks"
    if recipe.optim.precision == "bf16":
        model = Float16Module(model.config, model)
    size = bucket_size(recipe.parallel, stage=pg.pp.rank(), dp_size=pg.dp_cp.size())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.optim.grad_reduce_in_fp32,
        overlap_grad_reduce=recipe.parallel.overlap_grad_reduce,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        use_distributed_optimizer=recipe.optim.use_distributed_optimizer,
        bucket_size=size,
    )
    layout = None
    if recipe.optim.use_distributed_optimizer:
        trainable = [p for p in model.parameters() if p.requires_grad]
        for p in trainable:
            p.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        layout = DistributedOptimizer.compute_full_param_layout(
            trainable,
            size,
            pg.dp_cp.size(),
            ddp_config,
            expert_data_parallel_world_size=pg.expt_dp.size(),
        )
    return DistributedDataParallel(model.config, ddp_config, model, pg_collection=pg, full_param_layout=layout)


@torch.no_grad()
def gather_weights(model: DistributedDataParallel) -> None:
    """Make the weights of every rank those of the last update.

    Under ``overlap_param_gather`` an update leaves each rank with new values of the elements that it owns only; the
    others arrive in the next training step's forward. Whatever reads weights before that, a save or an evaluation, calls
    this first, on all ranks. An evaluation must not leave it to its forwards: a rank that lacks a modality would skip
    that encoder's messages, for which the others wait.
    """
    if model.ddp_config.overlap_param_gather:
        model.start_param_sync(force_sync=True)


def unwrap_model(model: DistributedDataParallel) -> MegatronModule:
    """The model that :func:`wrap_model` was given."""
    inner = model.module
    return cast(MegatronModule, inner.module if isinstance(inner, Float16Module) else inner)
