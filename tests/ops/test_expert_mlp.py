"""The experts' MLP as one op: definition row by row, every gradient, what it saves, spare rows, both CPU paths."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_omni.ops.expert_mlp import expert_mlp, expert_mlp_reference
from megatron_omni.ops.extension import use_cpu_engine
from tests.ops.ragged import ENGINES, counts, examples, offsets_of, sides
from tests.ops.rounding import (
    OPS,
    Rounded,
    accumulator,
    assert_rounded,
    elementwise,
    exact,
    product,
    row_sums,
    stored,
    transpose,
    unit,
)

NAMES = ("y", "dx", "dw1", "dw2", "drow_weight")


def leaves(rows_by_expert, hidden, width, dtype, spare=0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, std=1.0):
        return torch.randn(*size, generator=generator, dtype=torch.float64) * std

    rows, experts = sum(rows_by_expert), len(rows_by_expert)
    x, grad = normal(rows + spare, hidden), normal(rows + spare, hidden)
    row_weight = torch.rand(rows + spare, generator=generator, dtype=torch.float64)
    for tail in (x, grad, row_weight):
        tail[rows:] = float("nan")
    w1 = normal(experts, hidden, 2 * width, std=1.5 * hidden**-0.5)
    w2 = normal(experts, width, hidden, std=width**-0.5)
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.to(dtype), w1.to(dtype), w2.to(dtype), row_weight.to(weight_dtype)]
    return [value.requires_grad_() for value in inputs], grad.to(dtype)


def definition(x, w1, w2, row_weight, offsets, grad):
    """y and every gradient in float64, from the formulas of the docstring of ops/expert_mlp.py, expert by expert."""
    x, w1, w2, row_weight, grad = (value.detach().double() for value in (x, w1, w2, row_weight, grad))
    y, dx, ds = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(row_weight)
    dw1, dw2 = torch.zeros_like(w1), torch.zeros_like(w2)
    for e in range(w1.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        g, u = (x[rows] @ w1[e]).chunk(2, dim=1)
        s = row_weight[rows, None]
        r = 1 / (1 + torch.exp(-g))
        a = g * r * u
        y[rows] = (s * a) @ w2[e]
        d = grad[rows] @ w2[e].t()
        ds[rows] = (d * a).sum(1)
        dw2[e] = (s * a).t() @ grad[rows]
        dgu = torch.cat([s * d * u * r * (1 + g * (1 - r)), s * d * g * r], dim=1)
        dx[rows], dw1[e] = dgu @ w1[e].t(), x[rows].t() @ dgu
    return y, dx, dw1, dw2, ds


def rounded_definition(x, w1, w2, weight, dtype, grad):
    """y and every gradient of one expert as ``Rounded``: the roundings that the docstring of ops/expert_mlp.py allows.

    Sums and SwiGLU in fp32 (fp64); h, the activations s a and (dg | du) are rounded to the rows' dtype, and the backward
    pass starts from the rounded h.
    """
    wide = accumulator(dtype)
    x, w1, w2, grad = (exact(value) for value in (x, w1, w2, grad))
    s = weight.detach().double()[:, None]
    h = product(x, w1, wide)

    def parts(h):
        g, u = h.value.chunk(2, dim=1)
        return g, u, 1 / (1 + torch.exp(-g)), *h.error.chunk(2, dim=1)

    def activation(h, s):  # s silu(g) u
        g, u, r, e_g, e_u = parts(h)
        return elementwise(s * g * r * u, wide, s * r * (1 + g * (1 - r)) * u * e_g, s * g * r * e_u)

    y = stored(product(stored(activation(h, s), dtype), w2, wide), dtype)
    kept = stored(h, dtype)
    g, u, r, e_g, e_u = parts(kept)
    slope, bend = r * (1 + g * (1 - r)), r * (1 - r) * (2 + g * (1 - 2 * r))  # first and second derivative of silu
    d = product(grad, transpose(w2), wide)
    act = activation(kept, torch.ones_like(s))
    ds = row_sums(elementwise(d.value * act.value, wide, act.value * d.error, d.value * act.error), wide, 1)
    # Of the exponential 1 + g (1 - r) takes its rounding in parts that may cancel: their sizes, not their sum.
    sizes = s * d.value * u * r * (1 + g.abs())
    dg = elementwise(s * d.value * u * slope, wide, s * u * slope * d.error, s * d.value * slope * e_u,
                     s * d.value * u * bend * e_g, OPS * unit(wide) * sizes)  # fmt: skip
    du = elementwise(s * d.value * g * r, wide, s * g * r * d.error, s * d.value * slope * e_g)
    dh = stored(Rounded(torch.cat([dg.value, du.value], 1), torch.cat([dg.error, du.error], 1)), dtype)
    dx = stored(product(dh, transpose(w1), wide), dtype)
    dw1 = stored(product(transpose(x), dh, wide), dtype)
    dw2 = stored(product(transpose(stored(activation(kept, s), dtype)), grad, wide), dtype)
    return y, dx, dw1, dw2, ds


def check_against_float64(rows, hidden, width, spare, dtype, engine, seed, weighted=True):
    offsets, used = offsets_of(rows), sum(rows)
    inputs, grad = leaves(rows, hidden, width, dtype, spare, seed)
    if not weighted:
        inputs[3] = torch.ones_like(inputs[3])
    wanted = inputs if weighted else inputs[:3]
    x, w1, w2, row_weight = inputs
    with use_cpu_engine(engine):
        y = expert_mlp(x, w1, w2, offsets, row_weight=row_weight if weighted else None)
        got = [y.detach(), *torch.autograd.grad(y, wanted, grad)]
    for name, one in zip(NAMES, got, strict=False):
        assert one.dtype == (accumulator(dtype) if name == "drow_weight" else dtype)
        assert name in ("dw1", "dw2") or not one[used:].any(), name
    for e, count in enumerate(rows):
        mine = slice(int(offsets[e]), int(offsets[e + 1]))
        right = rounded_definition(x[mine], w1[e], w2[e], row_weight[mine], dtype, grad[mine])
        for name, one, value in zip(NAMES, got, right, strict=False):
            assert_rounded(one[e] if name in ("dw1", "dw2") else one[mine], value, f"{name} of expert {e}")
        assert count or not (got[2][e].any() or got[3][e].any())


@examples(60)
@given(
    rows=counts,
    hidden=sides,
    width=sides,
    spare=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    engine=st.sampled_from(ENGINES),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
@example(rows=[7], hidden=2, width=1, spare=2, dtype=torch.bfloat16, engine=ENGINES[0], seed=14, weighted=True)
@example(rows=[4], hidden=129, width=2, spare=0, dtype=torch.bfloat16, engine=ENGINES[0], seed=10, weighted=True)
def test_errs_by_its_roundings_at_most(rows, hidden, width, spare, dtype, engine, seed, weighted):
    check_against_float64(rows, hidden, width, spare, dtype, engine, seed, weighted)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, hidden, width", [((450, 3), 130, 300), ((9, 0, 30), 1700, 256), ((1600,), 70, 600)])
def test_shapes_of_several_blocks(rows, hidden, width, dtype, engine):
    """More rows, columns and contraction than one block of the kernels holds; expert widths in one and in many pieces."""
    check_against_float64(rows, hidden, width, 1, dtype, engine, 0)


def test_the_reference_is_the_definition():
    rows, offsets = (3, 0, 9), offsets_of((3, 0, 9))
    inputs, grad = leaves(rows, 7, 5, torch.float64)
    y = expert_mlp_reference(*inputs[:3], offsets, row_weight=inputs[3])
    got = y, *torch.autograd.grad(y, inputs, grad)
    for name, one, right in zip(NAMES, got, definition(*inputs, offsets, grad), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("rows", [(3, 0, 2), (0, 0, 0)])
def test_gradients_by_finite_differences(rows):
    inputs, _ = leaves(rows, 5, 4, torch.float64)
    offsets = offsets_of(rows)

    def run(x, w1, w2, row_weight):
        return expert_mlp(x, w1, w2, offsets, row_weight=row_weight)

    y = run(*inputs)
    if sum(rows):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradcheck(lambda x, w1, w2: expert_mlp(x, w1, w2, offsets), inputs[:3])
    y.sum().backward()  # an expanded gradient
    for e, count in enumerate(rows):
        assert bool(inputs[1].grad[e].any()) == bool(inputs[2].grad[e].any()) == (count > 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gate", [-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4])
def test_extreme_gates(gate, engine):
    """silu and its slope at their limits: no overflow, no NaN."""
    x, w1, w2 = torch.ones(1, 1), torch.tensor([[[gate, 3.0]]]), torch.tensor([[[2.0]]])
    leaves = [value.requires_grad_() for value in (x, w1, w2)]
    with use_cpu_engine(engine):
        y = expert_mlp(*leaves, offsets_of((1,)))
        got = [y.detach(), *torch.autograd.grad(y.sum(), leaves)]
    exact = definition(*leaves, torch.ones(1), offsets_of((1,)), torch.ones(1, 1))
    for one, truth in zip(got, exact, strict=False):
        torch.testing.assert_close(one, truth.float(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_gradients_added_to_buffers(dtype, engine):
    """Two backward passes into the same buffers; all other gradients have the same bits as without."""
    rows, offsets = (37, 0, 5), offsets_of((37, 0, 5))
    wide = torch.promote_types(dtype, torch.float32)
    inputs, grad = leaves(rows, 67, 50, dtype, spare=2)
    x, w1, w2, row_weight = inputs
    before = [torch.randn(w.shape, dtype=wide, generator=torch.Generator().manual_seed(1)) for w in (w1, w2)]
    buffers = [value.clone() for value in before]
    with use_cpu_engine(engine):
        plain = torch.autograd.grad(expert_mlp(x, w1, w2, offsets, row_weight=row_weight), inputs, grad)
        for _ in range(2):
            y = expert_mlp(x, w1, w2, offsets, row_weight=row_weight, main_grads=(buffers[0], buffers[1]))
            into = torch.autograd.grad(y, inputs, grad)
    exact = definition(*(value[:42] if value.dim() < 3 else value for value in inputs), offsets, grad[:42])
    assert torch.equal(into[0], plain[0]) and torch.equal(into[3], plain[3])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5  # h and d h are rounded to the rows' dtype
    for buffer, start, value in zip(buffers, before, exact[2:4], strict=True):
        assert torch.equal(buffer[1], start[1])  # no row of expert 1: untouched
        added = buffer.double() - start.double()
        assert (added - 2 * value).norm() <= tolerance * value.norm()


def test_bad_buffers_are_named():
    inputs, _ = leaves((2, 3), 4, 3, torch.bfloat16)
    shapes = [w.shape for w in inputs[1:3]]
    good = [torch.zeros(shape) for shape in shapes]
    for message, buffers in {
        "main_grad2: missing": (good[0], None),
        "main_grad1: dtype": (good[0].bfloat16(), good[1]),
        "main_grad1: has shape": (good[1], good[1]),
        "main_grad2: must be contiguous": (good[0], torch.zeros(2, 4, 3).transpose(1, 2)),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            expert_mlp(*inputs[:3], offsets_of((2, 3)), main_grads=buffers)


def test_saves_only_rows_and_pre_activations():
    rows = (6, 5)
    inputs, _ = leaves(rows, 8, 12, torch.float32)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: packed.append(value) or value, lambda value: value):
        expert_mlp(*inputs[:3], offsets_of(rows), row_weight=inputs[3])
    known = {value.data_ptr() for value in inputs}
    kept = [value for value in packed if value.data_ptr() not in known and value.is_floating_point()]
    assert [tuple(value.shape) for value in kept] == [(11, 24)]


def test_same_bits_on_any_number_of_threads():
    rows = (300, 0, 17, 95)
    inputs, grad = leaves(rows, 96, 300, torch.float32)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = expert_mlp(*inputs[:3], offsets_of(rows), row_weight=inputs[3])
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    torch.set_num_threads(before)
    for name, one, other in zip(NAMES, *results, strict=True):
        if name == "drow_weight":  # its partial sums follow the blocks of columns, which follow the threads
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # terms of 10 cancel
        else:
            assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(dtype):
    rows, offsets = (5, 0, 9), offsets_of((5, 0, 9))
    inputs, grad = leaves(rows, 16, 24, dtype)
    x, w1, w2, row_weight = inputs
    ops = torch.ops.megatron_omni
    torch.library.opcheck(ops.expert_mlp.default, (x, w1, w2, offsets, row_weight))
    torch.library.opcheck(ops.expert_mlp.default, (x, w1, w2, offsets, None))
    plain = [value.detach() for value in inputs]
    h = ops.expert_mlp(*plain[:3], offsets, plain[3])[1]
    args = (grad, plain[0], h, plain[1], plain[2], offsets, plain[3], True, True, False, True)
    torch.library.opcheck(ops.expert_mlp_backward.default, args)
    buffers = [torch.zeros(value.shape) for value in (w1, w2)]
    # not the checks that compare gradients: those of w1 and w2 are uninitialised memory then
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.expert_mlp.default, (x, w1, w2, offsets, None, *buffers), test_utils=utilities)
    torch.library.opcheck(ops.expert_mlp_backward.default, (*args[:9], True, True, *buffers))

    def run(x, w1, w2, row_weight):
        return expert_mlp(x, w1, w2, offsets, row_weight=row_weight)

    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        expected, got = (torch.autograd.grad(f(*inputs), inputs, grad) for f in (run, compiled))
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


def good():
    return {
        "x": torch.zeros(5, 4),
        "w1": torch.zeros(2, 4, 6),
        "w2": torch.zeros(2, 3, 4),
        "offsets": offsets_of((2, 3)),
        "row_weight": torch.ones(5),
    }


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(5, 4, dtype=torch.int64), "x: dtype"),
        ("x", torch.zeros(5, 3), "w1: side 1 is 4, x has 3 columns"),
        ("w1", torch.zeros(2, 4, 7), "w2: must be"),
        ("w1", torch.zeros(2, 6, 4).transpose(1, 2), "w1: must be contiguous"),
        ("w2", torch.zeros(2, 4, 3), "w2: must be"),
        ("w2", torch.zeros(2, 3, 4, dtype=torch.float64), "w2: dtype"),
        ("w2", torch.zeros(2, 4, 3).transpose(1, 2), "w2: must be contiguous"),
        ("offsets", torch.tensor([0, 4, 3]), "offsets: must ascend"),
        ("offsets", torch.tensor([0, 4, 9]), "offsets: ends at 9, past 5"),
        ("row_weight", torch.ones(4), "row_weight: has 4 entries, must have 5"),
        ("row_weight", torch.ones(5, dtype=torch.float64), "row_weight: dtype"),
        ("row_weight", torch.ones(5, 1), "row_weight: must be a contiguous vector"),
    ],
)
def test_bad_input_names_the_argument(name, value, message):
    arguments = good() | {name: value}
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments)
