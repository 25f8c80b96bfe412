"""Routing against definitions written token by token in float64 from the specification (sections 1.1, 1.2,
11.1-11.10)."""

import itertools
import math

import pytest
import torch

from megatron_omni.ops.topp_route import (
    RoutingRule,
    capacity_keep,
    expert_capacity,
    release_select,
    route_selected,
    select_slots,
    topp_route,
    topp_route_reference,
)
from tests.ops.routing import routed

ROUTED, NULL, SHARED = 4, 1, 2
SLOTS = ROUTED + NULL
RULE = RoutingRule(num_routed=ROUTED, num_null=NULL, top_p=0.7)


def softmax(values):
    top = max(values)
    exponentials = [math.exp(v - top) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def argmax(values, candidates):
    """Largest value among candidates; ties to the lowest index."""
    return min(candidates, key=lambda i: (-values[i], i))


def select_token(z, *, top_p=0.7, top_k=None, gumbel=None, max_routed=None):
    """Draw slots one at a time until their probabilities sum to top_p. Returns (selected, delta by slot)."""
    p = softmax(z)
    key = z if gumbel is None else [a + b for a, b in zip(z, gumbel, strict=True)]
    left, selected, delta, total, real = list(range(len(z))), [], {}, 0.0, 0
    for count in itertools.count(1):
        drawn = argmax(key, left)
        delta[drawn] = drawn == argmax(z, left)
        total += p[drawn]
        if drawn >= ROUTED or max_routed is None or real < max_routed:
            selected.append(drawn)
            real += drawn < ROUTED
        left.remove(drawn)
        if not left or (count == top_k if top_k is not None else total >= top_p):
            return selected, delta


def logits(num_tokens=300, seed=0, ties=False):
    z = torch.randn(num_tokens, SLOTS + SHARED, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (z * 2).round() / 2 if ties else z


def noise(num_tokens=300, seed=1, slots=SLOTS):
    u = torch.rand(num_tokens, slots, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return -torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-12)))


def uniforms(num_tokens=300, seed=2):
    return torch.rand(num_tokens, SLOTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "rule", [{}, {"top_p": 0.3}, {"top_p": 1.0}, {"top_k": 2}, {"max_routed": 2}, {"top_p": 0.9, "max_routed": 1}]
)
@pytest.mark.parametrize("ties", [False, True])
def test_selection_and_weights_token_by_token(sampled, rule, ties):
    z, g = logits(ties=ties), noise() if sampled else None
    arguments = {"num_routed": ROUTED, "num_null": NULL, "gumbel": g, "top_p": 0.7} | rule
    routing, plain = routed(z, **arguments), routed(z, by=topp_route_reference, **arguments)
    assert torch.equal(plain.mask, routing.mask) and torch.equal(plain.k, routing.k)
    torch.testing.assert_close(plain.weights, routing.weights, rtol=1e-12, atol=1e-15)
    for t in range(z.shape[0]):
        token = z[t].tolist()
        selected, _ = select_token(token[:SLOTS], gumbel=g[t].tolist() if sampled else None, **rule)
        assert routing.mask[t].nonzero().flatten().tolist() == sorted(selected)
        assert routing.k[t] == len(selected)
        everyone = [*selected, *range(SLOTS, SLOTS + SHARED)]
        share = dict(zip(everyone, softmax([token[e] for e in everyone]), strict=True))
        expected = torch.tensor([share.get(e, 0.0) for e in range(SLOTS + SHARED)], dtype=torch.float64)
        got = torch.cat([routing.weights[t], routing.shared_weights[t]])
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    assert bool((routing.scale == 1).all())


@pytest.mark.parametrize(("estimator", "probability"), [("paper", 5 / 8), ("grin", 1 / 4)])
def test_scale_token_by_token(estimator, probability):
    z, g, u = logits(ties=True), noise(), uniforms()
    plain = routed(z, num_routed=ROUTED, num_null=NULL, top_p=0.7, gumbel=g)
    arguments = {"num_routed": ROUTED, "num_null": NULL, "top_p": 0.7, "gumbel": g, "bernoulli": u}
    routing = routed(z, **arguments, estimator=estimator)
    assert torch.equal(routed(z, by=topp_route_reference, **arguments, estimator=estimator).scale, routing.scale)
    seen = set()
    for t in range(z.shape[0]):
        selected, delta = select_token(z[t, :SLOTS].tolist(), gumbel=g[t].tolist())
        for e in selected:
            s = 1.0 if delta[e] or u[t, e] < probability else 1 / 3
            assert routing.scale[t, e].item() == pytest.approx(s, abs=1e-12)
            assert routing.weights[t, e].item() == pytest.approx(s * plain.weights[t, e].item(), rel=1e-12)
            seen.add((delta[e], s == 1.0))
    assert seen == {(True, True), (False, True), (False, False)}
    assert torch.equal(routing.shared_weights, plain.shared_weights)


