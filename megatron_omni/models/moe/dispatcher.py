"""Token dispatch for a variable number of experts per token: rows go to the ranks of their experts and come back.

Dispatch has two steps. ``begin`` takes the routing map [T, E] over all real experts, exchanges how many rows go where
and sets these counts on their way to the host. What it returns takes the local tokens x [T, H], per-assignment weights
and the experts, and returns y [T, H], the weighted sum of expert outputs per token in fp32. Every size follows from the
counts: they are the one thing for which a layer waits for its device, and what the caller computes between the two
steps hides it. Zero rows are legal everywhere (every token may go to null, on one rank or on all): the collectives
always run, with splits of zero, and the experts stay in the graph.

``AllToAllDispatcher``: permute by global expert; exchange rows over the expert-parallel (EP) group;
    with expert tensor parallelism (ETP) gather them over that group; group by local expert; experts; and the same way
    back (the ETP gather becomes a reduce-scatter). Rows travel unweighted: weights, and the estimator's factor on row
    gradients, are applied by the source rank when it sums a token's rows, so neither ever leaves it.
``AllGatherDispatcher``: gather tokens, map and weights over the combined ETP x EP group, compute the local experts on
    whatever concerns them, weight and sum, reduce-scatter. More traffic, fewer messages: good for few experts or much
    redundancy. Ranks may hold different numbers of tokens.

Why not Megatron's: docs/decisions/0002-own-dispatcher.md. Gradients are exact: the gradient of a gather is a
reduce-scatter, of an all-to-all the reverse all-to-all.
"""

from collections.abc import Callable
from functools import partial
from itertools import batched
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.models.exchange import AllToAllRows, GatherRows, ReduceScatterRows
from megatron_omni.models.moe.kernels import Kernels
from megatron_omni.ops.permute import Permutation
from megatron_omni.platform.device import to_host

ExpertsFn = Callable[[Tensor, Tensor], Tensor]
"""(rows [A, H], offsets [E_local + 1]) -> [A, H]."""


class Dispatch(Protocol):
    """The second step."""

    def __call__(
        self, x: Tensor, weights: Tensor, experts: ExpertsFn, *, gradient_factor: Tensor | None = None
    ) -> Tensor:
        """y [T, H] in fp32 (float64 for float64 input) from x [T, H], ``weights`` and ``gradient_factor`` [T, E]."""
        ...


class Dispatcher(Protocol):
    """What the dispatchers have in common."""

    def begin(self, routing_map: Tensor) -> Dispatch:
        """The first step, for ``routing_map`` [T, E] bool."""
        ...


class _ReorderRows(torch.autograd.Function):
    """x[order]; the gradient is g[inverse], a gather instead of autograd's scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def _gather_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] of equal-shaped integer tensors."""
    if group.size() == 1:
        return counts.unsqueeze(0)
    gathered = counts.new_empty(group.size() * counts.numel())
    dist.all_gather_into_tensor(gathered, counts.flatten(), group=group)
    return gathered.view(group.size(), *counts.shape)


def _with_zero(cumulative: Tensor) -> Tensor:
    return torch.cat([cumulative.new_zeros(1), cumulative])


def _combine(
    kernels: Kernels,
    rows: Tensor,
    permutation: Permutation,
    weights: Tensor,
    gradient_factor: Tensor | None,
    *,
    num_tokens: int,
) -> Tensor:
    """y [T, H] in at least fp32: the rows of each token, times their entries of ``weights`` [T, E], added up."""
    factor = None if gradient_factor is None else kernels.assignment_values(gradient_factor, permutation)
    return kernels.unpermute(
        rows,
        kernels.assignment_values(weights, permutation),
        permutation,
        num_tokens=num_tokens,
        gradient_factor=factor,
        out_dtype=torch.promote_types(rows.dtype, torch.float32),
    )


