"""Rows of new tokens in a frozen vocabulary matrix, trained as a parameter of their own.

Uni-MoE-2.0 adds 42 special tokens to Qwen2.5's 152k. A stage that freezes the embedding and the output layer still
trains the rows of these 42, and pays for 42 rows: gradient, moments and master weights are [R, H], not [V, H].

    before each use   the rows are written into the frozen matrix, which is then used as a whole
    backward          the matrix gets no gradient, the rows get theirs:
                      input    d row[r] = sum over the tokens t with id ids[r] of d hidden[t]
                      output   d row[r] = sum over the labelled tokens t of d logits[t, ids[r]] hidden[t]

So the forward, and the gradient of everything below, is bit for bit that of a matrix of which only these rows are
trained. Under tensor parallelism (TP) every rank holds all rows and a part of their gradient: of its S / TP tokens at the
input, of its V / TP ids at the output. After the backward the parts are summed, as those of norms are.

Checkpoints know nothing of it: their matrices are whole, rows included (models/language.py).

Shapes: R rows, H hidden size, V vocabulary, B batch, S sequence, N labelled tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class NewTokenRows(nn.Module):
    """The rows of tokens ``ids`` of a vocabulary-parallel matrix [V / TP, H], which starts as they are there."""

    ids: Tensor
    held: Tensor
    """Numbers of the rows that lie in this rank's share of the matrix, and ``places`` where there."""
    places: Tensor

    def __init__(self, matrix: Tensor, ids: Sequence[int], *, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.tp_group = tp_group
        first = tp_group.rank() * len(matrix)
        here = [(number, token - first) for number, token in enumerate(sorted(ids)) if 0 <= token - first < len(matrix)]
        self._index("ids", sorted(ids), matrix.device)
        self._index("held", [number for number, _ in here], matrix.device)
        self._index("places", [place for _, place in here], matrix.device)
        self.weight = nn.Parameter(self.of(matrix))

    def _index(self, name: str, values: list[int], device: torch.device) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64, device=device), persistent=False)

    def of(self, matrix: Tensor) -> Tensor:
        """These rows [R, H] of ``matrix``, on every rank; all ranks of the group call this together."""
        rows = matrix.new_zeros(len(self.ids), matrix.shape[1])
        rows.index_copy_(0, self.held, matrix.detach()[self.places])
        if self.tp_group.size() > 1:
            dist.all_reduce(rows, group=self.tp_group)  # exact: one rank has the row, the others zeros
        return rows

    def write_into(self, matrix: Tensor) -> None:
        """Make these rows the matrix's."""
        # By way of .data: micro-batches in flight have saved the matrix for their backward, and since an update comes
        # after the last of them, they find what they saved.
        matrix.data.index_copy_(0, self.places, self.weight.data[self.held])

    def forward(self, matrix: Tensor) -> Tensor:
        """The parameter, with ``matrix`` made to agree with it."""
        # A call, not an attribute: weights that other ranks updated are waited for in a hook of it.
        self.write_into(matrix)
        return self.weight

    def looked_up(self, embedded: Tensor, rows: Tensor, input_ids: Tensor) -> Tensor:
        """``embedded`` [B, S, H], looked up in the matrix for ``input_ids`` [B, S]; its gradient reaches ``rows``."""
        number = torch.searchsorted(self.ids, input_ids).clamp(max=len(self.ids) - 1)
        number = torch.where(self.ids[number] == input_ids, number, len(self.ids))
        result: Tensor = _InputGradient.apply(embedded, rows, number, self.tp_group)
        return result

    def scored(self, logits: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
        """``logits`` [N, 1, V / TP] of ``hidden`` [N, 1, H] by the matrix; their gradient reaches ``rows``."""
        result: Tensor = _OutputGradient.apply(logits, rows, hidden, self.held, self.places)
        return result


class _InputGradient(torch.autograd.Function):
    """The embeddings as they are; in the backward, each row's sum over its tokens (number R: none of these rows) in this
    rank's share of the sequence."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, rows: Tensor, number: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        ctx.num_rows, ctx.tp_group = len(rows), tp_group
        ctx.save_for_backward(number)
        return embedded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (number,), count = ctx.saved_tensors, ctx.num_rows
        grad, number = (t.tensor_split(ctx.tp_group.size(), dim=1)[ctx.tp_group.rank()] for t in (grads[0], number))
        sums = torch.ops.aten.embedding_dense_backward(grad, number, count + 1, count, False)
        return None, sums[:count], None, None


class _OutputGradient(torch.autograd.Function):
    """The logits as they are; in the backward, the weight gradient of the columns that are these rows'."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, hidden: Tensor, held: Tensor, places: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        ctx.save_for_backward(hidden, held, places)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, held, places = ctx.saved_tensors
        columns = grads[0].flatten(0, -2)[:, places]
        rows = hidden.new_zeros(ctx.num_rows, hidden.shape[-1])
        return grads[0], rows.index_copy_(0, held, columns.t() @ hidden.flatten(0, -2)), None, None, None