def test_sorted_selection_never_leaves_the_argmax():
    """Without sampling every slot is the best of what is left: s = 1 whatever B says."""
    u = torch.ones(300, SLOTS, dtype=torch.float64)
    routing = routed(logits(ties=True), num_routed=ROUTED, num_null=NULL, top_p=1.0, bernoulli=u, estimator="paper")
    assert bool((routing.scale == 1).all())


def test_null_share_is_lost_and_all_null_leaves_the_shared_part():
    z = torch.zeros(1, SLOTS + SHARED, dtype=torch.float64)
    z[0, ROUTED] = 10.0
    routing = routed(z, num_routed=ROUTED, num_null=NULL, top_p=0.7)
    assert routing.mask[0].tolist() == [False] * ROUTED + [True]
    expected = math.exp(0) / (math.exp(10) + 2)
    torch.testing.assert_close(routing.shared_weights[0], torch.full((2,), expected, dtype=torch.float64))


def test_padding_selects_nothing_and_stays_finite():
    padding = torch.arange(300) % 3 == 0
    for shared in (SHARED, 0):
        z = logits()[:, : SLOTS + shared].contiguous().requires_grad_()
        routing = routed(z, num_routed=ROUTED, num_null=NULL, top_p=0.7, padding=padding)
        assert not routing.mask[padding].any() and bool((routing.k[~padding] >= 1).all())
        assert bool((routing.weights[padding] == 0).all())
        (routing.weights.square().sum() + routing.shared_weights.square().sum()).backward()
        assert torch.isfinite(z.grad).all()
        assert bool((z.grad[padding][:, :SLOTS] == 0).all())


@pytest.mark.parametrize("mode", ["masked_softmax", "release"])
@pytest.mark.parametrize("route", [topp_route, topp_route_reference])
def test_probability_one_takes_every_slot_in_fp32(mode, route):
    """fp32 prefix sums end at 0.99999994, or at 1 before the last slot where that lies far below: neither is asked."""
    z = 5 * torch.randn(20_000, SLOTS + SHARED, generator=torch.Generator().manual_seed(0))
    in_order = torch.softmax(z[:, :SLOTS], 1).sort(1, descending=True).values
    assert (in_order[:, :-1].sum(1) >= 1).sum() > 1000, "the sums reach 1 early, or this shows nothing"
    assert bool((routed(z, by=route, num_routed=ROUTED, num_null=NULL, top_p=1.0, mode=mode).k == SLOTS).all())


@pytest.mark.parametrize("mode", ["masked_softmax", "release"])
@pytest.mark.parametrize("route", [topp_route, topp_route_reference])
@pytest.mark.parametrize("top_k", [0, SLOTS + 1])
def test_a_fixed_count_that_the_slots_cannot_give_is_refused(mode, route, top_k):
    with pytest.raises(ValueError, match=rf"top_k: {top_k} is not in 1\.\.{SLOTS}"):
        routed(logits(), by=route, num_routed=ROUTED, num_null=NULL, top_p=0.7, top_k=top_k, mode=mode)


