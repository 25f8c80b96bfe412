"""Places in a cache of fixed size: a buddy allocator of runs of positions. Pure Python.

The cache is one row of positions. A sample gets an *extent*: 2^k positions from an offset that is a multiple of 2^k
(Knowlton 1965), so its keys and values are one run, and no free place is too small for a sample of its size. An extent
grows to twice its size in place where its other half is free, else elsewhere.
"""

from dataclasses import dataclass

SMALLEST = 32
"""Positions of the smallest extent."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Positions ``offset`` to ``offset + size`` of the cache."""

    offset: int
    size: int


def extent_size(num_positions: int) -> int:
    """Size of the extent that holds so many positions."""
    return max(SMALLEST, 1 << (num_positions - 1).bit_length())


class ExtentPool:
    """Free and taken extents of ``budget`` positions, a whole number of smallest extents."""

    def __init__(self, budget: int) -> None:
        if budget < SMALLEST:
            raise ValueError(f"a cache of {budget} positions is too small; it needs at least {SMALLEST}")
        self.budget = budget - budget % SMALLEST
        self.taken = 0
        """Positions of taken extents."""
        self._free: dict[int, set[int]] = {}
        self._tops: dict[int, int] = {}
        """Offset -> size of the extents that are half of none."""
        offset = 0
        while offset < self.budget:
            size = 1 << ((self.budget - offset).bit_length() - 1)
            self._tops[offset] = size
            self._free.setdefault(size, set()).add(offset)
            offset += size

    @property
    def largest(self) -> int:
        """Positions of the largest extent there can be."""
        return self._tops[0]

    def take(self, size: int) -> Extent | None:
        """A free extent of ``size``, the one at the lowest place among the best fitting; None where there is none."""
        fitting = [s for s, offsets in self._free.items() if s >= size and offsets]
        if not fitting:
            return None
        found = min(fitting)
        offset = min(self._free[found])
        self._free[found].remove(offset)
        while found > size:
            found //= 2
            self._free.setdefault(found, set()).add(offset + found)
        self.taken += size
        return Extent(offset, size)

    def free(self, extent: Extent) -> None:
        """Give an extent back; free halves become whole again."""
        offset, size = extent.offset, extent.size
        self.taken -= size
        while offset not in self._tops or self._tops[offset] != size:
            other = offset ^ size
            if other not in self._free.get(size, ()):
                break
            self._free[size].remove(other)
            offset, size = min(offset, other), 2 * size
        self._free.setdefault(size, set()).add(offset)

    def grown(self, extent: Extent) -> Extent | None:
        """An extent of twice the size instead: in place where the other half is free, else a new one, and ``extent``
        is given back. What it held is still to be moved; the two overlap at most in the first's own place."""
        offset, size = extent.offset, extent.size
        other = offset ^ size
        is_top = self._tops.get(offset) == size
        if not is_top and other in self._free.get(size, ()):
            self._free[size].remove(other)
            self.taken += size
            return Extent(min(offset, other), 2 * size)
        found = self.take(2 * size)
        if found is not None:
            self.free(extent)
        return found
