"""The fused routing op against a definition written token by token, over slot counts, rules, noise, ties and dtypes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.ops.extension import use_cpu_engine
from megatron_omni.ops.topp_route import topp_route_reference
from tests.ops.ragged import ENGINES, examples
from tests.ops.routing import routed

KEEP = {"paper": 5 / 8, "grin": 1 / 4}


def logits(generator, num_tokens, width, ties, dtype=torch.float64):
    z = 2 * torch.randn(num_tokens, width, dtype=torch.float64, generator=generator)
    return ((2 * z).round() / 2 if ties else z).to(dtype)


def gumbel_noise(generator, num_tokens, slots, dtype=torch.float64):
    u = torch.rand(num_tokens, slots, dtype=torch.float64, generator=generator).clamp(1e-9, 1 - 1e-9)
    return -torch.log(-torch.log(u)).to(dtype)


def route_token(z, *, slots, num_routed, top_p, top_k, gumbel, bernoulli, max_routed, padding, keep, estimator):
    """docs/model.md 2.1 to 2.3 for the logits of one token (lists): (selected, scale of every slot)."""
    key = z[:slots] if gumbel is None else [a + b for a, b in zip(z, gumbel, strict=False)]
    order = sorted(range(slots), key=lambda e: (-key[e], e))
    top = max(z[:slots])
    p = [math.exp(v - top) for v in z[:slots]]
    count = top_k or next((n for n in range(1, slots) if sum(p[e] for e in order[:n]) / sum(p) >= top_p), slots)
    selected, real = set(), 0
    for e in order[:count]:
        if e >= num_routed or max_routed is None or real < max_routed:
            selected.add(e)
            real += e < num_routed
    scale = [1.0] * slots
    if estimator != "none" and bernoulli is not None:
        for place, e in enumerate(order):
            best = min(order[place:], key=lambda i: (-z[i], i))
            scale[e] = 1.0 if best == e or bernoulli[e] < KEEP[estimator] else 1 / 3
    if keep is not None:
        selected = {e for e in selected if keep[e]}
    return set() if padding else selected, scale


def softmax_gradient(z, selected, scale, estimator, slots, g):
    """Weights of one token and d(sum g w)/dz with s as the estimator has it, in float64 by the formulas."""
    taken = [e for e in range(len(z)) if e >= slots or e in selected]
    top = max((z[e] for e in taken), default=0.0)
    total = sum(math.exp(z[e] - top) for e in taken)
    w = [math.exp(z[e] - top) / total if e in taken else 0.0 for e in range(len(z))]
    s = [*scale, *[1.0] * (len(z) - slots)]
    dw = [g[e] * (s[e] if estimator == "paper" else 1.0) for e in range(len(z))]
    mean = sum(a * b for a, b in zip(w, dw, strict=True))
    return [a * b for a, b in zip(w, s, strict=True)], [a * (b - mean) for a, b in zip(w, dw, strict=True)]


SETTINGS = {
    "num_tokens": st.integers(0, 30),
    "num_routed": st.one_of(st.integers(1, 8), st.integers(30, 70)),
    "num_null": st.integers(0, 3),
    "num_shared": st.integers(0, 2),
    "rule": st.sampled_from(
        [{"top_p": p} for p in (0.05, 0.3, 0.7, 0.95)] + [{"top_p": 0.7, "top_k": 1}, {"top_p": 0.7, "max_routed": 1}]
    ),
    "sampled": st.booleans(),
    "padded": st.booleans(),
    "capped": st.booleans(),
    "ties": st.booleans(),
    "estimator": st.sampled_from(["none", "grin", "paper"]),
    "seed": st.integers(0, 10**6),
}


@examples(80)
@given(**SETTINGS)
def test_float64_token_by_token(
    num_tokens, num_routed, num_null, num_shared, rule, sampled, padded, capped, ties, estimator, seed
):
    generator = torch.Generator().manual_seed(seed)
    slots = num_routed + num_null
    z = logits(generator, num_tokens, slots + num_shared, ties).requires_grad_()
    noise = {
        "gumbel": gumbel_noise(generator, num_tokens, slots) if sampled else None,
        "bernoulli": torch.rand(num_tokens, slots, dtype=torch.float64, generator=generator),
        "padding": torch.rand(num_tokens, generator=generator) < 0.3 if padded else None,
        "keep": torch.rand(num_tokens, slots, generator=generator) < 0.7 if capped else None,
    }
    routing = routed(z, num_routed=num_routed, num_null=num_null, estimator=estimator, **rule, **noise)
    both = torch.cat([routing.weights, routing.shared_weights], 1)
    g = torch.randn(num_tokens, slots + num_shared, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((both * g).sum(), z)
    for t in range(num_tokens):
        row = {name: None if value is None else value[t].tolist() for name, value in noise.items()}
        values = z[t].tolist()
        rest = {"top_k": None, "max_routed": None} | rule
        selected, scale = route_token(values, slots=slots, num_routed=num_routed, estimator=estimator, **rest, **row)
        assert set(routing.mask[t].nonzero().flatten().tolist()) == selected
        assert int(routing.k[t]) == len(selected)
        assert routing.scale[t].tolist() == pytest.approx(scale, abs=1e-15)
        weights, dz = softmax_gradient(values, selected, scale, estimator, slots, g[t].tolist())
        assert both[t].tolist() == pytest.approx(weights, rel=1e-12, abs=1e-15)
        assert gradient[t].tolist() == pytest.approx(dz, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("estimator", ["none", "grin", "paper"])
@pytest.mark.parametrize("slots", [5, 64])
def test_float32_selects_as_the_reference_and_errs_at_most_twice_as_much(slots, estimator):
    """Weights and gradients against float64 over the same selection."""
    generator = torch.Generator().manual_seed(slots)
    z = logits(generator, 2000, slots + 2, False, torch.float32).requires_grad_()
    noise = {
        "gumbel": gumbel_noise(generator, 2000, slots, torch.float32),
        "bernoulli": torch.rand(2000, slots, generator=generator),
    }
    kind = {"num_routed": slots - 1, "num_null": 1, "top_p": 0.7, "estimator": estimator}
    mine, eager = routed(z, **kind, **noise), routed(z, by=topp_route_reference, **kind, **noise)
    # A sum within rounding of top_p may fall on either side: there, and only there, k may differ by one.
    p = torch.softmax(z.detach()[:, :slots].double(), 1)
    order = (z.detach()[:, :slots] + noise["gumbel"]).argsort(1, descending=True)
    close = ((p.gather(1, order).cumsum(1) - 0.7).abs() < 1e-6).any(1)
    same = (mine.mask == eager.mask).all(1)
    assert bool((same | close).all()) and int((~same).sum()) <= 4
    for name in ("mask", "scale", "k"):
        assert torch.equal(getattr(mine, name)[same], getattr(eager, name)[same])

    g = torch.randn(2000, slots + 2, dtype=torch.float64, generator=generator)
    exact_z = z.detach().double()
    everyone = torch.cat([mine.mask, mine.mask.new_ones(2000, 2)], 1)
    s = torch.cat([mine.scale.double(), torch.ones(2000, 2, dtype=torch.float64)], 1)
    w = torch.softmax(exact_z.masked_fill(~everyone, -math.inf), 1)
    dw = g * s if estimator == "paper" else g
    exact = w * s, w * (dw - (w * dw).sum(1, keepdim=True))

    def errors(routing):
        both = torch.cat([routing.weights, routing.shared_weights], 1)
        (gradient,) = torch.autograd.grad(both, z, g.float())
        return [(got.double() - want)[same].norm() for got, want in zip((both, gradient), exact, strict=True)]

    for mine_error, eager_error in zip(errors(mine), errors(eager), strict=True):
        assert mine_error <= 2 * eager_error


@pytest.mark.parametrize("estimator", ["none", "paper"])
def test_gradient_by_finite_differences(estimator):
    """s is constant between draws, so these two are true gradients (``grin`` passes s by on purpose)."""
    generator = torch.Generator().manual_seed(0)
    z = logits(generator, 6, 9, False).requires_grad_()
    noise = {"gumbel": gumbel_noise(generator, 6, 7), "bernoulli": torch.ones(6, 7, dtype=torch.float64)}

    def weights(z):
        routing = routed(z, num_routed=6, num_null=1, top_p=0.7, estimator=estimator, **noise)
        return routing.weights, routing.shared_weights

    assert estimator == "none" or bool(
        (routed(z, num_routed=6, num_null=1, top_p=0.7, estimator=estimator, **noise).scale < 1).any()
    )
    assert torch.autograd.gradcheck(weights, (z,))


def test_threads_do_not_change_a_bit():
    z = logits(torch.Generator().manual_seed(0), 3000, 9, False, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(routed(z, num_routed=6, num_null=1, top_p=0.7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [6, 60])
def test_not_a_number_stays_within_bounds(dtype, slots):
    """A diverged gate must not corrupt memory: k stays in 1..slots and sane tokens are not touched."""
    z = logits(torch.Generator().manual_seed(0), 50, slots, False, dtype)
    clean = routed(z, num_routed=slots, num_null=0, top_p=0.7)
    z[::5, 1] = math.nan
    z[1::5] = math.inf
    z[2::5] = -math.inf
    routing = routed(z, num_routed=slots, num_null=0, top_p=0.7)
    assert bool(((routing.k >= 1) & (routing.k <= slots)).all())
    assert torch.equal(routing.mask.sum(1), routing.k)
    for t in (3, 4, 8, 49):
        assert torch.equal(routing.weights[t], clean.weights[t])


def test_wrong_arguments_are_named():
    z, ok = torch.randn(4, 7), {"num_routed": 4, "num_null": 1, "top_p": 0.7}
    calls = {
        "z: dtype": lambda: routed(z.bfloat16(), **ok),
        "z: has 1 dim": lambda: routed(z[0], **ok),
        "z: must be contiguous": lambda: routed(z.t(), **ok),
        "z: has 7 columns for 8": lambda: routed(z, **ok | {"num_routed": 7}),
        "num_routed: 0": lambda: routed(z, **ok | {"num_routed": 0}),
        "num_null: -1": lambda: routed(z, **ok | {"num_null": -1}),
        "top_k: 6 is not in 1..5": lambda: routed(z, **ok, top_k=6),
        "top_k: 0": lambda: routed(z, **ok, top_k=0),
        "max_routed: -1": lambda: routed(z, **ok, max_routed=-1),
        "gumbel: has shape": lambda: routed(z, **ok, gumbel=torch.zeros(4, 7)),
        "bernoulli: has shape": lambda: routed(z, **ok, bernoulli=torch.zeros(3, 5), estimator="grin"),
        "gumbel: must be contiguous": lambda: routed(z, **ok, gumbel=torch.zeros(5, 4).t()),
        "padding: dtype": lambda: routed(z, **ok, padding=torch.zeros(4)),
        "padding: has 3": lambda: routed(z, **ok, padding=torch.zeros(3, dtype=torch.bool)),
        "keep: dtype": lambda: routed(z, **ok, keep=torch.ones(4, 5)),
        "keep: has shape": lambda: routed(z, **ok, keep=torch.ones(4, 7, dtype=torch.bool)),
        "estimator: typo": lambda: routed(z, **ok, estimator="typo"),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


@pytest.mark.parametrize("num_tokens", [5, 0])
def test_opcheck(num_tokens):
    ops = torch.ops.megatron_omni
    generator = torch.Generator().manual_seed(0)
    z = logits(generator, num_tokens, 7, False, torch.float32).requires_grad_()
    noise = gumbel_noise(generator, num_tokens, 5, torch.float32), torch.rand(num_tokens, 5, generator=generator)
    padding, keep = torch.zeros(num_tokens, dtype=torch.bool), torch.rand(num_tokens, 5, generator=generator) < 0.5
    torch.library.opcheck(ops.topp_route.default, (z, 4, 1, 0.7, None, "paper", *noise, 2, padding, keep))
    torch.library.opcheck(ops.topp_route.default, (z, 4, 1, 0.7, 2, "none", None, None, None, None))
    w, s = torch.rand(num_tokens, 5), torch.rand(num_tokens, 2)
    torch.library.opcheck(ops.topp_route_backward.default, (w, None, w, s, torch.ones(num_tokens, 5), "grin"))


def test_compiles_without_a_graph_break():
    u = torch.rand(20, 5, generator=torch.Generator().manual_seed(1))

    def weigh(z):
        routing = routed(z * 2, num_routed=4, num_null=1, top_p=0.7, bernoulli=u, estimator="paper")
        return (routing.weights * routing.k[:, None]).sum() + routing.shared_weights.square().sum()

    compiled = torch.compile(weigh, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        z = logits(torch.Generator().manual_seed(seed), 20, 7, False, torch.float32).requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(compiled(z), z), torch.autograd.grad(weigh(z), z))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("slots", [16, 17, 32, 33, 64, 129])
def test_draw_order_is_that_of_a_stable_sort(slots, engine):
    """fp32, with ties of every kind: equal values, both zeros, infinities, NaN."""
    generator = torch.Generator().manual_seed(slots)
    values = torch.tensor([-math.inf, -1.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 2.0, math.inf, math.nan])
    z = values[torch.randint(len(values), (40, slots), generator=generator)]
    z[20:] = torch.randn(20, slots, generator=generator)
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    with use_cpu_engine(engine):
        rank = torch.ops.megatron_omni.topp_route(z, slots, 0, 0.7, 2, "none", None, None, None, None, None)[5]
    assert torch.equal(rank.gather(1, order), torch.arange(slots).expand_as(order))
