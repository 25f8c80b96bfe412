"""Every op on a GPU against the float64 reference, forward and gradients; skipped where there is none.

Rule: the error (2-norm) of a kernel is at most twice that of the reference in the same dtype on the same device. Shapes are
chosen so that every path of csrc/cuda/grouped_gemm.cu is taken on Hopper: large and small tiles, few rows, plain.
"""

from itertools import pairwise

import pytest
import torch

from megatron_omni.ops import extension
from megatron_omni.ops import grouped_gemm as gemm
from megatron_omni.ops.permute import (
    build_permutation,
    build_permutation_reference,
    permute,
    permute_reference,
    unpermute,
    unpermute_reference,
)
from megatron_omni.ops.topp_route import RoutingRule, topp_route, topp_route_reference
from megatron_omni.platform.device import accelerator_present
from tests.ops.test_release_route import arguments as release_arguments

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not accelerator_present(), reason="no GPU"),
    pytest.mark.skipif(extension.CUDA_ERROR is not None, reason="the CUDA side is not built (make ext-cuda)"),
]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [BF16, F16, F32, F64]


def offsets_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0)


def results(function, leaves, device):
    """Value and gradients of function(*leaves) on the device, for an upstream gradient that is the same everywhere."""
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, dtype=F64, generator=generator)
    upstream = upstream.to(BF16).to(device, out.dtype)  # exact in every dtype
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compare(op, reference, leaves, *, low):
    """``leaves``: float64 tensors; ``low(leaf index)``: the dtype it has in the op. op(device) -> function of the leaves."""
    leaves = [leaf.to(low(i)) for i, leaf in enumerate(leaves)]
    exact = results(reference("cpu"), [leaf.double() for leaf in leaves], "cpu")
    eager = results(reference(DEVICE), leaves, DEVICE)
    got = results(op(DEVICE), leaves, DEVICE)
    again = results(op(DEVICE), leaves, DEVICE)
    for mine, repeated, truth, theirs in zip(got, again, exact, eager):
        assert torch.equal(mine, repeated), "not the same twice"
        error, allowed = (mine.cpu().double() - truth).norm(), (theirs.cpu().double() - truth).norm()
        # eager may be exact: by luck where numbers are few, and in float64 because it is the reference itself
        luck = 16 if low(0) == F64 else 1 / max(1, truth.numel()) ** 0.5
        assert float(error) <= 2 * float(allowed) + luck * torch.finfo(low(0)).eps * float(truth.norm())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("tokens", "experts"), [(0, 4), (1000, 128), (513, 5)])
def test_build_permutation(tokens, experts, share):
    routing_map = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)) < share
    expected = build_permutation_reference(routing_map)
    for known in (int(routing_map.sum()), None):
        got = build_permutation(routing_map.to(DEVICE), num_assignments=known)
        for name, mine, theirs in zip(expected._fields, got, expected):
            assert torch.equal(mine.cpu(), theirs), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "spare"), [(0, 64, 3), (777, 2048, 0), (300, 7, 5)])
def test_permute_and_unpermute(dtype, tokens, width, spare):
    generator = torch.Generator().manual_seed(0)
    meta = build_permutation_reference(torch.rand(tokens, 16, generator=generator) < 0.25)
    used = meta.row_token.shape[0]
    wide = torch.promote_types(dtype, F32)
    x, rows = (torch.randn(n, width, dtype=F64, generator=generator) for n in (tokens, used + spare))
    weights, factor = (0.5 + torch.rand(used, dtype=F64, generator=generator) for _ in range(2))

    def there(device):
        return type(meta)(*(t.to(device) for t in meta))

    def permuted(function):
        return lambda device: lambda x: function(x, there(device), num_rows=used + spare)

    def unpermuted(function):
        def on(device):
            f = factor.to(wide).to(device, F64 if dtype == F64 or device == "cpu" else F32)
            return lambda r, w: function(r, w, there(device), num_tokens=tokens, gradient_factor=f)

        return on

    compare(permuted(permute), permuted(permute_reference), [x], low=lambda _: dtype)
    low = (dtype, wide)
    compare(unpermuted(unpermute), unpermuted(unpermute_reference), [rows, weights], low=lambda i: low[i])


