"""What the leader of a replica has its ranks do in a step, as integers that one broadcast carries. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_omni.generation.extents import Extent
from megatron_omni.generation.request import Alternatives
from megatron_omni.generation.scheduler import Chunk, Copy

NOTHING_TO_DO, STEP, STOP, FAILED = range(4)


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What the leader has its replica do."""

    op: int
    chunks: tuple[Chunk, ...] = ()
    copies: tuple[Copy, ...] = ()
    requests: tuple[int, ...] = ()
    """Numbers of the requests that are new; they follow as objects."""
    joined: tuple[tuple[int, int, int], ...] = ()
    """(answer, request, sample) of the answers that are new."""
    answers_gone: tuple[int, ...] = ()
    requests_gone: tuple[int, ...] = ()

    def numbers(self) -> list[int]:
        """All of it as integers; :meth:`from_numbers` reads them."""
        lists = [
            [
                v
                for c in self.chunks
                for v in (c.answer, c.start, c.length, c.extent.offset, c.extent.size, len(c.choosing), c.whole)
            ],
            [v for c in self.copies for v in (c.source, c.target, c.length)],
            self.requests,
            [v for joined in self.joined for v in joined],
            self.answers_gone,
            self.requests_gone,
        ]
        return [self.op, *map(len, lists), *(v for values in lists for v in values)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> "Orders":
        """The orders that gave these :meth:`numbers`."""
        op, *sizes = numbers[:7]
        lists, place = [], 7
        for size in sizes:
            lists.append(numbers[place : place + size])
            place += size
        chunks, copies, requests, joined, answers_gone, requests_gone = lists
        return cls(
            op=op,
            chunks=tuple(
                Chunk(a, s, n, Extent(o, z), c > 0, w, max(c - 1, 0)) for a, s, n, o, z, c, w in _in_rows(chunks, 7)
            ),
            copies=tuple(Copy(*row) for row in _in_rows(copies, 3)),
            requests=tuple(requests),
            joined=tuple((a, r, s) for a, r, s in _in_rows(joined, 3)),
            answers_gone=tuple(answers_gone),
            requests_gone=tuple(requests_gone),
        )


def _in_rows(values: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    return (values[i : i + width] for i in range(0, len(values), width))


class Scored(NamedTuple):
    """A token that was chosen, or one of a prompt, with its log-probability where that was asked for."""

    answer: int
    token: int
    logprob: float | None = None
    top: Alternatives = ()
    near_edge: bool = False
    """Of a chosen one with a log-probability (sampling.py)."""
    made: tuple[int, ...] = ()
    """Of a chosen one: the tokens that the answer has more, a block's among them; empty: the token alone."""
