"""The hand-written CUDA kernels, executed thread by thread on the CPU (cuda_emulation), against float64 definitions.

This is the same source that nvcc compiles: indices, bounds, barriers, ragged groups and arithmetic are run, speed and the
hardware are not. Inputs that must not be read are NaN, results start as NaN and lie before a guard that must stay.
"""

import runpy
import shutil
from itertools import pairwise

import pytest
import torch

from megatron_omni.ops import counter_rng
from megatron_omni.ops import topp_route as route
from megatron_omni.ops.permute import build_permutation

from .cuda_emulation import ROOT, Kernels
from .test_release_route import arguments as release_arguments

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
GUARD = 64


@pytest.fixture(scope="module")
def cuda():
    return Kernels()


class Result:
    """Memory for a result: NaN (or True, or a large integer), and a guard behind it that the kernel must leave alone."""

    def __init__(self, *shape, dtype):
        size = torch.Size(shape).numel()
        fill = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else 1 << 40
        self.memory = torch.full((size + GUARD,), fill, dtype=dtype)
        self.memory[size:] = 1
        self.out = self.memory[:size].view(shape)

    def check(self):
        assert bool((self.memory[self.out.numel() :] == 1).all()), "written past the end"
        return self.out


def assert_as_exact_as(got, exact, eager, floor=0.0):
    """The error (2-norm) is at most twice that of the same computation in plain torch of that dtype, no entry stands out."""
    assert got.shape == exact.shape
    assert not torch.isnan(got).any()
    if got.numel():
        error, theirs = (got.double() - exact).abs(), (eager.double() - exact).abs()
        assert float(error.norm()) <= 2 * float(theirs.norm()) + floor * got.numel() ** 0.5
        assert float(error.max()) <= 4 * float(theirs.max()) + floor


def routing(tokens, experts, seed=0, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    return build_permutation(torch.rand(tokens, experts, generator=generator) < share)


@pytest.mark.parametrize(
    ("tokens", "experts", "share"), [(0, 4, 0.5), (9, 4, 0.0), (50, 70, 0.3), (20, 32, 1.0), (7, 1, 0.5)]
)
def test_fill_permutation(cuda, tokens, experts, share):
    routing_map = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)) < share
    pairs = [(e, t) for e in range(experts) for t in range(tokens) if routing_map[t, e]]
    rows_of = [[row for row, (_, token) in enumerate(pairs) if token == t] for t in range(tokens)]
    outs = [Result(len(pairs), dtype=torch.int64) for _ in range(3)]
    offsets, token_offsets = (offsets_of(routing_map.sum(dim).tolist()) for dim in (0, 1))
    sizes = (tokens, experts, len(pairs))
    cuda.fill_permutation(routing_map, routing_map.cumsum(0), offsets, token_offsets, *sizes, *(o.out for o in outs))
    row_token, row_expert, token_rows = (o.check().tolist() for o in outs)
    assert list(zip(row_expert, row_token)) == pairs
    assert token_rows == [row for rows in rows_of for row in rows]