@pytest.mark.parametrize("estimator", ["none", "grin", "paper"])
@pytest.mark.parametrize(
    ("routed", "null", "shared", "options"),
    [(4, 1, 2, {"top_p": 0.7}), (128, 8, 0, {"top_p": 0.5, "max_routed": 8}), (200, 0, 1, {"top_p": 0.0, "top_k": 6})],
)
def test_topp_route(estimator, routed, null, shared, options):
    generator = torch.Generator().manual_seed(routed)
    z = 2 * torch.randn(600, routed + null + shared, dtype=F64, generator=generator)
    noise = torch.rand(2, 600, routed + null, dtype=F64, generator=generator)
    gumbel, bernoulli, padding = -torch.log(-torch.log(noise[0])), noise[1], torch.rand(600, generator=generator) < 0.1

    def route(function, device):
        leaf = z.to(device, copy=True).requires_grad_()
        extra = {"gumbel": gumbel.to(device), "bernoulli": bernoulli.to(device), "padding": padding.to(device)}
        rule = RoutingRule(num_routed=routed, num_null=null, estimator=estimator, **options)
        out = function(leaf, rule, **extra)
        upstream = torch.arange(out.weights.numel(), dtype=F64, device=device).view_as(out.weights).cos()
        total = (out.weights * upstream).sum() + out.shared_weights.square().sum()
        return out, torch.autograd.grad(total, leaf)[0]

    (expected, exact), (got, mine) = route(topp_route_reference, "cpu"), route(topp_route, DEVICE)
    for name, a, b in zip(expected._fields, got, expected):
        torch.testing.assert_close(a.cpu(), b, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(mine.cpu(), exact)


GROUPS = {
    "large tiles": (900, 0, 513, 700),
    "small tiles": (64, 0, 1, 300, 129),
    "few rows": (1, 0, 3, 16, 30, 0, 2, 5),
    "empty": (0, 0),
    "one": (1,),
}


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_p": 0.9, "max_routed": 1}, {"top_p": 0.5, "top_k": 2}])
def test_release_route(options):
    """float64, so that near ties fall on the same side: the CPU's op, and its gradient."""
    z, given = release_arguments(4, 1, 2, tokens=600)
    rule = RoutingRule(num_routed=4, num_null=1, mode="release", estimator="grin", **options)

    def route(device):
        leaf = z.to(device, copy=True).requires_grad_()
        out = topp_route(leaf, rule, **{name: value.to(device) for name, value in given.items()})
        upstream = torch.arange(out.weights.numel(), dtype=F64, device=device).view_as(out.weights).cos()
        total = (out.weights * upstream).sum() + out.shared_weights.square().sum()
        return out, torch.autograd.grad(total, leaf)[0]

    (expected, exact), (got, mine) = route("cpu"), route(DEVICE)
    for name, a, b in zip(expected._fields, got, expected):
        torch.testing.assert_close(a.cpu(), b, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(mine.cpu(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N"), [(256, 520), (72, 1024), (33, 17)])
@pytest.mark.parametrize("groups", GROUPS)
def test_grouped_gemm(dtype, K, N, groups):
    counts = GROUPS[groups]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts) + 5, K, dtype=F64, generator=generator)
    w = torch.randn(len(counts), K, N, dtype=F64, generator=generator) / K**0.5

    def on(function):
        return lambda device: lambda x, w: function(x, w, offsets_of(counts, device))

    compare(on(gemm.grouped_gemm), on(gemm.grouped_gemm_reference), [x, w], low=lambda _: dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("K", "N"), [(256, 520), (33, 17)])
@pytest.mark.parametrize("groups", GROUPS)
def test_wgrad_adds_to_main_grad(dtype, K, N, groups):
    counts = GROUPS[groups]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(counts) + 5, width, generator=generator).to(dtype) for width in (K, N))
    start = torch.randn(len(counts), K, N, generator=generator)
    main_grad, offsets = start.to(DEVICE, copy=True), offsets_of(counts, "cpu")
    gemm.grouped_gemm_wgrad(x.to(DEVICE), dy.to(DEVICE), offsets.to(DEVICE), out=main_grad, accumulate=True)
    for e, (a, b) in enumerate(pairwise(offsets.tolist())):
        exact = start[e].double() + x[a:b].double().t() @ dy[a:b].double()
        assert float((main_grad[e].cpu() - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "F"), [(256, 384), (40, 24), (9, 5)])
@pytest.mark.parametrize("groups", GROUPS)
def test_expert_mlp(dtype, H, F, groups):
    from megatron_omni.ops.expert_mlp import expert_mlp, expert_mlp_reference

    counts = GROUPS[groups]
    generator = torch.Generator().manual_seed(0)
    E, rows = len(counts), sum(counts) + 5
    x, w1 = (
        torch.randn(rows, H, dtype=F64, generator=generator),
        torch.randn(E, H, 2 * F, dtype=F64, generator=generator),
    )
    w2, weight = torch.randn(E, F, H, dtype=F64, generator=generator), torch.rand(rows, dtype=F64, generator=generator)
    low = (dtype, dtype, dtype, torch.promote_types(dtype, F32))

    def on(function):
        return lambda device: lambda x, w1, w2, s: function(x, w1, w2, offsets_of(counts, device), row_weight=s)

    leaves = [x, w1 / H**0.5, w2 / F**0.5, weight]
    compare(on(expert_mlp), on(expert_mlp_reference), leaves, low=lambda i: low[i])


def test_no_op_waits_for_the_device():
    routing_map = (torch.rand(512, 8) < 0.3).to(DEVICE)
    count = int(routing_map.sum())
    x, w = torch.randn(512, 64, device=DEVICE, dtype=BF16), torch.randn(8, 64, 128, device=DEVICE, dtype=BF16)
    weights = torch.rand(count, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta = build_permutation(routing_map, num_assignments=count)
        rows = gemm.grouped_gemm(permute(x.requires_grad_(), meta), w.requires_grad_(), meta.offsets)
        unpermute(rows, weights.requires_grad_(), meta, num_tokens=512).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_shapes_are_checked():
    x, w = torch.zeros(4, 8, device=DEVICE), torch.zeros(2, 8, 3, device=DEVICE)
    with pytest.raises(ValueError, match="offsets: has shape"):
        gemm.grouped_gemm(x, w, torch.zeros(5, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="offsets: is on cpu"):
        gemm.grouped_gemm(x, w, torch.zeros(3, dtype=torch.int64))
