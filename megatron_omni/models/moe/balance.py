"""Load balancing: the auxiliary loss, how its gradient joins the backward pass, its coefficient, and routing metrics.

Per layer and micro-batch, over the E_d dynamic slots (null included unless ``aux_loss_counts_null`` is off):
    f_e = sum_t a_t m_te / sum_t a_t,   P_e = sum_t a_t q_te / sum_t a_t,   L = E_d * sum_e f_e P_e
with a_t = 0 for padding, ``aux_loss_label_weight`` for tokens that carry a label and 1 otherwise; m the selection
before any capacity drop; q the softmax over the selected slots (``selected``, the published code) or over all dynamic
ones (``full``). f and P are means over the whole micro-batch: summed over the sequence shards of the TP and CP groups,
never over data parallel, so L does not depend on TP, CP, PP or EP (docs/model.md 2.5). Balanced, L is the mean number of
selected slots; metrics divide by it.

The paper gives no auxiliary loss; this is the authors' code's. T tokens of this rank's shard.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omni.batch import Modality
from megatron_omni.config.model import MoEConfig
from megatron_omni.models.moe.context import RoutingStats, TokenContext
from megatron_omni.ops.topp_route import Routing, masked_softmax

NUM_MODALITIES = len(Modality)


class _SumOverGroup(torch.autograd.Function):
    """Sum over a process group; the gradient stays local, because every rank differentiates the same summed loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _AttachLoss(torch.autograd.Function):
    """Identity on x that adds ``loss`` to whatever is differentiated: its gradient is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.saved_tensors[0]


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, with ``loss`` (already scaled) joined to the backward pass that goes through it."""
    result: Tensor = _AttachLoss.apply(x, loss)
    return result


def aux_loss_coefficient(moe: MoEConfig, *, step: int) -> float:
    """Coefficient at an optimizer step: linear from ``moe_aux_loss_coeff`` to its minimum, then constant."""
    if moe.moe_aux_loss_decay_iters <= 0:
        return moe.moe_aux_loss_coeff_min
    done = min(max(step, 0) / moe.moe_aux_loss_decay_iters, 1.0)
    return moe.moe_aux_loss_coeff + (moe.moe_aux_loss_coeff_min - moe.moe_aux_loss_coeff) * done


def load_balancing_loss(
    z: Tensor, mask: Tensor, *, ctx: TokenContext, moe: MoEConfig, group: dist.ProcessGroup | None
) -> Tensor:
    """L of the module docstring from dynamic logits and selection [T, E_d]; ``group``: ranks that share the
    micro-batch."""
    weight = (~ctx.padding).to(z.dtype).masked_fill_(ctx.has_label & ~ctx.padding, moe.aux_loss_label_weight)
    z = z.masked_fill(ctx.padding.unsqueeze(1), 0)  # 0 x NaN is NaN: a weight of 0 does not keep a value out
    q = torch.softmax(z, dim=1) if moe.aux_loss_probs == "full" else masked_softmax(z, mask)
    sums = torch.cat([weight @ mask.to(z.dtype), weight @ q, weight.sum().unsqueeze(0)])
    if group is not None and dist.get_world_size(group) > 1:
        sums = _SumOverGroup.apply(sums, group)
    num_slots = z.shape[1]
    total = sums[-1].clamp_min(torch.finfo(z.dtype).tiny)  # a micro-batch of padding only: L = 0
    f, p = sums[:num_slots] / total, sums[num_slots:-1] / total
    terms = f * p
    if not moe.aux_loss_counts_null:
        terms = terms[: moe.num_routed_experts]
    return num_slots * terms.sum()


@torch.no_grad()
def record_routing(
    stats: RoutingStats,
    routing: Routing,
    *,
    layer: int,
    ctx: TokenContext,
    num_routed: int,
    num_before_drop: Tensor | None = None,
    aux_loss: Tensor | None = None,
) -> None:
    """Add one micro-batch of one layer to ``stats`` (this rank's tokens; the loss is the whole micro-batch's)."""
    counted = ~ctx.padding.unsqueeze(1)
    of_modality = (_one_hot(ctx.modality, NUM_MODALITIES) & counted).to(torch.float64)
    mask = routing.mask.to(torch.float64)
    real = routing.mask[:, :num_routed].sum(1)
    histogram = (_one_hot(real, num_routed + 1) & counted).sum(0)
    dropped = torch.zeros((), dtype=torch.float64, device=mask.device)
    if num_before_drop is not None:
        dropped = num_before_drop.to(torch.float64) - mask.sum()
    loss = torch.zeros_like(dropped) if aux_loss is None else aux_loss.detach().to(torch.float64)
    for total, value in (
        (stats.selected, of_modality.t() @ mask),
        (stats.tokens, of_modality.sum(0)),
        (stats.k_histogram, histogram.to(torch.float64)),
        (stats.aux_loss, loss),
        (stats.dropped, dropped),
    ):
        total[layer] = total[layer] + value if layer in total else value


def _one_hot(x: Tensor, size: int) -> Tensor:
    """[n, size] bool of x [n]. Nothing is read back, as it is by ``F.one_hot`` and ``bincount``, which check x."""
    return x.unsqueeze(1) == torch.arange(size, device=x.device)


