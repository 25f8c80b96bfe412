"""Kernels of the permutation ops against float64 definitions, over shapes, k from 0, skew, dtypes, both CPU paths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.ops.extension import use_cpu_engine
from megatron_omni.ops.permute import (
    Permutation,
    assignment_values,
    build_permutation,
    build_permutation_reference,
    permute,
    permute_reference,
    unpermute,
    unpermute_reference,
)
from tests.ops.ragged import ENGINES, examples
from tests.ops.rounding import assert_rounded, elementwise, exact, product, row_sums, stored

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_map(generator, num_tokens, num_experts, density, skew):
    """Expert e is taken with probability density * skew^e: from uniform to nearly one expert; k includes 0."""
    probability = density * skew ** torch.arange(num_experts)
    return torch.rand(num_tokens, num_experts, generator=generator) < probability


def definition(routing, rows, weights, num_tokens):
    """y[t] = sum_a w[a] rows[a] in float64, assignments listed straight from the map."""
    y = torch.zeros(num_tokens, rows.shape[1], dtype=torch.float64)
    for a, (_, t) in enumerate(routing.t().nonzero().tolist()):
        y[t] += weights[a] * rows[a]
    return y


CASES = {
    "num_tokens": st.integers(0, 60),
    "num_experts": st.integers(1, 11),
    "width": st.one_of(st.integers(1, 40), st.integers(250, 280)),
    "density": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    "skew": st.sampled_from([1.0, 0.5, 0.05]),
    "seed": st.integers(0, 10**6),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@examples(40)
@given(**CASES, spare=st.sampled_from([0, 3]))
def test_forward_and_gradients_err_by_their_roundings_at_most(
    engine, dtype, num_tokens, num_experts, width, density, skew, seed, spare
):
    generator = torch.Generator().manual_seed(seed)
    routing = random_map(generator, num_tokens, num_experts, density, skew)
    meta = build_permutation(routing)
    num = int(routing.sum())
    x = torch.randn(num_tokens, width, generator=generator).to(dtype).requires_grad_()
    rows = torch.randn(num + spare, width, generator=generator).to(dtype)
    rows[num:] = float("nan")  # must never be read
    rows.requires_grad_()
    weights = torch.rand(num, generator=generator).to(dtype).float().requires_grad_()
    factor = torch.rand(num, generator=generator) + 0.5
    g_rows = torch.randn(num + spare, width, generator=generator).to(dtype)
    g_y = torch.randn(num_tokens, width, generator=generator).to(dtype)
    token = meta.row_token

    with use_cpu_engine(engine):
        copies = permute(x, meta, num_rows=num + spare)
        y = unpermute(rows, weights, meta, num_tokens=num_tokens, gradient_factor=factor)
        (grad_x,) = torch.autograd.grad(copies, x, g_rows)
        grad_rows, grad_weights = torch.autograd.grad(y, (rows, weights), g_y)

    assert torch.equal(copies[:num], x[token]) and not copies[num:].any()
    assert copies.dtype == y.dtype == grad_x.dtype == grad_rows.dtype == dtype

    # The float32 products are rounded once and their sums over the assignments of a token once each.
    assignment = torch.zeros(num_tokens, num, dtype=torch.float64)
    assignment[token, torch.arange(num)] = 1.0
    wide, used = weights.detach().double()[:, None], rows.detach()[:num].double()
    g = g_y[token].double() * factor.double()[:, None]
    single = torch.float32

    def sums(terms):
        return stored(product(exact(assignment), elementwise(terms, single), single), dtype)

    assert_rounded(grad_x, sums(g_rows[:num].double()), "grad_x")
    assert_rounded(y, sums(used * wide), "y")
    assert_rounded(grad_rows[:num], stored(elementwise(g * wide, single), dtype), "grad_rows")
    assert_rounded(grad_weights, row_sums(elementwise(g * used, single), single, 1), "grad_weights")
    assert not grad_rows[num:].any()


@pytest.mark.parametrize("engine", ENGINES)
@examples(30)
@given(**CASES)
def test_float64_equals_reference(engine, num_tokens, num_experts, width, density, skew, seed):
    generator = torch.Generator().manual_seed(seed)
    routing = random_map(generator, num_tokens, num_experts, density, skew)
    meta = build_permutation(routing)
    for mine, reference in zip(meta, build_permutation_reference(routing), strict=True):
        assert torch.equal(mine, reference)
    num = int(routing.sum())
    rows = torch.randn(num, width, dtype=torch.float64, generator=generator)
    values = torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator)
    with use_cpu_engine(engine):
        weights = assignment_values(values, meta)
        y = unpermute(rows, weights, meta, num_tokens=num_tokens)
    assert torch.equal(weights, values.t()[routing.t()])
    torch.testing.assert_close(y, definition(routing, rows, weights, num_tokens), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(y, unpermute_reference(rows, weights, meta, num_tokens=num_tokens))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_by_finite_differences(engine):
    routing = random_map(torch.Generator().manual_seed(0), 7, 4, 0.6, 0.8)
    meta = build_permutation(routing)
    num = int(routing.sum())
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(num + 2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(num, dtype=torch.float64, requires_grad=True)
    values = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    with use_cpu_engine(engine):
        assert torch.autograd.gradcheck(lambda x: permute(x, meta, num_rows=num + 2), (x,))
        assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, meta, num_tokens=7), (rows, weights))
        assert torch.autograd.gradcheck(lambda v: assignment_values(v, meta), (values,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_and_two_threads_equal_one_thread_bitwise(dtype):
    """9000 x 256: results large enough to be stored past the caches, and split between threads in uneven runs."""
    generator = torch.Generator().manual_seed(0)
    routing = random_map(generator, 3000, 6, 1.0, 0.6)
    routing[::5] = False
    meta = build_permutation(routing)
    num = int(routing.sum())
    x = torch.randn(3000, 256, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(num, generator=generator).requires_grad_()
    g = torch.randn(3000, 256, generator=generator).to(dtype)

    def run():
        rows = permute(x, meta)
        y = unpermute(rows, weights, meta, num_tokens=3000)
        return rows, y, *torch.autograd.grad(y, (x, weights), g)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        together = run()
    finally:
        torch.set_num_threads(threads)
    with use_cpu_engine("portable"):
        plain = run()
    for a, b, c in zip(alone, together, plain, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=2 * torch.finfo(a.dtype).eps, atol=1e-3)
    assert torch.equal(alone[0], permute_reference(x, meta))


def test_half_precision_rounding_is_torch_s():
    """Every fp16 value through the kernels, and fp32 values at and beside the rounding boundaries, NaN and infinity."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype).view(-1, 1)
        meta = build_permutation(torch.ones(every.shape[0], 1, dtype=torch.bool))
        near = every.float()
        near = torch.cat([near, near * (1 + 2**-9), near * (1 - 2**-12), torch.nextafter(near, near * 2)])
        many = build_permutation(torch.ones(near.shape[0], 1, dtype=torch.bool))
        for engine in ENGINES:
            with use_cpu_engine(engine):
                widened = unpermute(every, torch.ones(1 << 16), meta, num_tokens=1 << 16, out_dtype=torch.float32)
                narrowed = unpermute(near, torch.ones(near.shape[0]), many, num_tokens=near.shape[0], out_dtype=dtype)
            # 0 + -0 is 0: compare values
            torch.testing.assert_close(widened, every.float(), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(narrowed, near.to(dtype), rtol=0, atol=0, equal_nan=True)


def example():
    meta = build_permutation(torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool))
    return meta, torch.randn(3, 4), torch.randn(5, 4), torch.rand(5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("row_token", lambda m: m._replace(row_token=m.row_token + 1)),
        ("row_token", lambda m: m._replace(row_token=m.row_token - 1)),
        ("row_token", lambda m: m._replace(row_token=m.row_token.int())),
        ("row_token", lambda m: m._replace(row_token=m.row_token.repeat(2)[::2])),
        ("token_offsets", lambda m: m._replace(token_offsets=m.token_offsets[:-1])),
        ("token_offsets", lambda m: m._replace(token_offsets=m.token_offsets.flip(0))),
        ("token_offsets", lambda m: m._replace(token_offsets=-m.token_offsets)),
        ("token_offsets", lambda m: m._replace(token_offsets=m.token_offsets * 2)),
        ("token_rows", lambda m: m._replace(token_rows=m.token_rows + 10**12)),
        ("token_rows", lambda m: m._replace(token_rows=m.token_rows[:-1])),
        ("token_rows", lambda m: m._replace(token_rows=m.token_rows.flip(0))),
        ("token_rows", lambda m: m._replace(token_rows=torch.zeros_like(m.token_rows))),
    ],
)
def test_wrong_metadata_is_named(name, change):
    meta, x, rows, weights = example()
    wrong = change(meta)
    with pytest.raises(ValueError, match=f"^{name}: "):
        permute(x, wrong)
    with pytest.raises(ValueError, match=f"^{name}: "):
        unpermute(rows, weights, Permutation(*wrong), num_tokens=3)


