"""Process groups: built once from the recipe's layout, then passed around. The only reader of Megatron's
``parallel_state``.

Ranks are ordered tensor, context, expert/data, pipeline (Megatron's ``tp-cp-ep-dp-pp``): a tensor group is adjacent
ranks, a context group the next of as many tensor groups, a pipeline group spans the world with the largest stride.
Experts have their own split of the same ranks: ``world = tp * cp * dp * pp = expert_tp * ep * expert_dp * pp``.

Megatron's model-parallel group (``mp``) holds one copy of all weights, tp x pp. The ranks that compute the same
micro-batches are tp x cp x pp: :func:`replica`, which Megatron has no group for.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.config.parallel import ParallelConfig, not_divided
from megatron_omni.platform.device import backend, select_device


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank's place in every group."""

    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
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
        """Reads the data of its data-parallel rank and broadcasts it over the replica."""
        return self.is_first and self.is_first_stage

    @property
    def is_first(self) -> bool:
        """Of the ranks of its stage that compute the same micro-batches: speaks for all of them."""
        return self.tp_rank == self.cp_rank == 0


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ValueError when the layout does not fit ``world_size`` ranks."""
    pp = parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if wrong := not_divided(parallel, world_size):
        raise ValueError(wrong)
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
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_seconds / 60,  # type: ignore[arg-type]
        create_gloo_process_groups=False,  # for gathers of state on the CPU, of which checkpoint/ makes none
    )
    pg = ProcessGroupCollection.use_mpu_process_groups()
    if pg.cp.size() > 1:
        _REPLICA[:] = [_replica(pg, timeout)]
    return pg


_REPLICA: list[dist.ProcessGroup] = []
"""This rank's, where it is none of Megatron's groups."""


def replica(pg: ProcessGroupCollection) -> dist.ProcessGroup:
    """The ranks that compute the same micro-batches, tp x cp x pp; the first of them reads the data."""
    return pg.mp if pg.cp.size() == 1 else _REPLICA[0]


def _replica(pg: ProcessGroupCollection, timeout: timedelta) -> dist.ProcessGroup:
    """Groups of all replicas are made by all ranks together."""
    own = [dist.get_global_rank(pg.tp_cp, rank) for rank in range(pg.tp_cp.size())]
    stride = dist.get_world_size() // pg.pp.size()
    first = own[0] % stride
    groups = [
        [stage * stride + start + i for stage in range(pg.pp.size()) for i in range(len(own))]
        for start in range(0, stride, len(own))
    ]
    made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    return made[first // len(own)]


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
        _REPLICA.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def place_in(pg: ProcessGroupCollection) -> Place:
    """This rank's place in the groups of ``pg``."""
    return Place(
        tp_rank=pg.tp.rank(),
        tp_size=pg.tp.size(),
        cp_rank=pg.cp.rank(),
        cp_size=pg.cp.size(),
        pp_rank=pg.pp.rank(),
        pp_size=pg.pp.size(),
        dp_rank=pg.dp.rank(),
        dp_size=pg.dp.size(),
        ep_rank=pg.ep.rank(),
        ep_size=pg.ep.size(),
        expert_tp_rank=pg.expt_tp.rank(),
        expert_tp_size=pg.expt_tp.size(),
    )