class AllToAllDispatcher:
    """Rows to the ranks of their experts by all-to-all over ``ep_group``; ``expt_tp_group`` splits each expert."""

    def __init__(
        self, *, num_experts: int, ep_group: dist.ProcessGroup, expt_tp_group: dist.ProcessGroup, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.ep_group, self.expt_tp_group = ep_group, expt_tp_group
        self.ep_size, self.etp_size = ep_group.size(), expt_tp_group.size()
        self.num_local_experts = num_experts // self.ep_size
        self.first_expert = ep_group.rank() * self.num_local_experts

    def begin(self, routing_map: Tensor) -> Dispatch:
        """See :class:`Dispatcher`."""
        counts = routing_map.sum(0)  # [E] rows of each global expert
        local = slice(self.first_expert, self.first_expert + self.num_local_experts)
        received = _gather_counts(counts, self.ep_group)[:, local]  # [ep, E_local]: from each EP rank, by expert
        held = _gather_counts(received, self.expt_tp_group)  # [etp, ep, E_local]
        return partial(self._dispatch, routing_map, held, to_host(torch.cat([counts, held.flatten()])))

    def _dispatch(
        self,
        routing_map: Tensor,
        held: Tensor,
        numbers: Callable[[], list[int]],
        x: Tensor,
        weights: Tensor,
        experts: ExpertsFn,
        *,
        gradient_factor: Tensor | None = None,
    ) -> Tensor:
        ep = self.ep_size
        by_rank = [sum(experts_of) for experts_of in batched(numbers(), self.num_local_experts)]
        sent_to, got_from = by_rank[:ep], by_rank[ep * (1 + self.expt_tp_group.rank()) :][:ep]
        held_by = [sum(sources) for sources in batched(by_rank[ep:], ep)]
        permutation = self.kernels.build_permutation(routing_map, num_assignments=sum(sent_to))
        rows = self.kernels.permute(x, permutation)
        if self.ep_size * self.etp_size == 1:
            rows = experts(rows, permutation.offsets)
        else:
            rows = self._remote(rows, held, sent_to, got_from, held_by, experts)
        return _combine(self.kernels, rows, permutation, weights, gradient_factor, num_tokens=x.shape[0])

    def _remote(
        self,
        rows: Tensor,
        held: Tensor,
        sent_to: list[int],
        got_from: list[int],
        held_by: list[int],
        experts: ExpertsFn,
    ) -> Tensor:
        """Expert outputs of ``rows``, which lie by global expert, in the same order.

        This rank sends ``sent_to`` [ep] rows and gets ``got_from`` [ep]; after the gather over the ETP group, of whose
        ranks it has ``held_by`` [etp] rows, there are ``held`` [etp, ep, E_local] of each source and local expert.
        """
        if self.ep_size > 1:
            rows = AllToAllRows.apply(rows, got_from, sent_to, self.ep_group)
        if self.etp_size > 1:
            rows = GatherRows.apply(rows, held_by, self.expt_tp_group)
        # Rows lie [ETP source, EP source, local expert]; the experts want [local expert, sources].
        offsets = _with_zero(held.sum((0, 1)).cumsum(0))
        reorder = self.num_local_experts > 1
        if reorder:
            chunk_expert = torch.arange(self.num_local_experts, device=rows.device).repeat(held[..., 0].numel())
            expert_of = torch.repeat_interleave(chunk_expert, held.flatten(), output_size=sum(held_by))
            order = torch.argsort(expert_of, stable=True)
            inverse = torch.argsort(order)
            rows = _ReorderRows.apply(rows, order, inverse)
        rows = experts(rows, offsets)
        if reorder:
            rows = _ReorderRows.apply(rows, inverse, order)
        if self.etp_size > 1:
            rows = ReduceScatterRows.apply(rows, held_by, self.expt_tp_group)
        if self.ep_size > 1:
            rows = AllToAllRows.apply(rows, sent_to, got_from, self.ep_group)
        return rows


class AllGatherDispatcher:
    """Tokens of the whole ``tp_ep_group`` (ETP x EP) to each of its ranks; outputs reduce-scattered back."""

    def __init__(
        self, *, num_experts: int, ep_group: dist.ProcessGroup, tp_ep_group: dist.ProcessGroup, kernels: Kernels
    ) -> None:
        self.kernels = kernels
        self.group = tp_ep_group
        num_local_experts = num_experts // ep_group.size()
        first = ep_group.rank() * num_local_experts
        self.local = slice(first, first + num_local_experts)

    def begin(self, routing_map: Tensor) -> Dispatch:
        """See :class:`Dispatcher`."""
        num_tokens = torch.full((1,), len(routing_map), dtype=torch.int64, device=routing_map.device)
        counts = _gather_counts(torch.cat([num_tokens, routing_map.sum(0)]), self.group)  # [ranks, 1 + E]
        sizes = torch.cat([counts[:, 0], counts[:, 1:][:, self.local].sum().unsqueeze(0)])
        return partial(self._dispatch, routing_map, to_host(sizes))

    def _dispatch(
        self,
        routing_map: Tensor,
        sizes: Callable[[], list[int]],
        x: Tensor,
        weights: Tensor,
        experts: ExpertsFn,
        *,
        gradient_factor: Tensor | None = None,
    ) -> Tensor:
        *tokens_of, num_assignments = sizes()
        num_experts = weights.shape[1]
        alone = self.group.size() == 1
        if not alone:
            x = GatherRows.apply(x, tokens_of, self.group)
            # Everything about assignments in one message; the columns of constants have no gradient.
            facts = [weights, routing_map.to(weights.dtype)] + ([] if gradient_factor is None else [gradient_factor])
            packed = GatherRows.apply(torch.cat(facts, dim=1), tokens_of, self.group)
            weights, routing_map = packed[:, :num_experts], packed[:, num_experts : 2 * num_experts] > 0.5
            gradient_factor = None if gradient_factor is None else packed[:, 2 * num_experts :].detach()
        permutation = self.kernels.build_permutation(routing_map[:, self.local], num_assignments=num_assignments)
        rows = experts(self.kernels.permute(x, permutation), permutation.offsets)
        local_factor = None if gradient_factor is None else gradient_factor[:, self.local]
        y = _combine(self.kernels, rows, permutation, weights[:, self.local], local_factor, num_tokens=x.shape[0])
        return y if alone else ReduceScatterRows.apply(y, tokens_of, self.group)