@pytest.mark.parametrize("claimed", [2, 4])
def test_fill_permutation_stops_at_a_wrong_number_of_assignments(cuda, claimed):
    routing_map = torch.tensor([[True, False], [True, True]])
    outs = [Result(claimed, dtype=torch.int64) for _ in range(3)]
    offsets, token_offsets = (offsets_of(routing_map.sum(dim).tolist()) for dim in (0, 1))
    with pytest.raises(RuntimeError, match="the device stopped"):
        cuda.fill_permutation(
            routing_map, routing_map.cumsum(0), offsets, token_offsets, 2, 2, claimed, *(o.out for o in outs)
        )
    assert all((out.check() == 1 << 40).all() for out in outs)  # nothing was written


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize(("tokens", "width", "spare"), [(0, 8, 2), (1, 8, 0), (37, 264, 5), (9, 7, 3), (70, 24, 0)])
def test_permute(cuda, dtype, tokens, width, spare):
    meta = routing(tokens, 5)
    x = torch.randn(tokens, width, dtype=F64).to(dtype)
    rows = meta.row_token.shape[0]
    out = Result(rows + spare, width, dtype=dtype)
    cuda.permute(x, meta.row_token, rows, rows + spare, width, dtype, out.out)
    assert torch.equal(out.check()[:rows], x[meta.row_token])
    assert not out.out[rows:].any()


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F32, BF16), (F64, F64)]
)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (37, 264), (9, 7)])
@pytest.mark.parametrize("weighted", [True, False])
def test_unpermute(cuda, dtype, out_dtype, tokens, width, weighted):
    meta = routing(tokens, 6)
    used = meta.row_token.shape[0]
    wide = torch.promote_types(dtype, F32)
    rows = torch.cat([torch.randn(used, width, dtype=F64).to(dtype), torch.full((2, width), float("nan"), dtype=dtype)])
    weights = torch.rand(used, dtype=wide) if weighted else None
    out = Result(tokens, width, dtype=out_dtype)
    cuda.unpermute(rows, weights, meta.token_offsets, meta.token_rows, tokens, width, dtype, out_dtype, out.out)

    def definition(kind):
        scaled = rows[:used].to(kind) * (1 if weights is None else weights.to(kind)[:, None])
        return torch.zeros(tokens, width, dtype=kind).index_add_(0, meta.row_token, scaled)

    assert_as_exact_as(out.check(), definition(F64), definition(wide).to(out_dtype), floor=1e-14)


@pytest.mark.parametrize(("dtype", "grad_dtype"), [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F64, F64)])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (37, 264), (9, 7)])
@pytest.mark.parametrize("factored", [True, False])
def test_unpermute_backward(cuda, dtype, grad_dtype, tokens, width, factored):
    meta = routing(tokens, 6)
    used, spare = meta.row_token.shape[0], 3
    wide = torch.promote_types(dtype, F32)
    rows = torch.full((used + spare, width), float("nan"), dtype=dtype)
    rows[:used] = torch.randn(used, width)
    weights = torch.rand(used, dtype=wide)
    factor = 1 + torch.rand(used, dtype=wide) if factored else None
    g = torch.randn(tokens, width).to(grad_dtype)
    grad_rows, grad_weights = Result(used + spare, width, dtype=dtype), Result(used, dtype=wide)
    sizes = (used, used + spare, width, dtype, grad_dtype)
    cuda.unpermute_backward(g, rows, weights, factor, meta.row_token, *sizes, grad_rows.out, grad_weights.out)

    def definition(kind):
        scaled = g.to(kind)[meta.row_token] * (1 if factor is None else factor.to(kind)[:, None])
        return scaled * weights.to(kind)[:, None], (rows[:used].to(kind) * scaled).sum(1)

    exact, eager = definition(F64), definition(wide)
    assert_as_exact_as(grad_rows.check()[:used], exact[0], eager[0].to(dtype), floor=1e-14)
    assert not grad_rows.out[used:].any()
    assert_as_exact_as(grad_weights.check(), exact[1], eager[1], floor=1e-13 if dtype == F64 else 1e-5)
    only_rows = Result(used + spare, width, dtype=dtype)
    cuda.unpermute_backward(g, None, weights, factor, meta.row_token, *sizes, only_rows.out, None)
    assert torch.equal(only_rows.check(), grad_rows.out)
    only_weights = Result(used, dtype=wide)
    cuda.unpermute_backward(g, rows, weights, factor, meta.row_token, *sizes, None, only_weights.out)
    assert torch.equal(only_weights.check(), grad_weights.out)


