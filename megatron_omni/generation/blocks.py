"""Pictures in answers, as blocks of tokens whose hidden states are told (request.Block), on every rank of a replica.

    answer    H e r e :  [TASK0]  [TASK1] [TASK2] [IMG0] .. [IMG31]  . [end]
              chosen     chosen   follow without a choice            chosen
    steps     one each            one forward, over the cache         one each

A block is computed as a part of a prompt is: in one step where that has room for it, else in several. The last stage reads
the rows behind its final norm. They are the same rows as those of one forward over the whole conversation
(tests/distributed/test_blocks.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.generation.request import Block
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.parallel.groups import replica
from megatron_omni.platform.device import device


@dataclass(eq=False)
class Blocks:
    """Those of one answer."""

    block: Block
    begins: list[int]
    """Of each the place of its first token in the answer."""
    read: int = 0
    """How many of them have been computed."""
    chosen: int = 0
    """Tokens of the answer that were chosen."""

    @classmethod
    def of(cls, block: Block) -> "Blocks":
        """Of an answer that has said nothing yet."""
        return cls(block, [0] if block.where == "first" else [])

    def after(self, token: int, *, at: int, is_end: bool, most: int) -> tuple[int, ...]:
        """What a chosen ``token`` adds to an answer of ``at`` tokens, of which ``most`` may be chosen."""
        self.chosen += 1
        block = self.block
        wanted = block.where == "end" and not self.begins
        if self.chosen > most:  # chosen behind a block that took the place of the end
            return ()
        if token == block.ids[0] or (is_end and wanted):
            return tuple(self._begin(at))
        if wanted and self.chosen == most:
            return (token, *self._begin(at + 1))
        return (token,)

    def forbidden(self) -> tuple[int, ...]:
        """Tokens that cannot be chosen next."""
        ids = self.block.ids
        return ids if len(self.begins) >= self.block.most else ids[1:]

    def _begin(self, at: int) -> list[int]:
        self.begins.append(at)
        return list(self.block.ids)


class Known(Protocol):
    """What is asked of an answer."""

    blocks: Blocks | None

    @property
    def begins_at(self) -> int:
        """Tokens before the answer."""
        ...


class Part(NamedTuple):
    """Tokens of a block that a step computes."""

    answer: int
    first: int
    """Of the block's tokens."""
    places: range
    """In the step's row."""
    ends: bool
    """The last of them is the block's last."""


class Shown(NamedTuple):
    """A block that has been computed."""

    answer: int
    number: int
    hidden: Tensor
    """[T, H] float32 in host memory."""


def parts_of(chunks: Sequence[Chunk], answers: Mapping[int, Known]) -> list[Part]:
    """Which tokens of ``chunks``, as they stand one behind the other in a step's row, are those of blocks not yet read."""
    parts, first = [], 0
    for chunk in chunks:
        answer = answers[chunk.answer]
        blocks = answer.blocks
        if blocks is not None and blocks.read < len(blocks.begins):
            begin = answer.begins_at + blocks.begins[blocks.read]
            end = begin + len(blocks.block.ids)
            low, high = max(begin, chunk.start), min(end, chunk.start + chunk.length)
            if low < high:
                places = range(first + low - chunk.start, first + high - chunk.start)
                parts.append(Part(chunk.answer, low - begin, places, high == end))
        first += chunk.length
    return parts


class BlockRows:
    """Hidden states of blocks, on their way from the last stage to the leader."""

    def __init__(self, pg: ProcessGroupCollection) -> None:
        self._pg = pg
        self._parts: dict[int, list[Tensor]] = {}
        """On the leader: of answers whose block is computed in several steps."""

    def take(
        self, parts: Sequence[Part], rows: Tensor | None, answers: Mapping[int, Known], *, hidden_size: int
    ) -> list[Shown]:
        """The blocks that a step finished, told on the leader; ``rows`` [n, H] of the last stage are those of ``parts``."""
        if not parts:
            return []
        count = sum(len(part.places) for part in parts)
        whole = torch.empty(count, hidden_size, device=device()) if rows is None else rows.float()
        if self._pg.pp.size() > 1:
            dist.broadcast(whole, group=self._pg.pp, group_src=self._pg.pp.size() - 1)
        leads, shown = replica(self._pg).rank() == 0, []
        for part, own in zip(parts, whole.split([len(part.places) for part in parts])):
            blocks = answers[part.answer].blocks
            assert blocks is not None
            if leads:
                if part.first == 0:  # an answer that lost its place begins its block again
                    self._parts[part.answer] = []
                self._parts[part.answer].append(own.cpu())
            if part.ends:
                if leads:
                    shown.append(Shown(part.answer, blocks.read, torch.cat(self._parts.pop(part.answer))))
                blocks.read += 1
        return shown

    def forget(self, answer: int) -> None:
        """An answer has gone."""
        self._parts.pop(answer, None)


def as_bytes(rows: Tensor | None) -> bytes:
    """Rows as an event has them."""
    return b"" if rows is None else rows.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()


def from_bytes(data: bytes, width: int) -> Tensor | None:
    """[n, ``width``] float32 of :func:`as_bytes`; None of nothing."""
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, width) if data else None
