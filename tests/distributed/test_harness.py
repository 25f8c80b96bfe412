"""The harness itself: results in rank order, a failing rank is reported with its traceback, a hang ends."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.parallel import groups
from tests.distributed.harness import Rank, RankFailure, run_ranks


def _sum_over_tensor_group(rank: Rank) -> tuple[groups.Place, float]:
    pg = rank.initialize(ParallelConfig(tensor_model_parallel_size=2))
    value = torch.tensor(float(rank.index))
    dist.all_reduce(value, group=pg.tp)
    return groups.place_in(pg), value.item()


def _second_rank_fails(rank: Rank) -> None:
    rank.initialize(ParallelConfig(tensor_model_parallel_size=2))
    if rank.index == 1:
        raise ValueError("boom")
    dist.barrier()


def _second_rank_waits(rank: Rank) -> None:
    rank.initialize(ParallelConfig(tensor_model_parallel_size=2))
    if rank.index == 0:
        dist.barrier()


def _second_rank_dies(rank: Rank) -> None:
    rank.initialize(ParallelConfig(tensor_model_parallel_size=2))
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def test_ranks_see_their_groups() -> None:
    results = run_ranks(_sum_over_tensor_group, 4)
    assert [value for _, value in results] == [1.0, 1.0, 5.0, 5.0]
    assert [(layout.tp_rank, layout.dp_rank) for layout, _ in results] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_first_failure_is_raised_with_its_traceback() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 failed.*boom"):
        run_ranks(_second_rank_fails, 2)


def test_death_is_told_before_the_connections_that_it_broke() -> None:
    with pytest.raises(
        RankFailure, match=r"(?s)^rank 1 died with exit code -11\n.*_second_rank_dies.*rank 0 of 2 failed.*by peer"
    ):
        run_ranks(_second_rank_dies, 2)


def test_hang_ends_and_shows_the_stack() -> None:
    with pytest.raises(RankFailure, match=r"(?s)ranks \[0\] did not finish.*_second_rank_waits"):
        run_ranks(_second_rank_waits, 2, timeout_seconds=8.0)


def test_layout_that_does_not_fit_names_field_and_fix() -> None:
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=2 .* does not divide the 3 rank"):
        groups.check_world_size(ParallelConfig(tensor_model_parallel_size=2), 3)
    with pytest.raises(ValueError, match=r"expert_model_parallel_size=3 .* divides 4"):
        groups.check_world_size(ParallelConfig(expert_model_parallel_size=3), 4)
