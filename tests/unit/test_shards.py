"""A slice of memory is cut into boxes of what lies in it: every element once, none of another rank; shares are even."""

import itertools

import pytest
import torch

from megatron_omni.checkpoint.shards import boxes, deal

VIEWS = {
    "vector": lambda memory: memory[:24],
    "matrix": lambda memory: memory[:24].view(4, 6),
    "experts": lambda memory: memory[:24].view(2, 3, 4),
    "one of each": lambda memory: memory[:24].view(1, 3, 1, 8),
    "half the columns": lambda memory: memory[:24].view(2, 2, 6)[..., 3:],
    "a lower half": lambda memory: memory[:24].view(4, 6)[2:],
    "scalar": lambda memory: memory[5],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_boxes_hold_the_elements_of_a_slice_of_memory_and_no_others(view: object) -> None:
    memory = torch.arange(24)
    seen = view(memory)  # type: ignore[operator]
    first, shape = seen.storage_offset(), tuple(seen.shape)
    for start, end in itertools.combinations(range(25), 2):
        found: list[int] = []
        cut = list(boxes(shape, seen.stride(), start - first, end - first))
        for offsets, sizes in cut:
            box = seen[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            assert tuple(box.shape) == sizes and box.numel()
            found += box.flatten().tolist()
        assert sorted(found) == sorted(set(seen.flatten().tolist()) & set(range(start, end))), (start, end)
        assert len(cut) <= 2 * len(shape) + 1


def test_shares_are_even() -> None:
    sizes = [7, 1, 3, 3, 2, 9, 4, 4, 1, 6]
    owners = deal(sizes, 4)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(4)]
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= 1
    assert deal([], 3) == [] and deal([5, 5], 1) == [0, 0]