def test_counts_on_iid_gaussian_logits():
    """docs/model.md 2.1: k in 1..4 sorted, mean 2.46; sampled up to 5, mean 2.92 (P = 0.7, five slots)."""
    num = 200_000
    z = torch.randn(num, SLOTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_rank = select_slots(z, RULE).mask.sum(1)
    drawn = select_slots(z, RULE, gumbel=noise(num)).mask.sum(1)
    assert (by_rank.min().item(), by_rank.max().item()) == (1, 4)
    assert (drawn.min().item(), drawn.max().item()) == (1, 5)
    assert by_rank.double().mean().item() == pytest.approx(2.46, abs=0.01)
    assert drawn.double().mean().item() == pytest.approx(2.92, abs=0.01)


def test_sampled_selection_has_the_law_of_draws_without_replacement():
    """Frequencies of all selected sets against enumeration of the draw orders, within 5 standard deviations."""
    z = [1.2, 0.1, -0.7, 0.4, 0.0]
    p = softmax(z)
    law: dict[frozenset, float] = {}

    def extend(prefix, probability):
        if sum(p[i] for i in prefix) >= 0.7:
            law[frozenset(prefix)] = law.get(frozenset(prefix), 0.0) + probability
            return
        rest = [i for i in range(SLOTS) if i not in prefix]
        mass = sum(p[i] for i in rest)
        for i in rest:
            extend([*prefix, i], probability * p[i] / mass)

    extend([], 1.0)
    num = 200_000
    mask = select_slots(torch.tensor([z], dtype=torch.float64).expand(num, -1), RULE, gumbel=noise(num)).mask
    codes = torch.bincount((mask.long() << torch.arange(SLOTS)).sum(1), minlength=1 << SLOTS)
    assert sum(law.values()) == pytest.approx(1.0)
    for code, count in enumerate(codes.tolist()):
        q = law.get(frozenset(i for i in range(SLOTS) if code >> i & 1), 0.0)
        assert abs(count / num - q) <= 5 * math.sqrt(q * (1 - q) / num), code


# ---- the published code --------------------


def release_token(z, *, eps=0.01, top_p=0.7, gumbel=None, bernoulli=None):
    """docs/model.md 2.2, `release`, for one token, scalars with autograd. Returns (dynamic weights, shared weights,
    taken)."""
    plain = z.detach().tolist()
    q = sorted(softmax(plain[:SLOTS]), reverse=True)
    k = 1 + sum(total < top_p for total in list(itertools.accumulate(q))[:-1])
    taken, multipliers = [], {}
    for j in range(k):
        left = [e for e in range(SLOTS) if e not in taken]
        best = max(plain[e] for e in left)
        near = []
        for e in left:
            scale = max(abs(plain[e]), abs(best))
            if scale == 0 or not (best - plain[e]) / scale > 2 * eps:
                near.append(e)
        noisy = plain if gumbel is None else [a + b for a, b in zip(plain[:SLOTS], gumbel[j].tolist(), strict=True)]
        drawn = argmax(noisy, near)
        g = torch.softmax(z[near], 0)[near.index(drawn)]
        if bernoulli is not None:
            c = drawn == argmax(plain, near) or bernoulli[drawn].item() > 0.75
            g = g + ((0.3333 + 0.6667 * c) * g - g).detach()
        taken.append(drawn)
        multipliers[drawn] = g
    total = sum(multipliers.values()) + 1e-6
    everyone = sorted(taken) + list(range(SLOTS, z.shape[0]))
    share = dict(zip(everyone, torch.softmax(z[everyone], 0), strict=True))
    dynamic_mass = sum(share[e] for e in taken)
    zero = z.new_zeros(())
    weights = torch.stack([multipliers[e] / total * dynamic_mass if e in taken else zero for e in range(SLOTS)])
    return weights, torch.stack([share[e] for e in range(SLOTS, z.shape[0])]), taken


def near_tied_logits(num_tokens=200):
    """Half of the tokens have values within the 2 % band of each other, some exactly equal, some exactly zero."""
    z = logits(num_tokens, seed=5)
    z[::2] = 1.0 + 0.03 * z[::2]
    z[::10, 1] = z[::10, 0]
    z[1::10, :SLOTS] = 0.0
    return z


@pytest.mark.parametrize("stochastic", [False, True])
def test_release_mode_token_by_token_with_gradient(stochastic):
    z = near_tied_logits().requires_grad_()
    g = noise(200, slots=SLOTS * SLOTS).view(-1, SLOTS, SLOTS) if stochastic else None
    u = uniforms(200) if stochastic else None
    routing = routed(
        z, num_routed=ROUTED, num_null=NULL, top_p=0.7, mode="release", gumbel=g, bernoulli=u, estimator="grin"
    )
    coefficients = torch.randn(200, SLOTS + SHARED, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    both = torch.cat([routing.weights, routing.shared_weights], 1)
    (gradient,) = torch.autograd.grad((both * coefficients).sum(), z)
    reference = z.detach().clone().requires_grad_()
    rows = []
    for t in range(200):
        weights, shared, taken = release_token(
            reference[t], gumbel=None if g is None else g[t], bernoulli=None if u is None else u[t]
        )
        assert routing.mask[t].nonzero().flatten().tolist() == sorted(taken)
        rows.append(torch.cat([weights, shared]))
    torch.testing.assert_close(both, torch.stack(rows), rtol=1e-10, atol=1e-12)
    (expected,) = torch.autograd.grad((torch.stack(rows) * coefficients).sum(), reference)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_release_mode_leaves_one_candidate_for_most_tokens():
    """98.3 % of tokens have a single candidate at the first draw (iid Gaussian logits, five slots)."""
    z = torch.randn(100_000, SLOTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    selection = release_select(z, RULE)
    first = selection.multiplier.gather(1, (selection.draw_rank == 0).long().argmax(1, keepdim=True))
    assert (first == 1).double().mean().item() == pytest.approx(0.983, abs=0.002)


def test_release_mode_near_tied_pair():
    """Two near ties end at 1/3 and 2/3 in evaluation, and scales (1/3, 1) push them to about 1/7 and 6/7."""
    z = torch.tensor([[2.0, 2.0, -9.0, -9.0, -9.0]], dtype=torch.float64)
    evaluated = routed(z, num_routed=ROUTED, num_null=NULL, top_p=0.7, mode="release")
    assert evaluated.weights[0, :2].tolist() == pytest.approx([1 / 3, 2 / 3], abs=1e-5)
    gumbel = torch.zeros(1, SLOTS, SLOTS, dtype=torch.float64)
    gumbel[0, 0, 1] = 1.0  # the runner-up by index is drawn first
    trained = routed(
        z,
        num_routed=ROUTED,
        num_null=NULL,
        top_p=0.7,
        mode="release",
        gumbel=gumbel,
        bernoulli=torch.zeros(1, SLOTS, dtype=torch.float64),
        estimator="grin",
    )
    assert trained.weights[0, :2].tolist() == pytest.approx([6 / 7, 1 / 7], abs=1e-4)


def test_release_mode_cap_and_padding():
    z = near_tied_logits()
    padding = torch.arange(200) % 4 == 0
    capped = routed(z, num_routed=ROUTED, num_null=NULL, top_p=0.9, mode="release", max_routed=1, padding=padding)
    free = routed(z, num_routed=ROUTED, num_null=NULL, top_p=0.9, mode="release")
    assert free.mask[:, :ROUTED].sum(1).max() > 1
    assert bool((capped.mask[:, :ROUTED].sum(1) <= 1).all()) and not capped.mask[padding].any()
    assert torch.equal(capped.mask[~padding][:, ROUTED:], free.mask[~padding][:, ROUTED:])
    total = torch.cat([capped.weights, capped.shared_weights], 1).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


# ---- capacity --------------------


def test_capacity_counts_padding_and_null():
    """C = max(min_capacity, ceil(T / E_d * factor)): 1000 tokens over 5 slots, factor 3 -> 600; 10 tokens -> 8."""
    assert expert_capacity(1000, 5, capacity_factor=3.0, min_capacity=8) == 600
    assert expert_capacity(10, 5, capacity_factor=3.0, min_capacity=8) == 8
    assert expert_capacity(11, 5, capacity_factor=1.0, min_capacity=1) == 3


@pytest.mark.parametrize(("mode", "num_capped"), [("masked_softmax", ROUTED), ("release", SLOTS)])
def test_capacity_keeps_the_largest_logits_of_each_capped_slot(mode, num_capped):
    z = logits(ties=True)
    z[:, ROUTED] += 2  # null is popular; the paper's rule must not cap it
    selection = release_select(z[:, :SLOTS], RULE) if mode == "release" else select_slots(z[:, :SLOTS], RULE)
    keep = capacity_keep(z[:, :SLOTS], selection.mask, num_capped=num_capped, capacity=20)
    for e in range(SLOTS):
        routed = selection.mask[:, e].nonzero().flatten().tolist()
        best = sorted(routed, key=lambda t: (-z[t, e].item(), t))
        survivors = set(best[:20] if e < num_capped else best)
        assert keep[:, e].nonzero().flatten().tolist() == sorted(survivors)
    before, after = route_selected(z, selection), route_selected(z, selection, keep=keep)
    assert int(before.mask.sum()) > int(after.mask.sum())
    everything = torch.cat([after.weights, after.shared_weights], 1).sum(1)
    torch.testing.assert_close(everything, torch.ones_like(everything), rtol=0, atol=1e-5)
    emptied = before.mask.any(1) & ~after.mask.any(1)
    assert emptied.any(), "some token loses all its slots and lives on its shared experts alone"
    assert bool((after.weights[emptied] == 0).all())


def test_capacity_of_a_small_batch_drops_nothing():
    z = logits(6)
    mask = torch.ones(6, SLOTS, dtype=torch.bool)
    assert capacity_keep(z[:, :SLOTS], mask, num_capped=ROUTED, capacity=8).all()
