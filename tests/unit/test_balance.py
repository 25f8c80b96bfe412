"""Auxiliary loss by its definition, its coefficient, how it joins the backward pass, and the routing metrics."""

import math

import pytest
import torch

from megatron_omni.batch import Modality
from megatron_omni.config.model import MoEConfig
from megatron_omni.models.moe.balance import (
    attach_loss,
    aux_loss_coefficient,
    load_balancing_loss,
    record_routing,
    reduce_stats,
    routing_metrics,
)
from megatron_omni.models.moe.context import RoutingStats, TokenContext
from megatron_omni.ops.topp_route import Routing, RoutingRule, select_slots

T, SLOTS = 40, 5


def context(**changes):
    fields = {
        "sample_ids": torch.zeros(T, dtype=torch.long),
        "sample_positions": torch.arange(T),
        "modality": torch.arange(T) % 4,
        "has_label": torch.arange(T) % 3 == 0,
        "padding": torch.arange(T) >= 33,
        "seed": 0,
        "step": 0,
        "stochastic": True,
        "aux_loss_scale": 0.0,
    }
    return TokenContext(**(fields | changes))


def problem():
    z = torch.randn(T, SLOTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ctx = context()
    return z, select_slots(z, RoutingRule(num_routed=4, num_null=1, top_p=0.7), padding=ctx.padding).mask, ctx


@pytest.mark.parametrize("probs", ["selected", "full"])
@pytest.mark.parametrize("counts_null", [True, False])
def test_loss_token_by_token_with_gradient(probs, counts_null):
    """L = E_d sum_e f_e P_e with a_t = 0 (padding), 10 (label), 1; without null its term leaves the sum, E_d stays."""
    z, mask, ctx = problem()
    z.requires_grad_()
    moe = MoEConfig(aux_loss_probs=probs, aux_loss_counts_null=counts_null)
    loss = load_balancing_loss(z, mask, ctx=ctx, moe=moe, group=None)
    f, p, total = [0.0] * SLOTS, [0.0] * SLOTS, 0.0
    for t in range(T):
        a = 0.0 if ctx.padding[t] else 10.0 if ctx.has_label[t] else 1.0
        total += a
        among = mask[t].nonzero().flatten().tolist() if probs == "selected" else list(range(SLOTS))
        for e in range(SLOTS):
            f[e] += a * float(mask[t, e])
            if a and e in among:
                p[e] = p[e] + a * torch.softmax(z[t, among], 0)[among.index(e)]
    counted = range(SLOTS if counts_null else 4)
    expected = SLOTS * sum(f[e] / total * p[e] / total for e in counted)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, z, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(got, wanted)
    pull = got[~ctx.padding].abs() > 0
    assert bool((pull | mask[~ctx.padding]).all()) == (probs == "full"), "an unselected slot is pulled in `full` alone"


@pytest.mark.parametrize("probs", ["selected", "full"])
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_logits_of_padding_reach_neither_loss_nor_gradient(probs, poison):
    z, mask, ctx = problem()
    moe, results = MoEConfig(aux_loss_probs=probs), []
    for value in (0.0, poison):
        given = z.masked_fill(ctx.padding[:, None], value).requires_grad_()
        loss = load_balancing_loss(given, mask, ctx=ctx, moe=moe, group=None)
        results.append((loss, *torch.autograd.grad(loss, given)))
    assert torch.isfinite(results[0][0]) and all(map(torch.equal, *results))


def test_balanced_loss_is_the_mean_count():
    """Every slot chosen equally often with equal probability: L = mean k (2 of 5 here), docs/model.md 2.5."""
    z = torch.zeros(T, SLOTS, dtype=torch.float64)
    mask = torch.zeros(T, SLOTS, dtype=torch.bool)
    for t in range(T):
        mask[t, [t % 5, (t + 1) % 5]] = True
    ctx = context(padding=torch.zeros(T, dtype=torch.bool), has_label=torch.zeros(T, dtype=torch.bool))
    loss = load_balancing_loss(z, mask, ctx=ctx, moe=MoEConfig(), group=None)
    assert loss.item() == pytest.approx(2.0)


def test_a_micro_batch_of_padding_has_no_loss():
    z, _, _ = problem()
    z.requires_grad_()
    ctx = context(padding=torch.ones(T, dtype=torch.bool))
    loss = load_balancing_loss(z, torch.zeros(T, SLOTS, dtype=torch.bool), ctx=ctx, moe=MoEConfig(), group=None)
    loss.backward()
    assert loss.item() == 0.0 and bool((z.grad == 0).all())


def test_coefficient_falls_linearly_and_stays():
    moe = MoEConfig(moe_aux_loss_coeff=0.025, moe_aux_loss_coeff_min=0.001, moe_aux_loss_decay_iters=10_000)
    values = [aux_loss_coefficient(moe, step=step) for step in (0, 2_500, 5_000, 10_000, 99_999)]
    assert values == pytest.approx([0.025, 0.019, 0.013, 0.001, 0.001])
    constant = MoEConfig(moe_aux_loss_coeff=0.025, moe_aux_loss_coeff_min=0.01, moe_aux_loss_decay_iters=0)
    assert aux_loss_coefficient(constant, step=0) == 0.01


def test_attached_loss_adds_its_gradient_and_nothing_else():
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    y = attach_loss(w * 5, (w**2).sum() * 0.5)
    assert y.tolist() == [10.0, 15.0]
    y.sum().backward()
    assert w.grad.tolist() == [5.0 + 2.0, 5.0 + 3.0]


def routing_of(mask):
    ones = torch.ones(mask.shape, dtype=torch.float64)
    return Routing(mask=mask, weights=ones, shared_weights=ones[:, :2], scale=ones, k=mask.sum(1))


def test_statistics_count_tokens_once_and_padding_never():
    _, mask, ctx = problem()
    stats = RoutingStats()
    for _ in range(2):
        record_routing(
            stats,
            routing_of(mask),
            layer=4,
            ctx=ctx,
            num_routed=4,
            num_before_drop=mask.sum() + 3,
            aux_loss=torch.tensor(1.5),
        )
    stats.micro_batches = 2
    real = mask[:33, :4].sum(1)
    for modality in Modality:
        tokens = [t for t in range(33) if t % 4 == modality]
        assert stats.tokens[4][modality] == 2 * len(tokens)
        assert stats.selected[4][modality].tolist() == (2 * mask[tokens].sum(0)).tolist()
    assert stats.k_histogram[4].tolist() == [2 * int((real == k).sum()) for k in range(5)]
    assert (stats.dropped[4].item(), stats.aux_loss[4].item()) == (6.0, 3.0)

    reduced = reduce_stats(stats, layers=[2, 4], moe=MoEConfig())
    assert torch.equal(reduced.selected[4], stats.selected[4]) and reduced.tokens[2].sum() == 0
    reduced = reduce_stats(stats, layers=[4], moe=MoEConfig())
    metrics = routing_metrics(reduced, layers=[4], moe=MoEConfig(capacity_factor=1.0))
    assert metrics["moe/dropped"] == pytest.approx(6 / (2 * mask.sum().item() + 6))
    assert "moe/dropped" not in routing_metrics(reduced, layers=[4], moe=MoEConfig())
    assert metrics["moe/mean_k"] == pytest.approx(real.double().mean().item())
    assert metrics["moe/null_share"] == pytest.approx((mask[:, 4].sum() / mask.sum()).item())
    per_token = (2 * mask.sum().item() + 6) / 66
    assert metrics["moe/aux_loss"] == pytest.approx(1.5 / per_token)
    image = [t for t in range(33) if t % 4 == Modality.IMAGE]
    counts = [metrics[f"moe/k/layer_0/{k}"] for k in range(5)]
    assert counts == pytest.approx([(real == k).double().mean().item() for k in range(5)]) and sum(
        counts
    ) == pytest.approx(1)
    load = mask[image].double().mean(0).tolist()
    names = [f"expert_{e}" for e in range(4)] + ["null_0"]
    assert [metrics[f"moe/load/layer_0/image/{name}"] for name in names] == pytest.approx(load)
    assert all(math.isfinite(v) for v in metrics.values())


def test_metrics_of_nothing_are_empty():
    moe = MoEConfig()
    assert routing_metrics(reduce_stats(RoutingStats(), layers=[2], moe=moe), layers=[2], moe=moe) == {}
    assert routing_metrics(reduce_stats(RoutingStats(), layers=[], moe=moe), layers=[], moe=moe) == {}
