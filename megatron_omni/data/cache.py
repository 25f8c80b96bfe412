"""What a loader remembers: values by (source, row), the least recently used forgotten first.

``PackedSample`` keeps a decoded sample small: tiles are normalised 8-bit pixels, so the pixels are kept and normalised
again when they are asked for, wherever that gives the very same floats.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_omni.data.sample import Sample


class Lru[V]:
    """Least recently used values up to a total cost, shared by threads. A limit of 0 keeps nothing."""

    def __init__(self, limit: int) -> None:
        self.limit, self._cost = limit, 0
        self._items: OrderedDict[tuple[int, int], tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> V | None:
        """The value, None where there is none."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: tuple[int, int], value: V, *, cost: int) -> None:
        """Keep a value as long as there is room for its cost."""
        with self._lock:
            self._cost += cost - self._items.pop(key, (None, 0))[1]
            self._items[key] = value, cost
            while self._cost > self.limit:
                _, (_, freed) = self._items.popitem(last=False)
                self._cost -= freed


@dataclass(frozen=True)
class PackedSample:
    """A sample whose tiles are kept as the 8-bit pixels they came from, where that is exact."""

    sample: Sample
    pixels: Tensor | None
    num_bytes: int

    @staticmethod
    def pack(sample: Sample) -> "PackedSample":
        """Pack; ``unpack`` returns equal tensors."""
        pixels = None
        if sample.tiles is not None:
            pixels = sample.tiles.add(1.0).mul_(127.5).round_().to(torch.uint8)
            if torch.equal(_normalised(pixels), sample.tiles):
                sample = replace(sample, tiles=None)
            else:
                pixels = None
        tensors = [pixels, *vars(sample).values()]
        return PackedSample(sample, pixels, sum(t.nbytes for t in tensors if isinstance(t, Tensor)))

    def unpack(self) -> Sample:
        """The sample as it was built."""
        return self.sample if self.pixels is None else replace(self.sample, tiles=_normalised(self.pixels))


def _normalised(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1.0)
