"""Rows of every rank, gathered: by an all-gather where all have as many, else by an all-to-all of copies."""

import pytest
import torch
import torch.distributed as dist

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.models.exchange import GatherRows
from tests.distributed.harness import Rank, run_ranks


def _gathered(rank: Rank, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    group = rank.initialize(ParallelConfig(expert_model_parallel_size=2)).ep
    called = []
    for name in ("all_gather_into_tensor", "all_to_all_single"):
        function = getattr(dist, name)
        setattr(
            dist, name, lambda *args, name=name, function=function, **kw: called.append(name) or function(*args, **kw)
        )
    rows = rows_of(rank.index, sizes).requires_grad_()
    out = GatherRows.apply(rows, sizes, group)
    forward = list(called)
    (gradient,) = torch.autograd.grad((out * (1 + rank.index)).sum(), rows)
    return out.detach(), gradient, forward


def rows_of(rank: int, sizes: list[int]) -> torch.Tensor:
    return torch.arange(sizes[rank] * 3, dtype=torch.float32).view(-1, 3) + 100 * rank


@pytest.mark.parametrize(
    ("sizes", "collective"),
    [([4, 4], "all_gather_into_tensor"), ([0, 0], "all_gather_into_tensor"), ([2, 5], "all_to_all_single")],
)
def test_rows_arrive_in_rank_order_and_their_gradients_are_summed(sizes: list[int], collective: str) -> None:
    expected = torch.cat([rows_of(rank, sizes) for rank in range(2)])
    for out, gradient, called in run_ranks(_gathered, 2, sizes):
        assert torch.equal(out, expected)
        assert torch.equal(gradient, torch.full_like(gradient, 3.0)), "1 of the first rank, 2 of the second"
        assert called == [collective]
