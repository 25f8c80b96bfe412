"""The global order of samples: a pure function of (seed, index), so that the only data state of a run is a cursor.

``Mixture.sample_at(i)`` answers which row of which source is the i-th sample of the run; its cost does not grow with i.

* **Phases.** A source with ``from_sample`` joins there and ``reweight`` changes its weight later (curriculum); between two
  such places the weights are constant.
* **Weights, exactly.** Inside a phase, items come in blocks. The items of each source are spread evenly: its j-th item
  of a phase is due between places (j - 1) / f and j / f, f its share, and the most urgent item that is due goes next
  (Pfair scheduling, Baruah et al. 1996). So at every place each source is less than one item off its exact share, and
  after one *period* (a whole number of blocks, as many as the weights need to come out even) it is exact and the
  pattern starts over. Only the counts per block are kept of this; inside a block the order is a seeded shuffle.
* **Epochs.** A source with ``epochs`` leaves where it has given that many times its rows: a phase ends there. When all
  have left, the order ends.
* **Groups.** Components that name a group (a modality class, blend.py) share the group's part of the mixture, and all
  groups that are active at a place have equal parts.
* **Rows, without repeats.** The n-th item of a source is row ``permutation(seed, source name, n // rows)[n % rows]``:
  each epoch visits every row once, in an order of its own. The permutation is a Feistel network over the row numbers
  (8 rounds, cycle walking), so no table of rows is kept.
* **batch_by "source".** The items are global batches instead of samples: all samples of a step come from one source.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from math import lcm
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_SAMPLES = 64
"""Items per block when samples of all sources mix."""
BLOCK_STEPS = 16
"""Items (steps) per block when a step has one source."""
_LONGEST_PERIOD = 1 << 16
"""Items; weights that do not come out even within this are rounded to it (8e-6 of the mixture)."""
_ROUNDS = 8
_ROWS_AT_ONCE = 256
"""Rows of an epoch's order that are computed together."""
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Component:
    """What the order needs to know about a source."""

    name: str
    num_rows: int
    weight: float = 1.0
    from_sample: int = 0
    reweight: tuple[tuple[int, float], ...] = ()
    """(sample count, weight from there on), in ascending order."""
    epochs: float | None = None
    """Times that its rows are given before it leaves; None: for ever."""
    group: str = ""
    """Components of a group share one part of the mixture, equal to every other group's."""
    source: int | None = None
    """Number of the source that its rows belong to; None: the component's own number."""
    rows: Sequence[int] | None = field(default=None, compare=False)
    """[num_rows] row numbers in that source; None: all of them."""

    def weight_at(self, item: int, *, samples_per_item: int) -> float:
        """Weight of the items from number ``item`` on; changes take effect at whole items, so a step is never split."""
        weight = 0.0
        for start, value in ((self.from_sample, self.weight), *self.reweight):
            if -(-start // samples_per_item) <= item:
                weight = value
        return weight


class Draw(NamedTuple):
    """The sample at one place of the global order."""

    source: int
    row: int
    epoch: int
    rank: int
    """Samples of this component drawn before this one."""
    component: int
    """Number of the component; the source's own number unless sources were divided."""


class DataEnded(ValueError):
    """The order was asked for a sample behind its end: every source has used its epochs."""


class Mixture:
    """The order for given components, seed and way of batching."""

    def __init__(
        self,
        components: list[Component],
        *,
        seed: int,
        batch_by: Literal["mixed", "source"] = "mixed",
        global_batch_size: int = 1,
    ) -> None:
        _validate(components)
        self.components = components
        self.seed, self.batch_by = seed, batch_by
        self.samples_per_item = global_batch_size if batch_by == "source" else 1
        self._block = BLOCK_STEPS if batch_by == "source" else BLOCK_SAMPLES
        self._phases: list[_Phase] = []
        self.num_samples = self._lay_out_phases()
        """Samples until every source has used its epochs; None for an order without end."""

    @property
    def phase_starts(self) -> list[int]:
        """Samples at which the set of sources or their weights change, from 0 on."""
        return [phase.start * self.samples_per_item for phase in self._phases]

    def _lay_out_phases(self) -> int | None:
        """Fill ``_phases``; where the order ends."""
        parts = self.components
        limits = [c.epochs and self._items_of_epochs(c) for c in parts]
        changes = [start for c in parts for start in (c.from_sample, *(at for at, _ in c.reweight))]
        starts = sorted({-(-start // self.samples_per_item) for start in changes} - {0})
        start, before = 0, np.zeros(len(parts), np.int64)
        while True:
            left = [limit is not None and before[i] >= limit for i, limit in enumerate(limits)]
            weights = [
                0.0 if gone else c.weight_at(start, samples_per_item=self.samples_per_item)
                for c, gone in zip(parts, left)
            ]
            later = [at for at in starts if at > start]
            if any(left) and not any(weights) and not later:
                return start * self.samples_per_item
            weights = _balanced(parts, weights)
            _check_weights(parts, weights, start * self.samples_per_item)
            phase = _Phase(start, weights, before, block=self._block, key=(self.seed, len(self._phases)))
            self._phases.append(phase)
            ends = later[:1]
            for i, limit in enumerate(limits):
                if limit is not None and weights[i] > 0:
                    ends.append(start + phase.items_until(i, int(limit - before[i]), most=min(ends, default=None)))
            if not ends:
                return None
            before = before + phase.counts(min(ends) - start)
            start = min(ends)

    def _items_of_epochs(self, component: Component) -> int:
        assert component.epochs is not None
        items = round(component.epochs * component.num_rows) // self.samples_per_item
        if items < 1:
            raise ValueError(
                f"data.sources[{component.name!r}].epochs = {component.epochs} of {component.num_rows} rows is less than "
                f"one {'step' if self.samples_per_item > 1 else 'sample'}; raise it or drop the source"
            )
        return items

    def past(self, num_samples: int) -> list[tuple[int, list[tuple[str, int, int]]]]:
        """What the first ``num_samples`` samples follow from: the first sample of every phase, and of each source that
        it draws from the name, the rows and the share (items of a period). Equal pasts have equal samples.
        """
        return [
            (
                phase.start * self.samples_per_item,
                [(part.name, part.num_rows, share) for part, share in zip(self.components, phase.shares) if share],
            )
            for phase in self._phases
            if phase.start * self.samples_per_item < num_samples
        ]

    def phase_at(self, index: int) -> int:
        """Number of the stretch with one set of sources and weights that sample ``index`` lies in."""
        item = index // self.samples_per_item
        return sum(phase.start <= item for phase in self._phases) - 1

    def sample_at(self, index: int) -> Draw:
        """The ``index``-th sample of the run, counted from 0."""
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        if self.num_samples is not None and index >= self.num_samples:
            raise DataEnded(
                f"the data ends after {self.num_samples} samples: every source has used its epochs; lower train_iters to "
                "what they last for, or raise data.sources[].epochs"
            )
        item, within = divmod(index, self.samples_per_item)
        phase = self._phases[self.phase_at(index)]
        source, rank = phase.item(item - phase.start)
        return self.draw(source, rank * self.samples_per_item + within)

    def draw(self, number: int, rank: int) -> Draw:
        """The ``rank``-th sample drawn from component ``number``."""
        component = self.components[number]
        epoch, position = divmod(rank, component.num_rows)
        source = number if component.source is None else component.source
        return Draw(source, self._row(component, epoch, position), epoch, rank, number)

    def next_in_epoch(self, draw: Draw, attempt: int) -> Draw:
        """Stand-in number ``attempt`` (from 1) for an unusable draw: the rows after it in its epoch's order."""
        if not attempt:
            return draw
        component = self.components[draw.component]
        position = (draw.rank + attempt) % component.num_rows
        return draw._replace(row=self._row(component, draw.epoch, position))

    def _row(self, component: Component, epoch: int, position: int) -> int:
        key = permutation_key(self.seed, component.name, epoch)
        block, within = divmod(position, _ROWS_AT_ONCE)
        row = _permuted_block(block, component.num_rows, key)[within]
        return row if component.rows is None else component.rows[row]


class _Phase:
    """A stretch of the order with a constant set of sources."""

    def __init__(
        self, start: int, weights: list[float], before: NDArray[np.int64], *, block: int, key: tuple[int, int]
    ) -> None:
        self.start = start
        self._before = before
        self._block = block
        self._key = key
        self._cumulative = block_counts(weights, block=block)  # [blocks of a period + 1, sources]
        self.shares: list[int] = self._cumulative[-1].tolist()
        self._slots = lru_cache(maxsize=64)(self._shuffled_block)

    def item(self, index: int) -> tuple[int, int]:
        """Source of the ``index``-th item of the phase, and how many items of that source came before it in the run."""
        block, within = divmod(index, self._block)
        sources, ranks = self._slots(block)
        return sources[within], ranks[within]

    def counts(self, num_items: int) -> NDArray[np.int64]:
        """Items of each source among the first ``num_items`` of the phase."""
        block, within = divmod(num_items, self._block)
        inside = np.bincount(self._slots(block)[0][:within], minlength=len(self._before))
        return self._counts_at_block(block) + inside

    def items_until(self, source: int, count: int, *, most: int | None) -> int:
        """Fewest items of the phase that hold ``count`` of a source's; of no more than ``most`` the answer is exact."""
        low, high = 0, count
        while self.counts(high)[source] < count:
            if most is not None and high > most:
                return high
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.counts(middle)[source] < count else (low, middle)
        return high

    def _counts_at_block(self, block: int) -> NDArray[np.int64]:
        period, within = divmod(block, len(self._cumulative) - 1)
        return period * self._cumulative[-1] + self._cumulative[within]

    def _shuffled_block(self, block: int) -> tuple[list[int], list[int]]:
        """Source of each item of a block, and the items of that source before it."""
        within = block % (len(self._cumulative) - 1)
        counts = self._cumulative[within + 1] - self._cumulative[within]
        seed, phase = self._key
        random = np.random.Generator(
            np.random.Philox(key=np.array([seed & _MASK64, phase], np.uint64), counter=[0, 0, block, 0])
        )
        sources = random.permutation(np.repeat(np.arange(len(counts)), counts))
        ranks = np.empty_like(sources)
        for source, first in enumerate(self._before + self._counts_at_block(block)):
            ranks[sources == source] = first + np.arange(counts[source])
        return sources.tolist(), ranks.tolist()


def block_counts(weights: list[float], *, block: int) -> NDArray[np.int64]:
    """[blocks of one period + 1, sources] items of each source before each block of a period; the last row ends it."""
    shares = _whole_shares(weights, block)
    period = sum(shares)
    order = np.empty(period, np.int64)
    # Heaps of (place, ...): items not yet due by the place from which they may come, items due by their deadline.
    waiting = [(0, source, 1) for source, share in enumerate(shares) if share]
    due: list[tuple[int, int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, number = heappop(waiting)
            heappush(due, (-(-number * period // shares[source]), source, number))
        deadline, source, number = heappop(due)
        assert place < deadline, "an item of the mixture comes too late"
        order[place] = source
        heappush(waiting, (number * period // shares[source], source, number + 1))
    counts = np.stack([np.bincount(part, minlength=len(shares)) for part in order.reshape(-1, block)])
    return np.concatenate([np.zeros((1, len(shares)), np.int64), counts.cumsum(axis=0)])


def _whole_shares(weights: list[float], block: int) -> list[int]:
    """Items of each source in one period: exactly proportional to the weights where a short period allows it."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.3 means 3/10, not its binary neighbour
    total = sum(exact)
    scale = lcm(*(fraction.denominator for fraction in (weight / total for weight in exact)))
    period = lcm(scale, block)
    if period > _LONGEST_PERIOD:
        period = _LONGEST_PERIOD
    quotas = [weight / total * period for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda s: (shares[s] - quotas[s], s))
    for source in by_remainder[: period - sum(shares)]:
        shares[source] += 1
    return shares


def _balanced(components: list[Component], weights: list[float]) -> list[float]:
    """Weights with which all groups have equal parts."""
    totals: dict[str, float] = {}
    for component, weight in zip(components, weights):
        totals[component.group] = totals.get(component.group, 0.0) + weight
    if list(totals) == [""]:
        return weights
    return [weight / totals[c.group] if weight else 0.0 for c, weight in zip(components, weights)]


@lru_cache(maxsize=1 << 12)
def permutation_key(seed: int, name: str, epoch: int) -> int:
    """64-bit key of one source's order in one epoch; the name, not the place in the recipe, so a recipe may grow."""
    text = f"{seed}:{epoch}:{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permuted(positions: NDArray[np.uint64], size: int, *, key: int) -> NDArray[np.uint64]:
    """Where a keyed permutation of range(size) sends ``positions``."""
    assert (positions < size).all()
    half = max(((size - 1).bit_length() + 1) // 2, 2)
    mask = (1 << half) - 1
    values, outside = positions.copy(), np.arange(len(positions))
    while len(outside):  # the network permutes a power of four; walk its cycles until all are back among the rows
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_hash64(key, round_number, right) & mask)
        values[outside] = left << half | right
        outside = outside[values[outside] >= size]
    return values


@lru_cache(maxsize=1 << 10)
def _permuted_block(block: int, size: int, key: int) -> list[int]:
    start = block * _ROWS_AT_ONCE
    return permuted(np.arange(start, min(start + _ROWS_AT_ONCE, size), dtype=np.uint64), size, key=key).tolist()


def _hash64(key: int, round_number: int, values: NDArray[Any]) -> NDArray[Any]:
    """SplitMix64's finaliser over the three inputs, modulo 2^64 (``values`` are uint64)."""
    x: NDArray[Any] = values * 0xD1B54A32D192ED03 + ((key + (round_number + 1) * 0x9E3779B97F4A7C15) & _MASK64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def _validate(components: list[Component]) -> None:
    if not components:
        raise ValueError("data.sources is empty; give at least one source")
    for component in components:
        name = f"data.sources[{component.name!r}]"
        if component.num_rows < 1:
            raise ValueError(f"{name} has {component.num_rows} rows; give a file with records")
        for weight in (component.weight, *(weight for _, weight in component.reweight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}.weight = {weight} must be finite and not negative (0 leaves it out)")
        if component.from_sample < 0:
            raise ValueError(f"{name}.from_sample = {component.from_sample} must not be negative")
        counts = [component.from_sample, *(start for start, _ in component.reweight)]
        if sorted(set(counts)) != counts:
            raise ValueError(
                f"{name}.reweight = {counts[1:]}: sample counts must ascend, above from_sample = {counts[0]}"
            )


def _check_weights(components: list[Component], weights: list[float], sample: int) -> None:
    drawn = [(weight, component) for weight, component in zip(weights, components, strict=True) if weight > 0]
    if not drawn:
        raise ValueError(
            f"data.sources: no source with weight > 0 at sample {sample}; give one from_sample = 0, or keep one above 0"
        )
    weight, lightest = min(drawn, key=lambda pair: pair[0])
    share = weight / sum(weight for weight, _ in drawn)
    if share * _LONGEST_PERIOD < 1:
        raise ValueError(
            f"data.sources[{lightest.name!r}].weight = {weight} is {share:.1e} of the mixture, below "
            f"the smallest share of {1 / _LONGEST_PERIOD:.1e}; raise it or drop the source"
        )