def reduce_stats(
    stats: RoutingStats,
    *,
    layers: Sequence[int],
    moe: MoEConfig,
    group: dist.ProcessGroup | None = None,
    dp_group: dist.ProcessGroup | None = None,
    pp_group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> RoutingStats:
    """Statistics of the whole step, the same on every rank: counts over the ranks of ``group``, which
    share micro-batches, DP replicas and pipeline stages.

    ``layers``: numbers of all MoE layers of the model, in order; layers of other stages are absent from ``stats``. The
    auxiliary loss is equal on the ranks of ``group``, so it is summed over DP and PP alone.
    """
    slots = moe.num_routed_experts + moe.num_null_experts
    histogram = moe.num_routed_experts + 1
    shapes = {
        "selected": (NUM_MODALITIES, slots),
        "tokens": (NUM_MODALITIES,),
        "k_histogram": (histogram,),
        "dropped": (),
    }

    def stacked(name: str, shape: tuple[int, ...]) -> Tensor:
        zero = torch.zeros(shape, dtype=torch.float64, device=device)
        values = getattr(stats, name)
        return torch.stack([values[layer].to(zero) if layer in values else zero for layer in layers]).reshape(
            len(layers), -1
        )

    def summed(x: Tensor, groups: Sequence[dist.ProcessGroup | None]) -> Tensor:
        for group in groups:
            if group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(x, group=group)
        return x

    if not layers:
        return RoutingStats(micro_batches=stats.micro_batches)
    counts = [stacked(name, shape) if shape else stacked(name, shape).view(-1, 1) for name, shape in shapes.items()]
    count_sums = summed(torch.cat(counts, dim=1), (group, dp_group, pp_group))
    losses = summed(stacked("aux_loss", ()).view(-1), (dp_group, pp_group))
    micro_batches = torch.tensor([float(stats.micro_batches)], dtype=torch.float64, device=device)
    result = RoutingStats(micro_batches=int(summed(micro_batches, (dp_group,)).item()))
    for row, layer in enumerate(layers):
        at = 0
        for name, shape in shapes.items():
            size = int(torch.Size(shape).numel())
            getattr(result, name)[layer] = count_sums[row, at : at + size].reshape(shape).cpu()
            at += size
        result.aux_loss[layer] = losses[row].cpu()
    return result


def moe_layer_numbers(num_blocks: int) -> list[int]:
    """Hybrid layer numbers count attention and feed-forward layers alike, from 1: every second one is a MoE layer."""
    return [2 * block + 2 for block in range(num_blocks)]


def layer_use(stats: RoutingStats, *, layers: Sequence[int], moe: MoEConfig) -> list[tuple[float, float]]:
    """Of each layer of reduced statistics, real experts per token and the null part of the selected slots; empty where no
    token was counted."""
    use = []
    for layer in layers:
        selected, num_tokens = stats.selected[layer], float(stats.tokens[layer].sum())
        if num_tokens == 0.0:
            return []
        real, null = selected.split([moe.num_routed_experts, moe.num_null_experts], dim=1)
        use.append((float(real.sum()) / num_tokens, float(null.sum()) / max(float(selected.sum()), 1.0)))
    return use


def routing_metrics(stats: RoutingStats, *, layers: Sequence[int], moe: MoEConfig) -> dict[str, float]:
    """Metrics of reduced statistics; ``layer_{i}`` counts MoE layers from 0.

    ``moe/mean_k``: real experts per token; ``moe/null_share``: part of the selected slots that are null;
    ``moe/aux_loss``: L over the mean number of counted slots per token (1 is balanced), mean over layers and
    micro-batches;
    ``moe/k/layer_{i}/{k}``: part of the tokens that use exactly k real experts;
    ``moe/dropped``: part of the selected slots that capacity removed (where there is a capacity);
    ``moe/load/layer_{i}/{modality}/expert_{e}``: part of that modality's tokens that use slot e (``null_{e}`` after
    them).
    """
    if not layers or sum(float(stats.tokens[layer].sum()) for layer in layers) == 0:
        return {}
    metrics: dict[str, float] = {}
    dropped_shares, losses = [], []
    use = layer_use(stats, layers=layers, moe=moe)
    num_routed = moe.num_routed_experts
    names = [f"expert_{e}" for e in range(num_routed)] + [f"null_{e}" for e in range(moe.num_null_experts)]
    for i, layer in enumerate(layers):
        selected, tokens = stats.selected[layer], stats.tokens[layer]
        num_tokens, num_selected = float(tokens.sum()), float(selected.sum())
        before_drop = num_selected + float(stats.dropped[layer])
        counted = before_drop if moe.aux_loss_counts_null else before_drop - float(selected[:, num_routed:].sum())
        if stats.micro_batches and counted:
            losses.append(float(stats.aux_loss[layer]) / stats.micro_batches / (counted / num_tokens))
        metrics[f"moe/mean_k/layer_{i}"] = use[i][0]
        for k, count in enumerate(stats.k_histogram[layer].tolist()):
            metrics[f"moe/k/layer_{i}/{k}"] = count / num_tokens
        for modality in Modality:
            if tokens[modality] > 0:
                for name, load in zip(names, (selected[modality] / tokens[modality]).tolist()):
                    metrics[f"moe/load/layer_{i}/{modality.name.lower()}/{name}"] = load
        dropped_shares.append(float(stats.dropped[layer]) / max(before_drop, 1.0))
    metrics["moe/mean_k"] = sum(mean_k for mean_k, _ in use) / len(layers)
    metrics["moe/null_share"] = sum(null for _, null in use) / len(layers)
    if moe.capacity_factor is not None:
        metrics["moe/dropped"] = sum(dropped_shares) / len(layers)
    if losses:
        metrics["moe/aux_loss"] = sum(losses) / len(losses)
    return metrics
