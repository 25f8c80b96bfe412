"""Process groups: built once from the recipe's layout, then passed around. The only reader of Megatron's
``parallel_state``.

Ranks are ordered tensor, expert/data, pipeline (Megatron's ``tp-cp-ep-dp-pp``): a tensor group is adjacent ranks, a
pipeline group spans the world with the largest stride. Experts have their own split of the same ranks: ``world = tp *
dp * pp = expert_tp * ep * expert_dp * pp``.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.platform.device import backend, select_device


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank's place in every group."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    expert_tp_rank: int
    expert_tp_size: int

    @property
    def is_first_stage(self) -> bool:
        """Holds the embeddings and the encoders."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the output layer and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_data_reader(self) -> bool:
        """Reads the data of its data-parallel rank and broadcasts it over the tensor and pipeline groups."""
        return self.tp_rank == 0 and self.is_first_stage


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ValueError when the layout does not fit ``world_size`` ranks."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if world_size % (tp * pp) != 0:
        raise ValueError(
            f"parallel.tensor_model_parallel_size={tp} x parallel.pipeline_model_parallel_size={pp} = {tp * pp} does "
            f"not divide the {world_size} ranks of this run; start a multiple of {tp * pp} ranks or change the sizes"
        )
    if world_size % (etp * ep * pp) != 0:
        raise ValueError(
            f"parallel.expert_model_parallel_size={ep} x expert_tensor_parallel_size={etp} x "
            f"pipeline_model_parallel_size={pp} = {etp * ep * pp} does not divide the {world_size} ranks of this run; "
            f"choose an expert_model_parallel_size that divides {world_size // pp}"
        )


def initialize(
    parallel: ParallelConfig, *, store: dist.Store | None = None, rank: int | None = None, world_size: int | None = None
) -> ProcessGroupCollection:
    """Start torch.distributed and build the groups of ``parallel``.

    Rendezvous comes from ``store``/``rank``/``world_size``, else from torchrun's environment, else a single process
    runs alone.
    """
    timeout = timedelta(seconds=parallel.distributed_timeout_seconds)
    select_device()
    if not dist.is_initialized():
        if store is None and "RANK" in os.environ:
            check_world_size(parallel, int(os.environ["WORLD_SIZE"]))
            dist.init_process_group(backend(), init_method="env://", timeout=timeout)
        else:
            store, rank, world_size = (store, rank, world_size) if store is not None else (dist.HashStore(), 0, 1)
            assert rank is not None and world_size is not None, "a store needs rank and world_size"
            check_world_size(parallel, world_size)
            dist.init_process_group(backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    check_world_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_seconds / 60,  # type: ignore[arg-type]
        create_gloo_process_groups=False,  # for gathers of state on the CPU, of which checkpoint/ makes none
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def drop_buffers() -> None:
    """Give up the memory that Megatron keeps for messages: where it was made in inference mode, no gradient may use it."""
    parallel_state.get_global_memory_buffer().buffer.clear()


def destroy() -> None:
    """Tear down the groups and torch.distributed, so that :func:`initialize` may be called again."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        # Megatron forgets some of its groups here; they would outlive torch.distributed and die with the next ones.
        for name, value in vars(parallel_state).items():
            if isinstance(value, dist.ProcessGroup):
                setattr(parallel_state, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


def place_in(pg: ProcessGroupCollection) -> Place:
    """This rank's place in the groups of ``pg``."""
    return Place(
        tp_rank=pg.tp.rank(),
        tp_size=pg.tp.size(),
        pp_rank=pg.pp.rank(),
        pp_size=pg.pp.size(),
        dp_rank=pg.dp.rank(),
        dp_size=pg.dp.size(),
        ep_rank=pg.ep.rank(),
        ep_size=pg.ep.size(),
        expert_tp_rank=pg.expt_tp.rank(),
        expert_tp_size=pg.expt_tp.size(),
    )
