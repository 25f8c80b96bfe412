"""Who sees whom in attention, as data: a list of segments, each a range of queries and the keys that it sees.

    full      every query sees every key
    causal    aligned at the end: of L queries and n keys, query i sees keys 0 .. n - L + i; the last L keys are its own

A token that is in no segment is padding: it sees nothing and nothing sees it. Uses, which a batch may mix:

    causal           a sample of a packed row: each token sees those before it in its own sample
    shared_prompt    one prompt and several responses: a response sees the prompt and itself
    prefix           tokens that all see each other, then causal ones that see them too
    cached           new tokens that see the keys of their sequence in a cache, of any length (generation/cache.py)

    cut              of any of these, the queries of one rank of a context-parallel group and the keys of all (:meth:`of_rank`)

Each is what a variable-length kernel takes, with different lengths of queries and keys (ops/segment_attention.py).
Tokens are counted in the flattened [B, S] grid of a batch, keys of a cache from its first. All of it is plain
numbers in host memory, from which shapes follow: nothing waits for a device.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries that see one set of keys."""

    queries: range
    keys: tuple[range, ...]
    """In order. Where ``causal``, the last range ends with the queries' own keys."""
    causal: bool = True

    @property
    def num_keys(self) -> int:
        """Keys of all ranges."""
        return sum(map(len, self.keys))

    @property
    def own_keys(self) -> range:
        """The keys of a causal segment's own queries."""
        assert self.causal
        return self.keys[-1][-len(self.queries) :]

    def of_queries(self, start: int, stop: int) -> "Segment | None":
        """What those of its queries see that lie in ``start .. stop - 1``; None where there are none."""
        own = range(max(start, self.queries.start), min(stop, self.queries.stop))
        if not own:
            return None
        unseen = self.queries.stop - own.stop if self.causal else 0
        return Segment(own, (*self.keys[:-1], self.keys[-1][: len(self.keys[-1]) - unseen]), self.causal)

    @property
    def first_position(self) -> int:
        """Place of its first query in the sample: the keys that come before its own queries. Responses to one prompt all
        continue from it."""
        return self.num_keys - len(self.queries)

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs with a score."""
        length = len(self.queries)
        return length * self.num_keys - self.causal * (length * (length - 1) // 2)

    def shifted(self, by: int) -> "Segment":
        """The same segment ``by`` tokens later."""
        return Segment(_shifted(self.queries, by), tuple(_shifted(keys, by) for keys in self.keys), self.causal)


def causal(length: int) -> tuple[Segment, ...]:
    """A sample of ``length`` tokens, each of which sees itself and those before it."""
    return shared_prompt(length, ())


def shared_prompt(prompt: int, responses: Sequence[int]) -> tuple[Segment, ...]:
    """A prompt of so many tokens and then responses of so many: each sees the prompt and itself, not the others."""
    segments, start = [Segment(range(prompt), (range(prompt),))], prompt
    for length in responses:
        own = range(start, start + length)
        adjacent = start == prompt  # one range: it need not be gathered
        segments.append(Segment(own, (range(own.stop),) if adjacent else tuple(filter(len, (range(prompt), own)))))
        start += length
    return _not_empty(segments)


def prefix(length: int, rest: int) -> tuple[Segment, ...]:
    """A prefix of ``length`` tokens that all see each other, then ``rest`` causal ones that see it too."""
    whole = range(length + rest)
    return _not_empty(
        [Segment(whole[:length], (whole[:length],), causal=False), Segment(whole[length:], (whole,), causal=True)]
    )


def prefix_length(segments: Sequence[Segment], length: int) -> int | None:
    """The n of :func:`prefix` that made ``segments`` of ``length`` tokens; 0: they are causal. None: neither."""
    first = segments[0] if segments else None
    n = len(first.queries) if first is not None and not first.causal else 0
    return n if tuple(segments) == (prefix(n, length - n) if n else causal(length)) else None


@dataclass(frozen=True)
class AttentionSegments:
    """The segments of a batch, in the order of their queries."""

    segments: tuple[Segment, ...]
    num_tokens: int
    """Queries of the grid, padding included: B x S."""
    key_ranks: int = 1
    """Ranks of a context-parallel group that have a part of the keys each."""
    derived: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What kernels made of the segments: made once and used by every layer."""

    def __post_init__(self) -> None:
        end = 0
        for segment in self.segments:
            queries, keys = segment.queries, segment.keys
            assert end <= queries.start < queries.stop <= self.num_tokens, (
                f"{queries} of {self.num_tokens}, after {end}"
            )
            assert keys and all(keys), f"no keys for {queries}"
            assert not segment.causal or len(keys[-1]) >= len(queries), (
                f"the keys of {queries} are not the last of {keys}"
            )
            end = queries.stop

    @property
    def num_pairs(self) -> int:
        """(query, key) pairs with a score."""
        return sum(segment.num_pairs for segment in self.segments)

    def of_rank(self, rank: int, ranks: int, *, length: int) -> "AttentionSegments":
        """The queries of ``rank``, counted in its own grid of rows of ``length`` / ``ranks`` tokens, and keys in the whole grid
        of rows of ``length``."""
        segments, place = [], 0
        for row in range(0, self.num_tokens, length):
            for part in row_parts(length, rank, ranks):
                start, stop = row + part.start, row + part.stop
                for segment in filter(None, (s.of_queries(start, stop) for s in self.segments)):
                    segments.append(replace(segment, queries=_shifted(segment.queries, place - start)))
                place += len(part)
        return AttentionSegments(tuple(segments), self.num_tokens // ranks, key_ranks=ranks)

    def numbers(self) -> list[int]:
        """All of it as integers; :meth:`from_numbers` reads them."""
        numbers = [self.num_tokens]
        for segment in self.segments:
            ranges = (segment.queries, *segment.keys)
            numbers += [int(segment.causal), len(ranges), *(end for r in ranges for end in (r.start, r.stop))]
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "AttentionSegments":
        """The description that gave these :meth:`numbers`."""
        segments, place = [], 1
        while place < len(numbers):
            is_causal, num_ranges = numbers[place : place + 2]
            ends = numbers[place + 2 : place + 2 + 2 * num_ranges]
            queries, *keys = (range(start, stop) for start, stop in zip(ends[::2], ends[1::2]))
            segments.append(Segment(queries, tuple(keys), bool(is_causal)))
            place += 2 + 2 * num_ranges
        return cls(tuple(segments), numbers[0])


def row_parts(length: int, rank: int, ranks: int) -> tuple[range, range]:
    """Which tokens of a row of ``length`` are those of ``rank`` of a context-parallel group, in its order.

    Of 2 ``ranks`` equal parts the one from the front and the one from the back: under a causal mask every rank then has as
    many (query, key) pairs as any other.
    """
    assert length % (2 * ranks) == 0, f"{length} tokens in 2 x {ranks} parts"
    size, late = length // (2 * ranks), 2 * ranks - 1 - rank
    return range(rank * size, (rank + 1) * size), range(late * size, (late + 1) * size)


def packed(rows: Sequence[Sequence[int]], length: int) -> AttentionSegments:
    """Causal samples, ``rows[b]`` their lengths one behind the other in row b of ``length`` tokens; the rest is padding."""
    segments: list[Segment] = []
    for row, lengths in enumerate(rows):
        start = row * length
        for sample in lengths:
            segments += (segment.shifted(start) for segment in causal(sample))
            start += sample
        assert start <= (row + 1) * length, f"{sum(lengths)} tokens in a row of {length}"
    return AttentionSegments(tuple(segments), len(rows) * length)


def _shifted(tokens: range, by: int) -> range:
    return range(tokens.start + by, tokens.stop + by)


def _not_empty(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if segment.queries)