ESTIMATORS = ("none", "grin", "paper")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("tokens", "routed", "null", "shared", "options"),
    [
        (33, 4, 1, 2, {"top_p": 0.7}),
        (9, 40, 3, 0, {"top_p": 0.6}),
        (5, 129, 0, 1, {"top_p": 0.9, "max_routed": 3}),
        (12, 4, 1, 2, {"top_p": 0.99, "max_routed": 1}),
        (12, 6, 2, 0, {"top_p": 0.0, "top_k": 3}),
        (3, 1, 0, 0, {"top_p": 0.5}),
        (0, 4, 1, 2, {"top_p": 0.7}),
    ],
)
@pytest.mark.parametrize("noise", [True, False])
def test_topp_route(cuda, estimator, tokens, routed, null, shared, options, noise):
    dynamic = routed + null
    generator = torch.Generator().manual_seed(tokens + routed)
    z = 2 * torch.randn(tokens, dynamic + shared, dtype=F64, generator=generator)
    z[::3, 0] = z[::3, dynamic - 1]  # ties
    gumbel = -torch.log(-torch.log(torch.rand(tokens, dynamic, dtype=F64, generator=generator))) if noise else None
    bernoulli = torch.rand(tokens, dynamic, dtype=F64, generator=generator) if noise else None
    padding = torch.rand(tokens, generator=generator) < 0.2
    keep = torch.rand(tokens, dynamic, generator=generator) < 0.8 if noise else None
    z.requires_grad_()
    rule = route.RoutingRule(num_routed=routed, num_null=null, estimator=estimator, **options)
    expected = route.topp_route_reference(z, rule, gumbel=gumbel, bernoulli=bernoulli, padding=padding, keep=keep)

    sizes = [tokens, dynamic, shared, routed, options.get("top_k", 0), options.get("max_routed", -1)]
    sizes = torch.tensor([*sizes, ESTIMATORS.index(estimator)])
    mask, k = Result(tokens, dynamic, dtype=torch.bool), Result(tokens, dtype=torch.int64)
    weights, scale = Result(tokens, dynamic, dtype=F64), Result(tokens, dynamic, dtype=F64)
    shared_weights, rank = Result(tokens, shared, dtype=F64), Result(tokens, dynamic, dtype=torch.int64)
    outputs = (mask, weights, shared_weights, scale, k, rank)
    inputs = (z.detach(), gumbel, bernoulli, padding, keep)
    cuda.topp_route(sizes, options["top_p"], F64, *inputs, *(o.out for o in outputs))
    assert torch.equal(mask.check(), expected.mask)
    assert torch.equal(k.check(), expected.k)
    torch.testing.assert_close(weights.check(), expected.weights.detach())
    torch.testing.assert_close(shared_weights.check(), expected.shared_weights.detach())
    torch.testing.assert_close(scale.check(), expected.scale)
    order = torch.sort(z.detach()[:, :dynamic] + (0 if gumbel is None else gumbel), dim=1, descending=True, stable=True)
    assert torch.equal(rank.check(), order.indices.argsort(1))

    upstream = torch.randn(tokens, dynamic, dtype=F64), torch.randn(tokens, shared, dtype=F64)
    total = (expected.weights * upstream[0]).sum() + (expected.shared_weights * upstream[1]).sum()
    (exact,) = torch.autograd.grad(total, z)
    grad_z = Result(tokens, dynamic + shared, dtype=F64)
    saved = (weights.out, shared_weights.out, scale.out)
    cuda.topp_route_backward(sizes, options["top_p"], F64, *upstream, *saved, grad_z.out)
    torch.testing.assert_close(grad_z.check(), exact)


