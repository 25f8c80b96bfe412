"""The reader's micro-batches reach every rank of its replica unchanged; media only the ranks that embed."""

from dataclasses import replace

import pytest
import torch

from megatron_omni.batch import COUNTS, GRIDS, INDICES, MEDIA, OmniBatch
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.parallel import sharing
from megatron_omni.parallel.groups import place_in
from megatron_omni.parallel.sharing import share_step, sum_over_ranks
from tests.attention import drawn_segments
from tests.distributed.harness import Rank, run_ranks

CPU = torch.device("cpu")


def step_of(replica: int) -> list[OmniBatch]:
    """Three micro-batches of different shapes: with pictures and sound, with sound and routes, with text only."""
    generator = torch.Generator().manual_seed(replica)

    def batch(length: int, tiles: int, chunks: int, route_bytes: int = 0) -> OmniBatch:
        ints = {name: torch.randint(-100, 2**40, (2, length), generator=generator) for name in GRIDS}
        ints |= {name: torch.randint(2**40, (tiles + i,), generator=generator) for i, name in enumerate(INDICES)}
        counts = {name: length + i for i, name in enumerate(COUNTS)}
        ints["position_ids"] = torch.randint(0, 99, (3, 2, length), generator=generator)
        pixels = torch.randint(256, (tiles, 3, 3, 3), generator=generator).byte() if tiles else None
        sound = torch.randn(chunks, 8, 5, generator=generator) if chunks else None
        attention = drawn_segments(generator, 2 * length)
        routes = torch.randint(256, (2, length, route_bytes), generator=generator).byte() if route_bytes else None
        media = {"pixel_values": pixels, "audio_features": sound}
        return OmniBatch(**ints, **counts, attention=attention, **media, routes=routes)

    return [batch(5, 3, 2), batch(9, 0, 1, 3), batch(4, 0, 0)]


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None and b is None if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)


def shared(rank: Rank, tensor: int, pipeline: int) -> bool:
    pg = rank.initialize(ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline))
    place = place_in(pg)
    for step in range(2):
        expected = step_of(10 * step + place.dp_rank)
        precision = (torch.float32, torch.bfloat16)[step]
        sharing._MESSAGE = (sharing._MESSAGE, 20)[step]  # the second step's header takes two messages
        loaded = expected if place.is_data_reader else None
        got = share_step(loaded, num_micro_batches=3, pg=pg, device=CPU, precision=precision)
        assert got is not None and len(got) == 3
        expected = [
            replace(b, audio_features=None if b.audio_features is None else b.audio_features.to(precision))
            for b in expected
        ]
        if not place.is_first_stage:
            expected = [replace(batch, pixel_values=None, audio_features=None) for batch in expected]
        for a, b in zip(got, expected, strict=True):
            assert all(equal(getattr(a, name), getattr(b, name)) for name in (*GRIDS, *INDICES, *MEDIA, "routes"))
            assert all(getattr(a, name) == getattr(b, name) for name in (*COUNTS, "attention"))
        assert got.shapes == [(2, 5), (2, 9), (2, 4)]
    # A reader that failed is known to its whole replica, and through the sum to every other.
    failing = place.dp_rank == 0
    got = share_step(
        step_of(0) if place.is_data_reader and not failing else None, num_micro_batches=3, pg=pg, device=CPU
    )
    assert (got is None) == failing
    return sum_over_ranks([int(failing and place.is_data_reader), 2], device=CPU) == [1, 2 * rank.world_size]


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(1, 1, 1), (2, 1, 2), (4, 2, 1), (4, 2, 2)])
def test_every_rank_of_a_replica_gets_its_readers_batches(world: int, tensor: int, pipeline: int) -> None:
    assert all(run_ranks(shared, world, tensor, pipeline))
