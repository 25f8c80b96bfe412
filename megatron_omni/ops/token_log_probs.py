"""Log-probability of each target token, and on request the entropy of its distribution and whether it is the most
probable one, from hidden states.

    x [n, V] = logits_of(hidden [n, H])                        in at least fp32
    log_probs_i = log p_i[t_i]        p_i = softmax(x_i)
    entropy_i   = -sum_j p_ij log p_ij                         nats
    is_top_i    = x_i[t_i] = max_j x_ij
    d / d x_ij  = (1[j = t_i] - p_ij) g_i - p_ij (log p_ij + entropy_i) h_i
                                                               g, h: the gradients of the first two

The logits of a packed sequence with 16k labels are 10 GB at 152,064 vocabulary rows, several times over with their
softmax and gradient. Rows do not depend on each other, so where the logits have more than ``LOGITS_CHUNK`` elements
they are made a chunk of rows at a time, in the forward and once more in the backward; at most one chunk stands. Weight
gradients of the chunks are added up in fp32. Fewer logits are made once and their log-probabilities kept.

Vocabulary-parallel: each rank of ``group`` has the logits of V / TP columns for every row. Columns from ``vocab_size``
on are padding and take no probability.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.config.parallel import LOGITS_CHUNK

PADDING = -1e30
"""Logit of a padding column: its probability is 0, and a gradient of entropy times it stays finite."""


class TokenLogProbs(NamedTuple):
    """Of each target, [n]."""

    log_prob: Tensor
    entropy: Tensor | None
    """None unless asked for."""
    is_top: Tensor | None
    """bool; None unless asked for. Targets that share the largest logit with another all count."""


def token_log_probs(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    parameters: Sequence[Tensor],
    num_columns: int,
    vocab_size: int,
    group: dist.ProcessGroup,
    with_entropy: bool = False,
    with_top: bool = False,
    chunk_elements: int = LOGITS_CHUNK,
) -> TokenLogProbs:
    """Log-probability of ``targets`` [n] and what is asked for besides, in at least fp32.

    ``logits_of`` maps rows [m, H] to logits [m, ``num_columns``] by ``parameters`` alone, which get the gradients; it is
    called again in the backward. ``hidden`` [n, H] and ``targets`` are the same on every rank of ``group``; the gradient
    of ``hidden`` is what ``logits_of`` makes it.
    """

    def found(rows: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        asked = {"with_entropy": with_entropy, "with_top": with_top}
        return _log_probs(logits_of(rows), wanted, vocab_size=vocab_size, group=group, **asked)

    rows = max(1, chunk_elements // (num_columns * (1 + with_entropy)))
    if len(hidden) <= rows:  # noqa: SIM108
        results = found(hidden, targets)
    else:
        results = _InChunks.apply(found, rows, targets, hidden, *parameters)
    return TokenLogProbs(results[0], results[1] if with_entropy else None, results[-1] if with_top else None)


def _log_probs(
    logits: Tensor, targets: Tensor, *, vocab_size: int, group: dist.ProcessGroup, with_entropy: bool, with_top: bool
) -> tuple[Tensor, ...]:
    """Log-probability and, behind it, what is asked for from this rank's columns ``logits`` [m, V / TP]."""
    width = logits.shape[1]
    first = width * group.rank()
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if first + width > vocab_size:
        padding = torch.arange(first, first + width, device=x.device) >= vocab_size
        x = x.masked_fill(padding, PADDING)
    if group.size() > 1:
        return _VocabParallel.apply(x, targets - first, group, with_entropy, with_top)
    every, column = torch.log_softmax(x, dim=1), targets.unsqueeze(1)
    picked = every.gather(1, column).squeeze(1)
    entropy = [-(every.exp() * every).sum(1)] if with_entropy else []
    is_top = [x.detach().gather(1, column).squeeze(1) == x.detach().amax(1)] if with_top else []
    return (picked, *entropy, *is_top)


class _VocabParallel(torch.autograd.Function):
    """The same of columns on several ranks; two reductions forward, none backward. Keeps log p of its columns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, targets: Tensor, group: dist.ProcessGroup, with_entropy: bool, with_top: bool
    ) -> tuple[Tensor, ...]:
        mine = (targets >= 0) & (targets < x.shape[1])
        column = targets.clamp(0, x.shape[1] - 1).unsqueeze(1)
        top = x.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        every = x - top.unsqueeze(1)
        odds = every.exp()
        sums = [odds.sum(1), every.gather(1, column).squeeze(1).masked_fill(~mine, 0.0)]
        if with_entropy:
            sums.append(odds.mul_(every).sum(1))
        total = torch.stack(sums)
        dist.all_reduce(total, group=group)
        log_total = total[0].log()
        every -= log_total.unsqueeze(1)
        entropy = [log_total - total[2] / total[0]] if with_entropy else []
        ctx.save_for_backward(every, column, mine, *entropy)
        is_top = [total[1] == 0] if with_top else []  # the largest logit was taken off
        ctx.mark_non_differentiable(*is_top)
        return (total[1] - log_total, *entropy, *is_top)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        every, column, mine, *entropy = ctx.saved_tensors
        factor = -grads[0].unsqueeze(1)
        if entropy:
            factor = factor - (every + entropy[0].unsqueeze(1)) * grads[1].unsqueeze(1)
        gradient = every.exp().mul_(factor)
        gradient.scatter_add_(1, column, grads[0].masked_fill(~mine, 0.0).unsqueeze(1))
        return gradient, None, None, None, None


class _InChunks(torch.autograd.Function):
    """``found(hidden, targets)``, ``rows`` rows at a time, without keeping anything of a chunk but its results.

    They go into memory that was there before the chunk: a small tensor that outlives the large ones it was made beside
    would split the heap that CPU runs keep (platform/allocator.py), and the next chunk's would find no room in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        found: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        rows: int,
        targets: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.found, ctx.rows, ctx.parameters = found, rows, parameters
        ctx.save_for_backward(targets, hidden)
        results: tuple[Tensor, ...] = ()
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            parts = found(hidden[chunk], targets[chunk])
            results = results or tuple(part.new_empty(len(hidden)) for part in parts)
            for result, part in zip(results, parts, strict=True):
                result[chunk] = part
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        targets, hidden = ctx.saved_tensors
        trained = [p for p, wanted in zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True) if wanted]
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[3] else None
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            leaf = hidden[chunk].detach().requires_grad_(hidden_grad is not None)
            with torch.enable_grad():
                results = ctx.found(leaf, targets[chunk])
            leaves = [*([leaf] if leaf.requires_grad else []), *trained]
            through = [(result, grad[chunk]) for result, grad in zip(results, grads) if result.is_floating_point()]
            outputs, factors = zip(*through)
            found = torch.autograd.grad(outputs, leaves, factors, allow_unused=True)
            if hidden_grad is not None:
                hidden_grad[chunk] = found[0]
            for total, part in zip(sums, found[len(found) - len(trained) :], strict=True):
                if part is not None:
                    total += part
        parts = iter(total.to(p.dtype) for total, p in zip(sums, trained, strict=True))
        by_parameter = [next(parts) if wanted else None for wanted in ctx.needs_input_grad[4:]]
        return None, None, None, hidden_grad, *by_parameter