def test_topp_route_refuses_what_does_not_fit(cuda):
    sizes = torch.tensor([1, 1025, 0, 1025, 0, -1, 0])
    with pytest.raises(RuntimeError, match="1 to 1024 dynamic slots"):
        cuda.topp_route(sizes, 0.5, F32, *[None] * 11)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("tokens", "sizes", "options"),
    [
        (150, (4, 1, 2), {"top_p": 0.7}),
        (40, (4, 1, 2), {"top_p": 0.9, "max_routed": 1}),
        (9, (40, 3, 0), {"top_p": 0.6, "top_k": 4}),
        (3, (1, 0, 0), {"top_p": 0.5}),
        (0, (4, 1, 2), {"top_p": 0.7}),
    ],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_release_route(cuda, dtype, tokens, sizes, options, sampled):
    """The CPU's op, whose source it is and which tests/ops/test_release_route.py holds to the reference."""
    routed, null, shared = sizes
    slots = routed + null
    z, given = release_arguments(*sizes, tokens=tokens, dtype=dtype, sampled=sampled, capped=sampled)
    top_k, max_routed = options.get("top_k"), options.get("max_routed")
    tensors = (given["gumbel"], given["bernoulli"], given["padding"], given["keep"])
    expected = torch.ops.megatron_omni.release_route(
        z, routed, null, options["top_p"], top_k, 0.01, *tensors[:2], max_routed, *tensors[2:]
    )
    shape = torch.tensor([tokens, slots, shared, routed, top_k or 0, -1 if max_routed is None else max_routed, 0])
    mask, k = Result(tokens, slots, dtype=torch.bool), Result(tokens, dtype=torch.int64)
    weights, shared_weights = Result(tokens, slots, dtype=dtype), Result(tokens, shared, dtype=dtype)
    rank, multiplier = Result(tokens, slots, dtype=torch.int64), Result(tokens, slots, dtype=dtype)
    outs = (mask, weights, shared_weights, k, rank, multiplier)
    cuda.release_route(shape, options["top_p"], 0.01, dtype, z, *tensors, *(o.out for o in outs))
    for got, wanted in zip((weights, shared_weights, mask, k, rank, multiplier), expected, strict=True):
        torch.testing.assert_close(got.check(), wanted, rtol=1e-6, atol=1e-12)

    upstream = torch.randn(tokens, slots, dtype=dtype), torch.randn(tokens, shared, dtype=dtype)
    saved = (z, mask.out, rank.out, multiplier.out)
    exact = torch.ops.megatron_omni.release_route_backward(*upstream, *saved, given["keep"], 0.01)
    grad_z = Result(tokens, slots + shared, dtype=dtype)
    cuda.release_route_backward(
        shape, 0.01, dtype, *upstream, z, mask.out, given["keep"], rank.out, multiplier.out, grad_z.out
    )
    torch.testing.assert_close(grad_z.check(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "draws"), [(0, 4), (70, 5), (3, 300), (4, 0)])
def test_counter_uniform_bit_for_bit(cuda, tokens, draws):
    sample_ids = torch.randint(-(1 << 62), 1 << 62, (tokens,))
    positions = torch.arange(tokens) * 977
    settings = {"seed": 3, "step": 11, "layer": 2, "purpose": counter_rng.Purpose.GUMBEL}
    expected = counter_rng.uniform(sample_ids, positions, num_draws=draws, **settings)
    out = Result(tokens, draws, dtype=F32)
    cuda.counter_uniform(sample_ids, positions, tokens, draws, counter_rng._call_key(**settings), out.out)
    assert torch.equal(out.check(), expected)


GROUPS = [(3, 0, 5), (0, 0), (70, 1, 0, 130), (40, 0, 0, 0, 1)]
"""Tiles of 16 rows (few an expert), none, tiles of 64, and 16 again with an expert that takes three."""
SHAPES = [(8, 16), (40, 136), (136, 72), (65, 7)]


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def per_expert(counts):
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(offsets_of(counts).tolist()))]


