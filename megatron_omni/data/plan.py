"""What a step will hold, before anything is decoded: places of the order, cut into sequences and micro-batches (loader.py)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_omni.data.mixture import Draw
from megatron_omni.data.sizes import SampleSize


class Place(NamedTuple):
    """One sample of a step: its place in the global order, the row that fills it, and its size from headers."""

    sample_id: int
    draw: Draw
    attempt: int
    """0: the row drawn; n: its n-th stand-in."""
    size: SampleSize
    is_filler: bool = False
    """Only fills the last step of an order that ends: read like any other, nothing of it is learned or counted."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.size.tokens


Row = list[Place]
"""The samples of one sequence of a batch."""


class Cursor(NamedTuple):
    """Where the order stands between two steps."""

    next_sample: int
    waiting: tuple[int, ...] = ()
    """Samples before ``next_sample`` that no sequence had room for yet, oldest first."""

    @property
    def consumed_samples(self) -> int:
        """Samples that were part of a step."""
        return self.next_sample - len(self.waiting)


@dataclass(frozen=True)
class Skip:
    """A record that was passed over."""

    source: str
    reason: str
    message: str


class Plan(NamedTuple):
    """A step, the same on every rank."""

    micro_batches: list[list[Row]]
    skips: list[Skip]
    """Records passed over because of what their headers show."""
    num_samples: int
    """Samples that left the order for this step; those that wait were seen before."""
    after: Cursor


Found = Literal["planned", "decoded"]
"""Where a record was found to be bad: in a plan, which all ranks make alike, or when one rank decoded it."""


def dealt[T](micro_batches: Sequence[T], *, rank: int, ranks: int) -> list[T]:
    """The micro-batches of a step that data rank ``rank`` computes: round j hands one to each, in turn or against it."""
    turns = [rank, ranks - 1 - rank]
    return [micro_batches[j * ranks + turns[j % 2]] for j in range(len(micro_batches) // ranks)]
