"""The reader's micro-batches reach every rank of its replica unchanged; media only the ranks that embed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_omni.batch import COUNTS, GRIDS, INDICES, MEDIA, OmniBatch
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.drawn import Drawn, DrawnPicture
from megatron_omni.parallel import sharing
from megatron_omni.parallel.groups import place_in
from megatron_omni.parallel.sharing import share_step, sum_over_ranks
from tests.attention import drawn_segments
from tests.distributed.harness import Rank, run_ranks

CPU = torch.device("cpu")


def step_of(replica: int) -> list[OmniBatch]:
    """Three micro-batches of different shapes: with pictures (one to be drawn from two of them) and sound, with sound and routes
    (and two to be drawn), with text only."""
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
        drawn = {5: drawn_from_rows(generator), 9: drawn_from_latents(generator)}.get(length)
        return OmniBatch(**ints, **counts, attention=attention, **media, routes=routes, drawn=drawn)

    return [batch(5, 3, 2), batch(9, 0, 1, 3), batch(4, 0, 0)]


def drawn_from_rows(generator: torch.Generator) -> Drawn | None:
    pixels = torch.randint(256, (3, 8, 6), generator=generator).byte()
    picture = DrawnPicture(
        offsets=torch.tensor([2, 3]), task="größer", target=pixels, source=pixels, vision_rows=(1, 5)
    )
    return placed((picture,))


def drawn_from_latents(generator: torch.Generator) -> Drawn | None:
    def picture(height: int, **more: Any) -> DrawnPicture:
        return DrawnPicture(
            offsets=torch.tensor([5, 6, 7]), target=torch.randn(4, height, 2, generator=generator).half(), **more
        )

    teachers = {"task": torch.randn(1, 5, generator=generator), "caption": torch.randn(3, 4, generator=generator)}
    hidden = [{"hidden": torch.randn(3, 8, generator=generator).bfloat16()} for _ in range(2)]
    vision = {
        "source": torch.randn(4, 2, 2, generator=generator).half(),
        "vision": torch.randn(6, 8, generator=generator).bfloat16(),
        "vision_rows": (0, 6),
    }
    return placed((picture(2, **hidden[0], **vision), picture(3, teachers=teachers, **hidden[1])))


def placed(pictures: tuple[DrawnPicture, ...]) -> Drawn | None:
    return Drawn.of([(), pictures], sample_ids=[7, 9], places=[(0, 0), (1, 1)], vision_starts=[0, 4], num_rows=2)


def same_drawn(a: Drawn | None, b: Drawn | None) -> bool:
    if a is None or b is None:
        return a is None and b is None
    told = [(x.tasks, x.vision_rows, sorted(x.teachers or ())) for x in (a, b)]
    return told[0] == told[1] and all(equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


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
            last = [place.is_last_stage and batch.drawn is not None and batch.drawn.wants_pixels for batch in expected]
            assert last == [place.is_last_stage, False, False]
            kept = [batch.pixel_values if own else None for batch, own in zip(expected, last)]
            expected = [replace(b, pixel_values=pixels, audio_features=None) for b, pixels in zip(expected, kept)]
        for a, b in zip(got, expected, strict=True):
            assert all(equal(getattr(a, name), getattr(b, name)) for name in (*GRIDS, *INDICES, *MEDIA, "routes"))
            assert all(getattr(a, name) == getattr(b, name) for name in (*COUNTS, "attention"))
            assert same_drawn(a.drawn, b.drawn if place.is_last_stage else None)
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