def with_nan_tail(values, spare):
    return torch.cat([values, torch.full((spare, *values.shape[1:]), float("nan"), dtype=values.dtype)])


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("K", "N"), SHAPES)
@pytest.mark.parametrize("counts", GROUPS)
def test_grouped_gemm(cuda, dtype, K, N, counts):
    torch.manual_seed(0)
    offsets, used, spare, E = offsets_of(counts), sum(counts), 4, len(counts)
    x, dy = (with_nan_tail(torch.randn(used, width).to(dtype), spare) for width in (K, N))
    w = torch.randn(E, K, N).to(dtype)
    sizes = (used + spare, E, K, N, dtype)
    workspace = cuda.workspace(used + spare, E)
    for source, transpose, width in ((x, 0, N), (dy, 1, K)):
        out = Result(used + spare, width, dtype=dtype)
        cuda.grouped_gemm(source, w, offsets, *sizes, transpose, out.out, workspace)

        def definition(kind, source=source, transpose=transpose, width=width):
            parts = [
                source[a:b].to(kind) @ (w[e].t() if transpose else w[e]).to(kind) for e, a, b in per_expert(counts)
            ]
            return torch.cat([*parts, torch.zeros(spare, width, dtype=kind)])

        assert_as_exact_as(out.check(), definition(F64), definition(dtype), floor=1e-5 if dtype == F32 else 1e-12)
        assert not out.out[used:].any()


def test_grouped_gemm_by_tiles_of_128_rows(cuda):
    """256 rows an expert and more, one of them not a multiple of a tile."""
    torch.manual_seed(0)
    K, N, counts = 40, 24, (300,)
    x, dy = (torch.randn(300, width).to(BF16) for width in (K, N))
    w, workspace = torch.randn(1, K, N).to(BF16), cuda.workspace(300, 1)
    for source, transpose, matrix in ((x, 0, w[0]), (dy, 1, w[0].t())):
        out = Result(300, matrix.shape[1], dtype=BF16)
        cuda.grouped_gemm(source, w, offsets_of(counts), 300, 1, K, N, BF16, transpose, out.out, workspace)
        assert_as_exact_as(out.check(), source.double() @ matrix.double(), source @ matrix)


def test_shared_memory_of_the_tiles_is_what_the_table_of_occupancy_says(cuda):
    checker = runpy.run_path(str(ROOT / "tools" / "check_cuda_objects.py"))
    for kind, tile in [(0, 16), (0, 64), (0, 128), (1, 16), (1, 64), (1, 128), (2, 128)]:
        assert cuda.mma_shared_bytes(kind, tile) == checker["mma_shared"](kind, tile), (kind, tile)


@pytest.mark.parametrize("offsets", [(1, 2, 3), (0, 3, 2), (0, -1, 2), (0, 2, 5)])
def test_wrong_offsets_stop_the_device(cuda, offsets):
    x, w, out = torch.zeros(4, 8), torch.zeros(2, 8, 8), Result(4, 8, dtype=F32)
    workspace, wrong = cuda.workspace(4, 2), torch.tensor(offsets)
    with pytest.raises(RuntimeError, match="the device stopped"):
        cuda.grouped_gemm(x, w, wrong, 4, 2, 8, 8, F32, 0, out.out, workspace)
    with pytest.raises(RuntimeError, match="the device stopped"):
        cuda.grouped_wgrad(x, x, wrong, 4, 2, 8, 8, F32, F32, 0, w, workspace)


@pytest.mark.parametrize(
    ("dtype", "dw_dtype"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32), (F64, F64)]
)
@pytest.mark.parametrize(("K", "N"), SHAPES)
@pytest.mark.parametrize("counts", GROUPS)
@pytest.mark.parametrize("accumulate", [0, 1])
def test_grouped_wgrad(cuda, dtype, dw_dtype, K, N, counts, accumulate):
    torch.manual_seed(0)
    offsets, used, spare, E = offsets_of(counts), sum(counts), 4, len(counts)
    x, dy = (with_nan_tail(torch.randn(used, width).to(dtype), spare) for width in (K, N))
    dw = Result(E, K, N, dtype=dw_dtype)
    if accumulate:
        dw.out.normal_()
    start = dw.out.double().clone() if accumulate else torch.zeros(E, K, N, dtype=F64)
    workspace = cuda.workspace(used + spare, E)
    cuda.grouped_wgrad(x, dy, offsets, used + spare, E, K, N, dtype, dw_dtype, accumulate, dw.out, workspace)

    def definition(kind):
        return torch.stack([x[a:b].to(kind).t() @ dy[a:b].to(kind) for _, a, b in per_expert(counts)])

    exact = start + definition(F64)
    eager = (start + definition(torch.promote_types(dtype, F32)).double()).to(dw_dtype)
    assert_as_exact_as(dw.check(), exact, eager, floor=1e-12 if dtype == F64 else 1e-5)
    for e, a, b in per_expert(counts):
        if a == b:
            assert torch.equal(dw.out[e].double(), start[e])