def test_wrong_tensors_are_named():
    meta, x, rows, weights = example()
    calls = {
        r"x: dtype Int": lambda: permute(x.int(), meta),
        r"x: has 3 dimensions": lambda: permute(x[None], meta),
        r"x: must be contiguous": lambda: permute(torch.randn(4, 3).t(), meta),
        r"num_rows: 4 output rows": lambda: permute(x, meta, num_rows=4),
        r"rows: has 4 rows for 5": lambda: unpermute(rows[:4], weights, meta, num_tokens=3),
        r"rows: must be contiguous": lambda: unpermute(rows[:, ::2], weights, meta, num_tokens=3),
        r"weights: has 4 entries": lambda: unpermute(rows, weights[:4], meta, num_tokens=3),
        r"gradient_factor: has 6": lambda: unpermute(rows, weights, meta, num_tokens=3, gradient_factor=torch.ones(6)),
        r"num_tokens: -1": lambda: unpermute(rows, weights, meta, num_tokens=-1),
        r"token_offsets: has 4 entries, must have 5": lambda: unpermute(rows, weights, meta, num_tokens=4),
        r"out_dtype: dtype Double": lambda: unpermute(rows, weights, meta, num_tokens=3, out_dtype=torch.float64),
        r"routing_map: dtype Float": lambda: build_permutation(x),
        r"routing_map: has 1 dim": lambda: build_permutation(x[0] > 0),
        r"num_assignments: 7 for a": lambda: build_permutation(torch.ones(3, 3, dtype=torch.bool), num_assignments=7),
        r"values: has 1 dim": lambda: assignment_values(weights, meta),
        r"row_token: has an entry": lambda: assignment_values(torch.ones(2, 3), meta),
        r"row_expert: has an entry": lambda: assignment_values(torch.ones(3, 2), meta),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_strided_maps_and_expanded_gradients():
    """The router hands in a slice of its columns; ``sum().backward()`` hands in a gradient of strides 0."""
    whole = random_map(torch.Generator().manual_seed(3), 40, 9, 0.5, 1.0)
    for part in (whole[:, :5], whole[::2], whole[:, 1::2], whole.t()):
        for a, b in zip(build_permutation(part), build_permutation_reference(part.contiguous()), strict=True):
            assert torch.equal(a, b)
    meta = build_permutation(whole[:, :5])
    x = torch.randn(40, 8, requires_grad=True)
    permute(x, meta).sum().backward()
    assert torch.equal(x.grad, whole[:, :5].sum(1, keepdim=True).float().expand(40, 8))
    values = torch.randn(40, 9, requires_grad=True)
    assignment_values(values[:, :5], meta).sum().backward()
    assert torch.equal(values.grad[:, :5], whole[:, :5].float()) and not values.grad[:, 5:].any()


@pytest.mark.parametrize("num_tokens", [7, 0])
def test_opcheck(num_tokens):
    ops = torch.ops.megatron_omni
    routing = random_map(torch.Generator().manual_seed(0), num_tokens, 4, 0.6, 0.8)
    meta = build_permutation(routing)
    num = meta.row_token.shape[0]
    csr = (meta.row_token, meta.token_offsets, meta.token_rows)
    x = torch.randn(num_tokens, 5, requires_grad=True)
    rows = torch.randn(num + 1, 5, requires_grad=True)
    weights = torch.rand(num, requires_grad=True)
    torch.library.opcheck(ops.build_permutation.default, (routing,))
    torch.library.opcheck(ops.permute.default, (x, *csr, num + 2))
    torch.library.opcheck(ops.unpermute.default, (rows, weights, *csr, num_tokens, None, torch.float32))
    torch.library.opcheck(ops.unpermute.default, (rows, None, *csr, num_tokens, None, torch.bfloat16))
    g = torch.randn(num_tokens, 5)
    detached = rows.detach(), weights.detach()
    torch.library.opcheck(ops.unpermute_backward.default, (g, *detached, None, *csr, True, True))
    torch.library.opcheck(ops.unpermute_backward.default, (g, *detached, None, *csr, False, True))
    values = torch.randn(num_tokens, 4, requires_grad=True)
    torch.library.opcheck(ops.gather_assignments.default, (values, meta.row_token, meta.row_expert))
    torch.library.opcheck(
        ops.scatter_assignments.default, (weights.detach(), meta.row_token, meta.row_expert, num_tokens, 4)
    )


def test_compiles_without_a_graph_break():
    """From the map on, the number of assignments unknown when compiling; another map then needs no new graph."""

    def layer(x, values, routing):
        meta = build_permutation(routing)
        rows = permute(x, meta) * 2
        return unpermute(rows, assignment_values(values, meta), meta, num_tokens=x.shape[0]).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        routing = random_map(torch.Generator().manual_seed(seed), 20, 4, 0.5, 0.9)
        x, values = torch.randn(20, 6, requires_grad=True), torch.randn(20, 4, requires_grad=True)
        expected = torch.autograd.grad(layer(x, values, routing).square().sum(), (x, values))
        got = torch.autograd.grad(compiled(x, values, routing).square().sum(), (x, values))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
