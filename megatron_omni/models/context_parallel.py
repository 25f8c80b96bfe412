"""Context parallelism: the tokens of every row cut over a group of ranks, and put together again. All of it is here.

    row      part 0 | part 1 | .. | part 2n - 1          2n equal parts for n ranks
    rank r   part r, then part 2n - 1 - r                an early and a late one: equal work under a causal mask

A rank's part of a micro-batch is a micro-batch of S / n tokens, which the trunk computes as any other: positions, labels,
token facts and routes are those of the tokens, wherever they lie. Two things are of whole rows:

    attention    queries are a rank's own, keys and values those of all ranks: gathered in each layer, behind the rotation.
                 Their gradients are summed on the way back to the rank that made them (a reduce-scatter). Grouped keys
                 and values are small beside what a layer keeps: 2 x groups x channels of them a token.
    the loss     is gathered token by token, so that a task sees whole rows and whole responses, the same on all ranks.
                 Each differentiates the same sum and takes back its own tokens' share, without a message.

Parameters are whole on every rank of the group, and their gradients there are of its own tokens: the data-parallel
reduction runs over both groups (Megatron's ``dp_cp``) and sums them.

The generator of pictures reads rows of the last layer, wherever they lie, and is computed on every rank of the group alike;
its gradients then count 1 / n on each (:func:`counted_once`).

A forward that asks for logits instead of a loss, or computes with a cache, is not cut: the ranks compute the same.

Source: the all-gather form of Llama 3 (https://arxiv.org/abs/2407.21783, section 3.3.2).

Shapes: B rows, S tokens of a whole row, n ranks, T = S / n tokens of a rank.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.batch import GRIDS, OmniBatch
from megatron_omni.models.exchange import GatherRows
from megatron_omni.segments import row_parts


class SequenceCut:
    """How rows are cut over ``group``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def part(self, batch: OmniBatch) -> OmniBatch:
        """This rank's tokens of ``batch``, with all of its media. Places of media that are another rank's lie one behind the
        grid. ValueError for rows that cannot be cut."""
        rows, length = batch.input_ids.shape
        if length % (2 * self.ranks):
            raise ValueError(
                f"rows of {length} tokens under parallel.context_parallel_size={self.ranks}: pad them to a multiple of "
                f"{2 * self.ranks} (data.pad_to_multiple_of)"
            )
        grids: dict[str, Any] = {name: self.own(getattr(batch, name), dim=-1) for name in GRIDS}
        return replace(
            batch,
            **grids,
            attention=batch.attention.of_rank(self.rank, self.ranks, length=length),
            label_places=self._label_places(batch),
            picture_places=self.places(batch.picture_places, rows, length),
            sound_places=self.places(batch.sound_places, rows, length),
            routes=None if batch.routes is None else self.own(batch.routes, dim=1),
            part_labels=(),
        )

    def own(self, x: Tensor, *, dim: int) -> Tensor:
        """This rank's T of the S tokens along ``dim``."""
        parts = row_parts(x.shape[dim], self.rank, self.ranks)
        return torch.cat([x.narrow(dim, part.start, len(part)) for part in parts], dim=dim)

    def whole(self, values: Tensor) -> Tensor:
        """[.., S] of all ranks' ``values`` [.., T], from which every rank computes the same."""
        result: Tensor = _Whole.apply(values, self)
        return result

    def places(self, places: Tensor, rows: int, length: int) -> Tensor:
        """``places`` in the flattened [S, B] grid as those in this rank's [T, B] grid; T x B where they are not its own."""
        early, late = row_parts(length, self.rank, self.ranks)
        token = places // rows
        is_late = (token >= late.start) & (token < late.stop)
        is_own = is_late | ((token >= early.start) & (token < early.stop))
        shift = torch.where(is_late, late.start - len(early), early.start)
        return torch.where(is_own, places - shift * rows, length // self.ranks * rows)

    def shared_rows(self, rows: Tensor, own: Tensor) -> Tensor:
        """[.., H] of all ranks from ``rows`` [.., H], of which ``own`` [..] are a rank's, for what all ranks compute alike and
        whose gradients all count 1 / n."""
        result: Tensor = _SharedRows.apply(rows, own.unsqueeze(-1), self)
        return result

    def _label_places(self, batch: OmniBatch) -> Tensor:
        """This rank's of ``batch.label_places``. They ascend, so those of a part of the rows are neighbours; where nobody has
        counted them, the host waits for their number."""
        rows, length = batch.input_ids.shape
        if not batch.part_labels:
            places = self.places(batch.label_places, rows, length)
            return places[places < length // self.ranks * rows]
        assert len(batch.part_labels) == 2 * self.ranks
        early, late = row_parts(length, self.rank, self.ranks)
        places = batch.label_places.split(batch.part_labels)
        first, second = places[self.rank], places[2 * self.ranks - 1 - self.rank]
        return torch.cat([first - early.start * rows, second - (late.start - len(early)) * rows])


def gathered_keys(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, ..] of every rank's ``x`` [T, ..], in the order of the row; each rank's gradient is of its own queries alone."""
    rows: Tensor = GatherRows.apply(x, [len(x)] * group.size(), group)
    return in_order(rows, group.size())


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's ``x``, one behind the other; no gradient."""
    rows = x.new_empty(len(x) * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.contiguous(), group=group)
    return rows


def in_order(rows: Tensor, ranks: int) -> Tensor:
    """[S, ..] in the order of the row, from the ranks' parts one rank behind the other."""
    early, late = rows.unflatten(0, (ranks, 2, -1)).unbind(1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


class _Whole(torch.autograd.Function):
    """All ranks' values; every rank has the whole gradient of them and takes its own part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cut: SequenceCut) -> Tensor:
        ctx.cut = cut
        return in_order(gathered(values.movedim(-1, 0), cut.group), cut.ranks).movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.own(grads[0], dim=-1), None


class _SharedRows(torch.autograd.Function):
    """Every row from the rank that has it; there the gradient is n times this rank's own, which is 1 / n of the whole."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, own: Tensor, cut: SequenceCut) -> Tensor:
        ctx.cut = cut
        ctx.save_for_backward(own)
        shared = torch.where(own, rows, 0)
        if shared.numel():
            dist.all_reduce(shared, group=cut.group)
        return shared

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (own,) = ctx.saved_tensors
        return torch.where(own, grads[0] * ctx.cut.ranks, 0), None, None


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.share, None


def counted_once(x: Tensor, copies: int) -> Tensor:
    """``x``, which ``copies`` ranks compute alike and whose gradients are summed over them: each counts as one part."""
    result: Tensor = _Counted.apply(x, 1 / copies) if copies > 1 else x
    return result