def swiglu_mlp(x, w1, w2, counts, row_weight):
    parts = []
    for e, a, b in per_expert(counts):
        gate, up = (x[a:b] @ w1[e]).chunk(2, dim=1)
        act = torch.nn.functional.silu(gate) * up
        parts.append((act if row_weight is None else act * row_weight[a:b, None].to(x.dtype)) @ w2[e])
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize(("H", "F"), [(16, 24), (40, 8), (9, 5)])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0), (70, 1)])
@pytest.mark.parametrize("weighted", [True, False])
def test_expert_mlp(cuda, dtype, H, F, counts, weighted):
    torch.manual_seed(0)
    used, spare, E = sum(counts), 3, len(counts)
    rows = used + spare
    wide = torch.promote_types(dtype, F32)
    x, dy = (with_nan_tail(torch.randn(used, H).to(dtype), spare) for _ in range(2))
    w1, w2 = (torch.randn(E, H, 2 * F) / H**0.5).to(dtype), (torch.randn(E, F, H) / F**0.5).to(dtype)
    row_weight = with_nan_tail(torch.rand(used, dtype=wide), spare) if weighted else None
    offsets, workspace = offsets_of(counts), cuda.workspace(rows, E)

    h, y, scratch = Result(rows, 2 * F, dtype=dtype), Result(rows, H, dtype=dtype), Result(rows, F, dtype=dtype)
    cuda.expert_mlp(x, w1, w2, offsets, row_weight, rows, E, H, F, dtype, h.out, scratch.out, y.out, workspace)
    dx, dh = Result(rows, H, dtype=dtype), Result(rows, 2 * F, dtype=dtype)
    dw1, dw2 = Result(E, H, 2 * F, dtype=dtype), Result(E, F, H, dtype=dtype)
    drow = Result(rows, dtype=wide) if weighted else None
    sizes = (rows, E, H, F, dtype, dtype, 0)
    cuda.expert_mlp_backward(
        *(dy, x, h.out, w1, w2, offsets, row_weight, *sizes, scratch.out, dh.out, dx.out, dw1.out, dw2.out),
        *(drow.out if drow else None, workspace),
    )

    def definition(kind):
        leaves = [x[:used], w1, w2] + ([row_weight[:used]] if weighted else [])
        leaves = [
            t.detach().to(kind if i < 3 else torch.promote_types(kind, F32)).requires_grad_()
            for i, t in enumerate(leaves)
        ]
        out = swiglu_mlp(leaves[0], leaves[1], leaves[2], counts, leaves[3] if weighted else None)
        return out.detach(), *torch.autograd.grad(out, leaves, dy[:used].to(kind))

    exact, eager = definition(F64), definition(dtype)
    got = [y.check()[:used], dx.check()[:used], dw1.check(), dw2.check()] + ([drow.check()[:used]] if weighted else [])
    floor = 1e-12 if dtype == F64 else 1e-5
    for name, mine, truth, theirs in zip(("y", "dx", "dw1", "dw2", "drow"), got, exact, eager):
        assert mine.shape == truth.shape, name
        assert_as_exact_as(mine, truth, theirs, floor=floor)
    for result in (h, y, dx, *([drow] if weighted else [])):
        assert not result.check()[used:].any()
